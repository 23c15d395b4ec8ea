"""Options of the training job: each mistake has its own line, and files and flags mean the same."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml

from align_ext.architectures import Architecture
from align_ext.config import AUTO, AlignLoraConfig
from align_ext.system.bounds import default_of
from align_ext.system.reading import read_yaml
from align_ext.training.options import TrainOptions, known_options

NOT_BY_DEVICE = {"per_device_train_batch_size": None}


def test_options_survive_a_yaml_file(tmp_path):
    adapter = {"align": None, "target_modules": r".*(up|down)_proj", "mmd_bandwidths": (1.0, 2.0), "num_tasks": 3}
    options = TrainOptions(tasks=("a", "b"), lr=1e-3, output="x", overwrite=True, adapter=adapter)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(options.to_dict()))
    assert TrainOptions.from_mapping(read_yaml(tmp_path / "x.yaml")) == options


def test_a_file_may_be_written_as_people_write_them(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 2e-4\nbatch-size: 4\nlora_alpha: 16\ntasks: a, b\nalign: null\nmodel:\n")
    options = TrainOptions.from_mapping(read_yaml(tmp_path / "x.yaml"))
    assert (options.lr, options.batch_size, options.adapter["lora_alpha"]) == (2e-4, 4, 16.0)
    assert (options.tasks, options.adapter["align"], options.model) == (("a", "b"), None, None)
    (tmp_path / "empty.yaml").write_text("# all defaults\n")
    assert TrainOptions.from_mapping(read_yaml(tmp_path / "empty.yaml")) == TrainOptions()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bathc_size": 4}, "'bathc_size'; did you mean 'batch_size'"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 1.5}, "steps must be of type int, got 1.5"),
        ({"steps": True}, "steps must be of type int"),
        ({"steps": None}, "steps must be of type int"),
        ({"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"lr": -1}, "lr must be a positive number"),
        ({"warmup": 1.5}, r"warmup must be in \[0, 1\), or a number of steps"),
        ({"overwrite": "yes"}, "overwrite must be of type bool"),
        ({"tasks": [1, 2]}, "tasks must be"),
        ({"align": "mmd2"}, "unknown align 'mmd2'; did you mean 'mmd'"),
        ({"learning_rat": 1}, "unknown option 'learning_rat'; did you mean 'learning_rate'"),
        ({"config": "x.yaml"}, "config is a flag of the command and no option of a file: leave it out"),
        ({"dry-run": True}, "dry_run is a flag of the command"),
        ({"max_steps": 3, "num_train_epochs": 1}, "steps=3 and epochs=1.0 are both given, and epochs takes the place"),
        ({"batch_size": 8, "per-device-train-batch-size": 2}, "batch_size=8 and per_device_train_batch_size=2 are"),
        ({"hub_model_id": "a/b"}, "hub_model_id does nothing without push_to_hub: give that too, or leave it out"),
        ({"run_name": "x"}, "run_name does nothing without report_to"),
        ({"save_total_limit": 3}, "save_total_limit does nothing without save_steps"),
        ({"metric_for_best_model": "eval_loss"}, "does nothing without load_best_model_at_end or early_stopping_patie"),
        ({"mixing_temperature": 3}, "mixing_temperature does nothing without mixing"),
        ({"columns": "prompt=q"}, "columns does nothing without data"),
        ({"lora_aplha": 2}, "unknown option 'lora_aplha'; did you mean 'lora_alpha'"),
        ({"num_heads": 2.5}, "num_heads must be of type int or none, got 2.5"),
        ({"r": "auto"}, "r must be of type int, got 'auto'"),
        ({"mmd_bandwidths": "1,wide"}, "mmd_bandwidths must be of type"),
        ({"router": "linaer", "architecture": "hydra"}, "unknown router 'linaer'; did you mean 'linear'"),
        ({"num_heads": 3}, "architecture 'align_lora' has no num_heads"),
        ({"target_modules": "none"}, "target_modules must be suffixes"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"architecture": "lora2"}, "unknown architecture 'lora2'; did you mean"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"batch_size": 3}, "batch_size must be at least 4"),
        ({"batch_size": 5, "per_task": 3}, "batch_size must be at least 6 to hold per_task=3 examples of two tasks"),
        ({"mixing": "eqal"}, "mixing must be one of proportional, temperature, equal, round_robin, got 'eqal'"),
        ({"mixing_temperature": 0.5}, "mixing_temperature must be a number of at least 1"),
        ({"align_schedule": "none"}, "align_schedule must be one of constant, linear, cosine"),
        ({"align_warmup": 1.0}, r"align_warmup must be in \[0, 1\)"),
        ({"save_steps": -1}, "save_steps must be 0 or a positive integer"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainOptions.from_mapping(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (({"epochs": 1}, {"steps": 2}), {"steps": 2, "epochs": None}),
        (({"steps": 2}, {"num_train_epochs": 1}), {"steps": 40, "epochs": 1.0}),
        (({"steps": 2}, {"epochs": "none"}), {"steps": 2, "epochs": None}),
        (({"epochs": None, "steps": 2},), {"steps": 2, "epochs": None}),
        (
            ({"per_device_train_batch_size": 4}, {"batch_size": 6}),
            {"batch_size": 6, "per_device_train_batch_size": None},
        ),
        (({"batch_size": 6}, {"per_device_train_batch_size": 4}), {"batch_size": 8, "per_device_train_batch_size": 4}),
        (({"hub_model_id": "a/b", "push_to_hub": True}, {"push_to_hub": False}), {"push_to_hub": False}),
        (({"run_name": "x"}, {"report_to": "none"}), {"run_name": "x", "report_to": ()}),
    ],
)
def test_what_is_given_later_wins_and_the_whole_survives_a_file(sources, found):
    options = TrainOptions.from_mapping(*sources)
    assert {name: getattr(options, name) for name in found} == found
    assert TrainOptions.from_mapping(yaml.safe_load(yaml.safe_dump(options.to_dict()))) == options


@pytest.mark.parametrize("content", [": [", "- a\n- b\n", "words"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"x\.yaml") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_that_builds_python_objects_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    with pytest.raises(ValueError, match="not YAML"):
        read_yaml(tmp_path / "x.yaml")
    assert not (tmp_path / "ran").exists()


def test_small_batches_are_fine_without_alignment():
    for values in ({"align": "none"}, {"architecture": "lora"}):
        assert TrainOptions.from_mapping({"batch_size": 1, **values}).adapter_config(1).align is None


def test_every_option_of_the_adapters_is_an_option_with_the_same_default_and_a_text():
    known = known_options()
    for option in fields(AlignLoraConfig):
        assert known[option.name].of_adapter
        assert len(known[option.name].help) > 3, option.name
        assert known[option.name].default == default_of(option)
    assert known["r"].help == "rank of A and B."
    assert known["response_only"].help.endswith("all but padding).")
    assert not known["seed"].of_adapter


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_is_one_word_and_its_defaults_are_its_own(architecture):
    config = TrainOptions.from_mapping({"architecture": architecture}).adapter_config(5)
    assert config == AlignLoraConfig(architecture=architecture, num_tasks=5)
    printed = TrainOptions.from_mapping({"architecture": architecture}).to_dict()
    other = TrainOptions.from_mapping({**printed, "architecture": "r_lora"})
    assert other == TrainOptions.from_mapping({"architecture": "r_lora"}), "so that one word can be changed in a file"
    assert printed["num_heads"] == AUTO


@pytest.mark.parametrize("align", ["kl", "mmd", "none"])
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_takes_every_alignment(architecture, align):
    options = TrainOptions.from_mapping({"architecture": architecture, "align": align})
    assert options.adapter_config(5).align == (None if align == "none" else align)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("target_modules", "q_proj", ("q_proj",)),
        ("target_modules", ["mlp.c_fc"], ("mlp.c_fc",)),
        ("target_modules", r"model\.layers\.\d+\..*", r"model\.layers\.\d+\..*"),
        ("target_modules", "layers.{1,2}_proj", "layers.{1,2}_proj"),
        ("exclude_modules", "none", ()),
        ("target_blocks", "attention,mlp", ("attention", "mlp")),
        ("mmd_bandwidths", "0.5,2", (0.5, 2.0)),
        ("mmd_bandwidths", [1, 2], (1.0, 2.0)),
        ("mmd_bandwidths", "none", None),
        ("align", "none", None),
        ("align_weight", "0.5", 0.5),
        ("num_tasks", "7", 7),
        ("use_rslora", True, True),
        ("use_dora", True, True),
        ("init_lora_weights", "pissa", "pissa"),
    ],
)
def test_words_of_a_file_or_flag_become_the_adapters_options(name, given, meant):
    config = TrainOptions.from_mapping({name: given, "align": "kl"} | {name: given}).adapter_config(2)
    assert getattr(config, name) == meant


def test_routed_options_and_none_for_a_part_reach_the_adapters():
    given = {"architecture": "mtlora", "target_blocks": "none", "spectral": "none", "num_heads": "3", "top_k": 2}
    config = TrainOptions.from_mapping(given).adapter_config(2)
    assert (config.target_blocks, config.spectral, config.num_heads, config.top_k) == ((), None, 3, 2)
    assert TrainOptions.from_mapping({"architecture": "hydra", "router": "none"}).adapter_config(2).router is None


@pytest.mark.parametrize("name", ["align", "router", "router_init", "reduce", "routing", "balance", "spectral"])
@pytest.mark.parametrize("value", ["None", "NONE", "nnone"])
def test_of_choices_that_may_be_none_the_word_that_is_accepted_is_offered(name, value):
    with pytest.raises(ValueError, match=rf"unknown {name} '{value}'; did you mean 'none'\? \(known: .*, none\)"):
        TrainOptions.from_mapping({name: value})
    with pytest.raises(ValueError, match=r"top_k must be of type int or none, got 'None'"):
        TrainOptions.from_mapping({"top_k": "None"})


def test_adapter_options_reach_the_adapters_and_their_defaults_agree():
    assert TrainOptions().adapter_config(5) == AlignLoraConfig(num_tasks=5)
    adapter = {"r": 3, "lora_alpha": 5.0, "target_modules": ("q_proj",), "align_weight": 0.5, "num_tasks": 9}
    config = TrainOptions(adapter=adapter).adapter_config(2)
    assert (config.r, config.lora_alpha, config.align_weight, config.num_tasks) == (3, 5.0, 0.5, 9)
    assert config.target_modules == ("q_proj",)
    with pytest.raises(ValueError, match="num_tasks must be at least 10, the tasks of the data, or none, got 9"):
        TrainOptions(adapter=adapter).adapter_config(10)
    with pytest.raises(ValueError, match="unknown option of the adapters 'ranks'"):
        TrainOptions(adapter={"ranks": 3})


def test_every_option_is_given_in_a_test():
    texts = [path.read_text() for path in Path(__file__).parents[1].rglob("*.py")]
    given = {word for text in texts for word in re.findall(r"\w+", text.replace("-", "_"))}
    assert [name for name in known_options() if name not in given and f"__{name}" not in given] == []
