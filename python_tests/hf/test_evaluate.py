"""Scoring: losses, choices and generations as a naive loop has them; the alignment as its definition has it."""

import dataclasses
import gzip
import json
import statistics
from typing import get_args

import pytest
import torch
from hf.words import gpt2, llama, qwen2, tokenizer
from transformers import GenerationConfig

from align_ext import TaskCollator, align_parts, capture_latents, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.architectures import Architecture
from align_ext.data.encode import encode, features
from align_ext.data.rows import Example
from align_ext.evaluation import likelihood
from align_ext.evaluation.evaluate import alignment, alignment_pull, evaluate, score_rows
from align_ext.evaluation.rows import RowScore, task_scores, write_rows

CHOICES = ("red", "green", "very dark blue")


def examples(said=None):
    """Nine examples with choices and seven with free text, of many lengths."""

    def keep(text):
        said.append(text)
        return float(len(text) % 2)

    labels = (0, 0, 0, 0, 0, 1, 1, 2, 2)
    colours = [Example("colour", "c" * (3 * i + 1), CHOICES[k], CHOICES, k) for i, k in enumerate(labels)]
    scorer = None if said is None else keep
    return colours + [Example("copy", "x" * (2 * i + 1), "y" * (i % 3 + 1), scorer=scorer) for i in range(7)]


@pytest.fixture
def model():
    return llama()


def naive_nll(model, prompt, answer, **inputs):
    """Negative log-likelihoods of an answer's tokens, one sequence, no padding."""
    prompt, answer = encode(tokenizer(), prompt, answer)
    if "labels" in inputs:
        inputs["labels"] = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), **inputs).logits[0].double().log_softmax(-1)
    return [-logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_losses_and_choices_are_those_of_one_sequence_at_a_time(model, batch_size):
    result = evaluate(model, tokenizer(), examples(), batch_size)
    assert list(result) == ["colour", "copy"]
    for task, score in result.items():
        mine = [example for example in examples() if example.task == task]
        tokens = [nll for example in mine for nll in naive_nll(model, example.prompt, example.answer)]
        assert score.loss == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
        assert score.examples == len(mine)
        nlls = [naive_nll(model, example.prompt, example.answer) for example in mine]
        residuals = [sum(nll) - score.loss * len(nll) for nll in nlls]  # whose mean is 0
        error = statistics.stdev(residuals) * len(mine) ** 0.5 / sum(map(len, nlls))
        assert score.loss_error == pytest.approx(error, rel=1e-4)
        assert score.greedy is None
    assert result["colour"].score_error == pytest.approx(
        (result["colour"].score * (1 - result["colour"].score) / 8) ** 0.5
    )
    means, sums = [], []
    for example in examples()[:9]:
        nlls = [naive_nll(model, example.prompt, choice) for choice in CHOICES]
        means.append(min(range(3), key=lambda i, nlls=nlls: sum(nlls[i]) / len(nlls[i])) == example.label)
        sums.append(min(range(3), key=lambda i, nlls=nlls: sum(nlls[i])) == example.label)
    assert result["colour"].score == pytest.approx(sum(means) / 9)
    assert sum(means) not in (0, 9, sum(sums)), "so that a wrong rule would show"


def greedy(model, ids, most, **inputs):
    """The text that follows a prompt, token by token, each time from the start."""
    start = len(ids)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), **inputs).logits[0, -1].argmax()))
        if ids[-1] == tokenizer().eos_token_id:
            break
    return tokenizer().decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_is_greedy_whatever_the_padding(model, batch_size):
    said, expected = [], []
    result = evaluate(model, tokenizer(), examples(said), batch_size)
    free = examples()[9:]
    for example in free:
        ids, _ = encode(tokenizer(), example.prompt, example.answer)
        expected.append(greedy(model, ids, max(len(other.answer) + 1 for other in free) + 4))
    assert said == expected
    assert len(set(said)) > 3
    assert result["copy"].score == pytest.approx(sum(len(text) % 2 for text in said) / 7)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1}, {"min_new_tokens": 9}, {"min_length": 99},
        {"max_length": 3}, {"max_time": 1e-9}, {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 9.0, "top_k": 2}, {"suppress_tokens": list(range(3, 60))},
        {"begin_suppress_tokens": list(range(3, 60))}, {"bad_words_ids": [[9], [10]]}, {"forced_eos_token_id": 1},
        {"return_dict_in_generate": True, "output_scores": True}, {"stop_strings": ["a"]}, {"use_cache": False},
        {"cache_implementation": "static"}, {"penalty_alpha": 0.6, "top_k": 4}, {"guidance_scale": 3.0},
        {"sequence_bias": [[[5], 90.0]]}, {"exponential_decay_length_penalty": (0, 9.0)}, {"own_option": 3},
        {"prompt_lookup_num_tokens": 3}, {"dola_layers": "low"}, {"token_healing": True},
        {"encoder_repetition_penalty": 9.0}, {"bos_token_id": "none"}, {"decoder_start_token_id": "x"},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_of_a_models_own_way_to_generate_nothing_reaches_its_greedy_answers(model, options):
    expected, said = [], []
    evaluate(model, tokenizer(), examples(expected), 3)
    model.generation_config = own = GenerationConfig(**model.generation_config.to_diff_dict() | options)
    evaluate(model, tokenizer(), examples(said), 3)
    assert said == expected
    assert model.generation_config is own


def test_an_answer_ends_at_each_end_token_of_the_model(model):
    said, ended = [], []
    evaluate(model, tokenizer(), examples(said), 3)
    letter = next(text for text in said if len(text) > 2)[1]
    model.generation_config.eos_token_id = [tokenizer().convert_tokens_to_ids(letter), tokenizer().eos_token_id]
    evaluate(model, tokenizer(), examples(ended), 3)
    assert ended == [text.partition(letter)[0] + letter * (letter in text) for text in said]


def test_a_choice_that_is_right_as_well_counts(model):
    choosing = examples()[:9]
    every = [dataclasses.replace(x, also=tuple({0, 1, 2} - {x.label})) for x in choosing]
    assert evaluate(model, tokenizer(), choosing)["colour"].score < 1
    assert evaluate(model, tokenizer(), every)["colour"].score == 1


def test_choices_may_be_answered_freely_too(model):
    said = []

    def keep(text):
        said.append(text)
        return float(len(said) in (2, 3, 5))

    choosing = [dataclasses.replace(example, scorer=keep) for example in examples()[:9]]
    result = evaluate(model, tokenizer(), choosing, 3, generate="all")["colour"]
    assert len(said) == 9
    assert result.greedy == pytest.approx(1 / 3)
    assert result.greedy_error == pytest.approx((1 / 3 * 2 / 3 / 8) ** 0.5)
    plain = evaluate(model, tokenizer(), choosing, 3)["colour"]
    assert (plain.score, plain.loss, plain.greedy) == (result.score, result.loss, None)


def test_scoring_leaves_the_model_in_the_mode_it_found(model):
    model.train()
    evaluate(model, tokenizer(), examples())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def sums_of(model, example, **inputs):
    """The sum of the negative log-likelihoods of every answer of an example, one sequence at a time."""
    answers = example.choices or (example.answer,)
    return [sum(naive_nll(model, example.prompt, answer, **inputs)) for answer in answers]


# Answers of one token, answers that begin alike, an answer that another one begins with, and equal ones.
SHARED = [
    Example("t", "the same beginning, and a first end", "a", ("a", "b", "c"), 0),
    Example("t", "the same beginning, and another", "it is red", ("it is red", "it is blue", "it is reddish"), 2),
    Example("t", "the same beginning", "twice", ("twice", "twice"), 1),
    Example("t", "the same beginning, then free text", "as long as it likes"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
@pytest.mark.parametrize("kind", [llama, gpt2, qwen2])
def test_what_answers_share_runs_once_and_changes_no_likelihood(kind, batch_size, monkeypatch):
    model, tokens = kind(), []
    expected = [sums_of(model, example) for example in SHARED * 2]
    whole = []
    monkeypatch.setattr(likelihood, "_whole", lambda *args, run=likelihood._whole: whole.append(1) or run(*args))
    model.register_forward_hook(lambda m, args, kwargs, y: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True)
    rows = score_rows(model, tokenizer(), SHARED * 2, batch_size, generate="none")
    for row, sums, example in zip(rows, expected, SHARED * 2, strict=True):
        assert row.nll == pytest.approx(sums, rel=1e-5)
        assert row.tokens == tuple(len(text) + 1 for text in example.choices or (example.answer,))
    assert len(whole) == 1, "the first batch is computed both ways, and the others are not"
    assert [row.id for row in rows[4:]] == [f"{row.id}#2" for row in rows[:4]]


def test_a_model_without_positions_or_with_other_numbers_by_its_cache_runs_every_answer_whole(model, monkeypatch):
    expected = [sums_of(model, example) for example in SHARED]
    whole, run = [], likelihood._whole
    monkeypatch.setattr(likelihood, "_whole", lambda *args: whole.append(1) or run(*args))
    shared = likelihood._shared

    def wrong(*args):
        return [tuple(value * 1.2 + 1 for value in of) for of in shared(*args)]

    monkeypatch.setattr(likelihood, "_shared", wrong)
    for sums, row in zip(expected, score_rows(model, tokenizer(), SHARED, 3, generate="none"), strict=True):
        assert row.nll == pytest.approx(sums, rel=1e-5)
    assert len(whole) == 4


def test_logits_of_a_16_bit_model_are_in_float32_so_that_choices_do_not_tie(model):
    """The weights of two tokens differ by less than what bfloat16 resolves of their logits."""
    model = model.to(torch.bfloat16)
    a, b = (tokenizer()(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    with torch.no_grad():
        head = model.lm_head.weight
        head.mul_(40)
        head[b] = head[a]
        head[b, 0] += 2 * head[a, 0].abs() * 2**-7
    choosing = [Example("t", "x" * n, "a", ("a", "b"), 0) for n in range(1, 9)]
    rows = score_rows(model, tokenizer(), choosing, 4, generate="none")
    assert all(row.nll[0] != row.nll[1] for row in rows)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.dtype == torch.bfloat16, "the model is left as it was"
    assert logits.shape[1] == 3


def test_rows_are_written_as_the_same_bytes_and_tell_everything(model, tmp_path):
    rows = score_rows(model, tokenizer(), examples(), 4)
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl.gz", {"test": rows}, "split")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    lines = [json.loads(line) for line in gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode().splitlines()]
    assert len(lines) == len(rows)
    assert lines[0].keys() == {"split", "id", "task", "label", "also", "nll", "tokens", "greedy"}
    assert (
        RowScore(**{k: tuple(v) if isinstance(v, list) else v for k, v in lines[0].items() if k != "split"}) == rows[0]
    )
    assert task_scores(rows) == evaluate(model, tokenizer(), examples(), 4)
    none = evaluate(model, tokenizer(), examples(), generate="none")["copy"]
    assert (none.score, none.score_error) == (None, None)


def adapted(model, **options):
    replace_linear_with_align_lora(model, r=4, lora_dropout=0.5, **options)
    return model


def test_the_alignment_is_the_kl_of_all_examples_latents_without_dropout(model):
    adapted(model, num_tasks=2)
    latents, task_of = {name: [] for name in adapted_layers(model)}, []
    for example in examples():
        prompt, answer = encode(tokenizer(), example.prompt, example.answer)
        task_of += [example.task == "copy"] * len(prompt + answer)
        inputs = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name, inputs=inputs: inputs.update({name: args[0]}))
            for name, layer in adapted_layers(model).items()
        ]
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([prompt + answer]))
        for hook in hooks:
            hook.remove()
        for name, layer in adapted_layers(model).items():
            latents[name].append((inputs[name][0] @ layer.adapter.lora_A.T).detach().double())
    mask, total = torch.tensor(task_of), 0.0
    for rows in latents.values():
        z = torch.cat(rows)
        a, b = (
            torch.distributions.Normal(z[m].mean(0), (z[m].var(0, correction=0) + 1e-6).sqrt()) for m in (mask, ~mask)
        )
        kl = torch.distributions.kl_divergence
        total += 0.5 * (kl(a, b) + kl(b, a)).sum().item() / len(latents)
    model.train()
    for batch_size in (3, 64):
        value = alignment(model, tokenizer(), examples(), {"colour": 0, "copy": 1}, batch_size)
        assert value == pytest.approx(total, rel=1e-4)
    assert model.training
    assert all(layer.training and layer.adapter.dropout_p == 0.5 for layer in adapted_layers(model).values())
    assert align_parts(model) is None, "measuring is no training step"


def test_batches_that_lack_a_task_still_merge_when_the_number_of_tasks_is_not_told(model):
    adapted(model)
    ids = {"copy": 0, "colour": 1}
    one_by_one = alignment(model, tokenizer(), examples(), ids, 1)
    assert one_by_one == pytest.approx(alignment(model, tokenizer(), examples(), ids, 64), rel=1e-4)
    assert one_by_one > 0


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_alignment_is_measured_whether_or_not_it_is_trained(architecture):
    """With equal parameters the value is the same, so that arms with alignment and without compare."""
    ids, values = {"colour": 0, "copy": 1}, []
    for align in (None, "kl"):
        torch.manual_seed(0)
        options = {"architecture": architecture, "align": align, "num_tasks": 2, "target_modules": "all-linear"}
        model = adapted(llama(), **options)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_E"):  # singular values, with which the latents of adalora begin at zero
                torch.nn.init.ones_(parameter)
        values.append([alignment(model, tokenizer(), examples(), ids, kind=kind) for kind in ("kl", "mmd", "l2")])
    assert values[0] == values[1]
    assert min(values[0]) > 0
    assert alignment(model, tokenizer(), examples(), ids) == values[0][0]
    assert alignment(llama(), tokenizer(), examples(), ids) is None
    assert alignment(model, tokenizer(), examples()[:4], {"colour": 0}) is None


def test_the_pull_at_the_latents_is_the_norm_of_their_gradient(model):
    """A penalty of n r elements, L = Σ z² / (n r) in each of L layers: the pull is 2 |z| / (n r L)."""
    adapted(model, num_tasks=2, target_modules=["q_proj"])
    ids = {"colour": 0, "copy": 1}
    batch = TaskCollator(tokenizer())(list(features(tokenizer(), examples(), ids)))
    counts = batch["attention_mask"].bool().flatten()
    with torch.no_grad(), capture_latents(model.eval()) as captured:
        model(**batch)
    z = torch.stack([layer.z[counts] for layer in captured.values()]).double()
    pull = alignment_pull(model, tokenizer(), examples(), ids, "l2")
    assert pull == pytest.approx(float(2 * z.norm() / z.numel()), rel=1e-5)
    assert alignment_pull(model, tokenizer(), examples(), ids, "kl") > 0


def trained(model, **options):
    adapted(model, num_tasks=2, **options)
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.adapter.lora_B, std=0.3)
    return model


def test_with_an_adapter_for_each_task_every_example_is_scored_by_that_of_its_task(model):
    trained(model, architecture="multi_adapter")
    said, ids = [], {"colour": 1, "copy": 0}
    result = evaluate(model, tokenizer(), examples(said), 4, ids=ids)
    for task, score in result.items():
        mine, k = [example for example in examples() if example.task == task], torch.tensor([ids[task]])
        tokens = [nll for x in mine for nll in naive_nll(model, x.prompt, x.answer, task_ids=k)]
        others = [nll for x in mine for nll in naive_nll(model, x.prompt, x.answer, task_ids=1 - k)]
        assert score.loss == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
        assert score.loss != pytest.approx(sum(others) / len(others), rel=1e-2)
    free = examples()[9:]
    for i, example in enumerate(free):
        most = max(len(other.answer) + 1 for other in free[i - i % 4 :][:4]) + 4
        prompt, _ = encode(tokenizer(), example.prompt, example.answer)
        assert said[i] == greedy(model, list(prompt), most, task_ids=torch.tensor([0]))
    assert model.align_state.task is None, "the task is named for the time of scoring alone"
    with pytest.raises(ValueError, match="ids lacks copy"):
        evaluate(model, tokenizer(), examples(), ids={"colour": 1})


def test_routing_by_sequence_sees_the_prompt_alone(model):
    trained(model, architecture="hydra", router="mlp", routing="sequence", target_modules="all-linear")
    for layer in adapted_layers(model).values():
        layer.adapter.lora_router.lora_R.data.mul_(20)
    result = evaluate(model, tokenizer(), examples()[:9], 4)["colour"]
    losses = []
    for inputs in ({"labels": None}, {}):
        nll = [x for example in examples()[:9] for x in naive_nll(model, example.prompt, example.answer, **inputs)]
        losses.append(sum(nll) / len(nll))
    assert result.loss == pytest.approx(losses[0], rel=1e-5)
    assert result.loss != pytest.approx(losses[1], rel=1e-3), "the router must not look at the answer"


def test_there_is_no_alignment_by_position_over_examples_of_different_lengths(model):
    adapted(model, num_tasks=2, align_statistics="position")
    assert alignment(model, tokenizer(), examples(), {"colour": 0, "copy": 1}) is None
