"""The log-likelihood of answers to prompts, in float32, with what several answers share computed once."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from align_ext.adapters.adapted_linear import AdaptedModule
from align_ext.adapters.trained_rows import TrainedRows
from align_ext.alignment.forward_hooks import CACHE
from align_ext.alignment.model_state import find_state
from align_ext.base_model.checks import model_errors

_SHORT = 8  # tokens; a shorter common prefix is not worth a forward of its own
_CLOSE = (0.05, 0.02)  # nats per token and relative: rounding in 16 bits, far less than a wrong position or mask costs


@dataclass(frozen=True)
class Question:
    """A prompt and the answers whose likelihoods are wanted, as tokens; task: its id, or -1."""

    prompt: list[int]
    answers: tuple[list[int], ...]
    task: int = -1

    @property
    def length(self) -> int:
        """The tokens of the prompt and the longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def answer_nll(
    model: Any, pad: int, questions: Sequence[Question], batch_size: int, advance: Callable[[int], None]
) -> list[tuple[float, ...]]:
    """Computes the negative log-likelihood of each answer, summed over its tokens, in nats.

    Logits are computed in float32, and only where an answer's token is predicted. The tokens that all prompts of a
    batch begin with, and those that the answers to one prompt begin with, are computed once, through the key-value
    cache: choices of one token cost one forward of the prompt. Models whose cache does not allow it, or that give other
    numbers so (compared on the first batch), run each answer whole.

    Args:
        model: a causal language model in eval mode.
        pad: the token to pad with.
        questions: in any order; the longest ones run first, so that a too large batch fails early.
        batch_size: the most answers in a forward.
        advance: called with the number of answers done.

    Returns:
        For each question, the sums of its answers.
    """
    cache = _cache_argument(model)
    found: dict[int, tuple[float, ...]] = {}
    order = sorted(range(len(questions)), key=lambda i: -questions[i].length)
    with _float32_head(model) as head, torch.no_grad():
        for number, batch in enumerate(_batches(questions, order, batch_size)):
            with model_errors(model, "score answers"):
                of_batch = [questions[i] for i in batch]
                sums = None if cache is None else _shared(model, pad, of_batch, head, cache)
                if sums is None or number == 0:
                    whole = _whole(model, pad, of_batch, head, batch_size)
                    cache = cache if sums is not None and _agree(sums, whole, of_batch) else None
                    sums = whole
            found.update(zip(batch, sums, strict=True))
            advance(sum(len(question.answers) for question in of_batch))
    return [found[i] for i in range(len(questions))]


def _batches(questions: Sequence[Question], order: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yields groups of questions with at most so many answers, or of one question."""
    batch: list[int] = []
    answers = 0
    for i in order:
        count = len(questions[i].answers)
        if batch and answers + count > most:
            yield batch
            batch, answers = [], 0
        batch.append(i)
        answers += count
    if batch:
        yield batch


def _agree(first: Any, second: Any, questions: Sequence[Question]) -> bool:
    """Whether two computations of the same sums differ by rounding only."""
    for ours, theirs, question in zip(first, second, questions, strict=True):
        for a, b, answer in zip(ours, theirs, question.answers, strict=True):
            if not abs(a - b) <= _CLOSE[0] * len(answer) + _CLOSE[1] * abs(b):
                return False
    return True


def _cache_argument(model: Any) -> str | None:
    """Returns the name of a model's argument for a cache, or None if it must run each answer whole.

    It takes positions and a cache that holds all keys and values as they are.
    """
    state, config = find_state(model), getattr(model, "config", None)
    accepted = inspect.signature(model.forward).parameters
    if config is None or config.is_encoder_decoder or "position_ids" not in accepted:
        return None
    if state is not None and state.config.routing == "sequence":  # the router needs the prompt in one forward
        return None
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return None
    return next((name for name in CACHE if name in accepted), None)


class _Head:
    """Makes the model compute its logits in float32 and only at the wanted tokens."""

    def __init__(self, module: nn.Module | None) -> None:
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        self.handles = []
        if module is not None:
            self.handles.append(module.register_forward_pre_hook(self._select))
        inner: Any = module.base_layer if isinstance(module, AdaptedModule) else module
        if module is not None and type(inner) is nn.Linear and inner.weight.dtype in (torch.bfloat16, torch.float16):
            self.weight = inner.weight.float()
            self.bias = None if inner.bias is None else inner.bias.float()
            self.handles.append(module.register_forward_hook(self._in_float32))

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rows is None or not args or args[0].dim() != 3:
            return None
        return (args[0][self.rows, self.columns][None], *args[1:])

    def _in_float32(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].float()
        y = nn.functional.linear(x, self.weight, self.bias)
        if not isinstance(module, AdaptedModule) or module.disabled or getattr(module, "merged", False):
            return y
        if isinstance(module, TrainedRows):
            return module.adapter(x, module.base_layer, y)
        return module.adapter(x, base_out=y)

    def log_probs(self, model: Any, inputs: dict[str, Tensor], rows: list[int], columns: list[int]) -> Tensor:
        """Returns the log-probabilities of the next token, float32 [K, vocabulary], at K tokens of a forward."""
        device = inputs["input_ids"].device
        self.rows, self.columns = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        logits = model(**inputs).logits
        if logits.shape[:2] != (1, len(rows)) or not self.handles:
            logits = logits[self.rows.to(logits.device), self.columns.to(logits.device)]
        return logits.reshape(len(rows), -1).float().log_softmax(-1)


@contextmanager
def _float32_head(model: Any) -> Iterator[_Head]:
    find = getattr(model, "get_output_embeddings", None)
    head = _Head(None if find is None else find())
    try:
        yield head
    finally:
        for handle in head.handles:
            handle.remove()


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns tokens and mask [B, S], padded on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def _whole(
    model: Any, pad: int, questions: Sequence[Question], head: _Head, batch_size: int
) -> list[tuple[float, ...]]:
    """Runs every prompt with every answer."""
    state, device = find_state(model), next(model.parameters()).device
    pairs = [(i, answer) for i, question in enumerate(questions) for answer in question.answers]
    sums: list[list[float]] = [[] for _ in questions]
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        rows = [[*questions[i].prompt, *answer] for i, answer in batch]
        ids, mask = _padded(rows, pad, device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if by_task(model):
            inputs["task_ids"] = torch.tensor([questions[i].task for i, _ in batch], device=device)
        if state is not None and state.config.routing == "sequence":
            labels = torch.full_like(ids, -100)  # the router needs the end of the prompt
            for row, (i, answer) in enumerate(batch):
                labels[row, len(questions[i].prompt) : len(rows[row])] = torch.tensor(answer, device=device)
            inputs["labels"] = labels
        where = [
            (row, len(questions[i].prompt) + k - 1) for row, (i, answer) in enumerate(batch) for k in range(len(answer))
        ]
        # Labels make some models compute a loss, for which the logits must be whole.
        selected = head if "labels" not in inputs else _Head(None)
        logs = selected.log_probs(model, {**inputs, "use_cache": False}, *map(list, zip(*where, strict=True)))  # type: ignore[dict-item]
        tokens = torch.tensor([token for _, answer in batch for token in answer], device=logs.device)
        values = iter((-logs.gather(1, tokens[:, None])[:, 0]).double().tolist())
        for i, answer in batch:
            sums[i].append(sum(next(values) for _ in answer))
    return [tuple(of_question) for of_question in sums]


def _shared(
    model: Any, pad: int, questions: Sequence[Question], head: _Head, cache_argument: str
) -> list[tuple[float, ...]]:
    """Runs the common start of all prompts, then the rest of each prompt, then what differs between the answers."""
    device, tasks = next(model.parameters()).device, by_task(model)
    texts = [[[*question.prompt, *answer] for answer in question.answers] for question in questions]
    # Each text's last token is only predicted, so it never runs.
    common = [min(_common(of), min(map(len, of)) - 1) for of in texts]
    start = _common([of[0][: len(q.prompt) - 1] for of, q in zip(texts, questions, strict=True)])
    start = start if start >= _SHORT and len(questions) > 1 else 0
    cache = DynamicCache(config=model.config)

    def run(rows: list[list[int]], before: Tensor, first: list[int], owners: list[int], where: Any) -> Tensor:
        ids, mask = _padded(rows, pad, device)
        positions = torch.tensor(first, device=device)[:, None] + torch.arange(ids.shape[1], device=device)
        inputs: Any = {"input_ids": ids, "attention_mask": torch.cat([before, mask], 1), "position_ids": positions}
        if tasks:
            inputs["task_ids"] = torch.tensor([questions[i].task for i in owners], device=device)
        inputs |= {cache_argument: cache, "use_cache": True}
        return head.log_probs(model, inputs, *map(list, zip(*where, strict=True)))

    everyone, empty = list(range(len(questions))), torch.ones(1, 0, dtype=torch.int64, device=device)
    if start and not tasks:
        run([texts[0][0][:start]], empty, [0], [0], [(0, 0)])
        cache.batch_repeat_interleave(len(questions))
    else:
        start = 0
    before = torch.ones(len(questions), start, dtype=torch.int64, device=device)
    rows = [of[0][start:end] for of, end in zip(texts, common, strict=True)]
    where = [(i, k - 1 - start) for i in everyone for k in range(len(questions[i].prompt), common[i] + 1)]
    logs, offset = run(rows, before, [start] * len(questions), everyone, where), 0
    sums: dict[tuple[int, int], float] = {}
    for i, question in enumerate(questions):
        first = len(question.prompt)
        count = common[i] + 1 - first
        for a, text in enumerate(texts[i]):
            tokens = torch.tensor(text[first : common[i] + 1], device=logs.device)
            sums[i, a] = -float(logs[offset : offset + count].gather(1, tokens[:, None]).double().sum())
        offset += count
    rest = [(i, a) for i in everyone for a, text in enumerate(texts[i]) if len(text) > common[i] + 1]
    if rest:
        owners = [i for i, _ in rest]
        lengths = torch.tensor([common[i] for i in owners], device=device)
        cached = start + max(map(len, rows))
        before = (torch.arange(cached, device=device) < lengths[:, None]).long()
        cache.batch_select_indices(torch.tensor(owners, device=device))
        ends = [texts[i][a][common[i] : -1] for i, a in rest]
        where = [(row, k) for row, end in enumerate(ends) for k in range(len(end))]
        logs = run(ends, before, [common[i] for i in owners], owners, where)
        tokens = torch.tensor([token for i, a in rest for token in texts[i][a][common[i] + 1 :]], device=logs.device)
        values = iter((-logs.gather(1, tokens[:, None])[:, 0]).double().tolist())
        for (i, a), end in zip(rest, ends, strict=True):
            sums[i, a] += sum(next(values) for _ in end)
    return [tuple(sums[i, a] for a in range(len(question.answers))) for i, question in enumerate(questions)]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Returns the number of tokens with which all rows begin."""
    places = enumerate(zip(*rows, strict=False))
    return next((k for k, tokens in places if len(set(tokens)) > 1), min(map(len, rows)))


def by_task(model: nn.Module) -> bool:
    """Whether a model computes by the task (multi_adapter, moelora, ...), so that it needs the task of each row."""
    state = find_state(model)
    return state is not None and state.config.row.by_task
