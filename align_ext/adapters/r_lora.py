"""R-LoRA (2502.15455): HydraLoRA whose heads start at random and drop out each for itself."""

from align_ext.adapters.multi_head import RoutedAdapter


class RLoraAdapter(RoutedAdapter):
    """Routed heads with random starts and a dropout mask on the latent of each.

        z = A x,   u_i = mask_i * z,   w = softmax(R x)
        y = base(x) + s (Σ_i w_i B_i u_i - B0 A0 x),   B0 = mean_i B_i at the start

    A zero router makes the start exactly no change: w_i = 1/N, and the mean of the heads is taken off again.
    """
