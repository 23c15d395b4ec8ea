"""The signature of Unsloth's LoRA of one projection, in plain PyTorch."""

import torch


class LoRA_W(torch.autograd.Function):
    """y = X Wᵀ + S (X Aᵀ) Bᵀ; X [batch, tokens, in], A [r, in], B [out, r]; W_quant None: W is not quantised."""

    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S):
        assert X.dim() == 3
        assert W_quant is None
        ctx.save_for_backward(X, W, A, B)
        ctx.scaling = S
        return X @ W.T + S * (X @ A.T) @ B.T

    @staticmethod
    def backward(ctx, dY):
        X, W, A, B = ctx.saved_tensors
        x, dy = X[0], dY[0]
        d_latent = ctx.scaling * dy @ B
        return (dy @ W + d_latent @ A)[None], None, None, d_latent.T @ x, ctx.scaling * dy.T @ (x @ A.T), None
