"""The seed project's three functions, under their old names and arguments, on today's engine.

`use_parallel` is kept for their callers and changes nothing: every core or GPU the engine has works on every step.
torch is imported when one of them runs: whoever only imports a name should not wait seconds for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread

_Pieces = SimpleQueue["str | BaseException | None"]  # None: the text has ended


def generate_with_standard_model(prompt: str, max_tokens: int = 50, use_parallel: bool = False) -> str:
    """Return the greedy text of plain decoding: one target forward a token."""
    return _generate("plain", prompt, max_tokens)


def generate_with_speculative_decoding(prompt: str, max_tokens: int = 50, use_parallel: bool = False) -> str:
    """Return the same greedy text, decoded with draft trees."""
    return _generate("opt-tree", prompt, max_tokens)


def generate_with_streaming_speculative_decoding(
    prompt: str, max_tokens: int = 50, use_parallel: bool = False
) -> Iterator[str]:
    """Yield the same greedy text piece by piece, as the steps bring it."""
    pieces: _Pieces = SimpleQueue()

    def decode() -> None:
        try:
            _generate("opt-tree", prompt, max_tokens, pieces)
        except BaseException as error:  # handed to the reader below, who raises it
            pieces.put(error)
        else:
            pieces.put(None)

    Thread(target=decode, name="basic-generate", daemon=True).start()
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def _generate(mode: str, prompt: str, max_tokens: int, pieces: _Pieces | None = None) -> str:
    """Decode one prompt greedily, and hand over its pieces as they come."""
    from worker.engine.options import Mode
    from worker.generate import generate, request_for, resident_assembly
    from worker.settings import WorkerSettings

    assembly = resident_assembly(WorkerSettings(max_sequences=1))
    request = request_for(assembly.name, prompt, max_tokens=max_tokens)

    def pass_on(new: Sequence[tuple[str, str]]) -> None:
        if pieces is not None:
            for text, _ in new:
                pieces.put(text)

    return generate(assembly, request, mode=Mode(mode), on_pieces=pass_on).text
