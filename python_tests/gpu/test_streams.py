"""Where and when kernels run: on the current stream, on the tensors' device, with the same bits beside other work."""

import torch
from gpu.cases import EVERY_CASE, assert_same_bits, move

SIZES = {"cuda": (3000, 520, 712, 12), "cpu": (70, 72, 40, 5)}  # cpu: the SIMT engine
DTYPE = torch.bfloat16


@EVERY_CASE
def test_same_bits(device, case):
    """Twice alone, then while another stream keeps part of the GPU busy."""
    tensors = move(case.tensors(SIZES[device.type], DTYPE), device)
    expected = case.results(tensors)
    assert_same_bits(case.results(tensors), expected)
    if device.type == "cuda":
        other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=device)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
    for _ in range(3):
        assert_same_bits(case.results(tensors), expected)


@EVERY_CASE
def test_side_stream(device, case):
    """The inputs are written late on a side stream: a kernel of another stream would read zeros."""
    tensors = move(case.tensors(SIZES[device.type], DTYPE), device)
    expected = case.results(tensors)
    late = {name: torch.zeros_like(t) for name, t in tensors.items()}
    if device.type == "cpu":  # which has no streams
        assert_same_bits(case.results(move(tensors, device)), expected)
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.results(late)  # its memory is this stream's from now on: no allocation waits for the GPU below
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for name, tensor in late.items():
            tensor.copy_(tensors[name])
        found = case.results(late)
        assert not stream.query(), "the stream was not busy: this test saw nothing"
    stream.synchronize()
    assert_same_bits(found, expected)


@EVERY_CASE
def test_second_device(device, case):
    """Tensors of the second GPU while the first one is current; of the same kind it computes the same bits."""
    tensors = case.tensors(SIZES[device.type], DTYPE)
    second = torch.device("cuda", 1) if device.type == "cuda" else device
    expected, found = (case.results(move(tensors, where)) for where in (device, second))
    assert all(tensor.device == second for tensor in found.values())
    if device.type == "cpu" or torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits(found, expected)
    else:
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name].cpu(), tensor.cpu(), rtol=2e-2, atol=2e-2 * float(tensor.abs().max())
            )
    if device.type == "cuda":
        assert torch.cuda.current_device() == device.index
