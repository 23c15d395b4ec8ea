"""Options that go to TrainingArguments, by both names, and those of the job around it."""

import dataclasses
import json
import re
from importlib.util import find_spec

import pytest
import torch
from hf.words import llama, model_folder, qwen3, write_rows
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align_ext.training import fit, trial
from align_ext.training.option_values import alternatives
from align_ext.training.options import TrainOptions, known_options
from align_ext.training.run_folder import RunFolder
from align_ext.training.trainer_options import check_field

# Of each option that has a field of TrainingArguments: a value that is not the default, and what arrives.
PASSED = {
    "steps": 7, "accumulation": 3, "lr": 1e-3, "warmup": 5.0, "lr_scheduler_type": "linear", "optim": "sgd",
    "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0.5,
    "eval_batch_size": 3, "bf16": True, "torch_compile": True, "dataloader_num_workers": 2,
    "log_steps": 2, "report_to": ["tensorboard"], "run_name": "mine", "save_total_limit": 4,
    "metric_for_best_model": "eval_loss/a", "load_best_model_at_end": True,
}  # fmt: skip
BEST = {"eval_steps": 2, "save_steps": 4}
NEEDED = {"load_best_model_at_end": BEST, "metric_for_best_model": {"load_best_model_at_end": True, **BEST},
          "run_name": {"report_to": "tensorboard"},
          "save_total_limit": {"save_steps": 4}}  # fmt: skip
NOT_HERE = {"fp16", "tf32", "use_liger_kernel", "fsdp_config", "deepspeed"}  # which need a GPU, or a test of their own
RESOLVED = {"epochs"}  # which becomes steps


def arguments(tmp_path, **options):
    made = TrainOptions.from_mapping(options)
    return fit.training_arguments(RunFolder(tmp_path, tmp_path, made), fit.argument_fields(made, "cpu"))


def tried(**options):
    made = TrainOptions.from_mapping(options)
    trial.try_arguments(made, fit.argument_fields(made, "cpu"))


def test_every_option_of_trainingarguments_is_tried_here():
    named = {name for name, option in known_options().items() if option.argument is not None}
    assert named == PASSED.keys() | NOT_HERE | RESOLVED


@pytest.mark.parametrize("name", PASSED)
def test_an_option_arrives_under_both_of_its_names(tmp_path, name):
    argument, more = known_options()[name].argument, NEEDED.get(name, {})
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert argument in defaults
    for given in (name, argument, argument.replace("_", "-")):
        found = getattr(arguments(tmp_path, **{**more, given: PASSED[name]}), argument)
        assert found == PASSED[name]
    assert getattr(TrainOptions(), name) != PASSED[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1, "learning_rate": 2}, "the option lr is given twice, as lr and learning_rate"),
        ({"optim": "adamm"}, "unknown optim 'adamm'"),
        ({"optim": "sdg"}, "did you mean 'sgd'"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"report_to": "wandbb"}, "unknown tracker of report_to 'wandbb'; did you mean 'wandb'"),
        ({"report_to": "clearml"}, "report_to=clearml needs its package: pip install clearml"),
        ({"use_liger_kernel": True}, "--use-liger-kernel cannot be used here: its kernels run on GPUs alone"),
        ({"trainer": "adam_beta3=1"}, "unknown field of TrainingArguments 'adam_beta3'"),
        ({"trainer": {"adam_beta1": 1}}, "trainer gives adam_beta1, which another option or the run itself decides"),
        ({"trainer": {"output_dir": "x"}}, "trainer gives output_dir, which another option"),
        ({"trainer": "x"}, "trainer must be name=value"),
        ({"trainer": "neftune_noise_alpha=["}, "trainer holds 'neftune_noise_alpha=[', of which a value is no YAML"),
        ({"fp16": True}, "--fp16 is for GPUs, and this run is on the CPU: take --bf16, or leave it out"),
        ({"trainer": 3}, "trainer must hold values by name, got 3"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 exclude each other"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
        ({"fsdp": True, "deepspeed": "x.json"}, "fsdp and deepspeed exclude each other"),
        ({"fsdp_config": "x.json"}, "fsdp_config goes with fsdp"),
        ({"fsdp": True}, "--fsdp divides a model among GPUs, and this run is on the CPU"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_steps, and save_steps"),
        ({"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 3}, "got eval_steps=2 and save_steps=3"),
        ({"epochs": 0}, "epochs must be a positive number"),
        ({"deepspeed": "/absent.json"}, "deepspeed: there is no file '/absent.json'"),
    ],
)
def test_a_wrong_one_is_named_with_the_cure(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        arguments(tmp_path, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["num_train_epochs", "deepspeed", "tf32", "hub_token", "hub_model_id", "save_only_model", "ignore_data_skip",
     "greater_is_better", "auto_find_batch_size", "train_sampling_strategy", "label_names", "enable_jit_checkpoint",
     "ddp_timeout", "fsdp", "bf16_full_eval"],
)  # fmt: skip
def test_a_further_field_neither_undoes_the_run_nor_is_lost(tmp_path, name):
    with pytest.raises(ValueError, match=f"trainer gives {name}, which another option or the run itself decides"):
        arguments(tmp_path, trainer={name: True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("optim_args=x", "trainer: optim_args must be name=value, several in quotes: optim_args=\"x=1,y=2\", got 'x'"),
        ("optim_args=3", "optim_args must be name=value"),
        ("torch_empty_cache_steps=x", "trainer: torch_empty_cache_steps must be a whole number or none, got 'x'"),
        ("neftune_noise_alpha=x", "trainer: neftune_noise_alpha must be a number or none, got 'x'"),
        ("label_smoothing_factor=true", "trainer: label_smoothing_factor must be a number, got True"),
        ("full_determinism=3", "trainer: full_determinism must be true or false, got 3"),
        ("lr_scheduler_kwargs=x", "lr_scheduler_kwargs must be values by name {x: 1, y: 2} or none, got 'x'"),
        ("accelerator_config=x", "accelerator_config must be values by name {x: 1, y: 2} or none, got 'x'"),
        ("include_for_metrics=3", "trainer: include_for_metrics must be a list [x, y], got 3"),
        ("project=3", "trainer: project must be text, got 3"),
        ("parallelism_config=3", "trainer: parallelism_config must be none, got 3"),
        ("label_smoothing_factor=2", "trainer: label_smoothing_factor must be in [0, 1), got 2"),
        ("neftune_noise_alpha=.inf", "trainer: neftune_noise_alpha must be a number >= 0, got inf"),
        ("dataloader_prefetch_factor=0", "trainer: dataloader_prefetch_factor must be a positive integer, got 0"),
        ("include_num_input_tokens_seen=some", "must be one of all, non_padding, no, True, False, got 'some'"),
        ("log_level=weird", "trainer: log_level must be one of detail, debug, info, warning, error, critical, passive"),
        ("gradient_checkpointing_kwargs={x: 1}", "gradient_checkpointing_kwargs must be by the names use_reentrant, "),
        ("logging_strategy=step", "unknown value of trainer's logging_strategy 'step'; did you mean 'steps'"),
    ],
)
def test_a_further_field_of_another_type_is_named_with_its_value_and_the_cure(tmp_path, given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        arguments(tmp_path, trainer=given)
    assert "\n" not in str(raised.value)


def test_what_trainingarguments_takes_by_default_is_of_its_type():
    for field in dataclasses.fields(TrainingArguments):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        check_field(field.name, getattr(default, "value", default), field.type)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("accelerator_config={foo: 1}", "accelerator_config={'foo': 1} cannot be used: .*keyword argument 'foo'"),
        ("torch_compile_backend=weird", "torch_compile_backend='weird' cannot be used: .*nvalid backend"),
        ("torch_compile_mode=weird", "torch_compile_mode='weird' cannot be used: .*mode=weird"),
        ("dataloader_persistent_workers=true", "dataloader_persistent_workers=True cannot be used: .*num_workers"),
        ("debug=weird", "debug='weird' cannot be used: change it, or leave it out .*not a valid DebugOption"),
        (
            "eval_on_start=true,dataloader_prefetch_factor=2",
            "dataloader_prefetch_factor=2 cannot be used: .*num_workers",
        ),
        ("optim_args=momentum=1", "optim_args='momentum=1' cannot be used: .* change nothing of --optim adamw_torch_f"),
        ("optim_target_modules=all-linear", "optim_target_modules='all-linear' cannot be used: .*galore and apollo"),
        ("lr_scheduler_kwargs={num_cycles: .inf}", "lr_scheduler_kwargs={'num_cycles': inf} cannot be used"),
        ("lr_scheduler_kwargs={foo: 1}", "lr_scheduler_kwargs={'foo': 1} cannot be used: .*lr-scheduler-type cosine"),
    ],
)
def test_a_further_field_that_transformers_refuses_is_named_with_its_value(given, reason):
    with pytest.raises(ValueError, match=f"^--trainer {reason}"):
        tried(trainer=given)


def test_arguments_of_an_optimizer_arrive(tmp_path):
    given = {"optim": "sgd", "eval_steps": 2, "trainer": 'optim_args="momentum=0.9,dampening=0.1",eval_delay=2'}
    made = arguments(tmp_path, **given)
    assert (made.optim_args, made.eval_delay) == ("momentum=0.9,dampening=0.1", 2)
    tried(**given)


NUMBERS = [field.name for field in dataclasses.fields(TrainingArguments) if {int, float} & {*alternatives(field.type)}]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_of_transformers_is_negative(name):
    with pytest.raises(ValueError, match=f"^trainer(:| gives) {name}"):
        tried(trainer={name: -1}, eval_steps=2)
    if (option := next((own for own, known in known_options().items() if known.argument == name), None)) is not None:
        needed = NEEDED.get(option, {})
        with pytest.raises(ValueError, match=f"^{option} must be"):
            tried(**{option: -1} | needed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e9}, "lr must be a positive number, at most 1000, got 1000000000.0"),
        ({"lr": 0.5, "weight_decay": 2}, "weight_decay=2 times lr=0.5 is the share of a weight that a step takes"),
        ({"adam_epsilon": 2}, "adam_epsilon must be a positive number, at most 1, got 2"),
        (
            {"trainer": {"eval_delay": 2}},
            "trainer: eval_delay does nothing without eval_steps: give that too, or leave",
        ),
        ({"trainer": {"eval_delay": 41}, "eval_steps": 2}, "trainer: eval_delay=41 is more than the 40 steps"),
        ({"trainer": {"project": "x"}}, "trainer: project does nothing without report_to"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "trainer": {"lr_scheduler_kwargs": {"min_lr": 1}}},
            "cosine_with_min_lr cannot be used: the learning rate of step ",
        ),
    ],
)
def test_what_would_spoil_a_run_or_do_nothing_is_refused_before_there_is_a_model(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tried(**options)


ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"zero_optimization": {"stage": 7}}, "1 validation error .* Input should be 0, 1, 2, 3"),
        ({"train_micro_batch_size_per_gpu": None}, "Either train_batch_size or train_micro_batch_size_per_gpu needs"),
        (
            {"train_micro_batch_size_per_gpu": 3},
            "ds train_micro_batch_size_per_gpu=3 vs hf per_device_train_batch_size=8",
        ),
        ({"fp16": {"enabled": True}}, "ds fp16.enabled=True"),
        ({"zero_optimization": None}, "it has no zero_optimization"),
    ],
)
def test_a_configuration_of_deepspeed_is_tried_before_there_is_a_model(tmp_path, changed, reason):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({name: value for name, value in (ZERO2 | changed).items() if value is not None}))
    with pytest.raises(ValueError, match=f"^--deepspeed .*zero.json cannot be used: .*{reason}") as raised:
        tried(deepspeed=str(file))
    assert "\n" not in str(raised.value)
    file.write_text(json.dumps(ZERO2 | {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    tried(deepspeed=str(file))
    assert not is_deepspeed_zero3_enabled()


def test_early_stopping_goes_by_the_held_out_loss(tmp_path):
    made = arguments(tmp_path, early_stopping_patience=1, **BEST)
    assert (made.metric_for_best_model, made.greater_is_better) == ("eval_loss", False)
    named = arguments(tmp_path, early_stopping_patience=1, metric_for_best_model="eval_loss/a", **BEST)
    assert named.metric_for_best_model == "eval_loss/a"


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_ligers_kernels_need_its_package():
    with pytest.raises(ValueError, match="--use-liger-kernel cannot be used here: pip install liger-kernel"):
        fit.argument_fields(TrainOptions(use_liger_kernel=True), "cuda")


def test_further_fields_arrive_as_they_are(tmp_path):
    made = arguments(tmp_path, trainer="torch_empty_cache_steps=3,adam_beta2=0.5".partition(",")[0])
    assert made.torch_empty_cache_steps == 3
    assert arguments(tmp_path, trainer={"neftune_noise_alpha": 5.0}).neftune_noise_alpha == 5.0


@pytest.mark.parametrize(
    "given",
    [
        "lr_scheduler_kwargs={num_decay_steps: 3, min_lr_ratio: 1e-1},label_smoothing_factor=0.1",
        'lr_scheduler_kwargs={"num_decay_steps": 3, "min_lr_ratio": 0.1}',
        {"lr_scheduler_kwargs": {"num_decay_steps": 3, "min_lr_ratio": "1e-1"}},
    ],
)
def test_a_schedule_gets_its_arguments(tmp_path, given):
    options = {"lr_scheduler_type": "warmup_stable_decay", "trainer": given}
    assert arguments(tmp_path, **options).lr_scheduler_kwargs == {"num_decay_steps": 3, "min_lr_ratio": 0.1}
    tried(**options)


def test_commas_in_brackets_divide_nothing():
    given = "a=[1,[2,3]],b={c: {d: 1, e: 2e-3}, f: [4,5]},g=6"
    assert TrainOptions.from_mapping({"trainer": given}).trainer == {
        "a": [1, [2, 3]], "b": {"c": {"d": 1, "e": 0.002}, "f": [4, 5]}, "g": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay cannot be used: get_wsd_sched"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be used: One of min_lr"),
        (
            {"lr_scheduler_type": "linear", "trainer": "lr_scheduler_kwargs={end: 1}"},
            "--lr-scheduler-type linear cannot be used: get_linear_schedule_with_warmup() got an unexpected keyword",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "TrainingArguments refuses the options: lr_scheduler_type"),
        ({"optim": "adamw_torch_npu_fused"}, "--optim adamw_torch_npu_fused cannot be used here: Trainer failed to"),
        ({"tf32": True}, "TrainingArguments refuses the options: --tf32 requires"),
    ],
)
def test_what_cannot_make_a_step_is_refused_before_there_is_a_model(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        tried(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adamw_8bit", "lion_32bit", "paged_adamw_8bit"])
def test_what_makes_a_step_is_taken(name):
    tried(optim=name, bf16=True, torch_compile=True, load_best_model_at_end=True, eval_steps=1, save_steps=1)


@pytest.mark.parametrize(
    ("options", "processes", "batch_size"),
    [({"batch_size": 12}, 3, 12), ({"per_device_train_batch_size": 4}, 3, 12), ({}, 2, 8)],
)
def test_the_batch_of_all_processes(options, processes, batch_size):
    made = TrainOptions.from_mapping(options).for_processes(processes)
    assert (made.batch_size, made.per_device_train_batch_size) == (batch_size, None)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="batch_size=7 cannot be divided among 2 processes: give a multiple of 2"):
        TrainOptions(batch_size=7).for_processes(2)


def test_epochs_are_as_many_steps_as_they_take():
    options = TrainOptions(epochs=1.5, batch_size=4, accumulation=2)
    assert options.for_examples(40).steps == 8  # 60 examples, 8 a step, none of them left out
    assert options.for_examples(1).steps == 1
    assert TrainOptions(steps=3).for_examples(40).steps == 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    model_folder(folder / "model", model=qwen3)
    write_rows(folder / "rows.jsonl")
    return folder


def train(run, place, *flags, code=0):
    base = ["train", "--model", place / "model", "--data", place / "rows.jsonl", "--device", "cpu", "--dtype",
            "float32", "--eval-examples", 2, "--steps", 2, "--output", "out"]  # fmt: skip
    found, out, error = run(*base, *flags)
    assert found == code, error
    return out + error


def results(tmp_path, name="out"):
    return json.loads((tmp_path / "work" / name / "results.json").read_text())


def test_the_best_adapter_on_examples_that_are_not_scored_is_kept(run, place, tmp_path):
    flags = ["--steps", 12, "--lr", 15.0, "--eval-steps", 1, "--save-steps", 1, "--early-stopping-patience", 2]
    train(run, place, *flags, "--load-best-model-at-end", "--warmup", 0, "--lr-scheduler-type", "constant")
    found = results(tmp_path)
    losses = [entry["eval_loss"] for entry in found["evaluations"]]
    best = losses.index(min(losses))
    assert found["steps"] == {"planned": 12, "done": best + 3, "best": best + 1, "begun": 0}
    assert len(losses) == best + 3 < 12
    assert found["data"]["tasks"]["next"]["dev"]["used"] == 2
    kept = load_file(tmp_path / f"work/out/checkpoints/checkpoint-{best + 1}/adapter_model.safetensors")
    saved = load_file(tmp_path / "work/out/adapter/adapter_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("bits", ["--load-in-4bit", "--load-in-8bit"])
def test_a_quantised_base_is_trained_checked_and_its_cost_is_known(run, place, tmp_path, bits):
    said = train(
        run, place, bits, "--optim", "adamw_8bit", "--architecture", "m_lora", "--align", "kl", "--num-heads", 2
    )
    assert "loaded again: same logits (relative difference 0.0e+00)" in said
    assert "stock PEFT: same logits" in said
    assert "merged: does not apply: the base weight is quantised" in said
    assert (tmp_path / "work/out/adapter/adapter_config.json").is_file()


def test_checks_are_made_as_far_as_they_are_wanted(run, place, tmp_path):
    said = train(run, place, "--checks", "none", "--attn-implementation", "eager", "--bf16")
    assert "same logits" not in said
    assert results(tmp_path)["checks"] == {}
    said = train(run, place, "--checks", "load", "--overwrite")
    assert results(tmp_path)["checks"].keys() == {"loaded again"}


def test_an_adapter_to_go_on_from_is_where_the_training_starts(run, place, tmp_path):
    train(run, place, "--lr", 0.05, "--checks", "none")
    first = results(tmp_path)
    train(run, place, "--adapter-from", "out/adapter", "--output", "more", "--checks", "none")
    assert results(tmp_path, "more")["before"]["tasks"] == first["after"]["tasks"] != first["before"]["tasks"]
    said = train(run, place, "--adapter-from", "out", "--output", "other", code=2)
    assert "out is no adapter folder: adapter_model.safetensors is missing; out/adapter is one" in said
    another = ("--model", model_folder(tmp_path / "another", model=llama), "--adapter-from", "out/adapter")
    said = train(run, place, *another, "--output", "other", code=2)
    assert said.rstrip().endswith("; give --model that one, or another --adapter-from")
    assert "r=8, the model's adapters r=4" in train(run, place, "--adapter-from", "out/adapter", "--r", 4,
                                                    "--output", "other", code=2)  # fmt: skip


def test_the_model_card_is_in_the_folder_and_an_upload_needs_the_hub(run, place, tmp_path):
    train(run, place, "--lora-alpha", 4)
    card = (tmp_path / "work/out/adapter/README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "lora_alpha: 4.0" in card
    assert "| next | 22 | 2 | " in card
    assert str(tmp_path) not in card.partition("## Options")[0].replace(str(place), "")
    said = train(run, place, "--push-to-hub", "--output", "other", code=2)
    assert "--push-to-hub needs the hub, but HF_HUB_OFFLINE is set" in said
    assert not (tmp_path / "work/other").exists()
