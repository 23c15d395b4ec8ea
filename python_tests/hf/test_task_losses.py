"""The loss by task is the model's own, for every kind of model, or it is not logged and said why."""

import pytest
import torch
import transformers as hf
from hf.kinds import VOCAB, adapted, bart, bert, made, padded, t5
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from align_ext import AlignTrainer, set_task
from align_ext.training.arguments import align_training_arguments
from align_ext.training.trainer import AlignMixin

NAMES, TASKS_OF = ("a", "b", "c"), [0, 1, 2, 0, 1, 1, 0, 2]
LENGTHS = [7, 5, 7, 3, 6, 2, 4, 5]
STILL = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 1}


def rows(kind):
    """Eight samples of three tasks with labels for a kind of model."""
    ids, mask = padded(LENGTHS)
    result = []
    for i, task in enumerate(TASKS_OF):
        row = {"input_ids": ids[i].tolist(), "attention_mask": mask[i].tolist(), "task_ids": task}
        if kind == "BertForMultipleChoice":
            row |= {name: [row[name], row[name][::-1]] for name in ("input_ids", "attention_mask")}
        result.append(row | LABELS[kind](i))
    return result


def of_tokens(i):
    return {"labels": [(3 * i + j) % 5 if j < LENGTHS[i] and (i + j) % 3 else -100 for j in range(7)]}


def of_target(i):
    return {"labels": [3 + (i * j) % 9 if j < 3 + i % 4 else -100 for j in range(7)]}


LABELS = {
    "LlamaForCausalLM": of_tokens,
    "GPT2LMHeadModel": of_tokens,
    "BertForTokenClassification": of_tokens,
    "BertForMaskedLM": of_tokens,
    "BertForSequenceClassification": lambda i: {"labels": i % 3},
    "regression": lambda i: {"labels": i / 3},
    "several classes": lambda i: {"labels": [float(i % 2), 0.0, float(i % 3 == 0)]},
    "BertForQuestionAnswering": lambda i: {"start_positions": i % 3, "end_positions": 2 + i % 2},
    "BertForMultipleChoice": lambda i: {"labels": i % 2},
    "T5ForConditionalGeneration": of_target,
    "BartForConditionalGeneration": of_target,
    "bfloat16": of_target,
}
ACCUMULATED = "LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration"  # the others: --slow
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
LLAMA = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def model_of(kind, **options):
    dtype = torch.float32
    name, config = {
        "LlamaForCausalLM": lambda: (kind, hf.LlamaConfig(**LLAMA, num_hidden_layers=1, use_cache=False)),
        "GPT2LMHeadModel": lambda: (
            kind, hf.GPT2Config(**NO_DROPOUT, n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB, eos_token_id=1)
        ),
        "BertForTokenClassification": lambda: (kind, bert(num_labels=5)),
        "BertForSequenceClassification": lambda: (kind, bert(num_labels=3)),
        "regression": lambda: ("BertForSequenceClassification", bert(num_labels=1)),
        "several classes": lambda: ("BertForSequenceClassification", bert(num_labels=3)),
        "T5ForConditionalGeneration": lambda: (kind, t5()),
        "BartForConditionalGeneration": lambda: (kind, bart(forced_eos_token_id=None)),
        "bfloat16": lambda: ("T5ForConditionalGeneration", t5()),
    }.get(kind, lambda: (kind, bert()))()  # fmt: skip
    options = {"exclude_modules": ("classifier", "qa_outputs", "pooler.dense"), "r": 2} | options
    return adapted(made(name, config, torch.bfloat16 if kind == "bfloat16" else dtype), **options)


def stacked(samples):
    return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}


def trainer_of(model, data, kind=AlignTrainer, folder="unused", args=None, **own):
    options = STILL | {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 3} | (args or {})
    arguments = align_training_arguments(str(folder), **options)
    return kind(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=stacked,
                task_names=NAMES, **own)  # fmt: skip


def by_the_model(model, data):
    """Each task's loss as the model itself gives it of that task's samples alone."""
    model.eval()
    result = {}
    for task, name in [*enumerate(NAMES), (None, "all")]:
        batch = stacked([row for row in data if task in (row["task_ids"], None)])
        del batch["task_ids"]
        with torch.no_grad():
            result[name] = model(**batch).loss.item()
    return result


@pytest.mark.parametrize(
    ("kind", "accumulation"),
    [(kind, 1) for kind in LABELS]
    + [pytest.param(kind, 2, marks=[pytest.mark.slow] * (kind not in ACCUMULATED)) for kind in LABELS],
)
def test_each_tasks_loss_is_the_models_own_of_its_samples(tmp_path, kind, accumulation):
    data, rel = rows(kind), 2e-2 if kind == "bfloat16" else 1e-5
    exact = by_the_model(model_of(kind), data)
    args = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    ran = trainer_of(model_of(kind), data, folder=tmp_path, args=args, in_order=True)
    evaluated = ran.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(exact.pop("all"), rel=rel), "whatever the batches are"
    assert {name: evaluated[f"eval_loss/{name}"] for name in NAMES} == pytest.approx(exact, rel=rel)
    ran.train()
    logged = ran.state.log_history[-2]
    assert {name: logged[f"loss/{name}"] for name in NAMES} == pytest.approx(exact, rel=rel)


def test_smoothed_labels_have_a_smoothed_loss_by_task(tmp_path):
    data, kind = rows("BertForTokenClassification"), "BertForTokenClassification"
    ran = trainer_of(model_of(kind), data, folder=tmp_path, args={"label_smoothing_factor": 0.2})
    ran.train()
    logged, by_task = ran.state.log_history[0], 0.0
    for task, name in enumerate(NAMES):
        count = sum(label != -100 for row in data if row["task_ids"] == task for label in row["labels"])
        by_task += logged[f"loss/{name}"] * count
    total = sum(label != -100 for row in data for label in row["labels"])
    assert by_task / total == pytest.approx(logged["lm_loss"], rel=1e-5)
    assert logged["loss/a"] != pytest.approx(by_the_model(model_of(kind), data)["a"], rel=1e-4)


def doubled(outputs, labels, num_items_in_batch=None):
    return 2 * torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


class OtherForTokenClassification(hf.BertForTokenClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        out = super().forward(input_ids, attention_mask, labels=labels)
        out["loss"] = out["loss"] + out["logits"].square().mean()  # as auxiliary losses are
        return out


def test_a_loss_that_the_terms_do_not_add_up_to_is_not_logged_by_task_and_said_once(tmp_path):
    data = rows("BertForTokenClassification")
    torch.manual_seed(0)
    own = adapted(OtherForTokenClassification(bert(num_labels=5)), exclude_modules=("classifier",))
    for model, options in ((model_of("BertForTokenClassification"), {"compute_loss_func": doubled}), (own, {})):
        ran = trainer_of(model, data, folder=tmp_path, args={"max_steps": 3}, **options)
        with pytest.warns(UserWarning, match="not logged by task: its terms do not add up") as said:
            metrics = ran.train() and ran.evaluate()
        assert sum("by task" in str(warning.message) for warning in said) == 1
        assert not any("loss/" in name for entry in (*ran.state.log_history, metrics) for name in entry)


class Own(torch.nn.Module):
    """A model of nobody's library, whose class says nothing about its labels."""

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.head = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 9)
        self.shift = shift

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.up(self.embed(input_ids)).relu())
        ahead = logits[:, : logits.shape[1] - self.shift].flatten(0, 1)
        return {"loss": torch.nn.functional.cross_entropy(ahead, labels[:, self.shift :].flatten()), "logits": logits}


@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_of_ones_own_tells_by_its_loss_which_labels_its_logits_have(tmp_path, shift):
    data = rows("BertForTokenClassification")
    model = adapted(Own(shift), target_modules=["up"])
    ran = trainer_of(model, data, folder=tmp_path)
    evaluated = ran.evaluate()
    for task, name in enumerate(NAMES):
        batch = stacked([row for row in data if row["task_ids"] == task])
        del batch["task_ids"]
        assert evaluated[f"eval_loss/{name}"] == pytest.approx(model(**batch)["loss"].item(), rel=1e-5)


class AlignSeq2SeqTrainer(AlignMixin, Seq2SeqTrainer):
    pass


@pytest.mark.parametrize("options", [{}, {"architecture": "multi_adapter", "align": None}])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_seq2seq_trainer_generates_with_each_samples_adapter(tmp_path, options, beams):
    data, kind, seen = rows("T5ForConditionalGeneration"), "T5ForConditionalGeneration", []
    model = model_of(kind, **options)
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_num_beams=beams, generation_max_length=6, **STILL,
        report_to="none", per_device_eval_batch_size=4,
    )  # fmt: skip
    ran = AlignSeq2SeqTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=stacked, task_names=NAMES,
        compute_metrics=lambda p: seen.append(p.predictions) or {"one": 1.0},
    )  # fmt: skip
    metrics = ran.evaluate()
    assert metrics["eval_one"] == 1.0
    model.eval()
    for i, row in enumerate(data):
        if options:
            set_task(model, row["task_ids"])
        one = stacked([{name: row[name] for name in ("input_ids", "attention_mask")}])
        alone = model.generate(**one, num_beams=beams, max_length=6)[0].tolist()
        assert seen[0][i].tolist()[: len(alone)] == alone
    for task, name in enumerate(NAMES):
        if options:
            set_task(model, task)
        batch = stacked([row for row in data if row["task_ids"] == task])
        del batch["task_ids"]
        assert metrics[f"eval_loss/{name}"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    set_task(model, None)
    ran.train()


def test_the_best_checkpoint_by_a_tasks_loss_is_that_of_the_least(tmp_path):
    kind = "BertForSequenceClassification"
    args = {"metric_for_best_model": "loss/a", "load_best_model_at_end": True, "save_strategy": "steps"}
    args |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4, "learning_rate": 0.05}
    ran = trainer_of(model_of(kind), rows(kind), folder=tmp_path, args=args)
    ran.train()
    losses = [entry["eval_loss/a"] for entry in ran.state.log_history if "eval_loss/a" in entry]
    assert ran.state.best_metric == min(losses) < max(losses)
    assert ran.evaluate()["eval_loss/a"] == pytest.approx(min(losses), rel=1e-5)
