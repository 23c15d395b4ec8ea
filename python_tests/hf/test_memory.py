"""The estimate of the memory of training: against a real step on a CPU, by hand, on the meta device, of odd models."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hf.folders import ARCHITECTURES, trained
from hf.runs import run
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
)

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.model.memory import TrainingMemory, training_memory
from align_ext.system import memory
from align_ext.training import cost

ROWS, TOKENS = 4, 64
TOLERANCE = 0.15  # of the memory that a step really takes, beside weights, adapters and moments
LLAMA = LlamaConfig(
    hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=2000,
)  # fmt: skip
QWEN2 = Qwen2Config(
    hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=500,
)  # fmt: skip
MIXTURE = Qwen3MoeConfig(
    hidden_size=128, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=1000,
)  # fmt: skip
BASES = {
    "llama": (LlamaForCausalLM, LLAMA, {"target_modules": "all-linear"}),
    "few logits": (Qwen2ForCausalLM, QWEN2, {"target_modules": ["q_proj", "v_proj"]}),
    "gpt2": (
        GPT2LMHeadModel, GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=1000),
        {"target_modules": ["c_attn", "c_fc"]},
    ),
    "DoRA": (LlamaForCausalLM, LLAMA, {"architecture": "lora", "use_dora": True}),
    "frozen experts": (Qwen3MoeForCausalLM, MIXTURE, {"target_modules": ["q_proj", "v_proj"]}),
    "routed": (LlamaForCausalLM, LLAMA, {"architecture": "hydra"}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("adamw_torch_fused", 2),
        ("adamw_8bit", 0.5),
        ("lion_8bit", 0.25),
        ("lion_32bit", 1),
        ("adafactor", 0),
        ("sgd", 0),
    ],
)
def test_what_an_optimizer_keeps(tmp_path, name, ratio):
    state = cost.optimizer_state(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    assert state == pytest.approx(ratio, rel=0.1, abs=0.01)
    model = model_of("routed", torch.bfloat16)
    needed = training_memory(model, ROWS, TOKENS, state=state)
    assert needed.optimizer == round(state * needed.adapters)


def model_of(name, dtype):
    kind, config, options = BASES[name]
    torch.manual_seed(0)
    model = replace_linear_with_align_lora(kind(config).to(dtype), AlignLoraConfig(num_tasks=2, **options))
    return model.train()


def peak_of(work):
    """The most bytes that a function has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


QUICK = [("llama", torch.float32, False), ("gpt2", torch.bfloat16, False), ("few logits", torch.float32, True)]
STEPS = [*itertools.product(BASES, (torch.float32, torch.bfloat16), (False, True))]


@pytest.mark.parametrize(
    ("base", "dtype", "checkpointing"),
    [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in STEPS],
)
def test_a_real_step_takes_what_was_estimated(base, dtype, checkpointing):
    model = model_of(base, dtype)
    needed = training_memory(model, ROWS, TOKENS, checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 500, (ROWS, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step():
        model(**inputs, task_ids=torch.arange(ROWS) % 2, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    moments = sum(x.nbytes for one in optimizer.state.values() for name, x in one.items() if name.startswith("exp"))
    assert needed.optimizer == moments
    assert needed.activations + needed.gradients == pytest.approx(peak_of(step), rel=TOLERANCE)


def test_what_does_not_depend_on_the_batch_by_hand():
    model = model_of("few logits", torch.bfloat16)
    needed = training_memory(model, 2, 16)
    adapters = 4 * 6 * 2 * (8 * 128 + 128 * 8)  # float32, layers, projections, A and B of rank 8
    assert (needed.adapters, needed.gradients, needed.optimizer) == (adapters, adapters, 2 * adapters)
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    assert needed.weights == 2 * sum(p.numel() for p in Qwen2ForCausalLM(QWEN2).parameters()) + rotary
    assert needed.total == needed.weights + 4 * adapters + needed.activations


def test_more_rows_take_more_and_checkpointing_less():
    model = model_of("llama", torch.float32)
    two, four = (training_memory(model, rows, 64).activations for rows in (2, 4))
    assert four == pytest.approx(2 * two, rel=0.02)
    assert training_memory(model, 4, 64, checkpointing=True).activations < 0.6 * four


def test_the_largest_batch_by_hand():
    needed = TrainingMemory(100, 10, 10, 20, 60, rows=3, tokens=8)
    assert needed.total == 200
    assert [needed.most_rows(available) for available in (0, 159, 160, 199, 200)] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_has_an_estimate_that_moves_nothing(kind):
    model = trained(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    needed = training_memory(model, 2, 16)
    assert needed.activations > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_weights_has_the_same_estimate():
    _, config, options = BASES["llama"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        replace_linear_with_align_lora(model, AlignLoraConfig(num_tasks=2, **options))
    found, expected = (training_memory(one, 2, 16) for one in (model, model_of("llama", torch.bfloat16)))
    rotary = found.weights - expected.weights  # its inverse frequencies, here in float32
    assert replace(found, weights=expected.weights) == expected
    assert 0 < rotary < 100


def test_a_quantised_base_counts_its_packed_weights_and_scales(place):
    pytest.importorskip("bitsandbytes")
    plain = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(
        place / "model", dtype=torch.float32, device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    )  # fmt: skip
    inner = [p.numel() for name, p in plain.named_parameters() if "_proj" in name]
    found = []
    for model in (plain, quantised):
        replace_linear_with_align_lora(model, AlignLoraConfig(num_tasks=2))
        found.append(training_memory(model, 2, 16))
    saved = found[0].weights - found[1].weights
    assert saved == pytest.approx(sum(inner) * (4 - 0.5 - 4 / 64), rel=0.01)  # scales: float32 for 64 weights
    assert found[0].activations == found[1].activations


class Looks(LlamaForCausalLM):
    """A model whose forward depends on values."""

    def forward(self, input_ids=None, **inputs):
        return super().forward(input_ids=input_ids[: 1 + int(input_ids.max())], **inputs)


def test_a_model_that_looks_at_values_has_none_and_says_so(monkeypatch):
    model = model_of("llama", torch.float32)
    monkeypatch.setattr(LlamaForCausalLM, "forward", Looks.forward)
    with pytest.raises(ValueError, match="the memory of this model cannot be estimated: ") as caught:
        training_memory(model, 2, 16)
    lines = cost.memory_advice(model, 2, 16, "cpu", checkpointing=False)
    assert lines == [str(caught.value).splitlines()[0][:200]]


NEEDED = TrainingMemory(2 << 30, 1 << 20, 1 << 20, 2 << 20, 8 << 30, rows=8, tokens=256)


@pytest.mark.parametrize(
    ("available", "checkpointing", "said"),
    [
        (64 << 30, False, "64.0 GiB are there: --batch-size up to about 55 would fit"),
        (8 << 30, False, "8.0 GiB are there, which may be too little: try --batch-size 5 with --accumulation or "
                         "--gradient-checkpointing (3.0 GiB)"),
        (1 << 30, True, "1.0 GiB are there, which may be too little: try a shorter --seq-len"),
        (None, False, None),
    ],
)  # fmt: skip
def test_advice_by_hand(monkeypatch, available, checkpointing, said):
    less = replace(NEEDED, activations=1 << 30)
    monkeypatch.setattr(cost, "training_memory", lambda *_, checkpointing, state: less if checkpointing else NEEDED)
    monkeypatch.setattr(cost, "available_memory", lambda device: available)
    first, *rest = cost.memory_advice(None, 8, 256, "cpu", checkpointing=checkpointing)
    assert first.startswith("about 3.0 GiB" if checkpointing else "about 10.0 GiB")
    assert rest == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        ("cuda", 64, "64.0 GiB are there: --batch-size up to about 220 would fit"),  # 55 on each of four GPUs
        ("cuda", 8, "8.0 GiB are there, which may be too little: try --batch-size 20 with --accumulation"),
        ("cpu", 64, "64.0 GiB are there: --batch-size up to about 52 would fit"),  # 26 in each half of the memory
    ],
)
def test_advice_is_of_all_processes_together(monkeypatch, device, there, said):
    monkeypatch.setattr(cost, "training_memory", lambda *_, checkpointing, state: NEEDED)
    monkeypatch.setattr(cost, "available_memory", lambda device: there << 30)
    count = {"cuda": 4, "cpu": 2}[device]
    monkeypatch.setattr(cost.processes, "count", lambda: count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    _, advice = cost.memory_advice(None, 8, 256, device, checkpointing=True)
    assert advice == said


def test_the_memory_that_is_there_holds_what_the_process_has(monkeypatch):
    found = memory.available_memory("cpu")
    assert 1 << 28 < found < 1 << 45
    monkeypatch.setattr(memory.Path, "read_text", lambda self: "nonsense")
    assert memory.available_memory("cpu") is None


def test_a_run_says_it_before_it_trains(place):
    _, said = run(place, steps=1)
    assert re.search(r"\nabout \d+ [KM]iB to train: weights .* activations \d+ [KM]iB of 8 x \d\d tokens\n", said)
    assert said.index("to train: weights") < said.index("scoring")
