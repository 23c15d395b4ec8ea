"""Every architecture and loss written out in plain float64 PyTorch, head by head and group by group, for autograd.

Nothing of align_ext computes here: modules are read for their parameters and options. The masks alone are drawn as the
operators draw them, seed and offset by torch.randint, bits by the reference's Philox.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.reference.philox import dropout_mask

SEQUENCE_COLUMNS = 8  # routing="sequence" hands the op x with a multiple of 8 columns, by which its masks are numbered


@dataclass
class Output:
    """What an adapter adds to its base, its latents [T, r] each, and its routing weights [T, G, N] or None."""

    low: Tensor
    latents: list[Tensor]
    weights: Tensor | None = None


def low_rank(
    adapter, config, x: Tensor, p: float = 0.0, tasks: Tensor | None = None, prompt: Tensor | None = None,
    rng: Tensor | None = None, number: tuple[int, int] = (0, 1),
) -> Output:  # fmt: skip
    """The low-rank path of one layer, without base.

    Args:
        adapter: of any architecture.
        config: its options.
        x: [..., n].
        p: of dropout.
        tasks: int64 [T], of every token; where the architecture is by task.
        prompt: bool [B, S], what routing="sequence" pools over.
        rng: seed and offset of the mask; drawn here if not given.
        number: which of how many layers it is whose masks of a token follow one another.
    """
    rows = x.reshape(-1, x.shape[-1])
    A, B = adapter.lora_A.to(x.dtype), adapter.lora_B.to(x.dtype)
    if config.architecture == "malora":
        A = torch.stack([C @ A for C in adapter.lora_C.to(x.dtype)])
    if config.architecture == "adalora":
        A = torch.diag(adapter.lora_E[:, 0]).to(x.dtype) @ A
    rng = None if p == 0 else torch.randint(0, 2**63 - 1, (2,)) if rng is None else rng
    tokens, n = rows.shape
    width = n
    if config.routing == "sequence":
        logits = config.routing_groups * config.num_heads
        width += logits + -(n + logits) % SEQUENCE_COLUMNS

    def mask(*shape):
        if rng is None:
            return torch.ones(tokens, *shape, dtype=x.dtype)
        return dropout_mask(rng, p, (tokens, number[1], *shape), x.dtype)[:, number[0]]

    if config.num_heads is None:
        xd = rows * mask(n)
        if config.architecture == "multi_adapter":
            z = torch.stack([A[k] @ xd[t] for t, k in enumerate(tasks.tolist())])
            low = torch.stack([B[k] @ z[t] for t, k in enumerate(tasks.tolist())])
        elif config.architecture == "mtlora_cvpr":
            z = xd @ A[0].T
            own = torch.stack([B[1 + k] @ (A[1 + k] @ xd[t]) for t, k in enumerate(tasks.tolist())])
            low = z @ B[0].T + own
        else:
            z = xd @ A.T
            low = (z @ adapter.lora_N.to(x.dtype).T if config.architecture == "nlora" else z) @ B.T
            if config.init_lora_weights in ("pissa", "nystrom"):
                low = low - xd @ adapter.lora_A0.to(x.dtype).T @ adapter.lora_B0.to(x.dtype).T
        return Output((adapter.scaling * low).view(*x.shape[:-1], -1), [z])

    heads, r, own = config.num_heads, adapter.r, config.row.A_per_head
    site, xd = config.dropout_site, rows
    if site == "input":
        xd = rows * mask(width)[:, :n]
        latents = [xd @ (A[i] if own else A).T for i in range(heads)]
        inner = latents
    elif site == "latent":
        masks = mask(heads, r)
        latents = [rows @ A.T for _ in range(heads)]
        inner = [latents[i] * masks[:, i] for i in range(heads)]
    else:
        masks = mask(heads, width)[:, :, :n]
        latents = [(rows * masks[:, i]) @ A.T for i in range(heads)]
        inner = latents
    weights = None
    if config.architecture == "moelora":
        gates = (adapter.lora_task @ adapter.lora_gate.T).softmax(1).to(x.dtype)[tasks]
        low = sum(gates[:, i, None] * (inner[i] @ B[i].T) for i in range(heads))
    elif config.architecture == "multilora":
        low = sum(adapter.lora_scaling[i].to(x.dtype) * (inner[i] @ B[i].T) for i in range(heads))
    elif config.router is None:
        low = sum(inner[i] @ B[i].T for i in range(heads)) / (heads if config.reduce == "mean" else 1)
    else:
        weights = routing_weights(adapter.lora_router, config, x, prompt)
        groups, out = weights.shape[1], B.shape[1]
        parts = []
        for g in range(groups):
            own_rows = slice(g * out // groups, (g + 1) * out // groups)
            parts.append(sum(weights[:, g, i, None] * (inner[i] @ B[i, own_rows].T) for i in range(heads)))
        low = torch.cat(parts, 1)
    if config.init_lora_weights == "random_heads":
        low = low - xd @ adapter.lora_A0.to(x.dtype).T @ adapter.lora_B0.to(x.dtype).T
    distinct = latents if own or site == "input_per_head" else latents[:1]
    return Output((adapter.scaling * low).view(*x.shape[:-1], -1), distinct, weights)


def dora(
    layer, config, x: Tensor, p: float = 0.0, rng: Tensor | None = None, number: tuple[int, int] = (0, 1)
) -> Output:
    """What DoRA adds to a layer's base: (g V - W) dropout(x), or g V x - W x where the masks act on latents."""
    adapter, W = layer.adapter, layer.weight.T if type(layer.base_layer).__name__ == "Conv1D" else layer.weight
    on_input = config.dropout_site == "input"
    xd = torch.nn.functional.dropout(x, p) if on_input else x
    inner = low_rank(adapter, config, xd, 0.0 if on_input else p, rng=rng, number=number)
    change = low_rank(adapter, config, torch.eye(x.shape[-1], dtype=x.dtype)).low.T
    g = adapter.lora_magnitude_vector / (W + change).detach().norm(dim=1)
    return Output((g - 1) * (xd @ W.T) + g * inner.low, inner.latents)


def likeliest(row: list[float], k: int) -> list[int]:
    """The k largest, the largest first, and of equal ones the first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


class Mixture:
    """A feed-forward block as N experts: each is the block's own forward for all tokens, and a token takes k of them.

    Args:
        block: the block, in which the forward of each adapted layer is the literal one from now on.
        config: its options.
        rng_of: returns seed and offset of a layer's mask and p.
    """

    def __init__(self, block, config, rng_of) -> None:
        self.block, self.config, self.rng_of, self.plain = block, config, rng_of, block.forward
        self.layers = [layer for layer in block.modules() if hasattr(layer, "adapter")]
        (self.router,) = (layer.adapter.lora_router for layer in self.layers if layer.adapter.lora_router is not None)
        for layer in self.layers:
            layer.forward = lambda x, layer=layer: self.layer(layer, x)

    def forward(self, x: Tensor, *others) -> tuple[Tensor, list[Output]]:
        """The block's output, and what each adapted layer hands over, in the order in which they run."""
        rows, experts = x.reshape(-1, x.shape[-1]), range(self.config.num_heads)
        p = (rows @ self.router.lora_R.to(x.dtype).T / self.config.router_temperature).softmax(1)
        self.chosen = [likeliest(row, self.config.top_k or len(experts)) for row in p.tolist()]
        self.rngs, self.latents, outputs = {}, {}, []
        for self.expert in experts:
            outputs.append(self.plain(x, *others).flatten(0, -2))
        y = [
            sum(p[t, i] * outputs[i][t] for i in chosen) / sum(p[t, i] for i in chosen)
            for t, chosen in enumerate(self.chosen)
        ]
        return torch.stack(y).view(*x.shape[:-1], -1), [self.output(layer, p) for layer in self.latents]

    def layer(self, layer, x: Tensor) -> Tensor:
        """A layer with the LoRA of the expert whose turn it is."""
        adapter, rows, k = layer.adapter, x.reshape(-1, x.shape[-1]), len(self.chosen[0])
        if layer not in self.rngs:
            self.rngs[layer] = self.rng_of(layer)
        (rng, p), xd = self.rngs[layer], rows
        if p:
            place = [chosen.index(self.expert) if self.expert in chosen else 0 for chosen in self.chosen]
            mask = dropout_mask(rng, p, (len(rows), k, rows.shape[1]), x.dtype)
            xd = rows * mask[torch.arange(len(rows)), place]
        z = xd @ adapter.lora_A[self.expert].to(x.dtype).T
        self.latents.setdefault(layer, []).append(z)
        low = adapter.scaling * z @ adapter.lora_B[self.expert].to(x.dtype).T
        return layer.base_layer(x) + low.view(*x.shape[:-1], -1)

    def output(self, layer, p: Tensor) -> Output:
        """The latents of a token's first expert, of its second one, ...; with the router, p."""
        places = zip(*self.chosen, strict=True)
        latents = [torch.stack([self.latents[layer][i][t] for t, i in enumerate(place)]) for place in places]
        return Output(p, latents, None if layer.adapter.lora_router is None else p[:, None])


def routing_weights(router, config, x: Tensor, prompt: Tensor | None) -> Tensor:
    """w [T, G, N]: a softmax over all heads, or over the top_k largest logits, of each token and group."""
    R = router.lora_R.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if config.routing == "sequence":
        means = [x[b, prompt[b]].sum(0) / max(int(prompt[b].sum()), 1) for b in range(len(x))]
        logits = [R @ torch.relu(router.lora_H.to(x.dtype) @ mean) for mean in means]
        logits = torch.stack([logits[b] for b in range(len(x)) for _ in range(x.shape[1])])
    else:
        logits = rows @ R.T
    heads, k = config.num_heads, config.top_k or config.num_heads
    groups = []
    for g in range(config.routing_groups):
        of_group = logits[:, g * heads : (g + 1) * heads] / config.router_temperature
        chosen = torch.zeros_like(of_group)
        for t, row in enumerate(of_group.tolist()):
            for i in sorted(range(heads), key=lambda i, row=row: (-row[i], i))[:k]:
                chosen[t, i] = 1
        powers = chosen * (of_group - of_group.detach().amax(1, keepdim=True)).exp()
        groups.append(powers / powers.sum(1, keepdim=True))
    return torch.stack(groups, 1)


def kl(z: Tensor, task: Tensor, config) -> Tensor:
    """The symmetric KL of the tasks' Gaussians, by torch.distributions; by token, or by position as released."""
    divergence = torch.distributions.kl_divergence
    ids = sorted(set(task[task >= 0].tolist()))
    groups = [z[task == i] for i in ids]
    normals = [
        torch.distributions.Normal(g.mean(0), (g.var(0, correction=config.align_ddof) + config.align_eps).sqrt())
        for g in groups
        if len(g) >= max(2, 1 + config.align_ddof)
    ]
    pairs = [0.5 * (divergence(a, b) + divergence(b, a)).sum() for a, b in itertools.combinations(normals, 2)]
    return reduced(pairs, config)


def kl_by_position(z: Tensor, task: Tensor, samples: int, config) -> Tensor:
    """The mean over the positions of a batch [B, S] of the KL over its samples; task int64 [B]."""
    by_position = z.view(samples, -1, z.shape[-1]).unbind(1)
    return sum(kl(at, task, config) for at in by_position) / len(by_position)


def mmd(z: Tensor, task: Tensor, config) -> Tensor:
    """The squared multi-kernel MMD of every pair of tasks, pair of tokens by pair of tokens."""
    groups = []
    for i in sorted(set(task[task >= 0].tolist())):
        g, most = z[task == i], config.mmd_n_max
        groups.append(g[[j * len(g) // most for j in range(most)]] if len(g) > most else g)
    groups = [g for g in groups if len(g) >= 2]

    def distances(a, b):
        return ((a[:, None] - b[None, :]) ** 2).sum(-1)

    every = torch.cat(groups).detach()
    width = distances(every, every).sum() / (len(every) * (len(every) - 1))
    half = config.mmd_kernels // 2
    widths = config.mmd_bandwidths or [width * 2.0 ** (k - half) for k in range(config.mmd_kernels)]

    def kernels(a, b):
        return sum(torch.exp(-distances(a, b) / width) for width in widths)

    def within(g):
        if config.mmd_statistic == "v":
            return kernels(g, g).mean()
        return kernels(g, g).masked_fill(torch.eye(len(g), dtype=torch.bool), 0).sum() / (len(g) * (len(g) - 1))

    pairs = [within(a) + within(b) - 2 * kernels(a, b).mean() for a, b in itertools.combinations(groups, 2)]
    return reduced(pairs, config)


def l2(z: Tensor, task: Tensor, config) -> Tensor:
    """The mean square of the latents of all tokens of a task."""
    rows = z[task >= 0]
    return sum((row @ row) for row in rows) / rows.numel()


def reduced(pairs: list[Tensor], config) -> Tensor:
    """The sum over a batch's pairs, their mean, or the mean times the number of all pairs of tasks."""
    total = torch.stack(pairs).sum()
    every = config.num_tasks * (config.num_tasks - 1) // 2 if config.align_pairs == "sum" else 1
    return total if config.align_pairs == "batch" else every * total / len(pairs)


def balance(w: Tensor, valid: Tensor, kind: str, top_k: int | None = None) -> Tensor:
    """How unevenly the heads are used; w [T, G, N], valid bool [T]; top_k: how many a token takes, else all with w."""
    rows = w[valid].flatten(0, 1)
    heads = rows.shape[1]
    P = [rows[:, i].sum() / len(rows) for i in range(heads)]
    if kind == "switch":
        taken = rows > 0 if top_k is None else torch.zeros_like(rows, dtype=torch.bool)
        for t, row in enumerate(rows.tolist() if top_k else []):
            taken[t, likeliest(row, top_k)] = True
        return heads * sum(taken[:, i].to(w.dtype).mean() * P[i] for i in range(heads))
    if heads == 1:
        return P[0] * 0
    mean = sum(P) / heads
    return sum((p - mean) ** 2 for p in P) / (heads - 1) / (mean**2 + 1e-10)


def orthogonality(P: Tensor, Q: Tensor) -> Tensor:
    """The mean of ||PᵀP - I||_F² and ||Q Qᵀ - I||_F², product by product of two columns, or rows."""
    vectors = (P.unbind(1), Q.unbind(0))
    return sum((a @ b - float(i == j)) ** 2 for of in vectors for i, a in enumerate(of) for j, b in enumerate(of)) / 2


def spectral(B: Tensor, kind: str) -> Tensor:
    """The overlap of each pair of heads, "paper" with projectors by an SVD of the [m, r] heads as they are now."""
    heads = list(B)
    if kind == "released":
        return sum(map(self_orthogonality, heads)) / len(heads)
    if kind == "paper":
        heads = [b @ projector(b.detach()) for b in heads]
    return sum(((a.T @ b) ** 2).sum() for a, b in itertools.combinations(heads, 2))


def self_orthogonality(B: Tensor) -> Tensor:
    """||diag(w) (Bᵀ B - c² I) diag(w)||_F² of one head, w = exp(-Sigma / mean Sigma), c = ||B||_F / sqrt(r)."""
    sigma, c = torch.linalg.svdvals(B.detach()), B.detach().norm() / B.shape[-1] ** 0.5
    w = torch.diag(torch.exp(-sigma / sigma.mean()))
    return (w @ (B.T @ B - c**2 * torch.eye(B.shape[-1], dtype=B.dtype)) @ w).square().sum()


def projector(B: Tensor) -> Tensor:
    """V exp(-Sigma / mean Sigma) Vᵀ of one head, the identity where it is zero."""
    _, sigma, V = torch.linalg.svd(B, full_matrices=False)
    if sigma.mean() < 1e-12:
        return torch.eye(B.shape[-1], dtype=B.dtype)
    return V.T @ torch.diag(torch.exp(-sigma / sigma.mean())) @ V
