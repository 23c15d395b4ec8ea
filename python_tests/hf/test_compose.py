"""Composed adapters: hand-computed cases, folders that stock PEFT reads, and mistakes named."""

import json

import pytest
import torch
from hf.test_export import logits
from hf.test_replace import gpt2
from safetensors.torch import load_file, save_file
from tiny import VOCAB, adapted, batch, llama

from align_ext import load_adapter, save_adapter
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.merging.arithmetic import (
    DenseDelta,
    LoraWeights,
    combined,
    merge_delta,
    read_lora,
    task_arithmetic,
    ties,
    truncated,
    write_lora,
)
from align_ext.merging.lorahub import Search, lorahub


def lora(A, B, base="base"):
    return LoraWeights({"layer": (torch.tensor(A), torch.tensor(B))}, {"base_model_name_or_path": base})


FIRST, SECOND = lora([[1.0, 2.0]], [[1.0], [0.0]]), lora([[0.0, 1.0]], [[2.0], [-1.0]])


@pytest.fixture
def folders(tmp_path):
    """Two adapters of the tiny Llama, of different scalings and values."""
    made = []
    for i, alpha in enumerate((32, 8)):
        model = adapted(llama(), torch.float32, lora_alpha=alpha, architecture="lora")
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                layer.adapter.lora_A.copy_(0.1 * torch.randn(layer.adapter.lora_A.shape, generator=generator))
                layer.adapter.lora_B.copy_(0.1 * torch.randn(layer.adapter.lora_B.shape, generator=generator))
        save_adapter(model, tmp_path / str(i))
        made.append(tmp_path / str(i))
    return made


def test_lorahub_combines_a_and_b_each_by_itself_hand_computed():
    A, B = combined([FIRST, SECOND], [1.0, -1.0]).layers["layer"]
    assert A.tolist() == [[1, 1]]
    assert B.tolist() == [[-1], [1]]


def test_task_arithmetic_adds_the_changes_hand_computed():
    result = task_arithmetic([FIRST, SECOND], [1.0, 0.5])
    # [[1 2], [0 0]] + 0.5 [[0 2], [0 -1]]
    assert result.deltas()["layer"].tolist() == [[1, 3], [0, -0.5]]
    assert result.layers["layer"][0].shape == (2, 2)


def test_ties_trims_elects_and_takes_the_mean_of_those_who_agree_hand_computed():
    first = lora([[1.0, 0.0], [0.0, 1.0]], [[4.0, -3.0], [1.0, 2.0]])  # the change is B
    second = lora([[1.0, 0.0], [0.0, 1.0]], [[2.0, 5.0], [0.5, 4.0]])
    # the two largest of each: [4 -3; 0 0] and [0 5; 0 4]; signs of the sum [+ +; 0 +]
    assert ties([first, second], density=0.5).layers["layer"].tolist() == [[4, 5], [0, 4]]
    # nothing trimmed: means of those who agree
    assert ties([first, second], density=1.0, weight=2.0).layers["layer"].tolist() == [[6, 10], [1.5, 6]]


def test_ties_trims_over_all_layers_of_an_adapter_together():
    one = torch.eye(1)
    layers = {name: (one, value * one) for name, value in (("a", 3.0), ("b", -2.0), ("c", 1.0), ("d", 0.5))}
    kept = ties([LoraWeights(layers, {})], density=0.5).layers
    assert {name: float(delta) for name, delta in kept.items()} == {"a": 3, "b": -2, "c": 0, "d": 0}


@pytest.mark.parametrize("dense", [False, True])
def test_truncation_is_the_nearest_of_its_rank_and_says_how_near(dense):
    # singular values 3, 2, 1 on the diagonal
    product = LoraWeights({"layer": (torch.eye(3, 4), torch.diag(torch.tensor([2.0, 3.0, 1.0])))}, {})
    delta = DenseDelta(product.deltas(), {}) if dense else product
    small, errors = truncated(delta, 2)
    A, B = small.layers["layer"]
    assert A.shape == (2, 4)
    assert B.shape == (3, 2)
    torch.testing.assert_close(B @ A, torch.diag(torch.tensor([2.0, 3.0, 0.0])) @ torch.eye(3, 4))
    assert errors["layer"] == pytest.approx((1 / 14) ** 0.5)
    whole, errors = truncated(delta, 3)
    torch.testing.assert_close(whole.deltas(), product.deltas())
    assert errors["layer"] < 1e-6


def test_truncation_to_more_than_there_is_pads_with_zeros():
    big, errors = truncated(FIRST, 2)
    assert big.layers["layer"][0].shape == (2, 2)
    torch.testing.assert_close(big.deltas(), FIRST.deltas())
    assert errors["layer"] < 1e-6


def test_a_folder_is_read_with_its_scaling_in_b(folders):
    read = read_lora(folders[0])
    model = load_adapter(llama(), folders[0])
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(read.deltas()[name], layer.delta_weight())


def test_a_peft_folder_with_patterns_is_read_with_the_scaling_of_each_layer(tmp_path):
    from peft import LoraConfig, get_peft_model

    options = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 10}, "use_rslora": True}
    peft = get_peft_model(llama(), LoraConfig(r=4, target_modules=["up_proj", "down_proj"], **options))
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    peft.save_pretrained(tmp_path)
    read = read_lora(tmp_path)
    for name, delta in read.deltas().items():
        layer = peft.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(delta, layer.get_delta_weight("default"))


COMPOSED = {
    "lorahub": lambda two: combined(two, [0.7, -0.4]),
    "sum": lambda two: task_arithmetic(two, [1.0, 0.5]),
    "sum of rank 3": lambda two: truncated(task_arithmetic(two, [1.0, 0.5]), 3)[0],
    "ties": lambda two: truncated(ties(two, 0.3), 4)[0],
    "mixed ranks": lambda two: LoraWeights(
        {name: (A[: 1 + i % 3], B[:, : 1 + i % 3]) for i, (name, (A, B)) in enumerate(two[0].layers.items())},
        two[0].config,
    ),
}


@pytest.mark.parametrize("how", COMPOSED)
def test_stock_peft_we_and_the_merged_model_read_a_composed_folder_alike(how, folders, tmp_path):
    from peft import PeftModel

    composed = COMPOSED[how]([read_lora(folder) for folder in folders])
    write_lora(composed, tmp_path / "out")
    ours = logits(load_adapter(llama(), tmp_path / "out"))
    assert (ours - logits(llama())).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), ours)
    torch.testing.assert_close(logits(merge_delta(llama(), composed)), ours, rtol=1e-4, atol=1e-5)


def test_one_adapter_with_weight_one_is_itself(folders):
    expected = logits(load_adapter(llama(), folders[0]))
    one = [read_lora(folders[0])]
    for composed in (combined(one, [1.0]), task_arithmetic(one, [1.0]), ties(one, density=1.0)):
        torch.testing.assert_close(logits(merge_delta(llama(), composed)), expected, rtol=1e-4, atol=1e-5)


def test_weights_stored_in_out_get_their_change_too(tmp_path):
    options = {"target_modules": ["c_fc"], "architecture": "lora"}
    save_adapter(adapted(gpt2(), torch.float32, **options), tmp_path / "a")
    ours = logits(load_adapter(gpt2(), tmp_path / "a"))
    dense = DenseDelta(read_lora(tmp_path / "a").deltas(), {})
    torch.testing.assert_close(logits(merge_delta(gpt2(), dense)), ours, rtol=1e-4, atol=1e-5)
    write_lora(read_lora(tmp_path / "a"), tmp_path / "b")
    from peft import PeftModel

    torch.testing.assert_close(logits(PeftModel.from_pretrained(gpt2(), tmp_path / "b")), ours)


def task(model, seed):
    """A batch whose labels are what the model itself says: its own loss is the least."""
    ids = torch.randint(1, VOCAB, (4, 10), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = model.eval()(input_ids=ids).logits.argmax(-1)
    return {"input_ids": ids, "labels": torch.cat([ids[:, :1], labels[:, :-1]], 1)}


def test_lorahub_finds_the_adapter_that_solves_the_task(folders):
    two = [read_lora(folder) for folder in folders]
    strong = [combined([adapter], [2.0]) for adapter in two]  # so that an adapter matters to the random model
    solver = merge_delta(llama(), strong[1])
    base = llama().train()
    examples = [task(solver, seed) for seed in range(2)]
    found = lorahub(base, strong, examples, Search(steps=30, seed=3))
    assert abs(found.weights[1]) > 0.5 > abs(found.weights[0])
    model = merge_delta(llama(), found.adapter)
    new = task(solver, 9)
    with torch.no_grad():
        assert model(**new).loss < base(**new).loss
    with torch.no_grad():
        loss = sum(float(model(**rows).loss) for rows in examples) / 2
    assert found.objective == pytest.approx(loss + 0.05 * sum(map(abs, found.weights)), rel=1e-5)
    again = lorahub(base, strong, examples, Search(steps=30, seed=3))
    assert again.weights == found.weights
    assert base.training
    assert not hasattr(base, "align_state")


def test_lorahubs_weights_stay_within_their_bound(folders):
    two = [read_lora(folder) for folder in folders]
    found = lorahub(llama(), two, [batch()[0]], Search(steps=3, bound=0.5))
    assert max(map(abs, found.weights)) <= 0.5


def other(name="other", sizes=(1, 2, 2)):
    r, n, m = sizes
    return LoraWeights({name: (torch.ones(r, n), torch.ones(m, r))}, {"base_model_name_or_path": "base"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ties([]), "adapters is empty"),
        (lambda: combined([FIRST, SECOND], [1.0]), r"weights \[1.0\] are 1, but there are 2 adapters"),
        (lambda: combined([FIRST, lora([[1.0, 2.0]], [[1.0], [0.0]], "x")], [1, 1]), "different bases: 'base' and 'x'"),
        (lambda: task_arithmetic([FIRST, other()], [1, 1]), "do not adapt the same layers: layer is in one"),
        (lambda: ties([FIRST, other("layer", (1, 3, 2))]), "different bases: layer has other sizes"),
        (lambda: combined([FIRST, other("layer", (2, 2, 2))], [1, 1]), "ranks 1 and 2 at layer.*task_arithmetic"),
        (lambda: ties([FIRST], density=0.0), r"density must be in \(0, 1\], got 0.0"),
        (lambda: truncated(FIRST, 0), "rank must be a positive integer, got 0"),
        (lambda: merge_delta(llama(), FIRST), "no layer 'layer'"),
        (lambda: merge_delta(llama(), other("lm_head", (1, 3, 2))), "change of lm_head is"),
        (lambda: lorahub(llama(), [FIRST], []), "examples is empty"),
        (lambda: lorahub(llama(), [FIRST], [batch()[0]]), "no layer 'layer'"),
        (lambda: lorahub(adapted(), [FIRST], [batch()[0]]), "has adapters already"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_adapters_of_mixed_ranks_add_up(folders):
    two = [read_lora(folders[0]), truncated(read_lora(folders[1]), 2)[0]]
    total = task_arithmetic(two, [1.0, 1.0])
    name = next(iter(total.layers))
    assert len(total.layers[name][0]) == 6
    torch.testing.assert_close(total.deltas()[name], two[0].deltas()[name] + two[1].deltas()[name])


def test_a_folder_of_another_kind_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="is no adapter folder"):
        read_lora(tmp_path / "absent")
    file = folders[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({**tensors, key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"use_dora=False, but adapter_model.* holds lora_magnitude"):
        read_lora(folders[0])
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match="1 keys are missing"):
        read_lora(folders[0])
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        read_lora(folders[0])


def test_a_composed_folder_keeps_what_it_is_for(folders, tmp_path):
    write_lora(read_lora(folders[1]), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == 4
    ours = json.loads((tmp_path / "out/align_lora_config.json").read_text())
    assert ours["architecture"] == "lora"
