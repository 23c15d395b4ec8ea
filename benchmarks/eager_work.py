"""What eager PyTorch launches for an adapted layer, as the methods are released (align_ext/bench/baselines.py)."""

from collections.abc import Sequence

from gpus import Gpu
from kernel_work import ELEMENT, Access, Layer, Work, mask_instructions


def sums_of_dx(layers: Sequence[Layer]) -> list[Work]:
    """Autograd's sums where each of the layers with the same x has a dx of its own."""
    size = layers[0].sizes["dx"][1]
    return [Work("dx +=", [Access("dx", size), Access("dx", size), Access("dx", size)]) for _ in layers[1:]]


def loop(layer: Layer, _: Gpu) -> list[Work]:
    """Operations of the released form, head after head, in eager PyTorch and bfloat16; with one head PEFT's LoRA."""
    tokens, r, n, m = layer.tokens, layer.rank, layer.in_dim, layer.out_dim
    x, y, z, w, w_i = (ELEMENT * tokens * columns for columns in (n, m, r, layer.heads, 1))
    A, B, R = ELEMENT * r * n, ELEMENT * r * m, ELEMENT * layer.heads * n

    def op(name: str, *arrays: int, product: int = 0, masks: int = 0) -> Work:
        accesses = [Access(name, size) for size in arrays]
        return Work(name, accesses, 2 * tokens * product, integer=mask_instructions(tokens * masks, of_block=4))

    of_x = [op("A x", x, A, z, product=r * n)]
    to_x = [op("dA", z, x, A, product=r * n), op("dx", z, A, x, product=r * n)]
    more = [op("dx +=", x, x, x)]
    before, after, weigh, unweigh = [], [], [], []
    if layer.site == "latent":
        before, after = of_x, to_x + more
        u, du = [op("dropout", z, z, z // 2, masks=r)], [op("dropout, backward", z, z // 2, z), op("dz +=", z, z, z)]
    else:
        u = [op("dropout", x, x, x // 2, masks=n), *of_x]
        du = [*to_x, op("dropout, backward", x, x // 2, x), *more]
    if layer.router:
        before = [*before, op("logits", x, R, w, product=layer.heads * n), op("softmax", w, w)]
        after = [*after, op("softmax, backward", w, w, w), op("dR", w, x, R), op("dx", w, R, x), *more]
        weigh = [op("w head", y, w_i, y)]
        unweigh = [op("w dy", y, w_i, y), op("dy head", y, y, y), op("sum", y, w_i)]
    forward = [*u, op("B u", z, B, y, product=r * m), op("scale", y, y), *weigh, op("y +=", y, y, y)]
    back = [*unweigh, op("scale", y, y), op("dB", y, z, B, product=r * m), op("du", y, B, z, product=r * m), *du]
    return [*before, *layer.heads * [*forward, *back], *after]
