"""The seed project's three functions, under their old names and arguments, on today's engine.

`use_parallel` splits the target over all GPUs of the machine, as far as its heads can be dealt out, or over processes
of its CPU where it computes in float32: in bfloat16 split sums round differently enough to change a text, and one
process has every core anyway. Without it one process does the work, on every core or on one GPU. torch is imported
when a function runs: whoever only imports a name should not wait seconds for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.loading.loader import LoadedModel
    from worker.settings import WorkerSettings

_Pieces = SimpleQueue["str | BaseException | None"]  # None: the text has ended


def generate_with_standard_model(prompt: str, max_tokens: int = 50, use_parallel: bool = False) -> str:
    """Return the greedy text of plain decoding: one target forward a token."""
    return _generate(_loaded_model(use_parallel), "plain", prompt, max_tokens)


def generate_with_speculative_decoding(prompt: str, max_tokens: int = 50, use_parallel: bool = False) -> str:
    """Return the same greedy text, decoded with draft trees."""
    return _generate(_loaded_model(use_parallel), "opt-tree", prompt, max_tokens)


def generate_with_streaming_speculative_decoding(
    prompt: str, max_tokens: int = 50, use_parallel: bool = False
) -> Iterator[str]:
    """Yield the same greedy text piece by piece, as the steps bring it."""
    pieces: _Pieces = SimpleQueue()
    loaded = _loaded_model(use_parallel)  # not in the thread: other ranks end with the thread that started them

    def decode() -> None:
        try:
            _generate(loaded, "opt-tree", prompt, max_tokens, pieces)
        except BaseException as error:  # handed to the reader below, who raises it
            pieces.put(error)
        else:
            pieces.put(None)

    Thread(target=decode, name="basic-generate", daemon=True).start()
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def _loaded_model(parallel: bool) -> LoadedModel:
    """Return the models of the environment's settings, loaded once; on as many ranks as there can be if `parallel`."""
    from worker.generate import resident_model
    from worker.settings import WorkerSettings

    settings = WorkerSettings(max_sequences=1)
    if parallel and settings.tp == 1:
        settings = settings.model_copy(update={"tp": _widest(settings)})
    return resident_model(settings)


def _widest(settings: WorkerSettings) -> int:
    """Return the largest number of ranks for which the machine has GPUs (cores in float32) and the target has heads."""
    from transformers import AutoConfig

    from worker.engine.model.architecture import tp_sizes
    from worker.loading.model_store import resolve
    from worker.node.placement import allowed_cpus, visible_gpus

    path = resolve(settings.target, settings.cache_dir)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    cores = len(allowed_cpus()) if settings.dtype == "float32" else 1
    most = len(visible_gpus()) or cores
    return max(ranks for ranks in tp_sizes(config) if ranks <= most)


def _generate(loaded: LoadedModel, mode: str, prompt: str, max_tokens: int, pieces: _Pieces | None = None) -> str:
    """Decode one prompt greedily, and hand over its pieces as they come."""
    from worker.engine.options import Mode
    from worker.generate import generate, request_for

    request = request_for(loaded.name, prompt, max_tokens=max_tokens)

    def pass_on(new: Sequence[tuple[str, str]]) -> None:
        if pieces is not None:
            for text, _ in new:
                pieces.put(text)

    return generate(loaded, request, mode=Mode(mode), on_pieces=pass_on).text
