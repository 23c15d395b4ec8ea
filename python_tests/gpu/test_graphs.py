"""Forward and backward in a CUDA graph: captured once, replayed on other inputs."""

import torch
from gpu.cases import EVERY_CASE, PROJECTIONS, assert_same_bits, move

SIZES = {"cuda": (1500, 264, 136, 8), "cpu": (70, 72, 40, 5)}
DTYPE = torch.bfloat16


def capture(device, run):
    """Returns (replay, outputs); on the SIMT engine, which has no graphs, a replay is another run."""
    if device.type == "cpu":
        outputs = run()

        def again():
            outputs.update(run())

        return again, outputs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up is not captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


@EVERY_CASE
def test_a_captured_step_replays_on_new_inputs(device, case):
    static = move(case.tensors(SIZES[device.type], DTYPE), device)
    replay, outputs = capture(device, lambda: case.results(static))
    for seed in (1, 2):
        given = move(case.tensors(SIZES[device.type], DTYPE, seed), device)
        for name, tensor in static.items():
            tensor.copy_(given[name])
        replay()
        assert_same_bits(outputs, case.results(given))


@PROJECTIONS
def test_each_replay_draws_other_dropout_masks(device, case):
    from align_ext import ops

    static = move(case.tensors(SIZES[device.type], DTYPE), device)

    def run():
        static["rng"] = ops.dropout_rng(device)
        return case.results(static)

    replay, outputs = capture(device, run)
    replay()
    first = outputs["y"].clone()
    replay()
    assert torch.equal(outputs["y"], first) == (not case.options["dropout_p"])
