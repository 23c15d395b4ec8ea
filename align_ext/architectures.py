"""The registry of architectures. A new architecture needs a class in align_ext/adapters and a row here."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Architecture = Literal[
    "align_lora", "lora", "multi_adapter", "lora_moe", "hydra", "r_lora", "m_lora", "mtlora", "multilora", "moelora",
    "mtlora_cvpr", "nlora", "malora", "mixlora", "adalora",
]  # fmt: skip


class Row(NamedTuple):
    """The properties of an architecture.

    Attributes:
        adapter: the adapter's class, as "module:name" in align_ext/adapters.
        formula: the term that it adds to W x.
        parameters: the trained parameters per layer, in n, m (in, out), r, N (num_heads), M (num_tasks), G
            (routing_groups) and d (shared_rank); behind ";", those of a block's router.
        paper: the paper; after "aligned: ", that of its alignment.
        defaults: the values for options that are "auto"; None: the option does not apply and may not be set.
        A_per_head: whether each head has its own A, so that no offset of rank r can subtract the initial heads.
        pissa: whether it can start from the base weight (init_lora_weights="pissa").
        by_task: whether what a layer computes depends on the task of the token, so that every token needs one.
        paths: the LoRAs of rank r that a token goes through, where there are no num_heads.
        mixture: whether its experts are whole feed-forward blocks behind one router (adapters/mixlora.py); layers in no
            such block get one LoRA.
    """

    adapter: str
    formula: str
    parameters: str
    paper: str
    defaults: Mapping[str, Any]
    A_per_head: bool = False
    pissa: bool = False
    by_task: bool = False
    paths: int = 1
    mixture: bool = False


_SCHEDULE: dict[str, Any] = dict.fromkeys(("target_r", "init_r", "tinit", "tfinal", "total_step"))  # of ranks
_ONE = {
    **_SCHEDULE, "deltaT": None, "beta1": None, "beta2": None, "orth_reg_weight": None,
    "align": None, "num_heads": None, "reduce": None, "router": None, "router_init": None, "routing": None,
    "routing_groups": None, "top_k": None, "router_temperature": None, "shared_rank": None, "dropout_site": "input",
    "init_lora_weights": "kaiming", "target_blocks": (), "balance": None, "spectral": None,
}  # fmt: skip
HEADS_OF_TASKS = 5  # as many heads as tasks, and this where they are not known; another number is the method's own
_SUMMED = {**_ONE, "num_heads": HEADS_OF_TASKS, "reduce": "sum", "dropout_site": "input_per_head"}
_ROUTED = {
    **_ONE, "num_heads": HEADS_OF_TASKS, "router": "linear", "router_init": "kaiming", "routing": "token",
    "routing_groups": 1, "top_k": 0, "router_temperature": 1.0,
}  # fmt: skip
_LATENT_MASKS = {"dropout_site": "latent", "init_lora_weights": "random_heads"}
_BLOCKS = {"routing_groups": 2, "target_blocks": ("mlp",), "balance": "cv2", "spectral": "paper"}

_LORA = ("lora:LoraAdapter", "s B A x", "r (n + m)", "2106.09685; aligned: 2508.05078")
ARCHITECTURES: Mapping[str, Row] = {
    "align_lora": Row(*_LORA, {**_ONE, "align": "kl"}, pissa=True),
    "lora": Row(*_LORA, _ONE, pissa=True),
    "multi_adapter": Row(
        "by_task:MultiAdapter", "s B_k A_k x, k the task", "M r (n + m)", "2508.05078, baseline", _ONE,
        A_per_head=True, by_task=True,
    ),
    "lora_moe": Row(
        "lora_moe:LoraMoeAdapter", "s Σ w_i(x) B_i A_i x", "N r (n + m) + N n", "2312.09979", _ROUTED, A_per_head=True
    ),
    "hydra": Row("hydra:HydraAdapter", "s Σ w_i(x) B_i A x", "r (n + N m) + N n", "2404.19245", _ROUTED),
    "r_lora": Row(
        "r_lora:RLoraAdapter", "s Σ w_i(x) B_i (mask_i * A x)", "r (n + N m) + N n",
        "2502.15455, eq. 4-6 and Table 1", {**_ROUTED, **_LATENT_MASKS},
    ),
    "m_lora": Row(
        "m_lora:MLoraAdapter", "s c Σ B_i (mask_i * A x)", "r (n + N m)", "2508.05078", {**_SUMMED, **_LATENT_MASKS}
    ),
    "mtlora": Row(
        "mtlora:MtLoraAdapter", "s Σ w_gi(x) B_gi A x, by group g of outputs", "r (n + N m) + G N n", "2603.01526",
        {**_ROUTED, **_BLOCKS},
    ),
    "multilora": Row(
        "multilora:MultiLoraAdapter", "s Σ c_i * B_i A_i x, c_i trained", "N r (n + m) + N m", "2311.11501",
        {**_ONE, "num_heads": HEADS_OF_TASKS}, A_per_head=True,
    ),
    "moelora": Row(
        "moelora:MoeLoraAdapter", "s Σ w_ki B_i A_i x, k the task", "N r (n + m) + 64 (M + N)", "2310.18339",
        {**_ONE, "num_heads": 8}, A_per_head=True, by_task=True,
    ),
    "mtlora_cvpr": Row(
        "mtlora_cvpr:MtLoraCvprAdapter", "s (B_0 A_0 + B_k A_k) x, k the task", "(1 + M) r (n + m)",
        "MTLoRA, CVPR 2024", _ONE, A_per_head=True, by_task=True, paths=2,
    ),
    "nlora": Row(
        "nlora:NLoraAdapter", "s (B N A - B0 A0) x", "r (n + m + r)", "2502.14482",
        {**_ONE, "init_lora_weights": "nystrom"},
    ),
    "malora": Row(
        "malora:MaLoraAdapter", "s Σ w_i(x) B_i C_i S x, S d rows", "d n + N r (d + m) + N n", "2410.22782",
        {**_ROUTED, "num_heads": 8, "top_k": 2, "shared_rank": 16}, A_per_head=True,
    ),
    "mixlora": Row(
        "mixlora:MixLoraAdapter", "s B_i A_i x in each layer of FFN_i; a block gives Σ w_i(x) FFN_i(x)",
        "N r (n + m); a block N n", "2404.15159",
        {**_ROUTED, "num_heads": 8, "top_k": 2, "routing": None, "routing_groups": None, "balance": "switch"},
        A_per_head=True, mixture=True,
    ),
    "adalora": Row(
        "adalora:AdaLoraAdapter", "s P Λ Q x, Λ diagonal, pruned", "r (n + m + 1)", "2303.10512",
        {
            **{name: default for name, default in _ONE.items() if name not in _SCHEDULE},
            "init_lora_weights": "gaussian", "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.1,
        },
    ),
}  # fmt: skip
HYDRA_WITHOUT_ROUTER = Row(
    "hydra:HydraSumAdapter", "s Σ B_i A (mask_i * x)", "r (n + N m)", "2404.19245, released code", _SUMMED
)
