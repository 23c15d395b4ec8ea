"""Options of the training job: each mistake has its own line, and files and flags mean the same."""

import pytest
import yaml

from align_ext.config import AlignLoraConfig
from align_ext.hf.options import TrainOptions, read_config


def test_options_survive_a_yaml_file(tmp_path):
    options = TrainOptions(tasks=("a", "b"), lr=1e-3, align="none", output="x", overwrite=True)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(options.to_dict()))
    assert TrainOptions.from_mapping(read_config(tmp_path / "x.yaml")) == options


def test_a_file_may_be_written_as_people_write_them(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 2e-4\nbatch-size: 4\nlora_alpha: 16\ntasks: a, b\nalign: null\nmodel:\n")
    options = TrainOptions.from_mapping(read_config(tmp_path / "x.yaml"))
    assert (options.lr, options.batch_size, options.lora_alpha) == (2e-4, 4, 16.0)
    assert (options.tasks, options.align, options.model) == (("a", "b"), "none", None)
    (tmp_path / "empty.yaml").write_text("# all defaults\n")
    assert TrainOptions.from_mapping(read_config(tmp_path / "empty.yaml")) == TrainOptions()


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
        ({"warmup": 1}, r"warmup must be in \[0, 1\)"),
        ({"overwrite": "yes"}, "overwrite must be of type bool"),
        ({"tasks": [1, 2]}, "tasks must be"),
        ({"align": "mmd2"}, "align must be one of auto, kl, none"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"architecture": "lora2"}, "unknown architecture 'lora2'; did you mean"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"batch_size": 3}, "batch_size must be at least 4"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainOptions.from_mapping(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [": [", "- a\n- b\n", "words"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"x\.yaml") as caught:
        read_config(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_that_builds_python_objects_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    with pytest.raises(ValueError, match="not YAML"):
        read_config(tmp_path / "x.yaml")
    assert not (tmp_path / "ran").exists()


def test_small_batches_are_fine_without_alignment():
    assert TrainOptions(batch_size=1, align="none").adapter_config(1).align is None
    assert TrainOptions(batch_size=1, architecture="lora").adapter_config(1).align is None


def test_adapter_options_reach_the_adapters_and_their_defaults_agree():
    assert TrainOptions().adapter_config(5) == AlignLoraConfig(num_tasks=5)
    options = TrainOptions(r=3, lora_alpha=5.0, lora_dropout=0.0, target_modules=("q_proj",), align_weight=0.5)
    config = options.adapter_config(2)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.align_weight) == (3, 5.0, 0.0, 0.5)
    assert config.target_modules == ("q_proj",)
