"""The target's vocabulary for grammars: the tokenizer, compiled grammars, and the threads that compute masks.

It outlives the engine, so that an engine that is rebuilt after a failed step finds its grammars compiled.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import ParamSpec, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from worker.engine.errors import EngineError, GrammarsRefused

Mask = NDArray[np.int32]  # [words] bit i of word w allows the token 32 w + i

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MAX_THREADS = 4  # that compute masks: more would take processors from the host's part of a step
_MAX_COMPILED = 32  # grammars that each thread keeps compiled; the least recently used is dropped
_LIMITS = LLParserLimits(verbose_errors=False)  # the library's: a mask may take about 15 ms


class GrammarVocabulary:
    """What the grammars of all sequences share. Each lives on one of the threads, by the number of its sequence."""

    def __init__(
        self, make_tokenizer: Callable[[], LLTokenizer], eos_ids: frozenset[int], width: int, defined: int
    ) -> None:
        """Use the tokenizer that `make_tokenizer` returns when the first grammar arrives, or its GrammarsRefused.

        Logits have `width` entries, of which those from `defined` on are of no token. `eos_ids` end any sequence.
        """
        self._make_tokenizer = make_tokenizer
        self._lock = threading.Lock()
        self.eos_ids = eos_ids
        self.width = width
        self._defined = self.mask_of(range(min(width, defined)))
        self._compiled: dict[int, OrderedDict[str, LLMatcher]] = {}

    @property
    def words(self) -> int:
        """Words of a mask."""
        return -(-self.width // 32)

    def mask_of(self, tokens: Iterable[int]) -> Mask:
        """Return the mask that allows these tokens."""
        bits = np.zeros(32 * self.words, np.bool_)
        bits[list(tokens)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def refusal(self) -> str:
        """Return why this model decodes no grammars; empty if it does. The first call takes up to a second."""
        tokenizer = self._tokenizer
        return "" if isinstance(tokenizer, LLTokenizer) else str(tokenizer)

    def start(self, number: int, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function on the thread of a sequence's number: those of one thread run in the order of their starts."""
        return _thread(number % num_threads()).submit(function, *args, **kwargs)

    def compile(self, text: str) -> LLMatcher:
        """Compile a grammar and return its matcher, which shares nothing with others."""
        matcher = LLMatcher(self.tokenizer, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise EngineError(f"the grammar is refused: {first_line(matcher.get_error())}")
        return matcher

    def matcher(self, text: str, number: int) -> LLMatcher:
        """Return a matcher for a grammar, from the compiled ones of the sequence's thread if it is among them.

        Matchers of one compiled grammar share its lexer, which grows as they need it.
        """
        compiled = self._compiled.setdefault(number % num_threads(), OrderedDict())
        if text not in compiled:
            compiled[text] = self.compile(text)
            if len(compiled) > _MAX_COMPILED:
                compiled.popitem(last=False)
        compiled.move_to_end(text)
        return compiled[text].deep_copy()

    def fill(self, matcher: LLMatcher) -> Mask:
        """Return the tokens that a matcher allows next. After an error, which the matcher keeps, they mean nothing."""
        row = np.empty(-(-self.tokenizer.vocab_size // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        row = row[: self.words]
        return np.bitwise_and(row, self._defined, out=row)

    @property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer. Raises GrammarsRefused if it can't be held exactly."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, GrammarsRefused):
            raise tokenizer
        return tokenizer

    @property
    def _tokenizer(self) -> LLTokenizer | GrammarsRefused:
        with self._lock:
            return self._made

    @cached_property
    def _made(self) -> LLTokenizer | GrammarsRefused:
        try:
            return self._make_tokenizer()
        except GrammarsRefused as refusal:
            return refusal


@cache
def num_threads() -> int:
    """Return the number of threads that compute masks: half of the processors that this process may use."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, processors // 2))


@cache
def _thread(index: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, f"basic-grammar-{index}")


def first_line(message: str) -> str:
    """Return the first line of the library's error message; the others are of its state."""
    return message.strip().partition("\n")[0]
