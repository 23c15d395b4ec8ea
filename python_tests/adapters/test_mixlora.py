"""MixLoRA: feed-forward blocks as experts, by hand; what they cost, keep and refuse. The equations: test_modes.py."""

import copy
import pickle

import pytest
import torch
from hf.families import family
from tiny import TASKS, adapted, batch, gradients, llama
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from align_ext import (
    add_adapter,
    align_parts,
    align_step,
    count_parameters,
    disable_adapter,
    flops_per_token,
    replace_linear_with_align_lora,
    set_adapter,
    unload,
)
from align_ext.adapters.adapted_block import adapted_layers

MIXLORA = {"architecture": "mixlora", "num_heads": 4}
LEADER = "model.layers.0.mlp.gate_proj"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 1
        self.q = nn.Linear(2, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.up.weight)
        nn.init.eye_(self.down.weight)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": Attention(), "block": Block()})])

    def forward(self, x):
        return {"loss": self.layers[0]["block"](x).sum()}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()[0]).logits


def loss_of(model, ids=None):
    inputs, tasks = batch()
    return model(**inputs, task_ids=tasks if ids is None else ids).loss


def test_mixlora_by_hand():
    model = Model().double()
    options = {"architecture": "mixlora", "num_heads": 3, "r": 1, "lora_alpha": 1, "lora_dropout": 0.0}
    replace_linear_with_align_lora(model, **options, target_modules=["up", "down"], balance_weight=0.5)
    block = model.layers[0]["block"]
    up, down = block.up.adapter, block.down.adapter
    values = {  # logits ln 6, ln 3, 0 of x = (1, 2): p = 0.6, 0.3, 0.1 and w = 2/3, 1/3
        up.lora_router.lora_R: [[torch.log(torch.tensor(v)), 0.0] for v in (6.0, 3.0, 1.0)],
        up.lora_A: [[[1.0, 0.0]], [[0.0, 1.0]], [[9.0, 9.0]]],
        up.lora_B: [[[1.0], [1.0]], [[-3.0], [0.0]], [[9.0], [9.0]]],
        down.lora_A: [[[1.0, 1.0]], [[0.0, 1.0]], [[9.0, 9.0]]],
        down.lora_B: [[[1.0], [0.0]], [[0.0], [2.0]], [[9.0], [9.0]]],
    }
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(torch.tensor(value))
    # expert 0: (1, 2) + 1 (1, 1), then (2, 3) + 5 (1, 0); expert 1: (1, 2) + 2 (-3, 0), then (0, 2) + 2 (0, 2)
    x = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    wanted = torch.tensor([[[2 / 3 * 7, 2 / 3 * 3 + 1 / 3 * 6]]], dtype=torch.float64)
    torch.testing.assert_close(block.eval()(x), wanted, rtol=1e-6, atol=0)
    loss = model.train()(x)["loss"]
    assert align_parts(model).balance == pytest.approx(3 * (0.6 + 0.3), rel=1e-6)  # both are chosen by all tokens
    assert loss.item() == pytest.approx(wanted.sum().item() + 0.5 * 2.7, rel=1e-6)
    loss.backward()
    assert not up.lora_A.grad[2].any()
    assert up.lora_B.grad[2].shape == (2, 1)
    assert not up.lora_B.grad[2].any()
    assert up.lora_router.lora_R.grad.any()


def test_the_first_layer_of_each_block_has_its_router_and_other_layers_have_one_lora():
    model = adapted(**MIXLORA, target_modules=["o_proj", "down_proj"])
    with_router = [n for n, layer in adapted_layers(model).items() if getattr(layer.adapter, "lora_router", None)]
    assert with_router == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert model.model.layers[0].mlp.down_proj.adapter.lora_router.lora_R.shape == (4, 48)  # of the block's input
    assert model.model.layers[0].self_attn.o_proj.adapter.lora_A.shape == (4, 48)
    count = count_parameters(model)
    assert (count.router, count.trainable) == (2 * 4 * 48, 2 * (4 * 4 * (80 + 48) + 4 * 48 + 4 * (48 + 48)))


def test_an_expert_without_a_token_has_a_gradient_of_zeros_and_changes_nothing():
    model = adapted(**MIXLORA)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.adapter.lora_router.lora_R[3] = -1e3 * layer.post_attention_layernorm.weight
            layer.mlp.gate_proj.adapter.lora_router.lora_R[:3] *= 1e-3
            layer.post_attention_layernorm.register_forward_hook(lambda module, args, y: y.abs())
    before = logits(model)
    loss_of(model.train()).backward()
    found = gradients(model)
    unused = [part[3] for name, part in found.items() if "mlp" in name and not name.endswith("lora_R")]
    assert len(unused) == 2 * 3 * 2
    assert not any(part.any() for part in unused)
    assert all(part[:3].any() for name, part in found.items() if "mlp" in name)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapter.lora_B[3] = torch.nan
    assert torch.equal(logits(model), before)


def test_the_base_computes_what_it_makes_of_the_block_s_input_once_a_token():
    model, seen = adapted(**MIXLORA), {}
    for name, layer in adapted_layers(model).items():
        layer.base_layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: args[0].shape[1]}))
    loss_of(model)
    assert {name.rpartition(".")[2]: tokens for name, tokens in seen.items()} == {
        "gate_proj": 10, "up_proj": 10, "down_proj": 20,
    }  # fmt: skip


def test_the_operations_are_those_of_k_rows_a_token_and_the_base_s_share_is_what_torch_counts():
    model, plain = (llama(attn_implementation="eager") for _ in range(2))
    adapted(model, torch.float32, **MIXLORA, target_modules="all-linear")
    loras = 2 * 4 * 2 * (4 * (48 + 48) + 2 * 3 * (48 + 80))  # 2 r of 2 layers: attention's, and k of each in the block
    router, again = 2 * 2 * 4 * 48, 2 * 2 * 80 * 48  # down_proj for the second row of each token
    assert flops_per_token(model).adapters == loras + router + again
    counted = []
    for run in (model.eval(), plain):
        for layer in adapted_layers(model).values():  # with a hook the base is called, where torch counts
            layer.base_layer.register_forward_hook(lambda *_: None)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(torch.zeros(1, 6, dtype=torch.long))
        counted.append(counter.get_total_flops())
    assert counted[0] - counted[1] == 6 * (router + again)  # the operators of the LoRAs are not looked into


def test_a_disabled_an_unloaded_and_another_adapter_leave_no_trace():
    plain = logits(llama())
    model = adapted(dtype=torch.float32, **MIXLORA)
    expected = logits(model)
    assert not torch.allclose(expected, plain)
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)
    add_adapter(model, "second", architecture="lora", num_tasks=3)
    set_adapter(model, "second")
    assert torch.equal(logits(model), plain)
    set_adapter(model, "default")
    assert torch.equal(logits(model), expected)
    unload(model)
    assert torch.equal(logits(model), plain)
    assert not any(block.mlp._forward_hooks or block.mlp._forward_pre_hooks for block in model.model.layers)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_routes_by_its_own_router(copied):
    model = adapted(**MIXLORA)
    expected, other = logits(model), copied(model)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        other.get_submodule(LEADER).adapter.lora_router.lora_R.neg_()
    assert not torch.allclose(logits(other), expected)
    assert torch.equal(logits(model), expected)


def test_no_row_outlives_its_block_nor_an_error_in_it():
    model = adapted(**MIXLORA, align="kl")
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    assert all(layer.adapter.mixture.rows is None for layer in adapted_layers(model).values())
    handle.remove()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model).backward()
    assert all(layer.adapter.mixture.rows is None for layer in adapted_layers(model).values())


def test_the_router_computes_in_float32_whatever_the_base_and_autocast_do():
    model = adapted(dtype=torch.bfloat16, **MIXLORA)
    router = model.get_submodule(LEADER).adapter.lora_router
    x = torch.randn(3, 5, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    torch.testing.assert_close(found, x.float().flatten(0, 1) @ router.lora_R.T)
    every = {"top_k": 0, "balance": "cv2"}  # so that rounding changes no choice
    model = adapted(dtype=torch.bfloat16, **MIXLORA, **every)
    exact = copy.deepcopy(model).double()
    for one in (model, exact):
        loss_of(one).backward()
    for (name, gradient), found in zip(gradients(exact).items(), gradients(model).values(), strict=True):
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 0.1 * gradient.norm(), name


@pytest.mark.parametrize("options", [{"align": "kl"}, {"align": "mmd", "mmd_n_max": 8}, {"align": "l2"}])
def test_ids_of_tokens_and_answers_count_as_ids_of_samples_do(options):
    inputs, tasks = batch()
    model, ids = adapted(**MIXLORA, **options, target_modules="all-linear"), tasks[:, None].expand(6, 10)
    losses = []
    for given in (tasks, ids):
        loss_of(model, given)
        losses.append(align_parts(model))
    assert losses[0] == losses[1]
    answers = adapted(**MIXLORA, **options, target_modules="all-linear", response_only=True)
    loss_of(answers)
    loss_of(model, torch.where(inputs["labels"] != -100, ids, -1))
    assert align_parts(answers) == align_parts(model) != losses[0]


def test_without_tasks_a_step_has_the_balance_alone():
    model = adapted(**MIXLORA)
    inputs, _ = batch()
    with align_step(model, None) as step:
        lm = model(**inputs).loss
    step.total(lm).backward()
    assert align_parts(model).balance > 0
    assert len(model.align_state.names) == 2  # the routers' layers


def test_a_layer_that_runs_without_its_block_is_an_error():
    model = adapted(**MIXLORA).eval()
    with pytest.raises(RuntimeError, match=r"a layer of the experts of 'model\.layers\.0\.mlp' ran, but not its block"):
        model.get_submodule(LEADER)(torch.zeros(1, 48, dtype=torch.float64))


@pytest.mark.parametrize("name", ["opt", "bert", "mixtral"])
def test_models_without_such_blocks_are_refused_and_left_alone(name):
    model = family(name)
    with pytest.raises(ValueError, match=r"mixes whole feed-forward blocks, .* names no layer in one"):
        replace_linear_with_align_lora(model, **MIXLORA)
    assert not any("lora" in key for key in model.state_dict())


def test_attention_alone_is_no_mixture():
    with pytest.raises(ValueError, match=r"target_modules=\('q_proj',\) names no layer in one"):
        replace_linear_with_align_lora(llama(), **MIXLORA, target_modules=["q_proj"], num_tasks=TASKS)


def test_the_rows_of_a_block_tell_nothing_about_the_batch_s_layout():
    model, ids = adapted(**MIXLORA), torch.ones(6, 6, dtype=torch.long)
    with pytest.raises(RuntimeError, match="whose first dimension may be the samples or the tokens"):
        model(input_ids=ids, attention_mask=ids, labels=ids, task_ids=torch.arange(6) % TASKS)


def test_in_an_encoder_decoder_no_loss_is_about_the_rows_of_blocks():
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sides = ViTConfig(**sizes, image_size=8, patch_size=4), GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(*sides))
    model.config.pad_token_id, model.config.decoder_start_token_id = 0, 1
    options = {**MIXLORA, "target_modules": ["fc1", "fc2"]}
    with pytest.raises(ValueError, match="use align=None and balance=None, or lora_moe"):
        replace_linear_with_align_lora(model, **options)
    replace_linear_with_align_lora(model, **options, balance=None)
    model.train()(pixel_values=torch.randn(2, 3, 8, 8), labels=torch.ones(2, 5, dtype=torch.long)).loss.backward()
    assert any(name.endswith("lora_B") and gradient.any() for name, gradient in gradients(model).items())
