"""M-LoRA (2508.05078): R-LoRA's heads without its router."""

from align_ext.adapters.multi_head import SummedAdapter


class MLoraAdapter(SummedAdapter):
    """Heads with random starts and a dropout mask on the latent of each.

        z = A x,   u_i = mask_i * z
        y = base(x) + s (c Σ_i B_i u_i - B0 A0 x),   c = 1 (reduce="sum") or 1/N ("mean"),   B0 = c Σ_i B_i at the start

    Without dropout it is one adapter, c Σ_i B_i A - B0 A0, so it merges, and exports to PEFT at twice the rank.
    """
