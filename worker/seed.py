"""The three public `generate_with_*` functions of the seed project, on the current engine.

`use_parallel` splits the target over as many GPUs as its heads allow. Without GPUs it splits it over CPU processes
where that keeps the text: models of the compiled kernels, and others in float32. Without `use_parallel` one process
uses one GPU or every core. The functions import torch themselves, because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.loading.loader import LoadedModel
    from worker.settings import WorkerSettings

_Pieces = SimpleQueue["str | BaseException | None"]  # None marks the end of the text


def generate_with_standard_model(prompt: str, max_tokens: int = 50, use_parallel: bool = False) -> str:
    """Return the greedy text of plain decoding: one target forward per token."""
    return _generate(_loaded_model(use_parallel), "plain", prompt, max_tokens)


def generate_with_speculative_decoding(prompt: str, max_tokens: int = 50, use_parallel: bool = False) -> str:
    """Return the same greedy text, decoded with draft trees (OPT-Tree)."""
    return _generate(_loaded_model(use_parallel), "opt-tree", prompt, max_tokens)


def generate_with_streaming_speculative_decoding(
    prompt: str, max_tokens: int = 50, use_parallel: bool = False
) -> Iterator[str]:
    """Yield the same greedy text in pieces, one or more per step."""
    pieces: _Pieces = SimpleQueue()
    loaded = _loaded_model(use_parallel)  # load in this thread: other ranks end with the thread that started them

    def decode() -> None:
        try:
            _generate(loaded, "opt-tree", prompt, max_tokens, pieces)
        except BaseException as error:  # raised by the generator below
            pieces.put(error)
        else:
            pieces.put(None)

    Thread(target=decode, name="basic-generate", daemon=True).start()
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def _loaded_model(parallel: bool) -> LoadedModel:
    """Return the models of the environment's settings, loaded once; with `parallel` on `_max_ranks` ranks."""
    from worker.generate import resident_model
    from worker.settings import WorkerSettings

    settings = WorkerSettings(max_sequences=1)
    if parallel and settings.tp == 1:
        settings = settings.model_copy(update={"tp": _max_ranks(settings)})
    return resident_model(settings)


def _max_ranks(settings: WorkerSettings) -> int:
    """Return the largest tensor parallel size of the target that this machine has devices for.

    Devices are GPUs; without GPUs, cores, of which a split that could change the text gets one.
    """
    import torch
    from transformers import AutoConfig

    from worker.engine.model.architecture import tp_sizes
    from worker.engine.model.loading import native_dtype
    from worker.engine.model.sharding import splits_exactly
    from worker.loading.model_store import resolve
    from worker.node.placement import allowed_cpus, visible_gpus

    path = resolve(settings.target, settings.cache_dir)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    sizes, gpus, cpu = tp_sizes(config), len(visible_gpus()), torch.device("cpu")
    if gpus:
        return max(ranks for ranks in sizes if ranks <= gpus)
    dtype = native_dtype(cpu) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    exact = [ranks for ranks in sizes if dtype == torch.float32 or splits_exactly(config, ranks, dtype, cpu)]
    return max((ranks for ranks in exact if ranks <= len(allowed_cpus())), default=1)


def _generate(loaded: LoadedModel, mode: str, prompt: str, max_tokens: int, pieces: _Pieces | None = None) -> str:
    """Decode one prompt greedily; put its pieces into the queue, if one is given."""
    from worker.engine.options import Mode
    from worker.generate import generate, request_for

    request = request_for(loaded.name, prompt, max_tokens=max_tokens)

    def put_pieces(new: Sequence[tuple[str, str]]) -> None:
        if pieces is not None:
            for text, _ in new:
                pieces.put(text)

    return generate(loaded, request, mode=Mode(mode), on_pieces=put_pieces).text
