"""`with disable_adapter(model)`: the model is its base inside, to the bit, and after it what it was."""

from contextlib import suppress

import pytest
import torch
from hf.test_beside import KINDS, tied
from peft import LoraConfig, get_peft_model
from tiny import WEIGHT, adapted, batch, gpt2, llama

from align_ext import align_step, disable_adapter, merge_and_unload, replace_linear_with_align_lora, unload

ARCHITECTURES = {**KINDS, "align_lora": {"architecture": "align_lora"}, "r_lora": {"architecture": "r_lora"}}
IDS = torch.tensor([0, 1, 2, 0, 1, 2])


def logits(model, **more):
    inputs, _ = batch()
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], **more).logits


def step(model):
    """Loss and gradients of a training step."""
    torch.manual_seed(3)
    model.zero_grad()
    inputs, ids = batch()
    loss = model(**inputs, task_ids=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_its_base_and_then_what_it_was(name, training):
    base = llama().double()
    model = adapted(**ARCHITECTURES[name]).train(training)
    if name in ("multi_adapter", "align_lora"):
        given = {"task_ids": IDS} if training or name == "multi_adapter" else {}
    else:
        given = {}
    before = logits(model, **given)
    for _ in range(2):
        with disable_adapter(model) as same:
            assert same is model
            assert torch.equal(logits(model, **given), logits(base))
            assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model, **given), before)
    assert not torch.equal(before, logits(base))


def test_a_step_is_the_same_with_a_reference_in_between():
    model = adapted(architecture="align_lora", align_weight=WEIGHT)
    expected = step(model)
    torch.manual_seed(3)
    model.zero_grad()
    inputs, ids = batch()
    with align_step(model, ids) as opened:
        loss = model(**inputs).loss
        with torch.no_grad(), disable_adapter(model):
            reference = model(**inputs).loss
    opened.total(loss).backward()
    found = [*(p.grad for p in model.parameters() if p.requires_grad)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected[1:], strict=True))
    assert torch.equal(reference, llama().double()(**inputs).loss)


@pytest.mark.parametrize(
    ("make", "module"), [(llama, "norm"), (llama, "lm_head"), (tied, "embed_tokens"), (gpt2, "attn")]
)
def test_what_is_trained_beside_has_its_values_of_the_base(make, module):
    targets = ["c_fc"] if make is gpt2 else ["up_proj"]
    model = replace_linear_with_align_lora(make(), num_tasks=2, target_modules=targets, modules_to_save=[module]).eval()
    with torch.no_grad():
        for p in (parameters := [p for p in model.parameters() if p.requires_grad]):
            p.add_(0.1 * torch.randn_like(p))
    ours, base = logits(model), make().eval()
    with suppress(KeyError), disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
        raise KeyError
    assert torch.equal(logits(model), ours)
    assert all(one is p for one, p in zip((p for p in model.parameters() if p.requires_grad), parameters, strict=True))


def test_it_is_the_method_of_an_adopted_peft_model_and_goes_with_the_adapters():
    model = get_peft_model(
        gpt2(), LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    )
    replace_linear_with_align_lora(model, architecture="lora")
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), logits(gpt2().eval()))
    assert not torch.equal(logits(model), logits(gpt2().eval()))
    plain = unload(model)
    assert "disable_adapter" not in model.__dict__
    assert torch.equal(logits(plain), logits(gpt2().eval()))


def test_what_cannot_be_disabled_says_so():
    with pytest.raises(ValueError, match="no adapters"), disable_adapter(llama()):
        pass
    model = adapted(architecture="lora", align=None)
    with disable_adapter(model), pytest.raises(ValueError, match="disabled already"), disable_adapter(model):
        pass
    layer = model.model.layers[0].mlp.up_proj
    layer.merge()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is merged into its weight"), disable_adapter(model):
        pass
    layer.unmerge()
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(llama().double()))
    merge_and_unload(model)
    model = adapted(architecture="lora", align=None)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is trained beside"), disable_adapter(model):
        pass
    assert not model.align_state.disabled
