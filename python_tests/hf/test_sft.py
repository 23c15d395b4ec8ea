"""AlignSFTTrainer with the real TRL: tokens keep their tasks, rows are TRL's own, the alignment keeps its weight."""

import json

import datasets
import pytest
import torch
import trl
from hf.sft_trainers import DIGITS, FORMATS, padded_and_padding_free, prompt_rows, text, text_rows, trainer
from hf.trainers import NAMES, WEIGHT, Gradients, adapted, logged, on_rank, shared_gradients
from hf.words import tokenizer
from processes import spawn
from safetensors.torch import load_file
from tiny import error
from transformers.trainer_pt_utils import LabelSmoother

ROUNDING = 1e-6  # the models are float64, but TRL's fused head and transformers' loss compute in float32


def check_tokens(batch):
    """Each token's task is that of its digit, padding's is none; returns how many tokens were told apart."""
    ids = batch["task_ids"]
    ids = ids if ids.dim() == 2 else ids[:, None].expand_as(batch["input_ids"])
    words, checked = tokenizer(), 0
    for token, task in zip(batch["input_ids"].flatten().tolist(), ids.flatten().tolist(), strict=True):
        word = words.decode([token])
        owner = next((k for k, digits in enumerate(DIGITS) if word in digits), None)
        if owner is not None:
            assert task == owner
            checked += 1
        elif token == words.pad_token_id and batch["task_ids"].dim() == 2:
            assert task == -1
        else:  # the end, and the words of the template
            assert task >= 0
    return checked


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_token_keeps_the_task_of_its_example_whatever_the_format_of_the_rows(tmp_path, kind, remove):
    rows = FORMATS[kind]()
    for options in {}, {"padding_free": True, "max_length": None}:
        ran = trainer(tmp_path, rows, remove_unused_columns=remove, **options)
        batches = list(ran.get_train_dataloader())
        told = sum(check_tokens(batch) for batch in batches)
        assert told == sum(
            c.isdigit()
            for row in rows
            for c in str(
                row.get("messages")
                or row.get("text")
                or row.get("prompt", "") + row.get("completion", "")
                or tokenizer().decode(row["input_ids"])
            )
        )
        assert batches[0]["task_ids"].shape == ((6,) if not options else batches[0]["input_ids"].shape)


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_rows_are_trls_own_with_the_task_of_every_token(tmp_path, strategy, iterable):
    rows = datasets.Dataset.from_list(text_rows(50))
    rows = rows.to_iterable_dataset(num_shards=2) if iterable else rows
    options = {"packing": True, "packing_strategy": strategy, "max_length": 8, "shuffle_dataset": True}
    ran = trainer(tmp_path, rows, **options)
    plain = trainer(tmp_path, rows, kind=trl.SFTTrainer, model=adapted(align=None), **options)
    ours, theirs = list(ran.train_dataset), list(plain.train_dataset)
    assert [{k: v for k, v in row.items() if k != "task_ids"} for row in ours] == theirs
    assert any(len(set(row["task_ids"])) > 1 for row in ours)
    assert sum(check_tokens(batch) for batch in ran.get_train_dataloader()) > 150
    ran.train()
    assert logged(ran)[0]["align_loss"] > 0


def test_without_packing_the_rows_are_trls_own_beside_their_tasks(tmp_path):
    options = {"max_length": 6, "truncation_mode": "keep_end"}
    ours = trainer(tmp_path, prompt_rows(), **options).train_dataset
    theirs = trainer(tmp_path, prompt_rows(), kind=trl.SFTTrainer, model=adapted(align=None), **options).train_dataset
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["labels"] == theirs["labels"]
    assert max(map(len, ours["input_ids"])) == 6


def own_loss(outputs, labels, num_items_in_batch=None):
    """A user's loss: the squared NLL per token."""
    nll = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].mT.double(), labels[:, 1:], reduction="none")
    return nll.square().sum() / num_items_in_batch


def smoothed(model, inputs):
    labels = inputs.pop("labels")
    return LabelSmoother(0.1)(model(**inputs), labels, shift_labels=True)


def squared(model, inputs):
    labels = inputs.pop("labels")
    return own_loss(model(**inputs), labels, (labels[:, 1:] != -100).sum())


def fine_tuned(model, inputs):
    """Dynamic fine-tuning: each token's NLL times its probability."""
    labels = inputs.pop("labels")[:, 1:]
    nll = torch.nn.functional.cross_entropy(model(**inputs).logits[:, :-1].mT.float(), labels, reduction="none")
    return (nll * torch.exp(-nll.detach())).sum() / (labels != -100).sum()


CASES = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 14},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 11},
    "label smoothing": {"label_smoothing_factor": 0.1, "loss_of": smoothed},
    "compute_loss_func": {"compute_loss_func": own_loss, "loss_of": squared},
    "dft": {"loss_type": "dft", "loss_of": fine_tuned},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.filterwarnings("ignore:`(compute_loss_func|label_smoothing_factor)` is deprecated")
@pytest.mark.parametrize("case", CASES)
def test_under_accumulation_the_alignment_gradient_is_the_mean_of_the_micro_batches_own(tmp_path, case):
    options, kept = dict(CASES[case]), Gradients()
    loss_of = options.pop("loss_of", lambda model, inputs: model(**inputs, use_cache=False).loss)
    arguments = {"compute_loss_func": options.pop("compute_loss_func")} if "compute_loss_func" in options else {}
    size = 2 if "packing" in options else 6
    ran = trainer(
        tmp_path, prompt_rows(), [kept], arguments=arguments, gradient_accumulation_steps=2,
        per_device_train_batch_size=size, **options,
    )  # fmt: skip
    batches = [dict(batch) for batch, _ in zip(ran.get_train_dataloader(), range(2), strict=False)]
    ran.train()
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert tokens[0] != tokens[1]
    shares = [n / sum(tokens) for n in tokens]
    expected = shared_gradients(batches, shares, loss_of=loss_of)
    assert error(kept.steps[0], expected) < ROUNDING
    assert error(kept.steps[0], shared_gradients(batches, [1, 1], loss_of=loss_of)) > 1e-2
    (entry,) = logged(ran)
    assert entry["loss"] == pytest.approx(entry["lm_loss"] + WEIGHT * entry["align_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_get_the_gradient_and_the_losses_of_one(tmp_path, unused_port):
    spawn(on_rank, unused_port, tmp_path, padded_and_padding_free)
    expected, losses = padded_and_padding_free(tmp_path, 1)
    assert error(load_file(tmp_path / "gradients.safetensors"), expected) < ROUNDING
    assert len(losses) == 18
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-5)


def test_clipping_scales_the_gradient_of_both_losses_together(tmp_path):
    kept, clipped = Gradients(), Gradients()
    trainer(tmp_path, text_rows(), [kept]).train()
    trainer(tmp_path, text_rows(), [clipped], max_grad_norm=0.01).train()
    norm = sum(g.square().sum() for g in kept.steps[0].values()).sqrt()
    assert norm > 0.1
    expected = {name: g * 0.01 / (norm + 1e-6) for name, g in kept.steps[0].items()}
    assert error(clipped.steps[0], expected) < ROUNDING


def exact_task_losses(batches):
    """Each task's mean NLL per supervised token of it, from the tokens one by one."""
    sums, model = {}, adapted(align=None).eval()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("task_ids", "labels")}
        with torch.no_grad():
            log_p = model(**inputs, use_cache=False).logits.log_softmax(-1)
        ids = batch["task_ids"]
        for row, labels in enumerate(batch["labels"].tolist()):
            for place, label in enumerate(labels[1:], start=1):
                task = int(ids[row] if ids.dim() == 1 else ids[row, place])
                if label != -100 and task >= 0:
                    nll, count = sums.get(task, (0.0, 0))
                    sums[task] = nll - float(log_p[row, place - 1, label]), count + 1
    return {NAMES[task]: nll / count for task, (nll, count) in sums.items()}


@pytest.mark.parametrize("case", ["padded", "padding_free", "bfd", "wrapped"])
def test_each_tasks_loss_is_logged_in_training_and_evaluation(tmp_path, case):
    rows = datasets.Dataset.from_list(text_rows())
    ran = trainer(tmp_path, text_rows(), arguments={"eval_dataset": rows}, **CASES[case])
    first = next(iter(ran.get_train_dataloader()))
    ran.train()
    exact = exact_task_losses([first])
    assert {k: v for k, v in logged(ran)[0].items() if k.startswith("loss/")} == pytest.approx(
        {f"loss/{name}": value for name, value in exact.items()}, rel=1e-5
    )
    exact = exact_task_losses(ran.get_eval_dataloader())
    assert {k: v for k, v in ran.evaluate().items() if k.startswith("eval_loss/")} == pytest.approx(
        {f"eval_loss/{name}": value for name, value in exact.items()}, rel=1e-5
    )


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
def test_evaluation_takes_a_dictionary_of_datasets_and_a_users_metrics(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"one": 1.0}

    parts = {name: datasets.Dataset.from_list(text_rows()[2 * k : 2 * k + 2]) for k, name in enumerate(NAMES)}
    arguments = {"eval_dataset": parts, "compute_metrics": metrics}
    ran = trainer(tmp_path, text_rows(), arguments=arguments, eval_strategy="steps", eval_steps=1)
    ran.train()
    found = {k: v for entry in ran.state.log_history for k, v in entry.items() if k.startswith("eval_")}
    for name in NAMES:
        assert found[f"eval_{name}_loss/{name}"] == pytest.approx(found[f"eval_{name}_loss"], rel=1e-5)
        assert found[f"eval_{name}_one"] == 1.0
    assert [shape[0] for shape in seen] == [2, 2, 2]
    assert all(len(shape) == 3 and shape[2] == len(tokenizer()) for shape in seen)


@pytest.mark.parametrize("packing", [False, True])
def test_a_dataset_without_ids_is_an_error_at_the_first_step_that_names_the_cure(tmp_path, packing):
    rows = [{"text": row["text"]} for row in text_rows()]
    ran = trainer(tmp_path, rows, packing=packing, max_length=16)
    with pytest.raises(ValueError, match=r"give the training dataset an integer column task_ids"):
        ran.train()


def test_plain_lora_trains_on_a_dataset_without_ids_and_iterates_a_streamed_one(tmp_path):
    rows = datasets.Dataset.from_list([{"text": row["text"]} for row in text_rows()])
    ran = trainer(tmp_path, rows.to_iterable_dataset(), model=adapted(align=None))
    ran.train()
    assert set(logged(ran)[0]) >= {"lm_loss", "loss"}
    assert "align_loss" not in logged(ran)[0]


def test_a_dictionary_of_datasets_by_task_needs_no_ids_to_train_and_to_evaluate(tmp_path):
    parts = {
        name: datasets.Dataset.from_list([{"text": text(i)} for i in range(24) if i // 2 % 3 == task])
        for task, name in enumerate(NAMES)
    }
    ran = trainer(tmp_path, dict(parts), arguments={"eval_dataset": dict(parts), "mixing": "equal"})
    batches = list(ran.get_train_dataloader())
    assert sum(map(check_tokens, batches)) > 100
    assert all((batch["task_ids"] == task).sum() in (0, 2, 3) for batch in batches for task in range(3))
    metrics = ran.evaluate()
    for name in NAMES:
        assert metrics[f"eval_{name}_loss/{name}"] == pytest.approx(metrics[f"eval_{name}_loss"], rel=1e-5)
