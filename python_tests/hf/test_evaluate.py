"""Scoring: losses, choices and generations as a naive loop has them; the alignment as its definition has it."""

import dataclasses
import statistics

import pytest
import torch
from hf.words import llama, tokenizer
from transformers import GenerationConfig

from align_ext import align_parts, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.data.encode import encode
from align_ext.data.rows import Example
from align_ext.evaluation.evaluate import alignment, answer_nll, evaluate

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
    result = evaluate(model, tokenizer(), choosing, 3, greedy=True)["colour"]
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


def test_the_first_position_of_a_row_is_never_counted():
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[3, -100, 2, 1], [5, -100, -100, -100]])
    nll, rows = answer_nll(logits, labels)
    assert rows.tolist() == [0, 0]
    torch.testing.assert_close(nll, -logits.log_softmax(-1)[0, [1, 2], [2, 1]])


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


def test_there_is_no_alignment_to_measure_without_one(model):
    ids = {"colour": 0, "copy": 1}
    assert alignment(model, tokenizer(), examples(), ids) is None
    assert alignment(adapted(model, architecture="lora"), tokenizer(), examples(), ids) is None


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
