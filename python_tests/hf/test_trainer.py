"""AlignTrainer: ids arrive, the alignment has its exact weight under accumulation, and losses are logged by task."""

import json

import datasets
import pytest
import torch
from hf.trainers import (
    NAMES,
    ONE_STEP,
    WEIGHT,
    Gradients,
    adapted,
    features,
    logged,
    on_rank,
    shared_gradients,
    step_and_evaluation,
    trainer,
)
from hf.words import tokenizer
from processes import spawn
from safetensors.torch import load_file
from tiny import error, gradients
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from align_ext import AlignTrainer, TaskCollator, align_step
from align_ext.alignment.micro_batch import MicroBatchShare
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.training import arguments as arguments_module
from align_ext.training.arguments import align_training_arguments

ROUNDING = 1e-6  # the models are float64, but transformers computes their loss from float32 logits


def micro_batch(rows, start):
    return TaskCollator(tokenizer())(rows[start : start + 6])


def expected_gradients(rows, starts, lm_shares):
    return shared_gradients([micro_batch(rows, start) for start in starts], lm_shares)


def supervised(rows, start):
    return sum(label != -100 for row in rows[start : start + 6] for label in row["labels"][1:])


def test_under_accumulation_the_alignment_gradient_is_the_mean_of_the_micro_batches_own(tmp_path):
    rows, kept = features(), Gradients()
    trainer(tmp_path, adapted(), rows, [kept], gradient_accumulation_steps=2).train()
    tokens = [supervised(rows, 0), supervised(rows, 6)]
    assert tokens[0] != tokens[1]
    expected = expected_gradients(rows, [0, 6], [n / sum(tokens) for n in tokens])
    assert error(kept.steps[0], expected) < ROUNDING
    plain = expected_gradients(rows, [0, 6], [1, 1])
    assert error(kept.steps[0], plain) > 1e-2


@pytest.mark.parametrize("align", ["kl", "mmd"])
@pytest.mark.parametrize("by_tokens", [True, False])
def test_exact_accumulation_gives_the_alignment_gradient_of_the_one_big_batch(tmp_path, align, by_tokens):
    """With dropout: the loop below is given the masks of the Trainer's by the same seed."""
    options = {"align_accumulation": "exact", "align": align, "lora_dropout": 0.4}
    rows, kept = features(), Gradients()
    ran = trainer(tmp_path, adapted(**options), rows, [kept], gradient_accumulation_steps=2)
    ran.model_accepts_loss_kwargs = by_tokens
    ran.add_callback(Seeds())
    ran.train()
    tokens = [supervised(rows, 0), supervised(rows, 6)]
    shares = [n / sum(tokens) for n in tokens] if by_tokens else [0.5, 0.5]
    model, steps = adapted(**options).train(), []
    torch.manual_seed(7)
    for start in (0, 6):
        inputs = micro_batch(rows, start)
        with align_step(model, inputs.pop("task_ids")) as step:
            steps.append((step, model(**inputs, use_cache=False).loss))
        # Two forwards whose graphs hold their masks: the oracle below aligns their latents as one batch.
        steps[-1] += (step.statistics(),)
    union = steps[0][2].merge(steps[1][2])
    tokens_before = (0, steps[0][2].tokens)
    for (step, loss, _), share, before in zip(steps, shares, tokens_before, strict=True):
        step.total(share * loss, scale=0.5, of=MicroBatchShare(union.after(before), 2, ())).backward()
    assert error(kept.steps[0], gradients(model)) < ROUNDING
    (entry,) = logged(ran)
    assert entry["align_loss"] == pytest.approx(steps[0][0].alignment.value.item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["lm_loss"] + WEIGHT * entry["align_loss"], rel=1e-5)


class Seeds(TrainerCallback):
    def on_step_begin(self, *_, **__):
        torch.manual_seed(7)


def test_exact_accumulation_is_the_whole_batch_and_micro_is_not(tmp_path):
    rows, gradients_of = features(), {}
    for kind, size, accumulation in (("exact", 6, 2), ("micro", 12, 1), ("other", 6, 2)):
        model, kept = adapted(align_accumulation="micro" if kind == "other" else kind), Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer(tmp_path, model, rows, [kept], **options).train()
        gradients_of[kind] = kept.steps
    for step in range(2):
        assert error(gradients_of["exact"][step], gradients_of["micro"][step]) < ROUNDING
        assert error(gradients_of["other"][step], gradients_of["micro"][step]) > 1e-2


def test_a_model_whose_loss_is_a_mean_per_batch_gets_the_same_alignment_gradient(tmp_path):
    rows, kept = features(), Gradients()
    ran = trainer(tmp_path, adapted(), rows, [kept], gradient_accumulation_steps=2)
    ran.model_accepts_loss_kwargs = False
    ran.train()
    assert error(kept.steps[0], expected_gradients(rows, [0, 6], [0.5, 0.5])) < ROUNDING
    (entry,) = logged(ran)
    assert entry["loss"] == pytest.approx(entry["lm_loss"] + WEIGHT * entry["align_loss"], rel=1e-5)


def test_a_last_step_with_fewer_micro_batches_divides_by_those_it_has(tmp_path):
    rows, kept = features(18), Gradients()
    options = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1}
    trainer(tmp_path, adapted(), rows, [kept], **options).train()
    assert len(kept.steps) == 2
    assert error(kept.steps[1], expected_gradients(rows, [12], [1.0])) < ROUNDING


def test_the_log_splits_the_loss_into_its_parts_and_by_task(tmp_path):
    rows = features(12)
    ran = trainer(tmp_path, adapted(), rows, max_steps=2)
    ran.train()
    first, second = logged(ran)
    for entry in (first, second):
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + WEIGHT * entry["align_loss"], rel=1e-5)
        assert entry["align_loss"] > 0
    sums = dict.fromkeys(range(3), (0.0, 0))
    model = adapted().eval()
    for row in rows[:6]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nll = model(input_ids=ids, labels=labels).loss.item() * count
        old = sums[row["task_ids"]]
        sums[row["task_ids"]] = (old[0] + nll, old[1] + count)
    for task, name in enumerate(NAMES):
        assert first[f"loss/{name}"] == pytest.approx(sums[task][0] / sums[task][1], rel=1e-5)


def test_between_logs_the_parts_are_means_and_accumulation_does_not_inflate_them(tmp_path):
    rows = features(24)
    fine = logged_after(tmp_path, rows, logging_steps=1, max_steps=4)
    coarse = logged_after(tmp_path, rows, logging_steps=4, max_steps=4)
    accumulated = logged_after(tmp_path, rows, logging_steps=1, max_steps=1, gradient_accumulation_steps=4)
    mean = sum(entry["align_loss"] for entry in fine) / 4
    assert coarse[0]["align_loss"] == pytest.approx(mean, rel=1e-5)
    assert coarse[0]["lm_loss"] == pytest.approx(sum(entry["lm_loss"] for entry in fine) / 4, rel=1e-5)
    assert accumulated[0]["align_loss"] == pytest.approx(mean, rel=1e-5)
    tokens = [supervised(rows, start) for start in (0, 6, 12, 18)]
    by_token = sum(entry["lm_loss"] * n for entry, n in zip(fine, tokens, strict=True)) / sum(tokens)
    assert accumulated[0]["lm_loss"] == pytest.approx(by_token, rel=1e-5)


def logged_after(tmp_path, rows, **options):
    ran = trainer(tmp_path, adapted(), rows, **options)
    ran.train()
    return logged(ran)


def test_evaluation_logs_the_loss_of_each_task_per_token(tmp_path):
    rows = features(20)
    ran = trainer(tmp_path, adapted(), rows, eval_rows=rows, per_device_eval_batch_size=7)
    metrics = ran.evaluate()
    for task, name in enumerate(NAMES):
        mine = [row for row in rows if row["task_ids"] == task]
        batch = TaskCollator(tokenizer())(mine)
        del batch["task_ids"]
        with torch.no_grad():
            exact = adapted().eval()(**batch).loss.item()
        assert metrics[f"eval_loss/{name}"] == pytest.approx(exact, rel=1e-5)
    one_by_one = trainer(tmp_path, adapted(), rows).evaluate(rows[:6], metric_key_prefix="few")
    assert ran.evaluate(rows[:6], metric_key_prefix="few")["few_loss/odd"] == one_by_one["few_loss/odd"]


def test_two_processes_get_the_gradient_and_the_losses_of_one(tmp_path, unused_port):
    spawn(on_rank, unused_port, tmp_path, step_and_evaluation)
    expected, losses = step_and_evaluation(tmp_path, 1)
    assert error(load_file(tmp_path / "gradients.safetensors"), expected) < ROUNDING
    assert len(losses) == 10
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-5)


def test_the_ids_column_of_a_dataset_survives_and_other_columns_do_not(tmp_path):
    rows = datasets.Dataset.from_list([row | {"note": "x"} for row in features()])
    ran = trainer(tmp_path, adapted(), rows)
    ran.train()
    assert logged(ran)[0]["align_loss"] > 0
    columns = next(iter(ran.get_train_dataloader())).keys()
    assert set(columns) == {"input_ids", "attention_mask", "labels", "task_ids"}


def test_a_training_batch_without_ids_is_an_error_when_alignment_is_on(tmp_path):
    ran = trainer(tmp_path, adapted(), features())
    collate = ran.data_collator
    ran.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "task_ids"}
    with pytest.raises(ValueError, match="no task_ids"):
        ran.train()


def test_plain_lora_trains_with_ids_and_without(tmp_path):
    for keep in (True, False):
        ran = trainer(tmp_path, adapted(align=None), features())
        collate = ran.data_collator
        ran.data_collator = lambda rows, keep=keep, collate=collate: {
            k: v for k, v in collate(rows).items() if keep or k != "task_ids"
        }
        ran.train()
        entry = logged(ran)[0]
        assert "align_loss" not in entry
        assert entry["loss"] == pytest.approx(entry["lm_loss"], rel=1e-5)
        assert ("loss/even" in entry) is keep


def test_balance_and_spectral_losses_are_logged_beside_the_others_and_need_no_ids(tmp_path):
    weights = {"balance_weight": 0.7, "spectral_weight": 0.2}
    ran = trainer(tmp_path, adapted(align=None, architecture="mtlora", **weights), features())
    collate = ran.data_collator
    ran.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "task_ids"}
    ran.train()
    (entry,) = logged(ran)
    assert "align_loss" not in entry
    assert entry["balance_loss"] > 0
    assert entry["spectral_loss"] > 0
    total = entry["lm_loss"] + 0.7 * entry["balance_loss"] + 0.2 * entry["spectral_loss"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_with_an_adapter_for_each_task_an_evaluation_uses_that_of_each_sample(tmp_path):
    rows = features(12)
    model = adapted(align=None, architecture="multi_adapter")
    metrics = trainer(tmp_path, model, rows, eval_rows=rows).evaluate()
    for task, name in enumerate(NAMES):
        batch = TaskCollator(tokenizer())([row for row in rows if row["task_ids"] == task])
        with torch.no_grad():
            exact = model.eval()(**batch).loss.item()
        assert metrics[f"eval_loss/{name}"] == pytest.approx(exact, rel=1e-5)


class Reporter(TrainerCallback):
    """What an integration (tensorboard, wandb, trackio) is given to report."""

    def __init__(self):
        self.reported = []

    def on_log(self, args, state, control, logs=None, **_):
        self.reported.append(rewrite_logs(dict(logs)))


def test_integrations_are_given_the_losses_by_task_as_plain_numbers(tmp_path):
    reporter, rows = Reporter(), features()
    options = {"eval_rows": rows, "eval_strategy": "steps", "eval_steps": 1}
    trainer(tmp_path, adapted(), rows, [reporter], **options).train()
    training, evaluation, _ = reporter.reported
    losses = {f"{split}/loss/{name}" for name in NAMES for split in ("train", "eval")}
    assert training.keys() >= {"train/lm_loss", "train/align_loss", "train/align_weight"}
    assert (training.keys() | evaluation.keys()) >= losses
    assert all(type(value) in (int, float) for value in (training | evaluation).values())


def test_samples_of_no_task_count_in_the_loss_but_in_no_tasks_loss(tmp_path):
    rows = [row | {"task_ids": -1 if i % 2 or i == 4 else row["task_ids"]} for i, row in enumerate(features())]
    ran = trainer(tmp_path, adapted(), rows)
    ran.train()
    with torch.no_grad():
        batch = TaskCollator(tokenizer())([rows[0]])
        del batch["task_ids"]
        exact = adapted().eval()(**batch).loss.item()
    assert logged(ran)[0]["loss/even"] == pytest.approx(exact, rel=1e-5)
    assert [name for name in logged(ran)[0] if name.startswith("loss/")] == ["loss/even", "loss/odd"]


def test_data_parallel_is_refused_with_advice(tmp_path):
    ran = trainer(tmp_path, adapted(), features())
    ran.args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        AlignTrainer(model=ran.model, args=ran.args, train_dataset=features(), data_collator=ran.data_collator)


def test_the_arguments_default_to_the_papers_recipe_and_can_be_overridden(tmp_path):
    arguments = align_training_arguments(str(tmp_path), max_steps=200, use_cpu=True)
    assert arguments.learning_rate == 2e-4
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(200) == 6
    assert arguments.report_to == []
    assert align_training_arguments(str(tmp_path), learning_rate=1e-3, use_cpu=True).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("given", "bf16"),
    [
        ({}, True),
        ({"use_cpu": True}, False),
        ({"fp16": True}, False),
        ({"fp16": False}, True),
        ({"bf16": False}, False),
    ],
)
def test_bfloat16_is_on_where_a_gpu_has_it_and_nothing_else_is_given(tmp_path, monkeypatch, given, bf16):
    made = []  # TrainingArguments itself refuses bf16 where there is no GPU
    monkeypatch.setattr(arguments_module, "TrainingArguments", lambda **fields: made.append(fields["bf16"]))
    for has in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has: has)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
        align_training_arguments(str(tmp_path), **given)
    assert made == [False, bf16]


@pytest.mark.parametrize(
    "given",
    [
        {"task_names": list("abcd")}, {"task_names": "abc"}, {"task_names": ["a", "a"]}, {"task_names": ["a", None]},
        {"task_names": ["a/b"]}, {"task_names": [".."]}, {"task_names": {"a": 1}}, {"in_order": "no"}, {"in_order": 1},
    ],
)  # fmt: skip
def test_what_the_first_checkpoint_would_refuse_is_refused_before_training(given, tmp_path):
    kept = {"args": align_training_arguments(str(tmp_path), use_cpu=True), "train_dataset": features(4)}
    with pytest.raises(ValueError, match=next(iter(given))):
        AlignTrainer(model=adapted(None, architecture="multi_adapter"), **kept, **given)
    parts = {"../x": datasets.Dataset.from_list(features(4)).remove_columns("task_ids")}
    with pytest.raises(ValueError, match="task_names"):
        AlignTrainer(model=adapted(None, architecture="multi_adapter"), **kept | {"train_dataset": parts})


def test_tasks_without_a_name_are_logged_and_saved_by_their_numbers(tmp_path):
    ran = AlignTrainer(
        model=adapted(), args=align_training_arguments(str(tmp_path), **ONE_STEP | {"save_strategy": "steps"},
                                                       save_steps=1),
        train_dataset=features(), data_collator=TaskCollator(tokenizer()), task_names=["even"], in_order=True,
    )  # fmt: skip
    ran.train()
    assert {"loss/even", "loss/1", "loss/2"} <= logged(ran)[0].keys()
    assert AdapterFolder.read(tmp_path / "checkpoint-1").task_names == ("even", "1", "2")


def test_evaluating_on_the_way_changes_no_bit_of_the_training(tmp_path):
    trained = []
    for evaluated in ({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        options = {"max_steps": 4, "learning_rate": 1e-2, "seed": 7, **evaluated}
        torch.manual_seed(7)
        ran = trainer(tmp_path, adapted(lora_dropout=0.3), features(), eval_rows=features(6, seed=1), **options)
        ran.train()
        assert any("eval_loss" in entry for entry in ran.state.log_history) == (evaluated["eval_strategy"] == "steps")
        trained.append([p.detach().clone() for p in ran.model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
