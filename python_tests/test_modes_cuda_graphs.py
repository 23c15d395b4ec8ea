"""What torch.compile(mode="reduce-overhead") may put into CUDA graphs, as far as a traced graph tells without a GPU.

The model lies on the meta device, which stands for a GPU: what is on the CPU then is what would be there beside a GPU.
Whether an operator may be captured is asked of inductor itself, which splits a graph where it may not.
"""

from contextlib import nullcontext

import pytest
import torch
from tiny import VOCAB, adapted, llama
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import is_cudagraph_unsafe_fx_node
from torch.utils._pytree import tree_leaves

from align_ext import align_step

OF_THE_STEP = {"align_ext::record_", "align_ext::recorded_gradient"}  # Python that finds the step, between two graphs
OF_EXPERTS = {"align_ext::expert_product"}  # which may wait for the device, to know how many rows each has
MODELS = {
    "lora": {"architecture": "lora", "align": None},
    "m_lora": {"architecture": "m_lora", "align": None, "num_heads": 2},
    "hydra": {"architecture": "hydra", "align": None, "num_heads": 3, "balance": "cv2"},
}


def traced(options):
    """The nodes of the forward and the backward graph of a training step."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    model = adapted(llama(num_hidden_layers=1), dtype=torch.float32, lora_dropout=0.1, **options).to("meta")
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    ids = torch.randint(1, VOCAB, (2, 8), device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    step = (
        align_step(model, None, inputs["attention_mask"], inputs["labels"]) if options.get("balance") else nullcontext()
    )
    with step:
        loss = compiled(**inputs).loss
    loss.backward()  # not the total: meta tensors are not recorded
    assert len(graphs) == 2
    return [node for graph in graphs for node in graph.graph.nodes]


def operator_of(node):
    """The operator that a node calls, also where it stands in functional form."""
    candidates = [node.target, *node.args[:1]]
    return next((of for of in candidates if isinstance(of, torch._ops.OpOverload)), None)


def devices_of(node):
    """Where the tensors are that a node takes and gives."""
    nodes = [leaf for leaf in tree_leaves((node, node.args, node.kwargs)) if isinstance(leaf, torch.fx.Node)]
    return {leaf.device.type for of in nodes for leaf in tree_leaves(of.meta.get("val")) if hasattr(leaf, "device")}


@pytest.mark.parametrize("name", MODELS)
def test_operators_take_no_cpu_tensors_and_may_be_captured(name):
    ours = set()
    for node in traced(MODELS[name]):
        operator = operator_of(node)
        if operator is None or node.op != "call_function":
            continue
        if operator.name() in OF_THE_STEP:
            assert torch.Tag.cudagraph_unsafe in operator.tags
        else:
            assert not is_cudagraph_unsafe_fx_node(node), operator
            assert len(devices_of(node)) <= 1, operator
        ours |= {operator.name()} if operator.namespace == "align_ext" else set()
    print(ours)
    backward = {operator for operator in ours - OF_THE_STEP if operator.endswith("_backward")}
    assert backward == {f"{operator}_backward" for operator in ours - OF_THE_STEP - backward} != set()
    assert ours & OF_THE_STEP == (OF_THE_STEP if "balance" in MODELS[name] else set())


def test_no_schema_but_the_step_s_and_the_experts_says_that_it_may_not_be_captured():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("align_ext::")]
    operators = {name: getattr(torch.ops.align_ext, name.removeprefix("align_ext::")).default for name in names}
    unsafe = {name for name, operator in operators.items() if torch.Tag.cudagraph_unsafe in operator.tags}
    assert unsafe == OF_THE_STEP | OF_EXPERTS
