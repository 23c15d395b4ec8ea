"""GPUs that the model knows: datasheets, and what is assumed of all of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An H100 SXM: its datasheet, then assumptions."""

    name: str = "H100"
    arch: int = 90  # whose machine code stands for it
    multiprocessors: int = 132
    memory: float = 3.35e12  # bytes/s
    tensor: float = 989e12  # dense bfloat16 FLOP/s, accumulated in float32
    clock: float = 1.83e9  # Hz: the datasheet's tensor FLOP/s are so many cycles of 4096 FLOPs a multiprocessor
    resident: int = 2  # blocks that share a multiprocessor (the table of cuda_static.py)
    schedulers: int = 4  # of a multiprocessor; each issues one instruction a cycle
    mma: float = 0.6  # of the tensor cores' peak that mma.sync gets; wgmma gets all of it
    hbm: float = 0.9  # of the memory's bytes/s that a stream gets
    issue: float = 0.9  # of the issue slots that are used at best
    gemm: float = 0.65  # of the tensor cores' peak that the base layer's products get
    latency: float = 0.8e-6  # s from a load's issue to its data, with the memory under load
    launch: float = 3e-6  # s from one kernel's end to the next one's full speed; the CPU is ahead

    @property
    def ffma(self) -> float:
        """float32 FLOP/s of 128 lanes a multiprocessor, 64 on sm_80."""
        return 2 * (64 if self.name == "A100" else 128) * self.multiprocessors * self.clock


GPUS = [
    Gpu("A100", 80, 108, 2.04e12, 312e12, 1.41e9, mma=1),  # A100 80GB SXM datasheet: 2048 FLOPs a cycle
    Gpu("RTX 4090", 80, 128, 1.01e12, 165e12, 2.52e9, resident=1, mma=1),  # Ada whitepaper: 512, boost 2.52 GHz
    Gpu(),  # H100 SXM datasheet (989.4 TFLOP/s)
    Gpu("H200", memory=4.8e12),  # H200 SXM datasheet: an H100 with another memory
    Gpu("B200", 90, 148, 8e12, 2250e12, 1.85e9, mma=0.3),  # HGX B200 datasheet: 8192; mma.sync as fast as an H100's
]
