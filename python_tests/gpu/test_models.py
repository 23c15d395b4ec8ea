"""Training a tiny Llama: every architecture and loss in every mode of checkpointing, twice, and by CUDA graphs."""

import functools

import pytest
import torch
from hf import mixtures
from losses.test_modes import CASES, options_of
from test_batch import CHECKPOINTING, checkpointed
from tiny import Oracle, adapted, batch, error, gradients, llama

from align_ext import align_step

# float32 (eps 6e-8): sqrt(1000) roundings of one sum, amplified by the division by small variances in the alignment.
ROUNDING = 5e-5
# By position a task has two samples, whose variance may be next to nothing.
CONDITIONED = {"align_eps": 0.01}
STEPS = 3


def model_of(name, device, **options):
    """In float32, on a device; eager attention, whose backward is the same twice."""
    model, own = llama(attn_implementation="eager"), options_of(name) | options
    own |= CONDITIONED if own.get("align_statistics") == "position" else {}
    return adapted(model, dtype=torch.float32, **own).to(device)


@functools.cache
def expected(name):
    """Of the equations in float64."""
    return Oracle(model_of(name, "cpu").double()).gradients([1.0])


RANDINT = torch.randint


def drawn_on_the_cpu(*args, device=None, **options):
    """torch.randint from the CPU's generator, as the equations draw their masks' seeds."""
    drawn = RANDINT(*args, **options)
    return drawn if device is None else drawn.to(device)


def on_device(seed, device):
    inputs, tasks = batch(seed)
    return {key: t.to(device) for key, t in inputs.items()}, tasks.to(device)


def step(model, device, seed=0):
    """The gradients of one batch, on the CPU."""
    torch.manual_seed(seed)  # the dropout masks'
    inputs, tasks = on_device(seed, device)
    model.zero_grad()
    model(**inputs, task_ids=tasks).loss.backward()
    return {name: g.cpu() for name, g in gradients(model).items()}


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("name", CASES)
def test_gradients(device, name, mode, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", drawn_on_the_cpu)
        assert error(step(checkpointed(model_of(name, device), mode), device), expected(name)) < ROUNDING
    if mode is not None:  # the device's generator draws the same masks in recomputation
        plain = step(model_of(name, device), device)
        assert error(step(checkpointed(model_of(name, device), mode), device), plain) < 1e-6


@pytest.mark.parametrize("name", ["lora, mmd", "multi_adapter, kl", "r_lora, mmd, cv2", "m_lora, kl", "mtlora"])
def test_same_training(device, name):
    def train():
        model = model_of(name, device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        found = []
        for seed in range(STEPS):
            found.append(step(model, device, seed))
            optimizer.step()
        return found

    for first, second in zip(train(), train(), strict=True):
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("name", ["align_lora by position", "lora, mmd", "r_lora, mmd, cv2", "lora_moe, kl, switch"])
def test_reduce_overhead(device, name):
    """Recorded in CUDA graphs, it trains as it does without; the SIMT engine has none, there the graph runs eagerly."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model = (model_of(name, device, lora_dropout=0.0) for _ in range(2))
    how = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, **how)
    for seed in range(4):  # warm-up, recording, replays
        inputs, tasks = on_device(seed, device)
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        with align_step(model, tasks, inputs["attention_mask"], inputs["labels"]) as opened:
            loss = compiled(**inputs).loss
        opened.total(loss).backward()
        found = {key: g.cpu() for key, g in gradients(model).items()}
        assert error(found, step(eager, device, seed)) < ROUNDING
    if device.type == "cuda":
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        print(f"figure: {name}: {skipped} graphs without CUDA graphs")
        assert skipped == 0


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts(device, kind):
    """The experts of a mixture, in one tensor: by torch's grouped product on a GPU that has one."""

    def of(dtype, place):
        model = mixtures.adapted(kind, dtype).to(place)
        inputs, tasks = on_device(0, place)
        model(**inputs, task_ids=tasks, use_cache=False).loss.backward()
        return {name: g.cpu() for name, g in mixtures.gradients(model).items()}

    # In a dry run the CPU has the CUDA kernels too, which know no float64: there this says only that it runs.
    exact = torch.float64 if device.type == "cuda" else torch.float32
    assert error(of(torch.float32, device), of(exact, "cpu")) < ROUNDING
