"""State of a claimed request until its outputs are committed.

Collects the engine's results per choice and returns what the next flush must write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jobs.openai.logprobs import Stored
from storage.dialect import storable
from storage.records import Checkpoint, Claim, FinishedChoice, RequestFailure, RequestPlan, RequestProgress, TreeRow
from storage.session import unavailable_reason
from storage.steps.columns import StepColumns
from worker.engine.sequence import Sequence
from worker.engine.stats import StepResult, StepStats
from worker.text.output_stream import OutputStream
from worker.text.prompt_record import PromptRecord
from worker.text.tree_rows import tree_row

_MAX_ERROR_CHARS = 500  # of the error message that a request ends with

Now = Callable[[], float]  # Unix seconds


@dataclass(slots=True)
class ActiveChoice:
    """One choice being decoded: its sequence, its text, and its uncommitted results."""

    index: int
    number: int  # of its sequence, in messages to and from the engine
    num_prompt: int
    output_stream: OutputStream
    prompt: PromptRecord
    started_at: float
    first_of_prompt: bool = True
    wants_logprobs: bool = False
    measured: bool = True  # its steps tell what drafts gain
    next_seq: int = 0  # sequence number of its next event
    announced: bool = False  # its `started` event is published, by this worker or an earlier one
    _ids: list[int] = field(default_factory=list)
    _accepted: list[bool] = field(default_factory=list)
    _pieces: list[tuple[str, str]] = field(default_factory=list)
    _steps: StepColumns = field(default_factory=StepColumns)
    _logprobs: list[Stored] = field(default_factory=list)

    def resume(self, checkpoints: list[Checkpoint], sequence: Sequence) -> None:
        """Restore the tokens that earlier workers committed, also in `sequence`: decoding continues after them."""
        for checkpoint in checkpoints:
            self.output_stream.resume(checkpoint.token_ids, checkpoint.accepted)
            sequence.ids += checkpoint.token_ids
            sequence.steps += len(checkpoint.steps)
            self.next_seq = checkpoint.seq + 1
            self.announced = True
        if not checkpoints and self.output_stream.echo:
            self._pieces.append((self.output_stream.echo, "target"))

    def take(self, result: StepResult, now: float, text_of: Callable[[int], str]) -> None:
        """Add the result of a step; `text_of` maps token ids to text for a recorded draft tree."""
        if result.prompt_logprobs is not None:
            self.prompt.take(result.prompt_logprobs)
        written = self.output_stream.take(result)
        self._ids += written.tokens
        self._accepted += written.accepted
        self._pieces += written.pieces
        self._logprobs += [likelihoods.stored() for likelihoods in written.logprobs or ()]
        tree = None if result.tree is None else tree_row(result.tree, text_of)
        if written.tokens:  # not with max_tokens 0
            stats = written.stats if self.measured else replace(written.stats, plain_step_ms=None)
            _add_step(self._steps, stats, now, tree)

    def checkpoint(self) -> Checkpoint | None:
        """Return the tokens since the last checkpoint and start the next one; None without new tokens.

        An echo waits for the first token: a request with a checkpoint has proved that it crashes no worker.
        """
        if not self._ids and not (self._pieces and self.output_stream.finished):
            return None
        checkpoint = Checkpoint(
            choice_index=self.index,
            seq=self.next_seq,
            token_ids=tuple(self._ids),
            accepted=tuple(self._accepted),
            text="".join(text for text, _ in self._pieces),
            pieces=tuple(self._pieces),
            steps=self._steps,
            logprobs=tuple(self._logprobs) if self.wants_logprobs else None,
        )
        self.next_seq += 1
        self._ids, self._accepted, self._pieces, self._logprobs = [], [], [], []
        self._steps = StepColumns()
        return checkpoint

    def output(self, now: float) -> FinishedChoice:
        """Return the finished choice as a row of `outputs`."""
        reason = self.output_stream.finish_reason
        assert reason is not None
        ids = self.output_stream.token_ids
        finished = FinishedChoice(
            choice_index=self.index,
            text=self.output_stream.text,
            token_ids=tuple(ids),
            finish_reason=reason,
            prompt_tokens=self.num_prompt,
            completion_tokens=len(ids),
            started_at=self.started_at,
            finished_at=now,
            last_seq=self.next_seq,
            first_of_prompt=self.first_of_prompt,
            reasoning_tokens=self.output_stream.reasoning_tokens,
            prompt=self.prompt.stored(),
        )
        self.next_seq += 1
        return finished


@dataclass(slots=True)
class ActiveRequest:
    """A claimed request and its choices that are not fully committed."""

    claim: Claim
    choices: dict[int, ActiveChoice] = field(default_factory=dict)
    failure: RequestFailure | None = None
    unwritten_plan: RequestPlan | None = None
    reading: bool = False  # no choices yet: the prompt is being tokenized
    numbers: frozenset[int] = frozenset()  # of the sequences of all its choices, finished ones included
    claimed_at: float = field(default_factory=time.time)
    _next_seq: int | None = None  # of choice 0, once that is gone from `choices`

    @property
    def done(self) -> bool:
        """True when the next flush ends the request."""
        if self.failure is not None:
            return True
        return not self.reading and all(c.output_stream.finished for c in self.choices.values())

    @property
    def ended(self) -> bool:
        """True when nothing is left to write."""
        return not self.reading and not self.choices

    @property
    def slots(self) -> int:
        """Engine slots that it needs; 1 until the prompt is read and the number of choices is known."""
        return len(self.choices) or int(self.reading)

    @property
    def failure_seq(self) -> int:
        """Sequence number of its `failed` event: after all events that earlier attempts published."""
        if self._next_seq is not None:
            return self._next_seq
        if self.claim.attempts == 1:
            return 0
        return 1 + max((c.seq for c in self.claim.checkpoints if c.choice_index == 0), default=0)

    def fail(self, failure: RequestFailure) -> None:
        """End the request with an error while it decodes; uncommitted output is dropped."""
        if 0 in self.choices:
            self._next_seq = self.choices[0].next_seq
        self.choices.clear()
        self.reading = False
        self.failure = failure

    def progress(self, now: float) -> RequestProgress:
        """Return what the next flush writes, and remove the choices that it finishes."""
        if self.failure is not None:
            return RequestProgress(self.claim.lease, failure=self.failure)
        ends = self.done
        checkpoints = [c.checkpoint() for c in self.choices.values()]
        finished = [c for c in self.choices.values() if c.output_stream.finished]
        for choice in finished:
            del self.choices[choice.index]
        plan, self.unwritten_plan = self.unwritten_plan, None
        progress = RequestProgress(
            lease=self.claim.lease,
            plan=plan,
            checkpoints=tuple(c for c in checkpoints if c is not None),
            finished=tuple(choice.output(now) for choice in finished),
            ends=ends,
        )
        for choice in finished:
            if choice.index == 0:
                self._next_seq = choice.next_seq
        return progress


def internal_error(what: str, error: BaseException) -> RequestFailure:
    """Return the failure of a request that an unexpected error ended."""
    text = f"{type(error).__name__}: {unavailable_reason(error)}"[:_MAX_ERROR_CHARS]  # without SQL statement and values
    return RequestFailure("server_error", f"{what}: {storable(text)}", status_code=500)


def _add_step(steps: StepColumns, stats: StepStats, now: float, tree: TreeRow | None) -> None:
    steps.add(
        ended_at=now,
        tree_nodes=stats.tree_nodes,
        tree_depth=stats.tree_depth,
        accepted_tokens=stats.accepted_tokens,
        emitted_tokens=stats.emitted_tokens,
        expected_accepted=stats.expected_accepted,
        draft_ms=stats.draft_ms,
        verify_ms=stats.verify_ms,
        step_ms=stats.step_ms,
        batch_sequences=stats.batch_sequences,
        plain_step_ms=stats.plain_step_ms,
        drafter=stats.drafter,
        decision=stats.decision,
        reached=stats.reached,
        preemptions=stats.preemptions,
        recomputed_tokens=stats.recomputed_tokens,
        tree=tree,
    )
