"""Selects the entries of a model's configuration that change its results, such as heads, rotations and activations.

Left out are entries that a user may change without changing results: names, versions and precisions, the attention
implementation, tokens (a tokenizer may be extended), dropout, initialisation, losses, labels and output options. An
entry that only one of two versions of transformers knows is not compared.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from align_ext.system.messages import shown

_NOT_COMPUTING = re.compile(
    r"_.*|architectures|name|(transformers_)?version|.*dtype|.*attn_implementation|use_cache|cache_implementation|"
    r"reorder_and_upcast_attn|slow_but_exact|deterministic_flash_attn|use_mamba_?.*|use_associative_scan|init_device|"
    r"quantization_config|auto_map|vocab_size|.*_tokens?_(id|index)s?|.*_(size|token)_id|tie_word_embeddings|"
    r".*(dropout|drop_?path|pdrop|layer_?drop).*|drop_.*|.*(initiali[sz]er|init_std|_init_|checkpointing).*|"
    r"init_.*|.*(loss|aux)_.*|.*_loss|output_.*|return_.*|.*label.*|problem_type|finetuning_task|task_specific_params|"
    r"tokenizer_class|prefix|torchscript|use_bfloat16|pruned_heads|pretraining_tp|chunk_size_feed_forward|"
    r"(generation|decoder_start).*|do_sample|temperature|top_[kp]|typical_p|(min|max)_(new_tokens|length)|num_beams.*|"
    r"num_return_sequences|repetition_penalty|length_penalty|no_repeat_ngram_size|early_stopping|suppress_tokens|"
    r"begin_suppress_tokens|bad_words_ids|forced_.*|remove_invalid_values|exponential_decay_length_penalty|"
    r"diversity_penalty|encoder_no_repeat_ngram_size|summary_.*|router_jitter_noise"
)
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings")
_CLOSE = 1e-6  # the relative tolerance for numbers that were rounded to float32, as in GGUF files


def computing_entries(config: Any) -> dict[str, Any]:
    """Returns the entries of a configuration that change results, as JSON values.

    Args:
        config: a configuration of transformers, with nested ones such as text_config; anything else gives no entries.
    """
    try:
        content = config.to_dict()
    except Exception:  # a model's `config` may be anything, and transformers cannot convert all of its own
        return {}
    return _select_entries(content) if isinstance(content, Mapping) else {}


def first_difference(
    recorded: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "", *, complete: bool = False
) -> str | None:
    """Returns the first entry that differs between two configurations, with both values, or None.

    Args:
        recorded: one of them.
        here: the other.
        prefix: the first part of the entry's name.
        complete: whether an entry that is missing in one of them counts as None; else it is not compared.
    """
    names = [*recorded, *(name for name in here if name not in recorded)]
    for name in names if complete else (name for name in recorded if name in here):
        before, now = recorded.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            difference = first_difference(before, now, f"{prefix}{name}.", complete=not name.endswith("_config"))
            if difference is not None:
                return difference
        elif not _is_close(before, now):
            return f"{prefix}{name} is {shown(now)}, not {shown(before)}"
    return None


def _select_entries(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Selects the entries that change results, also in nested configurations (..._config).

    The number of positions is left out: weights show it, and rotations depend on it only if they are scaled.
    """
    rotations = str([content.get(name) for name in ("rope_parameters", "rope_scaling")])
    scaled = bool(re.search(r"type': '(?!default')", rotations))
    return {
        key: _select_entries(value) if key.endswith("_config") and isinstance(value, Mapping) else _to_json(value)
        for key, value in content.items()
        if isinstance(key, str) and not _NOT_COMPUTING.fullmatch(key) and (scaled or key not in _POSITIONS)
    }


def _to_json(value: Any) -> Any:
    """Returns a value as a strict JSON parser would return it; a type that JSON does not have becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    return value if isinstance(value, (int, float)) and abs(value) < 2**63 else str(value)


def _is_close(a: Any, b: Any) -> bool:
    """Whether two values are equal up to rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_is_close, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool) | isinstance(b, bool):
        return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=0.0)
    return type(a) is type(b) and bool(a == b)
