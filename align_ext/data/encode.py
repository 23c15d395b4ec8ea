"""Encodes prompts and answers as tokens, identically for training, scoring and generation."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from align_ext.data.conversation import Prompt, messages_of
from align_ext.data.rows import Example
from align_ext.data.turns import NO_TEMPLATE, assistant_spans, written, written_calls
from align_ext.system.messages import shown

TrainedTurns = Literal["all", "last"]


def encode(tokenizer: Any, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
    """Tokenises a prompt, through the chat template if there is one, and its answer with the end token.

    The two are tokenised separately, so that training, scoring and generation see the same tokens of the prompt,
    whatever the tokenizer merges or appends. Of a plain text (no turns), the prompt is the first token.

    Raises:
        ValueError: the prompt is a conversation and there is no chat template, the template refuses it or omits text,
            or the tokenizer makes no token of the answer.
    """
    tokens, (answer_tokens,) = encode_example(tokenizer, Example("", prompt, answer))
    return tokens, answer_tokens


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[list[int]]]:
    """Returns the tokens of an example's prompt, and those of each of its answers: the choices, or the only one.

    Raises:
        ValueError: as in `encode`.
    """
    end = [] if tokenizer.eos_token_id is None or not example.ends else [tokenizer.eos_token_id]
    if example.is_text:
        text = _tokenize_answer(tokenizer, example.answer)
        tokens = [*_leading_tokens(tokenizer, example.answer, text), *text, *end]
        if len(tokens) < 2:
            raise ValueError(f"the text {shown(example.answer)} is one token, which nothing can be learnt from")
        return tokens[:1], [tokens[1:]]
    prompt = prompt_tokens(tokenizer, example.prompt)
    answers = [_tokenize_answer(tokenizer, answer) + end for answer in _answers(tokenizer, example)]
    return prompt, answers


def gold_tokens(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Returns the tokens of an example's prompt and of its right answer (see `encode_example`)."""
    prompt, answers = encode_example(tokenizer, example)
    return prompt, answers[max(example.label, 0)]


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Returns the tokens of a prompt up to the start of the answer (see `encode`)."""
    text, templated = _prompt_text(tokenizer, prompt)
    tokens = _tokenize(tokenizer, text)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the prompt {shown(prompt)}")
    return tokens if templated else [*_leading_tokens(tokenizer, text, tokens), *tokens]


def _answers(tokenizer: Any, example: Example) -> tuple[str, ...]:
    """Returns the texts of an example's answers."""
    if example.calls and not isinstance(example.prompt, str):
        return (written_calls(tokenizer, example.prompt, example.answer, example.calls),)
    return example.choices or (example.answer,)


def _tokenize_answer(tokenizer: Any, answer: str) -> list[int]:
    tokens = _tokenize(tokenizer, answer)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the answer {shown(answer)}")
    return tokens


def fits(tokenizer: Any, example: Example, max_tokens: int, *, cut: bool = False) -> bool:
    """Whether the prompt with each possible answer has at most so many tokens; nothing is truncated here.

    Args:
        tokenizer: the tokenizer.
        example: the example.
        max_tokens: the most tokens.
        cut: whether plain texts fit whatever their length, since they will be cut.

    Raises:
        ValueError: as in `encode`; the message names the example's file and line.
    """
    with _at(example):
        if cut and example.is_text:
            return True
        text = "" if example.is_text else _prompt_text(tokenizer, example.prompt)[0]
        answers = _answers(tokenizer, example)
        if any(_is_far_too_long(tokenizer, candidate, max_tokens) for candidate in (text, *answers)):
            return False
        prompt, tokens = encode_example(tokenizer, example)
        return all(len(prompt) + len(answer) <= max_tokens for answer in tokens)


@contextmanager
def _at(example: Example) -> Iterator[None]:
    """Begins the message of a ValueError with an example's file and line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{example.where or example.task}: {error}") from error


def check_conversations(tokenizer: Any, examples: Iterable[Example]) -> None:
    """Checks that the tokenizer has a chat template if any example, used or not, is a conversation.

    Raises:
        ValueError: it has none; the message names the example's file and line.
    """
    if getattr(tokenizer, "chat_template", None):
        return
    for example in examples:
        if not isinstance(example.prompt, str) and not example.is_text:
            raise ValueError(f"{example.where or example.task}: {NO_TEMPLATE}")


def features(
    tokenizer: Any, examples: Iterable[Example], ids: dict[str, int], turns: TrainedTurns = "last"
) -> Iterator[dict[str, Any]]:
    """Yields features for TaskCollator: tokens, labels on what is learnt (-100 elsewhere), and the task's id.

    Args:
        tokenizer: the tokenizer.
        examples: the examples.
        ids: the id of each task.
        turns: what is learnt of a conversation: the "last" turn of the assistant, the answer, or "all" of its turns.
            The tokens are the same.

    Raises:
        ValueError: as in `encode`, or a turn cannot be found; the message names the example's file and line.
    """
    for example in examples:
        with _at(example):
            prompt, answer = gold_tokens(tokenizer, example)
            labels = _turn_labels(tokenizer, example, prompt) if turns == "all" else [-100] * len(prompt)
        yield {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": labels + answer,
            "task_ids": ids[example.task],
        }


def _turn_labels(tokenizer: Any, example: Example, tokens: list[int]) -> list[int]:
    """Returns the labels of a prompt's tokens: those of the assistant's earlier turns, -100 elsewhere.

    The turns are those between the template's {% generation %} marks if it has any, and else those that
    `assistant_spans` finds.
    """
    turns = example.prompt
    if isinstance(turns, str) or not any(turn[0] == "assistant" for turn in turns):
        return [-100] * len(tokens)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the turns of a conversation need a fast tokenizer: give --trained-turns last")
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        messages, tools = messages_of(turns)
        marked = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        learnt = [bool(mark) for mark in marked["assistant_masks"]]
    else:
        text = written(tokenizer, turns)
        spans = assistant_spans(tokenizer, turns, text)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        learnt = [any(first < end and begin < last for begin, end in spans) for first, last in offsets]
    return [token if mark else -100 for token, mark in zip(tokens, learnt, strict=True)]


def token_rows(tokenizer: Any, examples: Iterable[Example]) -> Iterator[list[int]]:
    """Yields the tokens of each example's prompt with each of its answers."""
    for example in examples:
        prompt, answers = encode_example(tokenizer, example)
        yield from ([*prompt, *answer] for answer in answers)


def text_batch(tokenizer: Any, texts: Iterable[str]) -> dict[str, Tensor]:
    """Returns padded input_ids and attention_mask of texts, whatever the tokenizer's model_input_names are.

    Raises:
        ValueError: the tokenizer makes no token of any text.
    """
    usable = [text for text in texts if tokenizer(text)["input_ids"]]
    if not usable:
        raise ValueError("the tokenizer makes no token of any of the prompts: write others, or name another model")
    batch = tokenizer(usable, return_tensors="pt", padding=True, return_attention_mask=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _prompt_text(tokenizer: Any, prompt: Prompt) -> tuple[str, bool]:
    """Returns the text of a prompt, and whether a chat template wrote it, which includes all special tokens."""
    if isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        return f"{prompt}\n", False
    return written(tokenizer, (("user", prompt),) if isinstance(prompt, str) else prompt), True


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _leading_tokens(tokenizer: Any, text: str, tokens: list[int]) -> list[int]:
    """Returns the special tokens before a text; those after it are left out, since the answer follows."""
    all_tokens = list(tokenizer(text)["input_ids"])
    for start in range(len(all_tokens) - len(tokens) + 1):
        if all_tokens[start : start + len(tokens)] == tokens:
            return all_tokens[:start]
    raise ValueError("the tokenizer's special tokens change the text's own tokens")


def _is_far_too_long(tokenizer: Any, text: str, max_tokens: int) -> bool:
    """Whether the start of a text has more than twice as many tokens, so that a huge text is not fully tokenised.

    A cut changes a few tokens around it, far fewer than that.
    """
    length = 32 * max_tokens + 4096
    while length < len(text):
        if len(_tokenize(tokenizer, text[:length])) > 2 * max_tokens + 64:
            return True
        length *= 4
    return False
