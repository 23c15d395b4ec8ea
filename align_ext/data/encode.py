"""Prompts and answers as tokens: the same ones for training, scoring and generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from align_ext.data.conversation import Turn
from align_ext.data.rows import Example
from align_ext.system.reading import reason_of, shown

_NO_TEMPLATE = (
    "a conversation, or the column system, needs a chat template, and this tokenizer has none: take an "
    "instruction-tuned model, or write prompt and completion as text"
)


def encode(tokenizer: Any, prompt: str | tuple[Turn, ...], answer: str) -> tuple[list[int], list[int]]:
    """Tokenises a prompt, through the chat template if there is one, and its answer with the end token.

    The two are tokenised apart, so that training, scoring and generation see the same tokens of the prompt, whatever
    the tokenizer merges or appends.

    Raises:
        ValueError: the prompt is a conversation and there is no chat template, the template refuses it or leaves
            something out, or the tokenizer makes nothing of the answer.
    """
    return prompt_tokens(tokenizer, prompt), answer_tokens(tokenizer, answer)


def prompt_tokens(tokenizer: Any, prompt: str | tuple[Turn, ...]) -> list[int]:
    """The tokens of a prompt up to where the answer starts, as `encode` says."""
    text, templated = _prompt_text(tokenizer, prompt)
    tokens = _plain(tokenizer, text)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the prompt {shown(prompt)}")
    return tokens if templated else [*_opening(tokenizer, text, tokens), *tokens]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """The tokens of an answer, and the end token where the tokenizer has one, as `encode` says."""
    tokens = _plain(tokenizer, answer)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the answer {shown(answer)}")
    return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


def fits(tokenizer: Any, example: Example, max_tokens: int) -> bool:
    """Whether the prompt and each possible answer are at most so many tokens; nothing is ever cut.

    Raises:
        ValueError: as of `encode`; the message names the example's file and line.
    """
    answers = example.choices or (example.answer,)
    try:
        text, _ = _prompt_text(tokenizer, example.prompt)
        if any(_far_longer(tokenizer, long, max_tokens) for long in (text, *answers)):
            return False
        prompt = len(prompt_tokens(tokenizer, example.prompt))
        return all(prompt + len(answer_tokens(tokenizer, answer)) <= max_tokens for answer in answers)
    except ValueError as error:
        raise ValueError(f"{example.where or example.task}: {error}") from error


def check_conversations(tokenizer: Any, examples: Iterable[Example]) -> None:
    """Checks that the tokenizer can write every conversation, whether its row is taken in the end or not.

    Raises:
        ValueError: there is one and no chat template; the message names the example's file and line.
    """
    if getattr(tokenizer, "chat_template", None):
        return
    for example in examples:
        if not isinstance(example.prompt, str):
            raise ValueError(f"{example.where or example.task}: {_NO_TEMPLATE}")


def features(tokenizer: Any, examples: Iterable[Example], ids: dict[str, int]) -> list[dict[str, Any]]:
    """Features for TaskCollator: tokens, labels on the answer alone (-100 elsewhere), and the task's id."""
    rows = []
    for example in examples:
        prompt, answer = encode(tokenizer, example.prompt, example.answer)
        rows.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * len(prompt + answer),
                "labels": [-100] * len(prompt) + answer,
                "task_ids": ids[example.task],
            }
        )
    return rows


def token_rows(tokenizer: Any, examples: Iterable[Example]) -> Iterator[list[int]]:
    """The tokens of each example's prompt with each of its answers."""
    for example in examples:
        prompt = prompt_tokens(tokenizer, example.prompt)
        yield from ([*prompt, *answer_tokens(tokenizer, answer)] for answer in example.choices or (example.answer,))


def text_batch(tokenizer: Any, texts: Iterable[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask of texts, padded, whatever the tokenizer's model_input_names are.

    Raises:
        ValueError: the tokenizer makes no token of any text.
    """
    some = [text for text in texts if tokenizer(text)["input_ids"]]
    if not some:
        raise ValueError("the tokenizer makes no token of any of the prompts: write others, or name another model")
    batch = tokenizer(some, return_tensors="pt", padding=True, return_attention_mask=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _prompt_text(tokenizer: Any, prompt: str | tuple[Turn, ...]) -> tuple[str, bool]:
    """What is tokenised of a prompt, and whether a template made it, which writes all special tokens itself."""
    if not getattr(tokenizer, "chat_template", None):
        if isinstance(prompt, str):
            return f"{prompt}\n", False
        raise ValueError(_NO_TEMPLATE)
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program that comes with the model, and may fail in any way
        raise ValueError(f"the tokenizer's chat template refuses the prompt: {reason_of(error)}") from error
    lost = next((role for role, content in turns if content.strip() not in text), None)
    if lost is not None:
        raise ValueError(f"the tokenizer's chat template leaves out text of the {lost}'s turn")
    return text, True


def _plain(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _opening(tokenizer: Any, text: str, tokens: list[int]) -> list[int]:
    """The special tokens that the tokenizer puts before a text; those behind it would stand before the answer."""
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(tokens) + 1):
        if whole[start : start + len(tokens)] == tokens:
            return whole[:start]
    raise ValueError("the tokenizer's special tokens change the text's own tokens")


def _far_longer(tokenizer: Any, text: str, max_tokens: int) -> bool:
    """Whether the start of a text alone is more than twice as many tokens, so that a huge one is not tokenised.

    Where a text is cut, a few tokens around the cut may be others; they are fewer than that.
    """
    letters = 32 * max_tokens + 4096
    while letters < len(text):
        if len(_plain(tokenizer, text[:letters])) > 2 * max_tokens + 64:
            return True
        letters *= 4
    return False
