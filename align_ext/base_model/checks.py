"""Checks before training and scoring that a base model can be used.

All weights must have been loaded and be finite, logits must not depend on later tokens, each token must have an
embedding, the longest row and a padded batch must run, and no run may change the weights.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.alignment.buffers import same_buffers
from align_ext.base_model.fingerprint import BaseModel
from align_ext.system.memory import is_out_of_memory
from align_ext.system.messages import reason_of, shown

_PROBE = 8  # the number of tokens of a test run
_ROUNDING = 1e-4  # gradients up to this fraction of the largest one count as rounding errors
_CONSTANTS = ("masked_bias", "position_ids", "inv_freq")  # last name parts of buffers that older versions stored
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CannotRun(ValueError):
    """Raised if a run of the model raises an exception."""


@contextmanager
def model_errors(model: Any, what: str) -> Iterator[None]:
    """Turns an exception of a model in a block into a one-line CannotRun, except a lack of memory.

    Args:
        model: a model with or without adapters.
        what: completes the message "the model cannot ...".
    """
    try:
        yield
    except Exception as error:  # an unusual configuration may raise any exception in transformers or torch
        if is_out_of_memory(error):
            raise
        quantised = getattr(getattr(model, "config", None), "quantization_config", None) is not None
        hint = " (its config.json says that it is quantised)" if quantised else ""
        raise CannotRun(f"--model {_name(model)} cannot {what}: {reason_of(error)}{hint}") from error


def check_loaded(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Checks that all weights in a model's files were loaded, and that no weight is missing.

    Args:
        model: the loaded model.
        info: the output_loading_info of from_pretrained, without tied weights and without keys that the model's class
            declares as ignored.
        name: the first words of the message.

    Raises:
        ValueError: a weight is not stored, has another shape, or is stored but was not loaded.
    """
    learned = {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if _may_be_learned(tensor)}
    wrong_shapes = {str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys") or ()}
    missing = {name for name in info.get("missing_keys") or () if name in learned} - wrong_shapes
    if missing or wrong_shapes:
        what = f"lacks {_listed(missing)}" if missing else f"holds {_listed(wrong_shapes)} in other shapes"
        raise ValueError(
            f"{name} {what}, which {type(model).__name__} would have at random: name a whole causal language model, "
            "whose config.json (model_type, sizes) is that of its weights"
        )
    unexpected = {name for name in info.get("unexpected_keys") or () if not _is_computed_buffer(model, name)}
    if unexpected:
        raise ValueError(
            f"{name} holds {_listed(unexpected)}, which {type(model).__name__} does not read: correct its config.json "
            "(model_type, number of layers), or, where nothing needs them, save the model without them "
            "(AutoModelForCausalLM.from_pretrained(old).save_pretrained(new))"
        )
    if errors := [*(info.get("error_msgs") or ()), *(info.get("conversion_errors") or ())]:
        raise ValueError(f"{name} was not read as a whole: {shown(str(errors[0]))}")


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Raises ValueError for a weight that is NaN or infinite; a buffer such as a mask may be infinite."""
    for key, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.dtype not in _FLOATS or weight.is_meta or not weight.numel() or type(weight.data) is not Tensor:
            continue
        minimum, maximum = (float(x) for x in torch.aminmax(weight))
        nan, infinite = math.isnan(minimum), math.isinf(minimum) or math.isinf(maximum)
        if nan or (infinite and isinstance(weight, nn.Parameter)):
            kind = "NaN" if nan else "infinite"
            cure = "take a wider --dtype, or " if weight.dtype == torch.float16 and kind == "infinite" else ""
            raise ValueError(f"{name} is damaged: values of {shown(key)} are {kind}; {cure}take an undamaged one")


def check_base(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Sequence[int]] = (),
    *,
    training: bool = False,
    cure: str = "give a smaller --seq-len",
) -> frozenset[str]:
    """Runs a model without adapters on its device; its buffers are restored afterwards.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer.
        rows: the token ids of the rows for training and scoring.
        training: whether the longest row and the batch are also run in training mode.
        cure: the advice for rows that are too long.

    Returns:
        The names of the modules that ran.

    Raises:
        ValueError: a token has no embedding; the model cannot run at all, at this length, with padding or in training;
            its logits are not finite or depend on later tokens; or a run changes its weights. The message is one line
            with the cure.
    """
    longest = _checked_rows(model, tokenizer, rows)
    special = set(tokenizer.all_special_ids)
    most = _PROBE if longest is None else min(_PROBE, len(longest))
    probe = [token for token in range(_embedding_rows(model, tokenizer)) if token not in special][: most + 1]
    batch = [probe[:most], probe[: (most + 1) // 2]] if probe else []
    with same_buffers(model), _record_modules(model) as ran:
        weights = BaseModel.of(model).weights
        _check_causal(model, tokenizer, probe)
        if longest is not None:
            _check_longest(model, tokenizer, longest, cure)
        for left in (False, True):  # scoring pads on the right, generation on the left
            _run(model, tokenizer, batch, left=left)
        _check_weights(model, weights)
        if training and longest is not None:
            _run(model, tokenizer, batch, training=True)
            _run(model, tokenizer, [longest], training=True)
            _check_weights(model, weights)
    return frozenset(ran)


@contextmanager
def _record_modules(model: nn.Module) -> Iterator[set[str]]:
    """Yields a set that collects the names of the modules that run in a block."""
    names, ran = {id(module): name for name, module in model.named_modules()}, set[str]()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda m, _: ran.add(names.get(id(m), "")))
    try:
        yield ran
    finally:
        hook.remove()


def _check_weights(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Raises ValueError if weights have changed: the base must stay frozen, since an adapter belongs to its weights."""
    after = BaseModel.of(model).weights
    if changed := [name for name in before if after.get(name) != before[name]]:
        # RWKV-4 divides weights by powers of two in evaluation.
        scales = bool(getattr(model.config, "rescale_every", 0))
        cure = 'set "rescale_every": 0 in its config.json' if scales else "name a model whose forward leaves them alone"
        raise ValueError(f"--model {_name(model)} changes {_listed(changed)} as it runs, beside which no adapter can "
                         f"be trained or scored: {cure}")  # fmt: skip


def _checked_rows(model: Any, tokenizer: Any, rows: Iterable[Sequence[int]]) -> Sequence[int] | None:
    """Returns the longest row; raises ValueError for a token without an embedding."""
    embedded, longest = _embedding_rows(model, tokenizer), None
    for row in itertools.chain([[tokenizer.pad_token_id]], filter(len, rows)):
        if (token := max(row)) >= embedded:
            raise ValueError(
                f"--model {_name(model)}: its tokenizer makes the token {shown(tokenizer.convert_ids_to_tokens(token))}"
                f", whose number is {token}, and the model has embeddings of {embedded} tokens: take the tokenizer "
                "that belongs to the model, or give the model more (resize_token_embeddings) and save it"
            )
        longest = row if longest is None or len(row) > len(longest) else longest
    return None if longest is None or longest == [tokenizer.pad_token_id] else longest


def _embedding_rows(model: Any, tokenizer: Any) -> int:
    """Returns the number of token embeddings of a model, or of its tokenizer's tokens if the model does not tell."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):
        return int(getattr(model.config.get_text_config(), "vocab_size", None) or len(tokenizer))


@torch.no_grad()
def _check_causal(model: Any, tokenizer: Any, tokens: Sequence[int]) -> None:
    """Runs two rows that differ only in their last token, and compares the logits before it."""
    if len(tokens) < 2:
        return
    first, second = (_run(model, tokenizer, [row])[0] for row in (tokens[:-1], [*tokens[:-2], tokens[-1]]))
    if not bool(torch.isfinite(first).all()):
        raise ValueError(
            f"--model {_name(model)} computes logits that are not finite in {str(model.dtype).removeprefix('torch.')}: "
            "take a wider --dtype, or another model"
        )
    # Rounding changes logits too, since tokens that are routed to the same expert are multiplied together.
    if not torch.equal(first[:-1], second[:-1]) and _depends_on_last_token(model, tokens[:-1]):
        raise ValueError(
            f"--model {_name(model)} is no causal language model: as {type(model).__name__} its tokens see later ones, "
            "so that it would read the answers that it is to predict; name another model (or, where its weights were "
            'trained so, set "is_decoder": true in its config.json)'
        )


def _depends_on_last_token(model: Any, tokens: Sequence[int]) -> bool:
    """Whether the logits of the tokens before the last one depend on the embedding of the last one."""
    embedded: list[Tensor] = []

    def replace_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(replace_output)
    try:
        with torch.enable_grad():
            ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[:, :-1].float().square().sum(), embedded[0])
    except Exception as error:  # quantised layers have no backward, nor has Reformer in eval mode
        if is_out_of_memory(error):
            raise
        return False
    finally:
        hook.remove()
    sizes = gradient[0].float().abs().amax(-1)
    return bool(sizes[-1] > _ROUNDING * sizes.max())


def _check_longest(model: Any, tokenizer: Any, row: Sequence[int], cure: str) -> None:
    """Runs the longest row; the message of a failure names the number of positions."""
    try:
        _run(model, tokenizer, [row])
    except CannotRun as error:
        positions = learned_positions(model)
        known = positions is not None and positions < len(row)
        known_positions = f"it has {positions} positions; " if known else ""
        raise ValueError(f"{error} (the longest row); {known_positions}{cure}") from error


def learned_positions(model: Any) -> int | None:
    """Returns the size of a model's table of positions (embeddings, sines, a mask); None: it computes positions."""
    try:
        most = model.config.get_text_config().max_position_embeddings
        tokens = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    sizes += [size for buffer in model.buffers() for size in buffer.shape]
    # Some tables have a few additional rows for padding.
    return most if isinstance(most, int) and any(most <= size <= most + 4 for size in sizes) else None


@torch.no_grad()
def _run(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], *, left: bool = False, training: bool = False
) -> Tensor:
    """Returns the logits of rows of any lengths; leaves the model in eval mode."""
    length = max(map(len, rows), default=0)
    gaps = [length - len(row) for row in rows]
    sides = [(gap, 0) if left else (0, gap) for gap in gaps]
    pad = tokenizer.pad_token_id
    filled = [[*[pad] * a, *row, *[pad] * b] for row, (a, b) in zip(rows, sides, strict=True)]
    ones = [[*[0] * a, *[1] * len(row), *[0] * b] for row, (a, b) in zip(rows, sides, strict=True)]
    ids, mask = (torch.tensor(table, device=next(model.parameters()).device) for table in (filled, ones))
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"labels": ids.masked_fill(mask == 0, -100)} if training else {}
    what = f"run {length} tokens" if len(rows) == 1 else f"run a batch of {len(rows)} rows of which one is padded"
    try:
        with model_errors(model, what + " in training" * training):
            return model.train(training)(**inputs, use_cache=False).logits.float().cpu()  # .cpu() raises GPU errors
    finally:
        model.eval()


def _may_be_learned(tensor: Tensor) -> bool:
    """Whether a tensor may hold learned values: a parameter or floating-point buffer, not a counter or a mask."""
    return isinstance(tensor, nn.Parameter) or tensor.is_floating_point()


def _is_computed_buffer(model: nn.Module, name: str) -> bool:
    """Whether a stored tensor is a buffer that the model computes itself; older versions stored masks and positions."""
    buffers = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    constants = {*_CONSTANTS, *(key.rpartition(".")[2] for key in buffers)} - {"weight", "bias"}
    return name in buffers or name.rpartition(".")[2] in constants


def _listed(names: Collection[str]) -> str:
    first = list(map(shown, sorted(names)[:3]))
    if len(names) == 1:
        return f"the weight {first[0]}"
    return f"{len(names)} weights ({', '.join(first)}{', ...' * (len(names) > 3)})"


def _name(model: Any) -> str:
    return shown(getattr(model, "name_or_path", None) or type(model).__name__)
