"""Encodes prompts and answers as tokens, identically for training, scoring and generation."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from align_ext.data.conversation import Turn
from align_ext.data.rows import Example
from align_ext.system.messages import reason_of, shown

_NO_TEMPLATE = (
    "a conversation, or the column system, needs a chat template, and this tokenizer has none: take an "
    "instruction-tuned model, or write prompt and completion as text"
)


def encode(tokenizer: Any, prompt: str | tuple[Turn, ...], answer: str) -> tuple[list[int], list[int]]:
    """Tokenises a prompt, through the chat template if there is one, and its answer with the end token.

    The two are tokenised separately, so that training, scoring and generation see the same tokens of the prompt,
    whatever the tokenizer merges or appends.

    Raises:
        ValueError: the prompt is a conversation and there is no chat template, the template refuses it or omits text,
            or the tokenizer makes no token of the answer.
    """
    return prompt_tokens(tokenizer, prompt), answer_tokens(tokenizer, answer)


def prompt_tokens(tokenizer: Any, prompt: str | tuple[Turn, ...]) -> list[int]:
    """Returns the tokens of a prompt up to the start of the answer (see `encode`)."""
    text, templated = _prompt_text(tokenizer, prompt)
    tokens = _tokenize(tokenizer, text)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the prompt {shown(prompt)}")
    return tokens if templated else [*_leading_tokens(tokenizer, text, tokens), *tokens]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """Returns the tokens of an answer, and the end token if the tokenizer has one (see `encode`)."""
    tokens = _tokenize(tokenizer, answer)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the answer {shown(answer)}")
    return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


def fits(tokenizer: Any, example: Example, max_tokens: int) -> bool:
    """Whether the prompt with each possible answer has at most so many tokens; nothing is ever truncated.

    Raises:
        ValueError: as in `encode`; the message names the example's file and line.
    """
    answers = example.choices or (example.answer,)
    try:
        text, _ = _prompt_text(tokenizer, example.prompt)
        if any(_is_far_too_long(tokenizer, candidate, max_tokens) for candidate in (text, *answers)):
            return False
        prompt = len(prompt_tokens(tokenizer, example.prompt))
        return all(prompt + len(answer_tokens(tokenizer, answer)) <= max_tokens for answer in answers)
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
        if not isinstance(example.prompt, str):
            raise ValueError(f"{example.where or example.task}: {_NO_TEMPLATE}")


def features(tokenizer: Any, examples: Iterable[Example], ids: dict[str, int]) -> list[dict[str, Any]]:
    """Returns features for TaskCollator: tokens, labels on the answer only (-100 elsewhere), and the task's id."""
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
    """Yields the tokens of each example's prompt with each of its answers."""
    for example in examples:
        prompt = prompt_tokens(tokenizer, example.prompt)
        yield from ([*prompt, *answer_tokens(tokenizer, answer)] for answer in example.choices or (example.answer,))


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


def _prompt_text(tokenizer: Any, prompt: str | tuple[Turn, ...]) -> tuple[str, bool]:
    """Returns the text of a prompt, and whether a chat template wrote it, which includes all special tokens."""
    if not getattr(tokenizer, "chat_template", None):
        if isinstance(prompt, str):
            return f"{prompt}\n", False
        raise ValueError(_NO_TEMPLATE)
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's, which may raise anything
        raise ValueError(f"the tokenizer's chat template refuses the prompt: {reason_of(error)}") from error
    missing = next((role for role, content in turns if content.strip() not in text), None)
    if missing is not None:
        raise ValueError(f"the tokenizer's chat template leaves out text of the {missing}'s turn")
    return text, True


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
