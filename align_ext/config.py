"""All options of an adapter, with their symbols in the papers. Names follow PEFT's LoraConfig."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from align_ext.architectures import ARCHITECTURES, HEADS_OF_TASKS, HYDRA_WITHOUT_ROUTER, Architecture, Row
from align_ext.combinations import check_combinations
from align_ext.option_rules import (
    as_tuple,
    bandwidths_rule,
    below_one_rule,
    blocks_rule,
    layers_rule,
    probability_rule,
    steps_rule,
    tokens_rule,
    weight_rule,
)
from align_ext.system.bounds import (
    MAX_SIZE,
    by_name,
    check_options,
    documented,
    integer_rule,
    is_whole,
    not_negative,
    option,
    positive,
    unknown_name,
)
from align_ext.system.messages import shown
from align_ext.system.names import Matcher, check_names, check_pattern

Align = Literal["kl", "mmd", "l2"]
Mixing = Literal["proportional", "temperature", "equal", "round_robin"]  # of tasks into batches
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "random_heads", "nystrom"]

DEFAULT_WEIGHT: Mapping[str, float] = {"kl": 0.1, "mmd": 0.15, "l2": 0.1}
AUTO: Any = "auto"  # an option's default that depends on the architecture or the model
MOST_HEADS = 16  # by default: mtLoRA's on 15 to 25 tasks, and what the fused path covers
MOST_TASKS = 10_000  # a limit, since reports have tables of all pairs of tasks


@documented
@dataclass(frozen=True)
class AlignLoraConfig:
    """Options of the adapters and of the losses on them; validated when made.

    An option that is "auto" takes the architecture's own value (align_ext/architectures.py); target_modules take the
    model's (align_ext/base_model/default_targets.py).
    """

    architecture: Architecture = option(
        "align_lora",
        'what stands beside each layer (align_ext/adapters): "lora", "align_lora" (one adapter, the tasks\' '
        'latents aligned), "multi_adapter" (A and B of each task), "lora_moe" (routed experts with A and B of '
        'their own), "hydra" (one A, routed heads B_i; with router=None their sum), "r_lora" (hydra with random '
        'heads and a dropout mask for each), "m_lora" (the same without a router), "mtlora" (routed heads beside '
        'whole blocks, fine-grained routing, spectral regularisation), "multilora" (LoRAs in parallel, each with '
        'trained scalings), "moelora" (experts weighed by the task), "mtlora_cvpr" '
        '(one adapter of all tasks, and one of each), "nlora" (a trained matrix between A and B), '
        '"malora" (routed experts, whose A_i lie in a shared subspace), "mixlora" (experts that are whole feed-forward '
        'blocks behind one router each; a LoRA beside layers elsewhere), "adalora" (ranks that layers compete for).',
    )
    r: int = option(8, "rank of A and B.", integer_rule())
    lora_alpha: float = option(32, "alpha; the scaling is s = alpha / r.", positive)
    lora_dropout: float = option(0.1, "p, of dropout at dropout_site, in [0, 1).", probability_rule)
    target_modules: tuple[str, ...] | str = option(
        AUTO,
        'suffixes of module names, a regular expression for the whole name, "all-linear", or "auto": the feed-forward '
        "layers of the blocks, whatever they are called (gate_proj, up_proj and down_proj in Llama), or all layers of "
        "blocks without such layers (Mamba); of several modalities those that see the text.",
    )
    target_parameters: tuple[str, ...] = option(
        (),
        "names, or their ends, of tensors that hold all experts of a mixture, to be adapted too with an A and a B for "
        "each expert (lora, align_lora), such as mlp.experts.gate_up_proj; target_modules may then be empty, and auto "
        "is, where the blocks have no other feed-forward layers.",
    )
    exclude_modules: tuple[str, ...] | str = option((), "suffixes, or a regular expression, of modules to leave alone.")
    rank_pattern: Mapping[str, int] = option(
        {}, "ranks of layers that differ from r, by suffix or by a regular expression for the end of the name.",
        by_name(integer_rule()),
    )  # fmt: skip
    alpha_pattern: Mapping[str, float] = option({}, "alphas of layers, likewise.", by_name(positive))
    layers_to_transform: tuple[int, ...] = option(
        (), "numbers of the layers to adapt, where target_modules are suffixes; empty: all.", layers_rule
    )
    layers_pattern: tuple[str, ...] = option(
        (), "names of the lists that these layers are in, as in layers.3; empty: the first number of a name counts."
    )
    modules_to_save: tuple[str, ...] = option(
        AUTO,
        'names of modules to train whole, beside the adapters, and to save with them; "auto": the head of a model '
        "that classifies or answers by spans, which starts at random; empty: none.",
    )
    bias: Literal["none", "all", "lora_only"] = option(
        "none", 'biases of the base to train beside the adapters: "all" of them, or "lora_only", the adapted layers\'.'
    )
    lora_bias: bool = option(
        False,
        "a trained bias b of B: y = base(x) + s (B z + b), by lora and align_lora; merges into a layer's own bias.",
    )
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = option(
        (), "numbers of tokens whose embeddings are trained, those of a tied output head with them, in place of whole "
        "embeddings; or such lists by the names of modules; empty: none.", tokens_rule,
    )  # fmt: skip
    target_blocks: tuple[str, ...] = option(
        AUTO, 'adapt whole blocks in place of linear layers: "attention", "mlp" or both (mtLoRA).', blocks_rule
    )
    use_rslora: bool = option(False, "s = alpha / sqrt(r) (2312.03732).")
    use_dora: bool = option(
        False,
        "DoRA (2402.09353): train the norm of each row of the adapted weight, too (align_ext/adapters/dora.py); lora, "
        "align_lora, m_lora, multilora, nlora, and hydra with router=None.",
    )
    init_lora_weights: Init = option(
        AUTO,
        '"kaiming" (A uniform, B = 0), "gaussian" (A ~ N(0, 1/r²), B = 0), "orthogonal" (A and B random with B A = 0; '
        'even r), "pissa" (the r largest singular directions of the base weight, 2404.02948; one adapter only), '
        '"random_heads" (R-LoRA, 2502.15455, Table 1), "nystrom" (rows and columns of the base weight, 2502.14482; '
        "nlora only); adalora has a start of its own. The last three start from B A != 0 and keep it frozen as an "
        "offset that is subtracted again; the base weight is never touched.",
    )
    init_gamma: float = option(64.0, 'gamma of "random_heads".', positive)
    num_heads: int | None = option(
        AUTO,
        "N, how many B_i (or experts) there are; by default one for each of num_tasks, at most 16; 5 for one task, or "
        "where num_tasks is not given; 8 in moelora, malora and mixlora.",
        integer_rule(),
    )
    reduce: Literal["sum", "mean"] | None = option(AUTO, 'heads without a router: their "sum" or "mean".')
    router: Literal["linear", "mlp"] | None = option(
        AUTO,
        '"linear" (on each token), "mlp" (two layers; with routing="sequence"), or None: heads without a router '
        "(hydra).",
    )
    router_init: Literal["kaiming", "zeros"] | None = option(
        AUTO,
        '"kaiming" or "zeros" (equal weights at the start; the default with random heads, whose start is no change of '
        "the model only so).",
    )
    routing: Literal["token", "sequence"] | None = option(
        AUTO,
        'weights for each "token", or one set for each "sequence", from the mean of its prompt\'s tokens: those '
        "before the first label, or all where there are no labels (to generate, which needs use_cache=True then).",
    )
    routing_groups: int | None = option(
        AUTO, "G, groups of outputs with routing weights of their own (mtLoRA's fine-grained routing).", integer_rule()
    )
    top_k: int | None = option(AUTO, "heads with weight; 0: all of them; by default 2 in malora and mixlora, else 0.")
    router_temperature: float | None = option(AUTO, "tau of the softmax.", positive)
    shared_rank: int | None = option(AUTO, "malora: d, rows of what its A_i share; by default 16.", integer_rule())
    target_r: int | None = option(None, "adalora: the mean rank at the end; None: two thirds of r.", integer_rule())
    init_r: int | None = option(None, "adalora: PEFT's name for r, whose place it takes.", integer_rule())
    tinit: int | None = option(None, "adalora: the steps before ranks fall; None: a sixth of all.", steps_rule(0))
    tfinal: int | None = option(None, "adalora: the last steps, of fixed ranks; None: half of all.", steps_rule(0))
    deltaT: int | None = option(AUTO, "adalora: the steps between allocations of ranks; by default 1.", steps_rule())
    beta1: float | None = option(AUTO, "adalora: of a weight's average sensitivity; by default 0.85.", below_one_rule)
    beta2: float | None = option(AUTO, "adalora: of its average uncertainty; by default 0.85.", below_one_rule)
    orth_reg_weight: float | None = option(
        AUTO,
        "adalora: of ||PᵀP - I||² and ||QQᵀ - I||² in the loss, a mean over matrices; by default 0.1.",
        not_negative,
    )
    total_step: int | None = option(
        None, "adalora: the optimizer steps that its schedule is about; None: those of the Trainer.", steps_rule()
    )
    dropout_site: Literal["input", "latent", "input_per_head"] = option(
        AUTO, 'what dropout acts on: "input" (x), "latent" (z, a mask for each head), "input_per_head".'
    )
    align: Align | None = option(
        AUTO,
        '"kl" (Align-LoRA, 2508.05078, eq. 5), "mmd" (its multi-kernel MMD), "l2" (a control: the mean square of the '
        "latents, whatever their task) or None; any architecture.",
    )
    align_weight: float | None = option(
        None, 'lambda in loss + lambda * align; None: 0.1 for "kl" and "l2", 0.15 for "mmd".', weight_rule
    )
    num_tasks: int | None = option(
        None,
        "M; None takes the largest task id seen so far plus one (one process only, not for multi_adapter).",
        integer_rule(maximum=MOST_TASKS, none=True),
    )
    align_eps: float = option(1e-6, "kl: added to every variance of z.", positive)
    align_ddof: int = option(0, "kl: 0: population variance, 1: sample variance.", integer_rule(0, 1, "0 or 1"))
    align_statistics: Literal["token", "position"] = option(
        "token",
        'kl: over a task\'s tokens ("token"), or position by position over its samples ("position": what '
        "Align-LoRA's released code does; unpacked batches, padding counts, sample variance, mean of pairs).",
    )
    align_pairs: Literal["sum", "mean", "batch"] = option(
        "sum",
        '"sum" over all pairs of the M tasks (eq. 5), estimated by the mean over the pairs that a batch holds times '
        'M (M - 1) / 2, so that its strength does not depend on the batch; that "mean" alone; or "batch", the sum over '
        "the batch's pairs, which grows with the tasks in a batch.",
    )
    align_layers: Literal["mean", "sum"] = option("mean", '"mean" over the adapted layers or "sum".')
    align_accumulation: Literal["micro", "queue", "exact"] = option(
        "micro",
        'what is aligned under gradient accumulation: each micro-batch by itself ("micro"), with the last ones\' '
        'statistics, constants for the gradient ("queue"), or all of a step as one batch ("exact": a second '
        "forward for each, align_ext/alignment/accumulation.py).",
    )
    align_queue: int = option(4, "K, how many micro-batches the queue holds.", integer_rule())
    mmd_bandwidths: tuple[float, ...] | None = option(
        None, "None for multiples of the mean squared distance, or the bandwidths themselves.", bandwidths_rule
    )
    mmd_kernels: int = option(5, "K, how many such multiples.", integer_rule(1, 32, "in 1 .. 32"))
    mmd_statistic: Literal["v", "u"] = option("v", '"v", or "u" for the unbiased one.')
    mmd_n_max: int = option(
        256,
        "tokens of a task that take part at most.",
        integer_rule(2, MAX_SIZE, f"an integer of at least 2 and at most {MAX_SIZE}"),
    )
    response_only: bool = option(
        False, "only tokens with a label count in alignment and balance (default: all but padding)."
    )
    balance: Literal["cv2", "switch"] | None = option(
        AUTO,
        '"cv2" (squared coefficient of variation of the heads\' mean weights), "switch" (Switch Transformer\'s, '
        'with top_k), or None; by default "cv2" in mtlora and "switch" in mixlora.',
    )
    balance_weight: float = option(0.01, "of the balance in the loss.", not_negative)
    spectral: Literal["paper", "uniform", "released"] | None = option(
        AUTO,
        'mtLoRA\'s regularisation of the heads\' overlap: "paper" (spectral-aware), "uniform", "released" (each '
        "head by itself) or None. DDP with reentrant checkpointing needs static_graph=True for it.",
    )
    spectral_weight: float = option(2e-3, "of the spectral regularisation, a mean over layers.", not_negative)
    spectral_steps: int = option(100, "k, forwards between two refreshes of its projectors.", integer_rule())
    share_inputs: bool = option(
        True,
        "compute adapted layers that a module calls with the same tensor (q, k, v; gate, up) together in training; on "
        "its own is each layer of multi_adapter, moelora, mtlora_cvpr, malora, multilora, nlora, adalora, of mixlora's "
        "blocks, with masks of each head on its input, routed by sequence, or compiled.",
    )
    adapter_dtype: Literal["float32", "base"] = option(
        "float32", 'dtype of A and B: "float32" (PEFT\'s default, also on a 16-bit base) or "base".'
    )

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            self._normalise_names(name)
        if self.modules_to_save != AUTO:
            self._set("modules_to_save", check_names(self.modules_to_save, "modules_to_save"))
        self._set("target_parameters", check_names(as_tuple(self.target_parameters), "target_parameters"))
        self._set("layers_to_transform", as_tuple(self.layers_to_transform))
        self._set("layers_pattern", check_names(as_tuple(self.layers_pattern), "layers_pattern"))
        for name in ("rank_pattern", "alpha_pattern"):
            given = {} if getattr(self, name) is None else getattr(self, name)
            self._set(name, dict(given) if isinstance(given, Mapping) else given)
        rows: Any = self.trainable_token_indices
        lists = {k: list(as_tuple(v)) for k, v in rows.items()} if isinstance(rows, Mapping) else as_tuple(rows)
        self._set("trainable_token_indices", lists)
        for name in ("mmd_bandwidths", "target_blocks"):
            if isinstance(value := getattr(self, name), Iterable) and not isinstance(value, str):
                self._set(name, tuple(value))
        if self.init_lora_weights is True:  # PEFT's name for its default
            self._set("init_lora_weights", "kaiming")
        if self.architecture not in get_args(Architecture):
            raise ValueError(unknown_name("architecture", self.architecture, get_args(Architecture)))
        if self.architecture == "adalora" and is_whole(self.init_r):
            self._set("r", self.init_r)
            self._set("init_r", None)
        equal_weights = self.router_init == AUTO and self.init_lora_weights in (AUTO, "random_heads")
        self._fill_in({**self.row.defaults, **self._heads_of_tasks()})
        if equal_weights and self.router is not None and self.init_lora_weights == "random_heads":
            self._set("router_init", "zeros")  # so that the adapter does not change the model at the start
        if self.align is not None and self.align not in get_args(Align):
            raise ValueError(unknown_name("align", self.align, [*get_args(Align), None]))
        if self.align is not None and self.align_weight is None:
            self._set("align_weight", DEFAULT_WEIGHT[self.align])
        if self.align_statistics == "position":  # the settings of the released code
            self._set("align_ddof", 1)
            self._set("align_pairs", "mean")
        self._check_ranges()
        check_combinations(self)

    def of_layer(self, name: str, matcher: Matcher | None = None) -> AlignLoraConfig:
        """Returns the options with the rank and the alpha of one layer.

        Raises:
            ValueError: a pattern is no regular expression, or the architecture cannot have this rank.
        """
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        matcher = matcher or Matcher()
        r = matcher.value_of(self.rank_pattern, name, self.r)
        alpha = matcher.value_of(self.alpha_pattern, name, self.lora_alpha)
        return replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def row(self) -> Row:
        """The architecture's row in the registry (align_ext/architectures.py)."""
        return HYDRA_WITHOUT_ROUTER if self._is_unrouted_hydra() else ARCHITECTURES[self.architecture]

    def _is_unrouted_hydra(self) -> bool:
        return self.architecture == "hydra" and self.router is None

    def _normalise_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                check_pattern(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        elif isinstance(value, Iterable):
            self._set(name, check_names(tuple(value), name, maximum=100_000))
        else:
            raise ValueError(f"{name} must be module names or a regular expression, got {shown(value)}")

    def _heads_of_tasks(self) -> dict[str, int]:
        """One head for each task, where there are such heads and the tasks are known (docs/faithfulness.md)."""
        tasks = self.num_tasks
        several = is_whole(tasks, 2, MOST_TASKS) and self.row.defaults["num_heads"] == HEADS_OF_TASKS
        return {"num_heads": min(tasks, MOST_HEADS)} if several and tasks is not None else {}

    def _fill_in(self, defaults: Mapping[str, Any]) -> None:
        """Sets "auto" options to the architecture's values; refuses options that the architecture does not have."""
        for name, default in defaults.items():
            value, optional = getattr(self, name), name in ("align", "balance", "spectral")
            if isinstance(value, str) and value == AUTO:
                self._set(name, default)
            elif default is None and value is not None and not optional:
                raise ValueError(f"{name}={shown(value)}: architecture {self._name()} has no {name}; leave it out")
            elif default is not None and value is None and not optional:
                raise ValueError(f"{name}=None: architecture {self._name()} needs it; leave it out for {default!r}")
        routed = self.router is not None
        heads = self.num_heads is not None and not self.row.by_task and not self.row.mixture
        for name, available, what in (("balance", routed, "router"), ("spectral", heads, "heads")):
            if getattr(self, name) is not None and not available:
                raise ValueError(f"{name}={shown(getattr(self, name))}: architecture {self._name()} has no {what}")

    def _name(self) -> str:
        return f"{self.architecture!r} without a router" if self._is_unrouted_hydra() else repr(self.architecture)

    def _check_ranges(self) -> None:
        check_options(self)
        heads = self.num_heads
        if self.top_k is not None and not is_whole(self.top_k, 0, heads or MAX_SIZE):
            raise ValueError(f"top_k must be in 1 .. num_heads = {heads}, or 0 for all heads, got {shown(self.top_k)}")

    @property
    def latents_per_head(self) -> bool:
        """Whether each head has a latent of its own."""
        several = self.num_heads is not None
        return several and (self.row.A_per_head or self.dropout_site == "input_per_head")

    @property
    def scaling(self) -> float:
        """The scaling s = alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def final_rank(self) -> int:
        """The mean rank of adalora's layers at the end."""
        return max(1, round(2 * self.r / 3)) if self.target_r is None else self.target_r

    @property
    def latents(self) -> int:
        """The number of latents z per token and layer: N if each head has its own latent, else 1; k in a mixture."""
        heads = self.num_heads or 1
        return (self.row.mixture and self.top_k) or heads if self.latents_per_head else 1

    @property
    def needs_ids(self) -> bool:
        """Whether training needs the tasks of the tokens."""
        return self.align is not None or self.row.by_task

    @property
    def needs_step(self) -> bool:
        """Whether training needs a step (align_ext/alignment): for a loss in addition to the model's, or for ids."""
        losses = self.balance or self.spectral or self.orth_reg_weight
        return self.needs_ids or bool(losses) or self.routing == "sequence"

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary; from_dict(to_dict()) is equal, also through JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AlignLoraConfig:
        """The inverse of to_dict.

        Raises:
            ValueError: an option is unknown (the message suggests one), or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(unknown_name("option", name, known))
        return cls(**options)
