"""replace_linear_with_align_lora on real models: what is adapted, what is left alone, and what it says."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, batch, gpt2, llama, qwen2
from torch import nn

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    align_parts,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
)
from align_ext.adapters.adapted_linear import AdaptedLinear


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB))


@pytest.mark.parametrize("make", [llama, qwen2, mistral])
def test_no_argument_but_the_model_is_needed(make):
    model = make()
    names = {n for n, m in model.named_modules() if n.endswith(("gate_proj", "up_proj", "down_proj"))}
    before = model.eval()(**batch()[0]).logits
    assert replace_linear_with_align_lora(model) is model
    assert {n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)} == names
    assert torch.equal(model(**batch()[0]).logits, before)  # B = 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.adapter.lora_{part}" for n in names for part in "AB"}
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.adapter.lora_A.shape == (8, layer.in_features)
    assert layer.adapter.lora_B.shape == (layer.out_features, 8)


def test_conv1d_of_gpt2_is_adapted():
    model, (inputs, tasks) = gpt2(), batch()
    before = model.eval()(**inputs).logits
    replace_linear_with_align_lora(model, target_modules=["c_fc", "c_proj"], num_tasks=3)
    assert len(adapter_report(model).replaced) == 6
    assert torch.equal(model(**inputs).logits, before)
    model.train()(**inputs, task_ids=tasks).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["q_proj", "v_proj"], 4),
        (r".*\.layers\.1\..*_proj", 7),
        ("all-linear", 14),
        (["model.layers.0.mlp.up_proj"], 1),
    ],
)
def test_target_modules_follow_peft(patterns, count):
    model = replace_linear_with_align_lora(llama(), target_modules=patterns)
    ours = set(adapter_report(model).replaced)
    peft = get_peft_model(llama(), LoraConfig(target_modules=patterns))
    theirs = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert ours == theirs
    assert len(ours) == count


def test_excluded_modules_are_left_alone():
    model = replace_linear_with_align_lora(llama(), target_modules="all-linear", exclude_modules=["q_proj", "k_proj"])
    assert not any(name.endswith(("q_proj", "k_proj", "lm_head")) for name in adapter_report(model).replaced)
    assert len(adapter_report(model).replaced) == 10


def test_tied_weights_are_left_alone_and_reported():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out, self.other = (nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4))
            self.out.weight = self.embed.weight

    model = replace_linear_with_align_lora(Tied(), r=2, target_modules=["out", "other"])
    assert adapter_report(model).skipped == {"out": "its weight is tied to embed"}


class Twice(nn.Module):
    """A layer at two names, one that runs twice in a Sequential, and a shared block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, inner, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dec_head, self.mlp = self.head, nn.Sequential(inner, nn.ReLU(), inner)
        block = nn.ModuleDict({"up": nn.Linear(8, 8)})
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x):
        x = self.own(self.mlp(self.dec_head(self.head(x))))
        for block in self.blocks:
            x = block["up"](x)
        return x


def test_a_layer_at_several_names_is_left_alone_and_one_of_a_shared_block_is_adapted():
    model, x = Twice(), torch.randn(4, 8)
    replace_linear_with_align_lora(model, r=2, target_modules="all-linear", align=None)
    report = adapter_report(model)
    assert report.replaced == ["own", "blocks.0.up"]
    assert report.skipped == {
        "head": "it is also at dec_head, which would stay as it is",
        "mlp.0": "it is also at mlp.2, which would stay as it is",
    }
    for layer in (model.own, model.blocks[1]["up"]):
        nn.init.normal_(layer.adapter.lora_B)
    expected = model.eval()(x)
    torch.testing.assert_close(merge_and_unload(model)(x), expected)
    with pytest.raises(ValueError, match="head matched, but it is also at dec_head"):
        replace_linear_with_align_lora(Twice(), r=2, target_modules=["head"])
    with pytest.raises(ValueError, match=r"dec_head"):
        replace_linear_with_align_lora(get_peft_model(Twice(), LoraConfig(target_modules=["head"])), align=None)


def narrow():
    torch.manual_seed(0)
    return nn.ModuleDict({"wide": nn.Linear(16, 16), "gate": nn.Linear(16, 1)})


def test_a_rank_above_a_layers_sizes_is_taken_and_said():
    model = replace_linear_with_align_lora(narrow(), r=4, target_modules="all-linear", align=None)
    report = adapter_report(model)
    assert (report.replaced, report.excessive) == (["wide", "gate"], ["gate"])
    assert str(report).endswith("r is above the smaller of the inputs and outputs of gate: it gains nothing")
    model = replace_linear_with_align_lora(narrow(), r=20, target_modules="all-linear", align=None)
    assert "outputs of wide and of 1 others" in str(adapter_report(model))
    assert adapter_report(replace_linear_with_align_lora(llama(), r=48)).excessive == []


def test_pissa_has_no_more_directions_than_a_weight():
    options = {"init_lora_weights": "pissa", "align": None, "r": 4}
    with pytest.raises(ValueError, match=r"gate: r=4 is above the 1 singular directions .*choose r <= 1, leave"):
        replace_linear_with_align_lora(narrow(), target_modules=["gate"], **options)
    model = replace_linear_with_align_lora(narrow(), target_modules="all-linear", exclude_modules=["gate"], **options)
    assert adapter_report(model).replaced == ["wide"]


def test_a_rank_above_a_layers_sizes_is_adopted_saved_and_loaded(tmp_path):
    peft = get_peft_model(narrow(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(4, 16)
    expected = peft.base_model.model["gate"](x)
    peft.save_pretrained(tmp_path / "stock")
    save_adapter(replace_linear_with_align_lora(peft, align=None), tmp_path / "ours")
    for folder in ("stock", "ours"):
        torch.testing.assert_close(load_adapter(narrow(), tmp_path / folder)["gate"](x), expected)


def test_nothing_matched_lists_the_models_linears():
    with pytest.raises(
        ValueError, match=r"target_modules=\('gate_prj',\).*down_proj \(2\), gate_proj \(2\).*all-linear"
    ):
        replace_linear_with_align_lora(llama(), target_modules=["gate_prj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_modules": "model.*"}, r"since exclude_modules='model\.\*' leaves out all that it names"),
        ({"layers_to_transform": [0], "layers_pattern": ["h"]}, r"since layers_to_transform=\(0,\) with layers_patt"),
    ],
)
def test_what_leaves_out_everything_that_is_named_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        replace_linear_with_align_lora(llama(), target_modules=["gate_proj"], **options)


def test_a_refused_call_changes_nothing():
    model = llama()
    before = [(n, type(m)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="no layer was adapted"):
        replace_linear_with_align_lora(model, target_modules=["nope"])
    assert before == ([(n, type(m)) for n, m in model.named_modules()], [p.requires_grad for p in model.parameters()])


def test_a_second_call_changes_nothing_and_says_so(caplog):
    model = replace_linear_with_align_lora(llama())
    names = [n for n, _ in model.named_parameters()]
    assert replace_linear_with_align_lora(model, r=4) is model
    assert [n for n, _ in model.named_parameters()] == names
    assert "has adapters already" in caplog.text
    assert len(model._forward_pre_hooks) == 1


def test_config_and_options_exclude_each_other():
    with pytest.raises(ValueError, match="either config or single options"):
        replace_linear_with_align_lora(llama(), AlignLoraConfig(), r=4)
    with pytest.raises(ValueError, match="unknown option 'rank'"):
        replace_linear_with_align_lora(llama(), rank=4)


def test_a_wrapped_model_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"OptimizedModule.*plain model first, then wrap"):
        replace_linear_with_align_lora(torch.compile(llama()))


class PackedLinear(nn.Module):
    """A quantised linear as GPTQ and AWQ have them: shape attributes, packed integers, no float weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max().item() / 127
        self.register_buffer("qweight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def test_a_quantised_linear_is_adapted_through_its_own_forward():
    model, (inputs, tasks) = llama(), batch()
    for layer in model.model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    before = model.eval()(**inputs).logits
    replace_linear_with_align_lora(model, num_tasks=3)
    assert torch.equal(model(**inputs).logits, before)
    model.train()(**inputs, task_ids=tasks).loss.backward()
    assert model.model.layers[0].mlp.up_proj.adapter.lora_B.grad.abs().sum() > 0


def test_a_subclass_of_linear_keeps_its_forward():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(4, 3))
    x = torch.randn(2, 4)
    before = model(x)
    replace_linear_with_align_lora(model, r=2, target_modules=["0"], align=None)
    assert torch.equal(model(x), before)


def test_hooks_of_the_base_layer_still_run():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    model[0].register_forward_hook(lambda m, a, y: y + 1)
    before = model(x)
    replace_linear_with_align_lora(model, r=2, target_modules=["0"], align=None)
    assert torch.equal(model(x), before)


def test_adapters_are_float32_on_a_16_bit_base():
    model = replace_linear_with_align_lora(llama().bfloat16())
    layer = model.model.layers[0].mlp.up_proj
    assert layer.adapter.lora_A.dtype == torch.float32
    assert model(**batch()[0], task_ids=batch()[1]).logits.dtype == torch.bfloat16
    model = replace_linear_with_align_lora(llama().bfloat16(), adapter_dtype="base")
    assert model.model.layers[0].mlp.up_proj.adapter.lora_A.dtype == torch.bfloat16


def test_a_model_on_the_meta_device_gets_meta_adapters():
    with torch.device("meta"):
        model = llama()
    replace_linear_with_align_lora(model, num_tasks=3)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    fresh = llama()
    model.load_state_dict(fresh.state_dict(), strict=False)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.adapter.reset_lora_parameters(None)
    inputs, tasks = batch()
    model.model.rotary_emb = fresh.model.rotary_emb
    assert torch.equal(model.eval()(**inputs).logits, fresh.eval()(**inputs).logits)
    model.train()(**inputs, task_ids=tasks).loss.backward()


def test_accelerates_device_map_with_offloading_is_respected(tmp_path):
    from accelerate import dispatch_model

    model, (inputs, tasks) = llama(), batch()
    before = copy.deepcopy(model).eval()(**inputs).logits
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    replace_linear_with_align_lora(model, num_tasks=3)
    assert model.model.layers[0].mlp.up_proj.adapter.lora_A.device.type == "cpu"
    torch.testing.assert_close(model.eval()(**inputs).logits, before)
    model.train()(**inputs, task_ids=tasks).loss.backward()
    assert model.model.layers[0].mlp.up_proj.adapter.lora_B.grad.abs().sum() > 0


def test_the_checkpoint_of_the_plain_base_still_loads():
    model, other = replace_linear_with_align_lora(llama()), llama()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all("lora_" in key for key in result.missing_keys)
    inputs, _ = batch()
    assert torch.equal(model.eval()(**inputs).logits, other.eval()(**inputs).logits)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_peft_model_is_adopted_with_its_weights(base_dtype):
    torch.manual_seed(3)
    peft = get_peft_model(
        llama().to(base_dtype), LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=["q_proj", "up_proj"])
    )
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    inputs, tasks = batch()
    before = peft.eval()(**inputs).logits
    parameters = {id(p) for p in peft.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    assert replace_linear_with_align_lora(peft, num_tasks=3) is peft
    report = adapter_report(peft)
    assert len(report.adopted) == len(report.replaced) == 4
    assert {id(p) for p in peft.parameters() if p.requires_grad} == parameters
    eps = torch.finfo(base_dtype).eps
    assert (peft(**inputs).logits - before).abs().max() <= 8 * eps * before.abs().max()
    peft.train()(**inputs, task_ids=tasks).loss.backward()
    optimizer.step()
    assert align_parts(peft).align > 0
    assert (peft.eval()(**inputs).logits - before).abs().max() > 0


def test_a_peft_variant_is_left_alone_and_named():
    peft = get_peft_model(llama(), LoraConfig(alora_invocation_tokens=[1], target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="a variant \\(ALoraLinearVariant\\)"):
        replace_linear_with_align_lora(peft)


def test_a_peft_model_that_trains_what_cannot_be_adopted_is_refused():
    peft = get_peft_model(llama(), LoraConfig(target_modules=["up_proj"]))
    peft.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"also trains .*lm_head"):
        replace_linear_with_align_lora(peft)


def test_a_part_that_is_adapted_already_is_not_adapted_again(caplog):
    inner = replace_linear_with_align_lora(llama())
    outer = nn.Sequential(inner)
    names = [n for n, _ in outer.named_parameters()]
    replace_linear_with_align_lora(outer, target_modules="all-linear")
    assert [n for n, _ in outer.named_parameters()] == names
    assert "has adapters already" in caplog.text


def test_what_was_meant_and_not_found_is_reported(caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB))
    replace_linear_with_align_lora(model, target_modules=["q_proj", "gate_prj"])
    assert "'gate_prj' matches no linear layer" in caplog.text
    assert "tensors of experts" in caplog.text


def test_a_name_of_which_nothing_is_adapted_is_reported_with_the_reason(caplog):
    options = {"architecture": "m_lora", "target_modules": ["q_proj", "embed_tokens"]}
    replace_linear_with_align_lora(llama(), **options)
    assert "'embed_tokens' adapts no layer: model.embed_tokens is left alone: embeddings are" in caplog.text
    caplog.clear()
    replace_linear_with_align_lora(llama(), target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])
    assert "'k_proj' adapts no layer: exclude_modules=('k_proj',) leaves out all that it names" in caplog.text


def test_adapters_of_packed_layers_are_where_the_packed_weight_is():
    with torch.device("meta"):
        packed = PackedLinear.__new__(PackedLinear)
        nn.Module.__init__(packed)
        packed.in_features = packed.out_features = 4
        packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8))
    model = replace_linear_with_align_lora(nn.Sequential(packed), r=2, target_modules=["0"], align=None)
    assert model[0].adapter.lora_A.is_meta


def test_weights_offloaded_with_their_parent_are_left_alone():
    from accelerate import cpu_offload

    model = llama()
    cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaMLP"])
    with pytest.raises(ValueError, match="offloaded together with its parent"):
        replace_linear_with_align_lora(model)
