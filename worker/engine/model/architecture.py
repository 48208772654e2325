"""Facts about a model from its configuration: what packed decoding supports, its sizes and its positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from worker.engine.errors import ModelRefused
from worker.engine.kv.fp8 import has_fp8_kv
from worker.engine.shards.shard import Shard, parts_of, tp_sizes_of

# Beyond the original positions, the frequencies of these depend on the longest sequence of the forward, so one sequence
# would change another's logits.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_ORIGINAL = "original_max_position_embeddings"
_BY_TEXT = "basic_long_text_tokens"  # attribute of a loaded model's configuration
STORED_HEAD_DIM = "basic_stored_head_dim"  # attribute of a fused model: the size of a head in its KV slots, if larger
SHARD = "basic_shard"  # attribute of a loaded model that ranks split: the shard of this process
ATTENTION_SHAPE = "basic_attention_shape"  # attribute of a loaded model: what its layers pass to attention
_SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of the KV layout that holds the keys and values of every layer of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    latent_dim: int = 0  # first numbers of a key that are its value, too; 0: keys and values are stored apart


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise ModelRefused, with the reason, for a text configuration that packed rows can't decode exactly."""
    unknown = set(getattr(config, "layer_types", None) or []) - _ATTENTION_LAYERS
    if unknown:
        raise ModelRefused(
            f"{config.model_type} has layers of type {', '.join(sorted(unknown))}; only attention can be packed, "
            "choose another model"
        )
    missing = [name for name in _SIZES if not isinstance(_size(config, name), int)]
    if missing:
        raise ModelRefused(
            f"{config.model_type} has no {missing[0]} in its configuration, and only models of attention layers can be "
            "packed; choose another model"
        )


def refuse_tp_size(config: PretrainedConfig, ranks: int) -> None:
    """Raise ModelRefused, with the sizes that work, if the heads can't be divided among this many ranks."""
    if ranks not in tp_sizes(config):
        heads, kv_heads = _heads(config)
        raise ModelRefused(
            f"{heads} heads over {kv_heads} KV heads can't be split over {ranks} ranks; use --tp "
            f"{' or '.join(map(str, tp_sizes(config)))}, with more replicas beside it, or see `basic plan`"
        )


def tp_sizes(config: PretrainedConfig) -> list[int]:
    """Return the tensor parallel sizes that divide a model's heads evenly."""
    return tp_sizes_of(*_heads(config))


def shard_of(model: PreTrainedModel) -> Shard:
    """Return the shard of a model that this process holds."""
    known: Shard | None = getattr(model, SHARD, None)
    return known or Shard(parts_of(*_heads(model.config.get_text_config())))


def is_dealt_by_transformers(model: PreTrainedModel) -> bool:
    """Return whether transformers split a model over ranks, whose sums depend on their number and on the batch."""
    return (model.tp_size or 1) > 1


def max_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a text model computes exactly in any batch; None if its configuration has no limit.

    Rotary frequencies that depend on the longest sequence of a forward are constant up to the original number of
    positions, so that number is the limit.
    """
    known = [_size(config, name) for name in ("max_position_embeddings", "max_seq_len", "n_positions")]
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        known.append(_size(config, "attention_chunk_size"))  # below it, a chunk is all of a text
    ropes = list(_ropes(getattr(config, "rope_parameters", None) or {}))
    if long_text_tokens(config) is None and any(_depends_on_batch(rope) for rope in ropes):
        known += [rope.get(_ORIGINAL) for rope in ropes] + [getattr(config, _ORIGINAL, None)]
    return min((int(n) for n in known if isinstance(n, int) and n > 0), default=None)


def batch_dependent_rope(config: PretrainedConfig) -> str | None:
    """Return the kind of rotary embeddings whose frequencies change beyond `max_positions`; None if there is none."""
    ropes = _ropes(getattr(config, "rope_parameters", None) or {})
    changing = [] if long_text_tokens(config) is not None else [rope for rope in ropes if _depends_on_batch(rope)]
    return next((str(rope["rope_type"]) for rope in changing), None)


def choose_factors_by_text(config: PretrainedConfig) -> bool:
    """Note that each text chooses the factors of longrope; return False if a model's embeddings have no choice."""
    ropes = _longropes(config)
    changing = [rope for rope in _ropes(getattr(config, "rope_parameters", None) or {}) if _depends_on_batch(rope)]
    originals = [rope.get(_ORIGINAL) for rope in ropes]
    if not changing or len(changing) > len(ropes) or originals != originals[:1] * len(ropes):
        return False
    if not isinstance(originals[0], int):
        return False
    setattr(config, _BY_TEXT, originals[0])
    return True


def long_text_tokens(config: PretrainedConfig) -> int | None:
    """Return beyond how many tokens a text has the long factors of longrope; None if texts do not choose."""
    known: int | None = getattr(config, _BY_TEXT, None)
    return known


def use_long_factors(config: PretrainedConfig, context: int) -> bool:
    """Let the long factors of longrope hold for texts of any length if texts of `context` tokens are wanted.

    The frequencies then depend on no length. Do nothing, and return False, if the original positions are enough.
    """
    positions, ropes = max_positions(config), _longropes(config)
    if not ropes or positions is None or context <= positions:
        return False
    for rope in ropes:
        for name in [name for name in rope if name.startswith("long_")]:  # factors, and scales of some models
            rope[name.replace("long_", "short_", 1)] = rope[name]
    return True


def has_long_factors(config: PretrainedConfig) -> bool:
    """Return whether longrope uses its long factors for texts of any length."""
    ropes = _longropes(config)
    return bool(ropes) and not any(_depends_on_batch(rope) for rope in ropes)


def _longropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    ropes = _ropes(getattr(config, "rope_parameters", None) or {})
    return [rope for rope in ropes if rope["rope_type"] == "longrope" and "long_factor" in rope]


def _depends_on_batch(rope: dict[str, Any]) -> bool:
    """Return whether frequencies depend on the longest sequence of a forward."""
    same = "long_factor" in rope and rope["long_factor"] == rope.get("short_factor")
    return rope.get("rope_type") in _BATCH_DEPENDENT_ROPE and not (rope["rope_type"] == "longrope" and same)


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values of one token, on each rank."""
    config = model.config.get_text_config()
    head_dim = getattr(model, STORED_HEAD_DIM, None) or head_dim_of(model)
    head_bytes = head_dim + 1 if has_fp8_kv(model) else head_dim * model.dtype.itemsize  # FP8 has an exponent
    stores = 1 if latent_dim_of(model) else 2  # keys, and values
    return int(stores * layers_of(config) * kv_heads_of(model) * head_bytes)


def ranks_of(model: PreTrainedModel) -> int:
    """Return the tensor parallel size of a loaded model: the ranks that its heads are divided among."""
    return model.tp_size or shard_of(model).ranks


def layers_of(config: PretrainedConfig) -> int:
    """Return the decoder layers of a text configuration."""
    return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)


def heads_of(model: PreTrainedModel) -> int:
    """Return the query heads that a loaded model has on each rank."""
    known: AttentionShape | None = getattr(model, ATTENTION_SHAPE, None)
    return known.heads if known else _heads(model.config.get_text_config())[0] // (model.tp_size or 1)


def kv_heads_of(model: PreTrainedModel) -> int:
    """Return the KV heads that a loaded model has on each rank."""
    known: AttentionShape | None = getattr(model, ATTENTION_SHAPE, None)
    return known.kv_heads if known else _heads(model.config.get_text_config())[1] // (model.tp_size or 1)


def head_dim_of(model: PreTrainedModel) -> int:
    """Return the number of dimensions of one attention head: the larger of those of keys and values."""
    known: AttentionShape | None = getattr(model, ATTENTION_SHAPE, None)
    if known:
        return known.head_dim
    config = model.config.get_text_config()
    return int(_size(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def latent_dim_of(model: PreTrainedModel) -> int:
    """Return how many numbers of a stored latent are values; 0 for models that store keys and values apart."""
    known: AttentionShape | None = getattr(model, ATTENTION_SHAPE, None)
    return known.latent_dim if known else 0


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    heads = int(config.num_attention_heads)
    return heads, int(_size(config, "num_key_value_heads") or heads)


def _size(config: PretrainedConfig, name: str) -> Any:
    """Return a size of a configuration; None if there is none, or another for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers raises a class of its own here, which is not part of its API
        return None


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters of each kind: one for all layers, or one for each type of layer."""
    if isinstance(parameters.get("rope_type"), str):
        yield parameters
    for nested in parameters.values():
        if isinstance(nested, dict):
            yield from _ropes(nested)
