"""LoRA-MoE (LoRAMoE, 2312.09979): routed experts with A and B of their own."""

from align_ext.adapters.multi_head import RoutedAdapter


class LoraMoeAdapter(RoutedAdapter):
    """Experts mixed by a router: all of them, or the top_k.

        z_i = A_i dropout(x),   w = softmax over the top_k largest of R x, 0 elsewhere
        y = base(x) + s Σ_i w_i B_i z_i

    Its alignment is the mean over the experts of that of their latents z_i.
    """
