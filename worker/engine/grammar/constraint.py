"""The state of one sequence's grammar: a matcher at its newest token, which walks down the paths of a draft tree.

The state is a function of the output tokens alone, so a sequence that continues elsewhere rebuilds it from them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import thread_time

import numpy as np
from llguidance import LLMatcher

from worker.engine.errors import EngineError
from worker.engine.grammar.grammar import Grammar
from worker.engine.grammar.vocabulary import GrammarVocabulary, Mask, first_line

_SLOW_S = 0.005  # of the processor, for a stretch; most take a tenth of a millisecond


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """The tokens that a grammar allows next."""

    mask: Mask | None = None  # None: all, because the grammar does not bind yet
    failure: str = ""  # why no token is allowed; then the mask allows none

    @property
    def only(self) -> int | None:
        """The token, if exactly one is allowed."""
        if self.mask is None:
            return None
        bits = self.mask.view(np.uint32)
        words = bits.nonzero()[0]
        if len(words) != 1 or int(np.bitwise_count(bits[words[0]])) != 1:
            return None
        return 32 * int(words[0]) + int(bits[words[0]]).bit_length() - 1


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Tokens that a grammar forces after some path, and what it allows before each of them and after the last."""

    tokens: list[int]
    allowed: list[Allowed]  # one more than tokens
    open: bool  # after the last it allows several tokens that don't end the text, and its masks took less than _SLOW_S


class Constraint:
    """The grammar of one sequence. All methods run on the sequence's thread, in the order of the sequence's tokens."""

    def __init__(self, grammar: Grammar, vocabulary: GrammarVocabulary, end_ids: frozenset[int], number: int) -> None:
        """Start before the first output token. `end_ids` end the sequence, `number` names it."""
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._number = number
        self._end_ids = end_ids
        self._ends = vocabulary.mask_of(end_ids)
        self._binding = not grammar.after  # the grammar binds the next token
        self._tail: list[int] = []  # the newest output tokens before that, of which `after` may be a part
        self._bound: list[int] = []  # the output tokens that the grammar binds
        self._walked: list[int] = []  # tokens below the newest one that the matcher has consumed
        self._matcher: LLMatcher | None = None

    def commit(self, tokens: Seq[int]) -> None:
        """Take the next output tokens."""
        if not self._binding:
            begin = self._begin(tokens)
            if begin is None:
                self._tail = [*self._tail, *tokens][-len(self._grammar.after) :]
                return
            self._binding, tokens = True, tokens[begin:]
        self._bound += tokens
        if self._matcher is not None and not self._consume(tokens):
            self._matcher = None

    def allowed(self, path: Seq[int] = ()) -> Allowed:
        """Return what is allowed after a path below the newest token."""
        if not self._binding:
            begin = self._begin(path)
            if begin is None:
                return Allowed()
            path = path[begin:]
        try:
            return self._allowed(list(path))
        except EngineError as error:
            return self._failed(str(error))
        except BaseException as error:  # a panic in Rust is no Exception
            self._matcher = None
            return self._failed(f"the grammar can't be followed: {type(error).__name__}: {first_line(str(error))}")

    def stretch(self, path: Seq[int] = (), limit: int = 0) -> Stretch:
        """Return what is allowed after a path, and up to `limit` tokens that are forced there, but for an end.

        A mask that takes long ends the stretch and the tree there: other sequences of the step wait for every mask.
        """
        path, tokens, ends_at = list(path), list[int](), thread_time() + _SLOW_S
        allowed = [self.allowed(path)]
        while len(tokens) < limit and thread_time() < ends_at:
            token = allowed[-1].only
            if token is None or token in self._end_ids:
                break
            path.append(token)
            tokens.append(token)
            allowed.append(self.allowed(path))
        mask = allowed[-1].mask
        several = mask is None or (bool((mask & ~self._ends).any()) and (not limit or allowed[-1].only is None))
        return Stretch(tokens, allowed, several and thread_time() < ends_at)

    def _begin(self, path: Seq[int]) -> int | None:
        """Return where the grammar begins in a path below the newest token; None: not in it."""
        after = list(self._grammar.after)
        before = self._tail[max(len(self._tail) - len(after) + 1, 0) :]
        tokens = [*before, *path]
        for end in range(len(after), len(tokens) + 1):
            if tokens[end - len(after) : end] == after:
                return end - len(before)
        return None

    def _allowed(self, path: list[int]) -> Allowed:
        """Return what is allowed after a bound path. An error counts only if a freshly compiled matcher has it too.

        The others have walked other paths before, and share a lexer with other sequences.
        """
        matcher = self._matcher or self._rebuilt(fresh=False)
        mask = self._mask(matcher, path)
        if mask is None:
            matcher = self._rebuilt(fresh=True)
            mask = self._mask(matcher, path)
        self._matcher = None if mask is None else matcher
        if mask is None:
            return self._failed(f"the grammar can't be followed: {first_line(matcher.get_error())}")
        return Allowed(mask) if mask.any() else self._failed("the grammar allows no token of the model here")

    def _rebuilt(self, *, fresh: bool) -> LLMatcher:
        """Return a matcher at the newest token."""
        text = self._grammar.text
        matcher = self._vocabulary.compile(text) if fresh else self._vocabulary.matcher(text, self._number)
        matcher.consume_tokens(self._bound)
        self._walked = []
        return matcher

    def _mask(self, matcher: LLMatcher, path: list[int]) -> Mask | None:
        """Return the mask after a bound path; None: the matcher is in its error state."""
        common = 0
        for one, other in zip(self._walked, path, strict=False):
            if one != other:
                break
            common += 1
        matcher.rollback(len(self._walked) - common)
        if common < len(path):
            matcher.consume_tokens(path[common:])
        self._walked = path
        mask = self._vocabulary.fill(matcher)
        if matcher.is_error():
            return None
        self._restrict_ends(matcher, mask)
        return None if matcher.is_error() else mask

    def _restrict_ends(self, matcher: LLMatcher, mask: Mask) -> None:
        """Allow the tokens that end this sequence alone only where the grammar accepts the text up to there.

        The text of a special token is empty, that of another one belongs to the output.
        """
        for token in self._end_ids - self._vocabulary.eos_ids:
            word, bit = token // 32, np.int32(np.uint32(1 << token % 32).view(np.int32))
            if self._vocabulary.tokenizer.is_special_token(token):
                accepted = matcher.is_accepting()
            else:
                accepted = bool(mask[word] & bit) and self._accepts_after(matcher, token)
            mask[word] = mask[word] | bit if accepted else mask[word] & ~bit

    @staticmethod
    def _accepts_after(matcher: LLMatcher, token: int) -> bool:
        accepted = matcher.consume_token(token) and matcher.is_accepting()
        matcher.rollback(1)
        return accepted

    def _consume(self, tokens: Seq[int]) -> bool:
        """Move the matcher to the newest token; return False if it is in its error state."""
        assert self._matcher is not None
        self._matcher.rollback(len(self._walked))
        self._walked = []
        self._matcher.consume_tokens(list(tokens))
        return not self._matcher.is_error()

    def _failed(self, reason: str) -> Allowed:
        return Allowed(np.zeros(self._vocabulary.words, np.int32), reason)
