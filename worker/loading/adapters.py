"""LoRA adapters as models of their own: merged into their base once, into a directory that loads as any model does.

peft computes the merge, with its variants (rsLoRA, DoRA, ranks and scales by layer, whole layers). Each changed weight
is computed in float32, W + (alpha / r) B A for plain LoRA (arXiv 2106.09685, section 4.1), and rounded once to the
dtype of the base. torch, transformers and peft are imported only for a merge.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.errors import SetupError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_TOKENIZER: Final = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
# Fields of adapters that no merged weight can stand for.
_NOT_MERGED: Final = {
    "alora_invocation_tokens": "activated LoRA, which works after certain tokens only",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "layer_replication": "replicated layers",
    "use_qalora": "QA-LoRA, for quantised bases",
}


def is_adapter(folder: Path) -> bool:
    """Return whether a directory holds an adapter and no model."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(folder: Path) -> str:
    """Return the base model that an adapter names; raise SetupError unless it is a LoRA adapter that can be merged."""
    config = _read(folder)
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise SetupError(f"{folder} is an adapter of type {kind or 'unknown'}; only LoRA adapters are merged")
    for field, what in _NOT_MERGED.items():
        if config.get(field):
            raise SetupError(f"{folder} can't be merged: its {_CONFIG} has {field} ({what})")
    if not (folder / _WEIGHTS).is_file():
        advice = "; pickles are never loaded, so save it as safetensors" if any(folder.glob("*.bin")) else ""
        raise SetupError(f"{folder} has no {_WEIGHTS}{advice}")
    return str(config.get("base_model_name_or_path") or "")


def merged_name(folder: Path, base: Path) -> str:
    """Return the name of the merged directory: another one as soon as a file of the adapter or of the base changes."""
    digest = hashlib.sha256()
    files = [folder / _CONFIG, folder / _WEIGHTS, *sorted(base.glob("*.safetensors")), base / "config.json"]
    for file in files:
        stat = file.resolve().stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f"{folder.resolve().name}-{digest.hexdigest()[:12]}"


def merge(folder: Path, base: Path, directory: Path) -> None:
    """Write the merged model into a new directory, with the tokenizer of the adapter or else of the base.

    Raise SetupError for an adapter that does not fit the base, and for a base that is no whole, unquantised model.
    """
    from worker.engine.errors import ModelRefused
    from worker.engine.model.checkpoint import as_model_refused, refuse_unreadable
    from worker.engine.model.quantized_checkpoint import refuse_quantized

    try:
        refuse_quantized(str(base))
        refuse_unreadable(str(base))
        with as_model_refused(f"{folder} could not be merged into {base}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is refused here
            _merge(folder, base).save_pretrained(directory)
    except ModelRefused as refused:
        raise SetupError(str(refused)) from refused
    _copy_texts(folder, base, directory)


def _read(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise SetupError(f"{folder / _CONFIG} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise SetupError(f"{folder / _CONFIG} is no JSON object")
    return config


def _merge(folder: Path, base: Path) -> PreTrainedModel:
    """Return the base model with the adapter in its weights."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    from worker.engine.model.checkpoint import refuse_incomplete

    _refuse_unknown_fields(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", output_loading_info=True)
    model, info = loaded
    refuse_incomplete(str(base), model, info)
    wrapped = PeftModel.from_pretrained(model, folder)
    _refuse_other_weights(folder, wrapped)
    tied = _tied_weights(model)
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            _merge_in_float32(folder, layer, tied)
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged


def _merge_in_float32(folder: Path, layer: Any, tied: frozenset[int]) -> None:
    from worker.engine.errors import ModelRefused

    weight = layer.get_base_layer().weight
    if id(weight) in tied:
        raise ModelRefused(
            f"{folder} changes an embedding that the base ties to its output layer, so that a merge would change both"
        )
    dtype = weight.dtype
    layer.get_base_layer().float()
    layer.merge(safe_merge=True)
    layer.get_base_layer().to(dtype)


def _tied_weights(model: PreTrainedModel) -> frozenset[int]:
    """Return the identity of the weight that input and output embeddings share, if they do."""
    inputs: Any = model.get_input_embeddings()
    outputs: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    shared = inputs is not None and outputs is not None and inputs.weight is outputs.weight
    return frozenset([id(inputs.weight)]) if shared else frozenset()


def _refuse_unknown_fields(folder: Path) -> None:
    """Raise ModelRefused for what this version of peft would ignore."""
    import peft

    from worker.engine.errors import ModelRefused

    known = peft.LoraConfig.__dataclass_fields__.keys()
    unknown = sorted(name for name, value in _read(folder).items() if name not in known and value)
    if unknown:
        raise ModelRefused(f"{folder / _CONFIG} has {unknown[0]}, which peft {peft.__version__} does not know")


def _refuse_other_weights(folder: Path, wrapped: PeftModel) -> None:
    """Raise ModelRefused unless the adapter has every weight that its configuration promises, and no unused one."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    from worker.engine.errors import ModelRefused

    wanted, model = get_peft_model_state_dict(wrapped, save_embedding_layers=False), wrapped.state_dict()
    with safe_open(folder / _WEIGHTS, framework="pt") as opened:
        given = set(opened.keys())
        # peft saves whole embeddings beside adapters of them, and loads them.
        whole = {name for name in given - wanted.keys() if name in model and opened.get_tensor(name).equal(model[name])}
    lacking, unknown = wanted.keys() - given, given - wanted.keys() - whole
    for names, what in ((unknown, "has weights for layers that the base lacks"), (lacking, "lacks weights")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelRefused(f"{folder} {what}: {min(names)}{more}")


def _copy_texts(folder: Path, base: Path, directory: Path) -> None:
    """Copy tokenizer, chat template and sampling defaults, byte for byte; files of the adapter replace the base's."""

    def copy(source: Path, wanted: Callable[[str], bool]) -> None:
        for file in source.iterdir():
            if file.is_file() and wanted(file.name):
                shutil.copyfile(file, directory / file.name)

    def is_tokenizer(name: str) -> bool:
        return name.startswith(_TOKENIZER)

    own = any(is_tokenizer(file.name) and file.suffix in (".json", ".model") for file in folder.iterdir())
    copy(base, lambda name: name == "generation_config.json" or (not own and is_tokenizer(name)))
    copy(folder, is_tokenizer)
