"""multi_adapter sorts the tokens by their tasks once a step, whatever runs the layers."""

import pytest
import torch
from test_batch import CHECKPOINTING, checkpointed
from tiny import adapted, batch
from torch.utils._python_dispatch import TorchDispatchMode

from align_ext import align_step

MULTI = {"architecture": "multi_adapter", "lora_dropout": 0.2}


class Calls(TorchDispatchMode):
    """The names of the operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name().removeprefix("align_ext::"))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("align", [None, "kl"])
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_the_ids_are_sorted_once_a_step(mode, align):
    model = checkpointed(adapted(align=align, **MULTI), mode)
    for seed in range(2):
        inputs, tasks = batch(seed)
        with Calls() as calls:
            model(**inputs, task_ids=tasks).loss.backward()
        assert calls.names.count("group_rows") == 1
        assert calls.names.count("grouped_lora_backward") == 6  # layers


def test_a_compiled_model_sorts_once_too():
    torch._dynamo.reset()
    sorts = []

    def backend(graph, example_inputs):
        sorts.append(sum("group_rows" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model, (inputs, tasks) = adapted(**MULTI), batch()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with align_step(model, tasks, inputs["attention_mask"], inputs["labels"]) as step:
        lm = compiled(**inputs).loss
    step.total(lm).backward()
    assert sorts == [1]
