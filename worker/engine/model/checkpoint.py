"""Checks of a checkpoint: complete files, a language model, no weight missing.

Read configurations and the headers of weight files, never the weights. Without these checks, transformers would load
such a checkpoint and decode random text. Each refusal is one sentence that names what was found.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from worker.engine.errors import EngineError, ModelRefused, error_summary

EAGLE_3 = "an EAGLE-3 head"  # a kind of draft

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_LFS = b"version https://git-lfs"
_AGAIN = "download it again"
_MAX_NAMES = 3  # names that an error lists

_WRITES_TEXT = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
# Tensors of a checkpoint that are no weights of the text model: buffers of earlier releases, multi-token prediction
# heads, and encoders of images or audio.
_IGNORED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    r"|\.(attn|attention)\.(masked_)?bias$"
    r"|\.position_ids$|_extra_state$"
    r"|(^|\.)(mtp|mtp_layers|nextn)\."
    r"|^(model\.)?(vision|visual|image|audio|mm|multi_modal|embed_vision|embed_audio)[a-z_]*\."
)
_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_hidden_layers")


@contextmanager
def as_model_refused(what: str, *, ranks: int = 1) -> Iterator[None]:
    """Raise errors of libraries about a model as ModelRefused, in one sentence that starts with `what`.

    Let errors of the device or its memory pass, and with several `ranks` every RuntimeError: a restart may help.
    """
    try:
        yield
    except (EngineError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if ranks > 1 and isinstance(error, RuntimeError):
            raise
        raise ModelRefused(f"{what}: {error_summary(error)}") from error


def refuse_unreadable(path: str) -> None:
    """Raise ModelRefused unless a local directory holds the complete files of a language model.

    The hub's client checks hub ids.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and _first_bytes(file) == _LFS:
            raise ModelRefused(f"{file} is a Git LFS pointer and not the file itself; fetch it with: git lfs pull")
    if not (folder / _CONFIG).exists():
        if (folder / "adapter_config.json").exists():
            raise ModelRefused(f"{folder} is an adapter, not a whole model; give its directory as the target")
        packed = next(iter(sorted(folder.glob("*.gguf"))), None)
        if packed is not None:
            raise ModelRefused(f"{folder} has no {_CONFIG}; give the path of its GGUF file, {packed}")
        raise ModelRefused(f"{folder} has no {_CONFIG}; give the directory of a model as transformers saves it")
    if (folder / "adapter_config.json").exists():
        # transformers would load the base model that it names, with the adapter beside its weights.
        raise ModelRefused(f"{folder} holds a model and an adapter; move adapter_config.json away, or {_CONFIG}")
    kind = draft_kind(folder)
    if kind is not None:
        raise ModelRefused(f"{folder} is {kind}, a draft for another model; give a language model")
    config = read_config(folder)
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelRefused(
            f"{folder} is a {config.get('model_type')}, which needs remote code; choose a model that "
            "transformers supports"
        )
    for file in weight_files(folder):
        _keys_of(file)


def refuse_unfit(path: str, config: PretrainedConfig) -> None:
    """Raise ModelRefused for the configuration of a model for another task."""
    declared = config.architectures or []
    known = {_name(names.get(config.model_type)) for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES)}
    if declared and not any(name in known or _WRITES_TEXT.search(name) for name in declared):
        raise ModelRefused(f"{path} is a {declared[0]}, which writes no text; choose a causal language model")


def refuse_incomplete(path: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise ModelRefused, with the names, unless a checkpoint has exactly the weights of the loaded model.

    `info` is the loading info of `from_pretrained`, without tied weights and those that the architecture ignores.
    """
    kind = type(model).__name__
    if info["mismatched_keys"]:
        name, theirs, ours = sorted(info["mismatched_keys"])[0]
        raise ModelRefused(
            f"{path} does not fit its {_CONFIG}: {name} is {_shape(theirs)} in the file and {_shape(ours)} by the "
            f"configuration{_more(len(info['mismatched_keys']) - 1)}; {_AGAIN}"
        )
    if info["missing_keys"]:
        raise ModelRefused(f"{path} lacks weights of a {kind}: {_names(info['missing_keys'])}; {_AGAIN}")
    others = [key for key in info["unexpected_keys"] if not _is_ignored(key, model.config.get_text_config())]
    if others:
        raise ModelRefused(
            f"{path} has weights that do not belong to a {kind}: {_names(others)}; it is another kind of "
            "model, choose a causal language model"
        )
    if info["error_msgs"]:
        raise ModelRefused(f"{path} could not be loaded: {info['error_msgs'][0].splitlines()[0]}")


def draft_kind(folder: Path) -> str | None:
    """Return the kind of draft head in a directory, of those made for other programs; None if it is none of them."""
    config = read_config(folder)
    named = " ".join([*map(str, config.get("architectures") or []), str(config.get("model_type"))]).lower()
    if "speculators_model_type" in config or "speculators_config" in config:
        if config.get("speculators_model_type") == "eagle3":
            return EAGLE_3
        return f"a draft of the speculators library ({config.get('speculators_model_type', 'unknown')})"
    keys = _all_keys(folder)
    if "eagle3" in named or "draft_vocab_size" in config or {"d2t", "t2d"} & keys or _any_starts(keys, "midlayer."):
        return EAGLE_3
    if "eagle" in named or {"fc.weight", "model.fc.weight"} & keys:
        return "an EAGLE-1 or EAGLE-2 head"
    if "medusa" in named or "medusa_num_heads" in config or _any_starts(keys, "medusa") or _is_medusa(keys):
        return "a set of Medusa heads"
    if "hydra" in named or "hydra_num_heads" in config or _any_starts(keys, "hydra"):
        return "a set of Hydra heads"
    if "mlp_speculator" in named or "mlpspeculator" in named or _any_starts(keys, "speculator."):
        return "an MLP speculator"
    if re.search(r"draft|speculat|mtpmodel|dflash", named):
        return f"a draft head ({(config.get('architectures') or [config.get('model_type')])[0]})"
    return None


def folder_of(path: str) -> Path | None:
    """Return the local directory of a model or hub id; None if it is not downloaded."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a directory; empty if there is none or it can't be read."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads; raises ModelRefused if one is missing."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        if pickled is not None:
            raise ModelRefused(f"{pickled} is a pickle, which is never loaded; save the model as safetensors")
        raise ModelRefused(f"{folder} has no weights ({_WEIGHTS}); {_AGAIN}")
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelRefused(f"{folder / _INDEX} can't be read ({error_summary(error)}); {_AGAIN}") from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelRefused(f"{folder} has none of these files, which its {_INDEX} names: {_names(missing)}; {_AGAIN}")
    return [folder / name for name in names]


def _keys_of(file: Path) -> set[str]:
    """Return the names of the tensors in a file; raises ModelRefused if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ModelRefused(f"{file} is damaged or truncated ({reason}); {_AGAIN}") from error


def _all_keys(folder: Path) -> set[str]:
    """Return the names of all tensors in a directory, pickles included; skip files that can't be read."""
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            keys |= _keys_of(file)
        except ModelRefused:
            continue
    for file in (*folder.glob("*.bin"), *folder.glob("*.pt")):
        keys |= _pickled_strings(file)
    return keys


def _pickled_strings(file: Path) -> set[str]:
    """Return all strings in a pickle of tensors, which include their names; run nothing of it."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return {word for _, word, _ in pickletools.genops(archive.read(name)) if isinstance(word, str)}
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return set()


def _is_medusa(keys: set[str]) -> bool:
    return any(re.fullmatch(r"\d+\.\d+\.linear\.weight", key) for key in keys)


def _any_starts(keys: set[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _is_ignored(key: str, config: PretrainedConfig) -> bool:
    if _IGNORED.search(key):
        return True
    extra = next((n for name in _EXTRA_LAYERS if (n := getattr(config, name, None))), 0)
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    first = int(config.num_hidden_layers)
    return found is not None and first <= int(found[1]) < first + int(extra)


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_LFS))


def _name(known: Any) -> str:
    return str(known[0] if isinstance(known, tuple | list) else known)


def _names(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    return ", ".join(ordered[:_MAX_NAMES]) + _more(len(ordered) - _MAX_NAMES)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
