"""Forgetting: the loss of a model on plain text that no task is about."""

import pydoc_data.topics
from typing import Any

from align_ext.evaluation.evaluate import eval_mode
from align_ext.evaluation.likelihood import Question, answer_nll

_TOKENS = 128  # of a passage


def passages(tokenizer: Any, count: int) -> list[list[int]]:
    """Returns so many passages of 128 tokens, at equal distances in the topics of Python's own help.

    The text is prose about a language, comes with every Python, and differs little between its versions.
    """
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = (i * (len(tokens) - _TOKENS) // max(count - 1, 1) for i in range(count))
    return [tokens[start : start + _TOKENS] for start in starts]


def text_loss(model: Any, tokenizer: Any, count: int, batch_size: int) -> dict[str, float | int]:
    """Measures the mean negative log-likelihood of a token of plain text after the first of its passage, in nats.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        count: the number of passages.
        batch_size: the number of passages in a forward.

    Returns:
        The loss and the number of predicted tokens.
    """
    questions = [Question(passage[:1], (passage[1:],), 0) for passage in passages(tokenizer, count)]
    with eval_mode(model):
        sums = answer_nll(model, tokenizer.pad_token_id, questions, batch_size, lambda _: None)
    tokens = sum(len(question.answers[0]) for question in questions)
    return {"loss": sum(nll for (nll,) in sums) / tokens, "tokens": tokens}
