"""mtLoRA (2603.01526, ICLR 2026): routed heads for 15 to 25 tasks."""

from align_ext.adapters.multi_head import RoutedAdapter


class MtLoraAdapter(RoutedAdapter):
    """Heads with routing weights for each of G groups of outputs (fine-grained routing).

        z = A dropout(x),   w_g = softmax(R_g x),   g = 1 .. G
        y[o] = base(x)[o] + s Σ_i w_{g(o), i} B_i[o] z,   g(o) = floor(o G / m)

    By default it stands beside whole MLP blocks (align_ext/adapters/adapted_block.py), with the spectral-aware
    regularisation of its heads (align_ext/losses/spectral.py) and a balance loss (align_ext/losses/balance.py).
    """
