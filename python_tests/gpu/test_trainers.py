"""A step of a tiny Llama with bf16=True by both trainers: as near to float64 as a literal model's in autocast."""

import torch
from hf.trainers import Gradients


def check(build, folder, device):
    from hf.test_precision import error, literal_gradients

    kept = Gradients()
    build(folder, kept, use_cpu=device.type == "cpu").train()
    exact, found = literal_gradients(None), {name: g.cpu().double() for name, g in kept.steps[0].items()}
    plain = error(literal_gradients(torch.bfloat16), exact)
    print(f"figure: error {error(found, exact):.1e}, a literal model's {plain:.1e}")
    assert error(found, exact) <= 2 * plain


def test_trainer(tmp_path, device):
    from hf.test_precision import by_trainer

    check(by_trainer, tmp_path, device)


def test_sft_trainer(tmp_path, device):
    from hf.test_precision import by_sft

    check(by_sft, tmp_path, device)
