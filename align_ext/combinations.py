"""Which options of AlignLoraConfig exclude one another, or need another."""

from collections.abc import Callable
from typing import Any

from align_ext.system.messages import shown


def check_combinations(config: Any) -> None:
    """Raises ValueError, naming the option, its value and the cure, if options do not go together.

    Args:
        config: an AlignLoraConfig of which each option by itself is valid.
    """

    def refuse(option: str, why: str) -> None:
        raise ValueError(f"{option}={shown(getattr(config, option))}: {why}")

    for name in ("layers_to_transform", "rank_pattern", "alpha_pattern"):
        if config.target_blocks and getattr(config, name):
            refuse(name, "it is about linear layers, and whole blocks are adapted: leave it or target_blocks out")
    whole = isinstance(config.target_modules, str) and config.target_modules not in ("all-linear", "auto")
    if config.layers_to_transform and whole:
        refuse("layers_to_transform", "target_modules is a regular expression: say in it which layers are meant")
    if config.layers_pattern and not config.layers_to_transform:
        refuse("layers_pattern", "it does nothing without layers_to_transform: give that too, or leave it out")
    if config.bias == "lora_only" and config.target_blocks:
        refuse("bias", 'whole blocks are adapted, which have no bias of their own: take "all", or linear layers')
    if config.lora_bias and (config.architecture not in ("lora", "align_lora") or config.target_blocks):
        refuse("lora_bias", "it is the bias of a layer's only B: for lora and align_lora beside linear layers")
    if not config.target_modules and not config.target_parameters:
        raise ValueError(
            'target_modules must be suffixes of module names, a regular expression or "all-linear", got '
            f"{shown(config.target_modules)}"
        )
    if config.target_parameters and config.architecture not in ("lora", "align_lora"):
        refuse("target_parameters", "an expert gets one A and one B: use lora or align_lora, or leave it out")
    if config.target_parameters and config.lora_bias:
        refuse("lora_bias", "experts get A and B alone: leave it or target_parameters out")
    if config.target_parameters and config.use_dora:
        refuse("use_dora", "DoRA's norms are of one weight, and experts have many: leave it or target_parameters out")
    if config.target_parameters and config.init_lora_weights == "pissa":
        refuse("init_lora_weights", "PiSSA starts from one weight, and experts have many: leave it or "
               "target_parameters out")  # fmt: skip
    if config.architecture == "adalora":
        _check_adalora(config, refuse)
    several = (config.num_heads or 1) > 1
    random = config.init_lora_weights in ("random_heads", "orthogonal")
    A_per_head = config.row.A_per_head
    if config.row.by_task and config.num_tasks is None:
        refuse("num_tasks", f"{config.architecture} has an adapter for each task: say how many there are")
    if config.init_lora_weights == "random_heads" and (config.num_heads is None or A_per_head):
        refuse("init_lora_weights", "random heads are for hydra, r_lora, m_lora and mtlora, heads on one A")
    if config.init_lora_weights == "pissa" and (not config.row.pissa or config.target_blocks):
        refuse("init_lora_weights", "PiSSA starts one adapter from one weight: use lora or align_lora, no blocks")
    start = config.init_lora_weights
    if config.architecture == "nlora" and (start == "orthogonal" or (start == "nystrom" and config.target_blocks)):
        refuse("init_lora_weights", 'nlora starts from one weight by "nystrom", or as SLoRA by "kaiming" or '
               '"gaussian", which blocks take too: choose one of these')  # fmt: skip
    if config.architecture == "malora" and config.init_lora_weights == "orthogonal":
        refuse("init_lora_weights", 'A_i is a product of two matrices: start malora by "kaiming" or "gaussian"')
    if config.row.mixture and config.target_blocks:
        refuse("target_blocks", "the layers of its blocks are adapted: name them in target_modules, and leave it out")
    if config.init_lora_weights == "nystrom" and config.architecture != "nlora":
        refuse("init_lora_weights", "it starts a matrix between A and B: use nlora, or start otherwise")
    if config.use_dora and (config.router is not None or config.row.by_task):
        refuse("use_dora", "DoRA rescales one adapted weight, and there is one for each input or task: use lora, "
               "align_lora, m_lora, multilora, nlora, or hydra with router=None")  # fmt: skip
    if config.use_dora and config.lora_bias:
        refuse("lora_bias", "DoRA rescales what B returns, and PEFT knows no bias there: leave it or use_dora out")
    if config.use_dora and config.target_blocks:
        refuse("use_dora", "a whole block has no one weight: leave target_blocks out")
    if config.init_lora_weights == "orthogonal" and config.r % 2:
        refuse("r", "orthogonal initialisation halves the rank: choose an even r")
    if config.dropout_site != "input" and (config.num_heads is None or A_per_head):
        refuse("dropout_site", f"{config.architecture} has one mask, on the input")
    masked = config.dropout_site != "input" and config.lora_dropout > 0
    if config.router_init == "zeros" and several and not random and not A_per_head and not masked:
        refuse("router_init", "heads that start at zero with equal weights stay identical: use random heads")
    if config.router_init == "zeros" and config.top_k and config.top_k < (config.num_heads or 1):
        refuse("top_k", 'of equal logits the first win: router_init="zeros" would leave the other heads untrained')
    alike = config.router is None and several and not random and not A_per_head
    if alike and not masked:
        refuse("lora_dropout", "heads that start at zero without masks of their own stay identical: use dropout "
               "at latent or input_per_head, or random heads")  # fmt: skip
    if config.balance == "switch" and not 0 < (config.top_k or 0) < (config.num_heads or 1):
        refuse("balance", 'where every head takes every token it is a constant: choose a top_k, or "cv2"')
    if (config.router == "mlp") != (config.routing == "sequence") and config.router is not None:
        refuse("routing", 'the router "mlp" is for routing="sequence", and "linear" for routing="token"')
    if config.align_statistics == "position":
        if config.align != "kl" or config.response_only:
            refuse("align_statistics", 'per position means align="kl" over all tokens, response_only=False')
        if config.num_heads is not None and config.latents_per_head:
            refuse("align_statistics", "per position there is one latent a token: not for latents of each head")


def _check_adalora(config: Any, refuse: Callable[[str, str], None]) -> None:
    if config.init_lora_weights != "gaussian":
        refuse("init_lora_weights", "adalora starts from Λ = 0 with P and Q of N(0, 0.02²): leave it out")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            refuse(name, "the layers of adalora begin with one rank and one scaling, and compete: leave it out")
    if config.use_dora:
        refuse("use_dora", "DoRA has no form for ranks that are pruned: leave it out, or use lora")
    if config.target_r is not None and config.target_r > config.r:
        refuse("target_r", f"ranks fall from r={config.r} to it: choose a target_r <= r")
    total = config.total_step
    if total is not None and (config.tinit or 0) + (config.tfinal or 0) >= total:
        refuse("total_step", f"tinit={config.tinit} and tfinal={config.tfinal} leave no step in which ranks fall: "
               "choose smaller ones, or more steps")  # fmt: skip
