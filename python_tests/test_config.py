"""AlignLoraConfig: defaults, validation, JSON."""

import json
import math
from typing import get_args

import pytest

from align_ext import AlignLoraConfig
from align_ext.architectures import ARCHITECTURES, Architecture


def test_the_defaults_are_the_papers():
    config = AlignLoraConfig()
    assert (config.architecture, config.r, config.lora_alpha, config.lora_dropout) == ("align_lora", 8, 32, 0.1)
    assert (config.align, config.align_weight) == ("kl", 0.1)
    assert config.target_modules == "auto"
    assert config.scaling == 4


def test_every_architecture_has_a_row():
    assert get_args(Architecture) == tuple(ARCHITECTURES)


def test_the_help_of_an_option_says_what_its_default_is_where_few_architectures_have_it():
    told = {
        "top_k": [("malora", 2), ("mixlora", 2)], "shared_rank": [("malora", 16)], "deltaT": [("adalora", 1)],
        "beta1": [("adalora", 0.85)], "beta2": [("adalora", 0.85)], "orth_reg_weight": [("adalora", 0.1)],
        "balance": [("mtlora", "cv2"), ("mixlora", "switch")],
    }  # fmt: skip
    for name, values in told.items():
        text = AlignLoraConfig.__dataclass_fields__[name].metadata["help"].partition("by default")[2]
        for architecture, default in values:
            assert ARCHITECTURES[architecture].defaults[name] == default
            assert str(default) in text, name
        others = {architecture for architecture in ARCHITECTURES if ARCHITECTURES[architecture].defaults.get(name)}
        assert others == {architecture for architecture, _ in values}


def test_plain_lora_has_no_alignment_unless_asked():
    assert AlignLoraConfig(architecture="lora").align is None
    assert AlignLoraConfig(architecture="lora", align="kl").align_weight == 0.1
    assert AlignLoraConfig(align=None).align is None
    assert AlignLoraConfig(align_weight=0.0).align_weight == 0.0


def test_rslora_divides_by_the_root_of_the_rank():
    assert AlignLoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 8 / math.sqrt(16)


@pytest.mark.parametrize(
    "options", [{}, {"align": None}, {"target_modules": "all-linear"}, {"target_modules": ["a", "b"], "num_tasks": 5}]
)
def test_json_round_trip(options):
    config = AlignLoraConfig(**options)
    assert AlignLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.5}, "r must be a positive integer, got 2.5"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"align": "kld"}, "unknown align 'kld'; did you mean 'kl'"),
        ({"align": "MMD"}, "unknown align 'MMD'; did you mean 'mmd'"),
        ({"align": "None"}, r"unknown align 'None'; did you mean None\? \(known: kl, mmd, l2, None\)"),
        ({"architecture": "aling_lora"}, "unknown architecture 'aling_lora'; did you mean 'align_lora'"),
        ({"align_weight": -1}, "align_weight must be a number >= 0"),
        ({"num_tasks": 0}, "num_tasks must be a positive integer, or None, got 0"),
        ({"target_modules": "*_proj"}, "is no regular expression"),
        ({"target_modules": None}, "target_modules must be module names or a regular expression, got None"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"target_modules": ()}, "target_modules must be suffixes"),
        ({"align_eps": 0}, "align_eps must be a positive number"),
        ({"align_ddof": 2}, "align_ddof must be 0 or 1"),
        ({"align_pairs": "max"}, "align_pairs must be"),
        ({"align_layers": "max"}, "align_layers must be"),
        ({"adapter_dtype": "int8"}, "adapter_dtype must be"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        AlignLoraConfig(**options)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="unknown option 'lora_aplha'; did you mean 'lora_alpha'"):
        AlignLoraConfig.from_dict({"lora_aplha": 3})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"architecture": "lora"}, {"num_heads": None, "router": None, "dropout_site": "input", "align": None}),
        ({"architecture": "multi_adapter", "num_tasks": 3}, {"num_heads": None, "needs_ids": True, "latents": 1}),
        (
            {"architecture": "lora_moe"},
            {"num_heads": 5, "top_k": 0, "routing_groups": 1, "latents": 5, "needs_step": False},
        ),
        (
            {"architecture": "hydra"},
            {"router": "linear", "router_init": "kaiming", "dropout_site": "input", "init_lora_weights": "kaiming"},
        ),
        (
            {"architecture": "hydra", "router": None},
            {"reduce": "sum", "dropout_site": "input_per_head", "latents": 5, "router_init": None},
        ),
        (
            {"architecture": "r_lora"},
            {"router_init": "zeros", "dropout_site": "latent", "init_lora_weights": "random_heads", "latents": 1},
        ),
        (
            {"architecture": "m_lora"},
            {"router": None, "reduce": "sum", "dropout_site": "latent", "init_lora_weights": "random_heads"},
        ),
        (
            {"architecture": "mtlora"},
            {
                "routing_groups": 2, "target_blocks": ("mlp",), "balance": "cv2", "spectral": "paper",
                "spectral_weight": 2e-3, "balance_weight": 0.01, "needs_step": True, "needs_ids": False,
            },
        ),
        ({"architecture": "multilora"}, {"num_heads": 5, "latents": 5, "router": None, "needs_step": False}),
        ({"architecture": "moelora", "num_tasks": 3}, {"num_heads": 8, "latents": 8, "needs_ids": True}),
        ({"architecture": "mtlora_cvpr", "num_tasks": 3}, {"num_heads": None, "latents": 1, "needs_ids": True}),
        ({"architecture": "nlora"}, {"init_lora_weights": "nystrom", "shared_rank": None, "latents": 1}),
        (
            {"architecture": "adalora", "r": 12},
            {"final_rank": 8, "deltaT": 1, "beta1": 0.85, "orth_reg_weight": 0.1, "align": None, "needs_ids": False},
        ),
        ({"architecture": "adalora", "init_r": 6, "orth_reg_weight": 0.0}, {"r": 6, "needs_step": False}),
        ({"architecture": "malora"}, {"num_heads": 8, "top_k": 2, "shared_rank": 16, "latents": 8, "balance": None}),
        (
            {"architecture": "mixlora"},
            {
                "num_heads": 8, "top_k": 2, "balance": "switch", "balance_weight": 0.01, "latents": 2, "align": None,
                "routing_groups": None, "needs_step": True, "needs_ids": False,
            },
        ),
        ({"architecture": "mixlora", "top_k": 0, "balance": "cv2"}, {"latents": 8}),
        ({"architecture": "r_lora", "init_lora_weights": "kaiming"}, {"router_init": "kaiming"}),
        ({"architecture": "hydra", "init_lora_weights": "random_heads"}, {"router_init": "zeros"}),
        ({"align_statistics": "position"}, {"align_ddof": 1, "align_pairs": "mean"}),
        ({"align": "mmd"}, {"align_weight": 0.15}),
    ],
)  # fmt: skip
def test_what_an_architecture_takes_where_nothing_is_said(options, expected):
    config = AlignLoraConfig(**options)
    assert {name: getattr(config, name) for name in expected} == expected
    assert AlignLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("hydra", {"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ("hydra", {"num_heads": None}, "num_heads=None: architecture 'hydra' needs it; leave it out for 5"),
        ("lora_moe", {"top_k": 6}, "top_k must be in 1 .. num_heads = 5, or 0 for all heads, got 6"),
        ("lora_moe", {"top_k": None}, "top_k=None: architecture 'lora_moe' needs it"),
        ("mtlora", {"routing_groups": 0}, "routing_groups must be a positive integer, got 0"),
        ("mtlora", {"router_temperature": 0}, "router_temperature must be a positive number"),
        ("mtlora", {"target_blocks": "mlp"}, "target_blocks must be of"),
        ("mtlora", {"target_blocks": ["head"]}, "target_blocks must be of"),
        ("mtlora", {"spectral_steps": 0}, "spectral_steps must be a positive integer"),
        ("mtlora", {"balance": "gini"}, 'balance must be "cv2" or "switch"'),
        ("mtlora", {"spectral": "svd"}, 'spectral must be "paper" or "uniform" or "released"'),
        ("mtlora", {"balance": "switch"}, "where every head takes every token it is a constant"),
        ("r_lora", {"router": None}, "router=None: architecture 'r_lora' needs it; leave it out for 'linear'"),
        ("r_lora", {"router": "cnn"}, 'router must be "linear" or "mlp"'),
        ("r_lora", {"dropout_site": "output"}, "dropout_site must be"),
        ("r_lora", {"top_k": 2}, "top_k=2: of equal logits the first win"),
        ("lora", {"num_heads": 3}, "num_heads=3: architecture 'lora' has no num_heads; leave it out"),
        ("lora", {"reduce": "mean"}, "architecture 'lora' has no reduce"),
        ("lora", {"balance": "cv2"}, "balance='cv2': architecture 'lora' has no router"),
        ("lora", {"spectral": "paper"}, "spectral='paper': architecture 'lora' has no heads"),
        ("lora", {"dropout_site": "latent"}, "lora has one mask, on the input"),
        ("lora", {"init_lora_weights": "random_heads"}, "random heads are for hydra, r_lora, m_lora and mtlora"),
        ("lora", {"init_lora_weights": "xavier"}, "init_lora_weights must be"),
        ("lora", {"init_lora_weights": "orthogonal", "r": 5}, "choose an even r"),
        ("lora", {"init_lora_weights": "pissa", "target_blocks": ["mlp"]}, "PiSSA starts one adapter"),
        ("hydra", {"init_lora_weights": "pissa"}, "PiSSA starts one adapter"),
        ("hydra", {"reduce": "sum"}, "architecture 'hydra' has no reduce"),
        ("hydra", {"router": None, "top_k": 2}, "architecture 'hydra' without a router has no top_k"),
        ("hydra", {"router": None, "balance": "cv2"}, "architecture 'hydra' without a router has no router"),
        ("hydra", {"router": None, "lora_dropout": 0.0}, "without masks of their own stay identical"),
        ("hydra", {"router": None, "dropout_site": "input"}, "without masks of their own stay identical"),
        ("hydra", {"router_init": "zeros"}, "heads that start at zero with equal weights stay identical"),
        ("hydra", {"router": "mlp"}, 'the router "mlp" is for routing="sequence"'),
        ("hydra", {"routing": "sequence"}, 'the router "mlp" is for routing="sequence"'),
        ("m_lora", {"router": "linear"}, "architecture 'm_lora' has no router"),
        ("m_lora", {"reduce": "max"}, 'reduce must be "sum" or "mean"'),
        ("multi_adapter", {}, "multi_adapter has an adapter for each task: say how many there are"),
        ("moelora", {}, "moelora has an adapter for each task: say how many there are"),
        ("moelora", {"num_tasks": 2, "spectral": "paper"}, "architecture 'moelora' has no heads"),
        ("hydra", {"shared_rank": 4}, "shared_rank=4: architecture 'hydra' has no shared_rank; leave it out"),
        ("malora", {"shared_rank": 0}, "shared_rank must be a positive integer"),
        ("malora", {"init_lora_weights": "orthogonal"}, 'start malora by "kaiming" or "gaussian"'),
        ("mixlora", {"num_heads": 2}, "where every head takes every token it is a constant"),
        ("mixlora", {"target_blocks": ["mlp"]}, "the layers of its blocks are adapted: name them in target_modules"),
        ("mixlora", {"routing_groups": 2}, "architecture 'mixlora' has no routing_groups"),
        ("mixlora", {"routing": "sequence"}, "architecture 'mixlora' has no routing"),
        ("mixlora", {"router": "mlp"}, 'the router "mlp" is for routing="sequence"'),
        ("mixlora", {"spectral": "paper"}, "architecture 'mixlora' has no heads"),
        ("mixlora", {"use_dora": True}, "DoRA rescales one adapted weight"),
        ("mixlora", {"align": "kl", "align_statistics": "position"}, "not for latents of each head"),
        ("nlora", {"init_lora_weights": "orthogonal"}, "nlora starts from one weight"),
        ("nlora", {"target_blocks": ["mlp"]}, "nlora starts from one weight"),
        ("adalora", {"init_lora_weights": "pissa"}, "adalora starts from Λ = 0"),
        ("adalora", {"use_dora": True}, "DoRA has no form for ranks that are pruned"),
        ("adalora", {"rank_pattern": {"q_proj": 2}}, "begin with one rank and one scaling"),
        ("adalora", {"alpha_pattern": {"q_proj": 2}}, "begin with one rank and one scaling"),
        ("adalora", {"target_r": 9}, "ranks fall from r=8 to it"),
        ("adalora", {"init_r": 0}, "init_r must be a positive integer, got 0"),
        ("adalora", {"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
        ("adalora", {"deltaT": None}, "architecture 'adalora' needs it"),
        ("adalora", {"tinit": 4, "tfinal": 6, "total_step": 10}, "leave no step in which ranks fall"),
        ("lora", {"target_r": 4}, "architecture 'lora' has no target_r"),
        ("lora", {"init_r": 4}, "architecture 'lora' has no init_r"),
        ("hydra", {"orth_reg_weight": 0.5}, "architecture 'hydra' has no orth_reg_weight"),
        ("lora", {"init_lora_weights": "nystrom"}, "it starts a matrix between A and B: use nlora"),
        ("lora_moe", {"init_lora_weights": "random_heads"}, "heads on one A"),
        ("lora_moe", {"dropout_site": "latent"}, "lora_moe has one mask, on the input"),
        ("align_lora", {"align": "mmd", "align_statistics": "position"}, 'per position means align="kl"'),
        ("align_lora", {"response_only": True, "align_statistics": "position"}, "response_only=False"),
        ("lora_moe", {"align": "kl", "align_statistics": "position"}, "not for latents of each head"),
        ("align_lora", {"mmd_bandwidths": []}, "mmd_bandwidths must be 1 to 32 positive numbers"),
        ("align_lora", {"mmd_kernels": 33}, "mmd_kernels must be in 1 .. 32"),
        ("align_lora", {"mmd_n_max": 1}, "mmd_n_max must be an integer of at least 2"),
        ("align_lora", {"mmd_statistic": "w"}, 'mmd_statistic must be "v" or "u"'),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_with_the_reason(architecture, options, message):
    with pytest.raises(ValueError, match=message):
        AlignLoraConfig(architecture=architecture, **options)
