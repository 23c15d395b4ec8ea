"""torch.compile(model) trains with the losses: one graph for batches of any shape, equal to the eager model."""

import pytest
import torch
from test_batch import EXACT, by_context
from tiny import TASKS, VOCAB, adapted, error, gradients, llama

from align_ext import align_step

ROUTED = {"architecture": "lora_moe", "num_heads": 3, "top_k": 2, "balance": "switch", "balance_weight": 0.5}
ALIGNED = {"align": "kl", "share_inputs": False}  # compiled layers have masks of their own
MODELS = {"lora": {"architecture": "lora"} | ALIGNED, "lora_moe": ROUTED | ALIGNED}
MODELS |= {"mixlora": ROUTED | ALIGNED | {"architecture": "mixlora"}}
SHAPES = ((6, 10), (5, 8), (4, 12))  # samples, tokens


def model_of(name, checkpointing):
    model = adapted(llama(num_hidden_layers=1), lora_dropout=0.2, **MODELS[name])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # transformers' hook on the embeddings has no place in a whole graph
    return model


def train(model, call, seed, shape, marked=False):
    """One backward on a batch of this shape, which the compiler may be told to change."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, shape, generator=generator)
    mask, place = torch.ones_like(ids), torch.arange(shape[1])
    mask[0, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (place < 2), -100)}
    for tensor in inputs.values() if marked else ():
        torch._dynamo.mark_dynamic(tensor, [0, 1])
    torch.manual_seed(seed)  # the dropout masks'
    with align_step(model, torch.arange(shape[0]) % TASKS, mask, inputs["labels"]) as step:
        lm = call(**inputs).loss
    step.total(lm).backward()


@pytest.mark.parametrize(
    ("checkpointing", "marked"), [(False, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("lora", "lora_moe")), "mixlora"])
def test_one_graph_serves_batches_of_other_sizes_and_lengths(name, checkpointing, marked):
    torch._dynamo.reset()
    eager, model = model_of(name, checkpointing=False), model_of(name, checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=None if marked else True)
    changes = {"skip_fwd_side_effects_in_bwd_under_checkpoint": name == "mixlora"}  # its blocks hold the rows meanwhile
    for seed, shape in enumerate(SHAPES):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0, **changes):
            train(model, compiled, seed, shape, marked)
        train(eager, eager, seed, shape)
        assert error(gradients(model), gradients(eager)) < EXACT, shape


def compiling_autograd():
    return torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))


@pytest.mark.parametrize("enabled", [compiling_autograd, lambda: torch._dynamo.config.patch(compiled_autograd=True)])
def test_compiled_autograd_is_refused_with_the_cure(enabled):
    with enabled(), pytest.raises(RuntimeError, match=r"set torch\._dynamo\.config\.compiled_autograd = False"):
        by_context(adapted(), 0)


def test_compiled_autograd_of_the_backward_alone_is_refused_too():
    loss = by_context(adapted(llama(num_hidden_layers=1)), 0)()
    with compiling_autograd(), pytest.raises(RuntimeError, match="compiled autograd cannot trace"):
        loss.backward()
