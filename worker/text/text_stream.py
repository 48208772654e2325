"""The text of one choice as its tokens arrive: detokenized, cut at stop strings, with the source of each piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from jobs.messages import AnswerFormat, SamplingParameters
from jobs.openai.logprobs import TokenAlternatives
from jobs.openai.prompt_details import token_name
from worker.engine.grammar.grammar import Grammar
from worker.engine.token_logprobs import TokenLogprobs
from worker.text.detokenizer import Detokenizer
from worker.text.reasoning import ReasoningCounter
from worker.text.stop_strings import Pieces, StopStrings, add_piece
from worker.text.token_bytes import token_bytes


class TextStream:
    """Incremental text of one choice: complete characters, with the source of each piece."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        sampling: SamplingParameters | None = None,
        before: Sequence[int] | None = (),
        form: AnswerFormat | None = None,
        grammar: Grammar | None = None,
        markers: frozenset[int] = frozenset(),
    ) -> None:
        """Continue the tokens `before`; None starts a new text. `sampling` says what the text holds, and its end.

        `markers` are ids of special tokens that the text shows although it shows no others.
        """
        self._token_bytes = token_bytes(tokenizer)
        skips_special = sampling is None or sampling.skip_special_tokens
        self._shown = markers if skips_special else self._token_bytes.special
        self._detokenizer = Detokenizer(tokenizer, before, self._shown)
        self._reasoning = ReasoningCounter(form, () if grammar is None else grammar.after)
        self._names_ids = sampling is not None and sampling.return_tokens_as_token_ids
        self._keeps_stop = sampling is not None and sampling.include_stop_str_in_output
        self._stops = StopStrings(() if sampling is None else sampling.stop, keep=self._keeps_stop)
        self._min_tokens = 0 if sampling is None else sampling.min_tokens
        self._text: list[str] = []
        self._first = before is None  # the next token starts a text
        self.num_tokens = 0  # tokens taken; those after a stop string are not

    @property
    def text(self) -> str:
        """Text returned so far."""
        return "".join(self._text)

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the reasoning so far; None if the format has none."""
        return self._reasoning.count

    def end(self) -> None:
        """Check a text that ends by itself. Raises RequestFailed if it has a grammar and no content."""
        self._reasoning.end()

    @property
    def stopped(self) -> bool:
        """True after a stop string."""
        return self._stops.hit

    def resume(self, ids: Sequence[int], accepted: Iterable[bool]) -> None:
        """Take tokens that an earlier worker has committed and published."""
        self.push(ids, accepted)
        self._first = self._first and not any(map(self._is_text, ids))

    def push(self, ids: Sequence[int], accepted: Iterable[bool], *, ended: bool = False) -> Pieces:
        """Add tokens; return the new (text, source) pieces: source `draft` for accepted draft tokens, else `target`.

        The token that completes a stop string is the last one taken. With `ended` the last token is the stop token that
        has ended the sequence.
        """
        pieces: Pieces = []
        stop_token = len(ids) - 1 if ended and not self._keeps_stop else None
        for at, (token, drafted) in enumerate(zip(ids, accepted, strict=True)):
            if self.stopped:
                break
            self.num_tokens += 1
            chunk = "" if at == stop_token else self._detokenizer.push(token)
            self._reasoning.push(token, chunk)
            if chunk:
                source = "draft" if drafted else "target"
                self._pass(pieces, self._stops.push(chunk, source, may_stop=self.num_tokens > self._min_tokens))
        return pieces

    def finish(self, _ids: Sequence[int] = ()) -> Pieces:
        """Return the rest of the text, such as an incomplete last character."""
        pieces: Pieces = []
        rest = self._detokenizer.finish()
        if rest:
            self._pass(pieces, self._stops.push(rest, "target"))
        self._pass(pieces, self._stops.end())
        return pieces

    def readable_logprobs(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> tuple[TokenAlternatives, ...]:
        """Return the log-probabilities of these tokens with token texts; `logprobs` may hold more entries than `ids`.

        Call in order: the tokens follow those of the previous call.
        """
        return tuple(self._likelihoods(token, entry) for token, entry in zip(ids, logprobs, strict=False))

    def _likelihoods(self, token: int, entry: TokenLogprobs) -> TokenAlternatives:
        first, self._first = self._first, self._first and not self._is_text(token)
        read = self._token_bytes.likelihoods(entry, token, first=first, shown=self._shown)
        return read.renamed([token_name(i) for i in (token, *(i for i, _ in entry.top))]) if self._names_ids else read

    def _is_text(self, token: int) -> bool:
        return token in self._shown or not self._token_bytes.is_special(token)

    def _pass(self, pieces: Pieces, passed: Pieces) -> None:
        for chunk, source in passed:
            self._text.append(chunk)
            add_piece(pieces, chunk, source)
