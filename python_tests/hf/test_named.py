"""Several adapters in one model by name: each is what it would be alone, and the base is never changed."""

import copy

import pytest
import torch
from hf.kinds import made, t5
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import batch, gpt2, llama

from align_ext import (
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    disable_adapter,
    join_adapters,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_adapter,
    set_task,
    unload,
)

FIRST = {"architecture": "align_lora", "r": 4, "lora_dropout": 0.0, "num_tasks": 3}
OF_T5 = FIRST | {"target_modules": "all-linear"}
SECOND = {
    "lora": {"architecture": "lora", "r": 2, "target_modules": "all-linear"},
    "m_lora": {"architecture": "m_lora", "r": 2, "num_heads": 2},
    "hydra": {"architecture": "hydra", "num_heads": 2, "target_modules": ("q_proj", "v_proj")},
    "mtlora": {"architecture": "mtlora", "num_heads": 2},
    "head": {"architecture": "lora", "modules_to_save": ("norm",)},
}


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=batch()[0]["input_ids"], **more).logits


def changed(model, seed):
    """The same model, what it trains moved off its first values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def alone(options, seed, model=None):
    model = (model or llama()).double()
    torch.manual_seed(seed)
    return changed(replace_linear_with_align_lora(model, **options), seed).eval()


def both(kind):
    """A model with two adapters, of which the first is active."""
    model = alone(FIRST, 1)
    torch.manual_seed(2)
    add_adapter(model, "second", **SECOND[kind])
    set_adapter(model, "second")
    changed(model, 2)
    set_adapter(model, "default")
    return model


def step(model):
    """Loss and gradients of one training step."""
    torch.manual_seed(3)
    inputs, ids = batch()
    model.train().zero_grad()
    loss = model(**inputs, task_ids=ids).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.eval()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("kind", SECOND)
def test_each_adapter_computes_and_trains_as_if_it_were_alone(kind):
    model = both(kind)
    for name, expected in (("default", alone(FIRST, 1)), ("second", alone(SECOND[kind], 2)), ("default", None)):
        expected = expected or alone(FIRST, 1)
        set_adapter(model, name)
        assert adapter_names(model)[0] == name
        assert sorted(adapter_names(model)) == ["default", "second"]
        assert torch.equal(logits(model), logits(expected))
        for one, other in zip(step(model), step(expected), strict=True):
            assert torch.equal(one, other)
        with disable_adapter(model):
            assert torch.equal(logits(model), logits(llama().double()))
    assert model.state_dict().keys() == alone(FIRST, 1).state_dict().keys()


@pytest.mark.parametrize("kind", SECOND)
def test_each_is_saved_alone_and_comes_back_by_name(kind, tmp_path):
    model = both(kind)
    for name in ("default", "second"):
        set_adapter(model, name)
        save_adapter(model, tmp_path / name)
    fresh = load_adapter(llama().double(), tmp_path / "default", "one").eval()
    load_adapter(fresh, tmp_path / "second", "two")
    assert adapter_names(fresh) == ["one", "two"]
    for name, source in (("two", "second"), ("one", "default")):
        set_adapter(fresh, name)
        set_adapter(model, source)
        assert torch.equal(logits(fresh), logits(model))
    load_adapter(fresh, tmp_path / "second", "two")  # into one that is there
    set_adapter(fresh, "two")
    set_adapter(model, "second")
    assert torch.equal(logits(fresh), logits(model))


def test_merging_and_unloading_are_about_the_active_one():
    model = both("lora")
    set_adapter(model, "second")
    expected = logits(model)
    merged = merge_and_unload(copy.deepcopy(model))
    assert (logits(merged) - expected).abs().max() < 1e-12
    assert torch.equal(logits(unload(model)), logits(llama().double()))
    assert not hasattr(model, "align_state")


def test_a_copy_has_all_adapters_of_its_own():
    model = both("m_lora")
    other = copy.deepcopy(model)
    before = logits(model)
    set_adapter(other, "second")
    changed(other, 5)
    assert adapter_names(model) == ["default", "second"]
    assert torch.equal(logits(model), before)
    set_adapter(model, "second")
    assert torch.equal(logits(model), logits(alone(SECOND["m_lora"], 2)))


def test_an_adapter_goes_where_the_model_went():
    model = both("lora").to("meta")
    set_adapter(model, "second")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_compiled_model_follows():
    model = both("lora")
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "second", "default"):
        set_adapter(model, name)
        assert torch.equal(logits(compiled), logits(model))


def test_other_values_come_in_place_without_a_new_compilation(tmp_path):
    """A hotswap: the folder of another training run with the same options."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {"architecture": "lora", "r": 2}
    other = alone(options, 2)
    save_adapter(other, tmp_path / "other")
    model = alone(options, 1)
    compiled = torch.compile(model, backend=backend)
    logits(compiled)
    count = len(graphs)
    load_adapter(model, tmp_path / "other")
    assert torch.equal(logits(compiled), logits(other))
    assert len(graphs) == count > 0


def test_an_encoder_decoder_s_layers_keep_seeing_their_tokens():
    def aligned(seed):
        torch.manual_seed(seed)
        return changed(replace_linear_with_align_lora(made("T5ForConditionalGeneration", t5()), **OF_T5), seed)

    def loss(model):
        ids = torch.arange(1, 13).view(3, 4)
        return model.train()(
            input_ids=ids, labels=ids.flip(1)[:, :3].contiguous(), task_ids=torch.tensor([0, 1, 2])
        ).loss

    model = aligned(1)
    add_adapter(model, "second", **OF_T5)
    loss(model)
    set_adapter(model, "second")
    loss(model)
    set_adapter(model, "default")
    assert torch.equal(loss(model), loss(aligned(1)))


def test_sums_are_peft_s(tmp_path):
    """ "cat" and "svd" beside PEFT's own, of the same folders."""
    options = {"architecture": "lora", "r": 3, "lora_alpha": 6, "target_modules": ("up_proj", "q_proj")}
    model = alone(options, 1).float()
    save_adapter(model, tmp_path / "default")
    add_adapter(model, "second", options)
    set_adapter(model, "second")
    save_adapter(changed(model, 2), tmp_path / "second")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "default", adapter_name="default").eval()
    theirs.load_adapter(tmp_path / "second", "second")
    for kind in ("cat", "svd"):
        theirs.add_weighted_adapter(["default", "second"], [0.7, 0.4], kind, combination_type=kind)
        theirs.eval().set_adapter(kind)  # which trains its new dropout
        add_weighted_adapter(model, ["default", "second"], [0.7, 0.4], kind, combination_type=kind)
        set_adapter(model, kind)
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    add_weighted_adapter(model, ["default", "second"], [0.7, 0.4], "ties", combination_type="ties_svd", svd_rank=2)
    set_adapter(model, "ties")
    assert model.model.layers[0].mlp.up_proj.adapter.r == 2
    set_adapter(model, "cat")
    save_adapter(model, tmp_path / "cat")
    again = load_adapter(llama(), tmp_path / "cat").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_one_batch_mixes_adapters_by_task(tmp_path):
    model = alone({"architecture": "lora", "r": 3}, 1)
    add_adapter(model, "second", architecture="m_lora", r=2, num_heads=2)
    set_adapter(model, "second")
    changed(model, 2)
    expected = {}
    for name in ("default", "second"):
        set_adapter(model, name)
        expected[name] = logits(model)
    join_adapters(model, ["default", "second"], "mixed")
    set_adapter(model, "mixed")
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    found = logits(model, task_ids=ids)
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(found[row], expected[["default", "second"][task]][row], rtol=1e-6, atol=1e-6)
    set_task(model, 1)
    torch.testing.assert_close(logits(model), expected["second"], rtol=1e-6, atol=1e-6)
    save_adapter(model, tmp_path / "mixed", ["maths", "code"])
    assert (tmp_path / "mixed/tasks/maths/adapter_model.safetensors").exists()


def test_what_cannot_be_is_one_sentence_and_changes_nothing():
    model = both("hydra")
    before = logits(model)
    for call, message in (
        (lambda: set_adapter(model, "secnd"), "unknown adapter_name 'secnd'; did you mean 'second'"),
        (lambda: set_adapter(model, ["default", "second"]), "adapter_name must be one name"),
        (lambda: add_adapter(model, "second", r=2), "has an adapter 'second' already: delete_adapter it"),
        (lambda: add_adapter(model, "third", r=-1), "r must be"),
        (lambda: add_adapter(model, "", r=2), "is no name"),
        (lambda: add_adapter(model, "third", target_modules=("nothing",)), "no layer was adapted"),
        (lambda: delete_adapter(model, "default"), "'default' is active"),
        (lambda: delete_adapter(model, "third"), r"unknown adapter_name 'third' \(known: default, second\)"),
        (lambda: add_weighted_adapter(model, ["default", "second"], [1, 1], "sum"), "adapter 'second': only plain"),
        (lambda: add_weighted_adapter(model, ["default"], [1], "sum", "linear"), "unknown combination_type 'linear'"),
        (lambda: add_weighted_adapter(model, ["default"], [1, 2], "sum"), "weights"),
        (lambda: join_adapters(model, ["default", "third"], "sum"), "unknown adapter 'third'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert adapter_names(model) == ["default", "second"]
        assert torch.equal(logits(model), before)
    next(layer for layer in model.modules() if hasattr(layer, "merged")).merge()
    with pytest.raises(ValueError, match="is merged into its weight"):
        set_adapter(model, "second")
    other = both("hydra")
    with disable_adapter(other), pytest.raises(ValueError, match="is disabled, or a step of it is open"):
        set_adapter(other, "second")
    other.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="its value in the base model is not kept"):
        set_adapter(other, "second")
    delete_adapter(model, "second")
    assert adapter_names(model) == ["default"]
    peft = get_peft_model(gpt2(), LoraConfig(r=2))
    adopted = replace_linear_with_align_lora(peft, architecture="lora")
    with pytest.raises(ValueError, match="an adopted PeftModel has its one adapter"):
        add_adapter(adopted, "second", r=2)
