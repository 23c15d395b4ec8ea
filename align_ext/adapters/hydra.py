"""HydraLoRA (2404.19245): one A, several heads B_i; with a router, or as their plain sum."""

from align_ext.adapters.multi_head import RoutedAdapter, SummedAdapter


class HydraAdapter(RoutedAdapter):
    """Heads mixed by a router, which alone tells them apart while they start from zero.

        z = A dropout(x),   w = softmax(R x)
        y = base(x) + s Σ_i w_i B_i z

    One dropout mask on x serves all heads.
    """


class HydraSumAdapter(SummedAdapter):
    """Heads without a router, as HydraLoRA's code trains them: each has a dropout mask of its own on x.

        z_i = A (mask_i * x),   y = base(x) + s Σ_i B_i z_i

    With one mask for all, heads that start from zero would get the same gradient and stay identical for ever.
    """
