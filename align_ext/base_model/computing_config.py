"""Of a model's configuration what decides what it computes: weights alone do not tell heads, rotations or activations.

Left out is what a user may change without another result: names, versions and precisions, how attention is carried out,
tokens (a tokenizer may be extended), dropout, initialisation, losses, labels, and what is returned. Entries that only
one of two versions of transformers knows are not compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from align_ext.system.reading import shown

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
_CLOSE = 1e-6  # of numbers that went through float32, as in GGUF files


def computing_entries(config: Any) -> dict[str, Any]:
    """What a configuration says of the computation, as JSON has it.

    Args:
        config: of transformers, with its parts (text_config) in it; anything else says nothing.
    """
    try:
        content = config.to_dict()
    except Exception:  # a model's `config` may be anything, and transformers refuses to write some
        return {}
    return _chosen(content) if isinstance(content, Mapping) else {}


def other_entry(
    recorded: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "", *, whole: bool = False
) -> str | None:
    """The first entry of two configurations that differs, with both values; None: they agree.

    Args:
        recorded: one of them.
        here: the other.
        prefix: opens the entry's name.
        whole: entries that one of them lacks are None in it; else they are not compared.
    """
    names = [*recorded, *(name for name in here if name not in recorded)]
    for name in names if whole else (name for name in recorded if name in here):
        before, now = recorded.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found = other_entry(before, now, f"{prefix}{name}.", whole=not name.endswith("_config"))
            if found is not None:
                return found
        elif not _same(before, now):
            return f"{prefix}{name} is {shown(now)}, not {shown(before)}"
    return None


def _chosen(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries that count, those of parts (..._config) too.

    Of how many positions there are the weights tell, and rotations do not depend on it unless they are stretched.
    """
    rotations = str([content.get(name) for name in ("rope_parameters", "rope_scaling")])
    stretched = bool(re.search(r"type': '(?!default')", rotations))
    return {
        key: _chosen(value) if key.endswith("_config") and isinstance(value, Mapping) else _plain(value)
        for key, value in content.items()
        if isinstance(key, str) and not _NOT_COMPUTING.fullmatch(key) and (stretched or key not in _POSITIONS)
    }


def _plain(value: Any) -> Any:
    """A value as a strict reader of JSON gives it back; what JSON does not know is text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    return value if isinstance(value, (int, float)) and abs(value) < 2**63 else str(value)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same but for rounding."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool) | isinstance(b, bool):
        return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=0.0)
    return type(a) is type(b) and bool(a == b)
