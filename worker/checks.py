"""Checks of `basic doctor` for a worker: model files and compute device. Downloads and loads nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from jobs.errors import SetupError
from jobs.settings import JobsSettings
from jobs.upkeep.doctor import Finding
from worker.engine.errors import ModelRefused
from worker.engine.model.checkpoint import folder_of
from worker.engine.model.quantized_checkpoint import refuse_quantized
from worker.loading.adapters import base_of, is_adapter
from worker.loading.model_store import PACKAGED
from worker.settings import WorkerSettings


def checks(_: JobsSettings) -> Iterator[Finding]:
    """Check the target models of the worker's settings, and the device."""
    for settings in WorkerSettings().for_each_target():
        yield _model(settings)
    yield _device()


def _model(settings: WorkerSettings) -> Finding:
    target = settings.target
    if target.lower().endswith(".gguf"):
        file = Path(target).expanduser()
        if file.is_file():
            return Finding("model files", "ok", f"{target} is converted at the first start")
        return Finding("model files", "problem", f"file not found: {file}", "set BASIC_TARGET to a GGUF file")
    if target.startswith(("/", ".", "~")):
        directory = Path(target).expanduser()
        if is_adapter(directory):
            return _adapter(directory, settings.base_model)
        if not (directory / "config.json").exists():
            return Finding(
                "model files", "problem", f"no model in {directory}", "set BASIC_TARGET to a model directory"
            )
        if not any(directory.glob("*.safetensors")):
            advice = "save the model as safetensors; pickled weights are never loaded"
            return Finding("model files", "problem", f"no safetensors in {directory}", advice)
        return _quantized(str(directory)) or Finding("model files", "ok", f"{target} is in {directory}")
    packaged = PACKAGED.get(target)
    if packaged is None and (downloaded := folder_of(target)) is not None:
        return _quantized(str(downloaded)) or Finding("model files", "ok", f"{target} is in {downloaded}")
    if packaged is None:
        return Finding("model files", "ok", f"{target} is downloaded from the hub at the first start", "")
    if (settings.cache_dir.expanduser() / "models" / target / "config.json").exists():
        return Finding("model files", "ok", f"{target} is converted")
    return Finding(
        "model files", "warning", f"{target} is not downloaded yet", f"fetch it with: basic models pull {target}"
    )


def _adapter(directory: Path, base: str) -> Finding:
    try:
        base = base or base_of(directory)
    except SetupError as refused:
        return Finding("model files", "problem", str(refused))
    if not base:
        return Finding("model files", "problem", f"{directory} names no base model", "set BASIC_BASE_MODEL to it")
    return Finding("model files", "ok", f"{directory} is merged into {base} at the first start")


def _quantized(directory: str) -> Finding | None:
    """Return the finding of a directory with quantised weights that no worker would start with."""
    try:
        refuse_quantized(directory)
    except ModelRefused as refused:
        sentence, _, advice = str(refused).partition("; ")
        return Finding("model files", "problem", sentence, advice)
    return None


def _device() -> Finding:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        memory = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        if free < 0.1 * total:
            return Finding("gpu", "warning", memory, "another process uses its memory; a worker needs most of it")
        if find_spec("triton") is None:
            return Finding(
                "gpu", "problem", f"{memory}; Triton is missing", "install the Triton release that torch requires"
            )
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            return Finding(
                "gpu",
                "problem",
                f"{memory}; Triton finds no C compiler",
                "install gcc: Triton compiles its kernel launchers with it",
            )
        return Finding("gpu", "ok", memory)
    if shutil.which("nvidia-smi"):
        advice = "install torch with CUDA (the default wheel of PyPI) and a driver that supports it"
        return Finding("gpu", "problem", "torch can't use the GPU of this machine", advice)
    return Finding("gpu", "ok", f"none; the engine computes on {torch.get_num_threads()} CPU threads")
