"""A Trainer's folders where its processes hold parts of the parameters: the whole adapter, to the bit, or none."""

import torch
from hf import sharded_trainers as runs
from hf.folders import plain
from processes import spawn
from safetensors.torch import load_file

from align_ext import load_adapter


def assert_whole(folder, base="llama"):
    """One process loads the folder and has what was trained."""
    expected = load_file(folder / "expected")
    loaded = load_adapter(plain(base), folder)
    found = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), (folder, name)


def test_by_fsdp2_checkpoints_are_whole_and_a_run_goes_on_from_them_to_the_bit(tmp_path, unused_port):
    spawn(runs.by_fsdp, unused_port, str(tmp_path))
    for name in runs.FSDP:
        for folder in ("checkpoint-1", "checkpoint-2", "final"):
            assert_whole(tmp_path / name / folder)


def test_by_deepspeed_checkpoints_are_whole_or_nothing_is_lost(tmp_path, unused_port):
    spawn(runs.by_deepspeed, unused_port, str(tmp_path))
    for name in runs.DEEPSPEED:
        for folder in ("checkpoint-1", "checkpoint-2", "final"):
            assert_whole(tmp_path / name / folder)
    assert_whole(tmp_path / "not gathered" / "final")
    for folder in ("checkpoint-1", "checkpoint-2"):
        assert_whole(tmp_path / "loaded in parts" / folder, "gpt2")
