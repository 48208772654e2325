"""The worker loop on a real SQLite file: claims, checkpoints, outputs, resumption, failures and events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import func, select, text
from torch import Tensor

from jobs.messages import CHAT_ENDPOINT, GenerationRequest, PartialEvent, SamplingParameters
from jobs.openai.logprobs import TokenAlternatives
from jobs.settings import JobsSettings
from jobs.verification.sample import start_verification
from storage import leases, queries, verifications, writes
from storage.cached_answers import CacheScope
from storage.lease_recovery import reclaim
from storage.models import ChoiceOutput, DecodeStep, JobRow, Partial, Request
from storage.records import NewJob, NewRequest
from storage.session import Database
from tests.clock import Clock
from tests.models import TableModel, byte_tokenizer
from tests.runner import MemoryChannel, Runner
from tests.unit.worker.engine.harness import FLAT_COSTS
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.options import EngineOptions, Mode
from worker.engine.output_lengths import OutputLengths
from worker.serving.engine_loop import EngineLoop
from worker.serving.requests.request_loop import RequestLoop
from worker.serving.requests.sink import Sink
from worker.sharing.access import DeviceAccess
from worker.text.codec import Codec

MODEL = "table"
AT_END = (
    3600.0  # flush interval of workers that commit when their requests are done: most of a turn's time is its flush
)
MAX_TOKENS = 12
VOCAB = 258
EOS = 256
DRAFTED = "the cat and the dog the cat "  # a prompt whose text is drafted at once, unlike those of other words
OPTIONS = EngineOptions(
    Mode.PAPER, max_sequences=3, max_context=200, prefill_rows=64, nodes=8, threshold=0.05, max_depth=4
)


@cache
def words(prefix: tuple[int, ...]) -> Tensor:
    """Logits that repeat words, so that the suffix drafter finds matches."""
    logits = torch.zeros(VOCAB)
    logits[b"the cat and the dog "[len(prefix) % 20]] = 8.0
    return logits


@cache
def byte_codec() -> Codec:
    """The codec of all workers that need no other: a new one probes its chat template again."""
    return Codec(byte_tokenizer(), frozenset({EOS}), OPTIONS.max_context, VOCAB)


class Worker:
    """A runner with its engine and sink, as in a worker process."""

    def __init__(
        self,
        database: Database,
        name: str,
        law: Callable[[tuple[int, ...]], Tensor] = words,
        *,
        reserved: int = 0,
        interval_s: float = 0.0,
        max_sequences: int = OPTIONS.max_sequences,
        kv_tokens: int | None = None,
        codec: Codec | None = None,
        numerics: str | None = None,
        access: DeviceAccess | None = None,
        scope: CacheScope | None = None,
    ) -> None:
        numerics = numerics if scope is None else scope.numerics
        options = replace(OPTIONS, max_sequences=max_sequences, kv_tokens=kv_tokens)
        self.events: list[PartialEvent] = []
        self.database = database
        self.model = TableModel(law)
        sink = Sink(database, self.events.extend, name, 30.0, numerics)
        codec = codec or byte_codec()
        near, far = MemoryChannel.pair()
        self.engine = EngineLoop(
            lambda: Engine(self.model, SuffixDrafter(), options, FLAT_COSTS),
            codec,
            database,
            near,
            worker_id=name,
            model=MODEL,
            lease_s=30.0,
            access=access,
        )
        self.requests = RequestLoop(
            codec,
            sink,
            database,
            far,
            worker_id=name,
            model=MODEL,
            lease_s=30.0,
            interval_s=interval_s,
            reserved=reserved,
            cache_scope=scope,
        )
        self.runner = Runner(self.engine, self.requests)

    def run(self, turns: int = 500) -> None:
        for _ in range(turns):
            self.runner.run_once(notified=self.work_waits())
            if not self.runner.busy:
                self.runner.run_once(notified=self.work_waits())
                if not self.runner.busy:
                    return
        raise AssertionError(f"still busy after {turns} turns")

    def work_waits(self) -> bool:
        """Return whether a claim would find requests; this query is much cheaper than an empty claim."""
        with closing(self.database.engine.raw_connection()) as connection:
            waits = connection.cursor().execute("SELECT 1 FROM requests WHERE status = 'queued' LIMIT 1")
            return waits.fetchone() is not None


def submit(
    database: Database,
    *prompts: str,
    job_id: str = "batch_1",
    priority: int = 0,
    compare_plain: int = 0,
    identities: Sequence[str] | None = None,
    **sampling: Any,
) -> None:
    parameters = SamplingParameters.model_validate(
        {"seed": 1, "max_tokens": MAX_TOKENS, "temperature": 0.0, **sampling}
    )
    requests = [
        NewRequest(
            f"request-{i}",
            GenerationRequest(model=MODEL, prompt=p, sampling=parameters).model_dump(mode="json"),
            identity=None if identities is None else identities[i],
        )
        for i, p in enumerate(prompts)
    ]
    with database.write() as session:
        job = NewJob(job_id, MODEL, CHAT_ENDPOINT, 3600.0, priority=priority, compare_plain=compare_plain)
        writes.insert_job(session, job, requests)


def texts(database: Database) -> dict[tuple[int, int], str]:
    with database.read() as session:
        return {(o.request_index, o.choice_index): o.text for o in session.scalars(select(ChoiceOutput))}


@pytest.fixture(scope="module")
def known() -> dict[Any, dict[tuple[int, int], str]]:
    """The texts of `undisturbed` workers."""
    return {}


def undisturbed(
    database: Database,
    known: dict[Any, dict[tuple[int, int], str]],
    *prompts: str,
    law: Callable[[tuple[int, ...]], Tensor] = words,
    **sampling: Any,
) -> dict[tuple[int, int], str]:
    """Return what a worker writes that nothing disturbs; it decodes once, not once for each case of a test."""
    key = (prompts, law, repr(sampling))
    if key not in known:
        submit(database, *prompts, job_id="undisturbed", **sampling)
        Worker(database, "a", law, interval_s=AT_END).run()
        known[key] = texts(database)
        with database.write() as session:
            session.execute(text("DELETE FROM outputs"))
            session.execute(text("DELETE FROM packed_steps"))
    return known[key]


def lapse_leases(database: Database) -> None:
    """Let all leases lapse, and requeue their requests."""
    with database.write() as session:
        session.execute(text("UPDATE requests SET lease_expires_at = 0 WHERE status = 'running'"))
        reclaim(session)


def test_every_request_gets_its_output_and_the_job_completes(database: Database) -> None:
    submit(database, "one", "two", "three", "four", "five")
    Worker(database, "a", interval_s=AT_END).run()
    assert len(texts(database)) == 5
    with database.read() as session:
        job = session.scalars(select(JobRow)).one()
        assert (job.status, job.requests_completed, job.requests_failed) == ("completed", 5, 0)


def test_emitted_tokens_of_the_steps_are_the_completion_tokens(database: Database) -> None:
    submit(database, DRAFTED, "the dog " + DRAFTED, n=2)
    Worker(database, "a").run()
    with database.read() as session:
        outputs = list(session.scalars(select(ChoiceOutput)))
        assert len(outputs) == 4
        for o in outputs:
            own = (DecodeStep.request_index == o.request_index) & (DecodeStep.choice_index == o.choice_index)
            assert (
                session.scalar(select(func.sum(DecodeStep.emitted_tokens)).where(own))
                == o.completion_tokens
                == MAX_TOKENS
            )
            assert session.scalar(select(func.sum(DecodeStep.accepted_tokens)).where(own))
        assert not list(session.scalars(select(Partial)))


def test_rows_count_what_memory_that_runs_out_costs_and_texts_stay(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputLengths, "expected", lambda _, group, decoded: np.array(decoded, np.int64) + 1)
    submit(database, "one", "two", "three", max_tokens=30)
    worker = Worker(database, "a", kv_tokens=80)
    worker.run()
    expected = "".join(chr(b) for b in b"the cat and the dog ") * 9
    assert all(len(text) == 30 and text in expected for text in texts(database).values())
    with database.read() as session:
        counted = session.execute(select(func.sum(DecodeStep.preemptions), func.sum(DecodeStep.recomputed_tokens)))
        preemptions, recomputed = counted.one()
    assert preemptions > 0
    assert (preemptions, recomputed) == (worker.engine.stats["preemptions"], worker.engine.stats["recomputed_tokens"])


def test_events_are_numbered_without_gaps_and_spell_the_output(database: Database) -> None:
    submit(database, DRAFTED, "the dog " + DRAFTED)
    worker = Worker(database, "a")
    worker.run()
    for index in range(2):
        own = [e for e in worker.events if e.index == index]
        assert [e.seq for e in own] == list(range(len(own)))
        assert (own[0].type, own[-1].type, own[-1].finish_reason) == ("started", "finished", "length")
        assert "".join(e.text for e in own) == texts(database)[index, 0]
        assert all("".join(p.text for p in e.pieces) == e.text for e in own)
        assert sum(e.tokens for e in own) == MAX_TOKENS
        assert 0 < sum(e.accepted for e in own) < MAX_TOKENS
    assert [e.status for e in worker.events if e.type == "job"] == ["completed"]


@pytest.mark.parametrize("turns", [1, 3, 6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_continues_from_its_checkpoint_when_its_worker_dies(
    database: Database, known: dict[Any, dict[tuple[int, int], str]], turns: int, temperature: float
) -> None:
    expected = undisturbed(database, known, "one", "two", temperature=temperature)
    submit(database, "one", "two", temperature=temperature)
    dying, heir = Worker(database, "b"), Worker(database, "c", interval_s=AT_END)
    for _ in range(turns):
        dying.runner.run_once(notified=dying.work_waits())
    lapse_leases(database)
    heir.run()
    assert heir.model.forwards
    assert texts(database) == expected
    with database.read() as session:
        emitted = select(func.sum(DecodeStep.emitted_tokens)).where(DecodeStep.job_id == "batch_1")
        assert session.scalar(emitted) == 2 * MAX_TOKENS
    for index in range(2):
        seqs = [e.seq for e in (*dying.events, *heir.events) if e.index == index]
        assert seqs == list(range(len(seqs))) or turns == 1


def test_a_text_that_is_resumed_on_another_kind_of_device_names_both(database: Database) -> None:
    submit(database, "one", "two")
    dying = Worker(database, "b", numerics="fp_gpu")
    for _ in range(3):
        dying.runner.run_once(notified=dying.work_waits())
    lapse_leases(database)
    Worker(database, "c", interval_s=AT_END, numerics="fp_cpu").run()
    submit(database, "one", job_id="batch_2", max_tokens=2)
    Worker(database, "d", interval_s=AT_END, numerics="fp_cpu").run()
    with database.read() as session:
        outputs = [*queries.outputs(session, "batch_1"), *queries.outputs(session, "batch_2")]
    assert [output.numerics for output in outputs] == ["fp_gpu,fp_cpu", "fp_gpu,fp_cpu", "fp_cpu"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_verification_computes_the_same_texts_without_drafts_also_of_a_text_that_was_resumed(
    database: Database, temperature: float
) -> None:
    submit(database, "one", "two", DRAFTED, temperature=temperature, n=2)
    dying = Worker(database, "b", numerics="fp_1")
    for _ in range(3):
        dying.runner.run_once(notified=dying.work_waits())
    lapse_leases(database)
    Worker(database, "c", interval_s=AT_END, numerics="fp_1").run()
    with database.read() as session:
        before = queries.job(session, "batch_1"), queries.job_stats(session, "batch_1")
        assert session.scalar(select(func.sum(DecodeStep.accepted_tokens))), "the texts to verify had no drafts"
    assert before[0] is not None
    quiet = JobsSettings(target=MODEL)
    started = start_verification(before[0], "100%", database=database, notify=lambda *_: True, settings=quiet)
    heir = Worker(database, "d", interval_s=AT_END, numerics="fp_1", max_sequences=2)
    heir.runner.run_once(notified=True)
    lapse_leases(database)
    Worker(database, "e", interval_s=AT_END, numerics="fp_1").run()
    with database.read() as session:
        found = list(verifications.compared(session, started, "batch_1"))
        assert [(one.request_index, one.verdict) for one in found] == [(n, "equal") for n in range(3)]
        assert all(len(one.second) == 2 for one in found)
        drafted = select(func.sum(DecodeStep.tree_nodes), func.count(DecodeStep.plain_step_ms))
        assert tuple(session.execute(drafted.where(DecodeStep.job_id == started)).one()) == (0, 0)
        assert (queries.job(session, "batch_1"), queries.job_stats(session, "batch_1")) == before
        assert [job.id for job in queries.jobs(session, 10).jobs] == ["batch_1"], "it is in no list"


PENALTIES: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.3,
    "logit_bias": {"120": 3},
}


@pytest.mark.parametrize("turns", [2, 6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_survive_the_death_of_a_worker(
    database: Database, known: dict[Any, dict[tuple[int, int], str]], turns: int, temperature: float
) -> None:
    expected = undisturbed(database, known, "one", "two", temperature=temperature, **PENALTIES)
    submit(database, "one", "two", temperature=temperature, **PENALTIES)
    dying = Worker(database, "b")
    for _ in range(turns):
        dying.runner.run_once(notified=dying.work_waits())
    lapse_leases(database)
    heir = Worker(database, "c", interval_s=AT_END)
    heir.run()
    assert heir.model.forwards
    assert texts(database) == expected


@cache
def multibyte(prefix: tuple[int, ...]) -> Tensor:
    logits = torch.zeros(VOCAB)
    spelt = "日本 🙂é ".encode()
    logits[spelt[len(prefix) % len(spelt)]] = 8.0
    return logits


@pytest.mark.parametrize(
    ("law", "stop"),
    [(words, ["dog"]), (words, ["never", "cat and the"]), (multibyte, ["🙂"]), (multibyte, ["x", "本 "])],
)
@pytest.mark.parametrize("turns", [0, 2, 5])
def test_a_text_ends_before_its_stop_string_also_in_an_accepted_path_and_resumed(
    database: Database,
    known: dict[Any, dict[tuple[int, int], str]],
    law: Callable[[tuple[int, ...]], Tensor],
    stop: list[str],
    turns: int,
) -> None:
    prompts = [
        "the cat and the dog the cat and the dog 日本 🙂é日本 🙂é",
        "two",
    ]  # the first one's text is drafted at once
    whole = undisturbed(database, known, *prompts, law=law, max_tokens=60)
    submit(database, *prompts, max_tokens=60, stop=stop)
    dying, heir = Worker(database, "b", law), Worker(database, "c", law, interval_s=AT_END if turns else 0.0)
    for _ in range(turns):
        dying.runner.run_once(notified=dying.work_waits())
    lapse_leases(database)
    heir.run()
    assert texts(database) == {key: said.partition(stop[-1])[0] for key, said in whole.items()}
    with database.read() as session:
        for o in session.scalars(select(ChoiceOutput)):
            mine = DecodeStep.request_index == o.request_index
            assert session.scalar(select(func.sum(DecodeStep.emitted_tokens)).where(mine)) == o.completion_tokens
            assert len(o.token_ids) == o.completion_tokens
            assert bytes(o.token_ids).decode(errors="ignore").endswith(stop[-1])
            assert o.finish_reason == "stop"
            assert "".join(piece for piece, _ in o.pieces) == o.text
            events = [e for e in (*dying.events, *heir.events) if e.index == o.request_index]
            assert "".join(e.text for e in events) == o.text
        last = session.scalars(
            select(DecodeStep).where(DecodeStep.request_index == 0).order_by(DecodeStep.step.desc())
        ).first()
        assert last is not None
        assert turns or last.accepted_tokens == last.emitted_tokens, "the stop did not lie inside an accepted path"


@pytest.mark.parametrize("stop", [[], ["dog"]])
def test_logprobs_of_all_tokens_are_stored_across_workers(database: Database, stop: list[str]) -> None:
    prompts = ["the cat and the dog the cat and the dog ", "two"]
    submit(database, *prompts, job_id="whole", logprobs=3, stop=stop)
    Worker(database, "a", interval_s=AT_END).run()
    submit(database, *prompts, job_id="resumed", logprobs=3, stop=stop)
    dying = Worker(database, "b")
    for _ in range(2):
        dying.runner.run_once(notified=dying.work_waits())
    with database.read() as session:
        assert list(session.scalars(select(Partial))), "nothing was committed before the worker died"
    lapse_leases(database)
    Worker(database, "c", interval_s=AT_END).run()
    with database.read() as session:
        found = {(o.job_id, o.request_index): o for o in session.scalars(select(ChoiceOutput))}
    for index in range(2):
        whole, resumed = found["whole", index], found["resumed", index]
        assert whole.logprobs is not None
        assert len(whole.logprobs) == whole.completion_tokens
        assert resumed.logprobs == whole.logprobs
        tokens = [TokenAlternatives.read(row) for row in whole.logprobs]
        assert b"".join(bytes(t.chosen.bytes or ()) for t in tokens) == bytes(whole.token_ids)
        assert all(t.top[0] == t.chosen and len(t.top) == 3 for t in tokens)


def test_requests_that_want_no_logprobs_have_none(database: Database) -> None:
    submit(database, "one")
    Worker(database, "a", interval_s=AT_END).run()
    with database.read() as session:
        assert session.scalars(select(ChoiceOutput)).one().logprobs is None


def test_a_slot_is_free_again_after_a_stop_string(database: Database) -> None:
    submit(database, *"abcdefgh", stop="cat", max_tokens=60)
    worker = Worker(database, "a", interval_s=AT_END)
    worker.run()
    assert len(texts(database)) == 8
    assert not any("cat" in said for said in texts(database).values())


@pytest.mark.parametrize(
    ("field", "value"), [("logit_bias", {"258": 1}), ("stop_token_ids", [5, 258])], ids=["logit_bias", "stop_token_ids"]
)
def test_a_token_id_beyond_the_vocabulary_fails_its_request_by_name(database: Database, field: str, value: Any) -> None:
    submit(database, "one", **{field: value})
    Worker(database, "a", interval_s=AT_END).run()
    with database.read() as session:
        failed = session.scalars(select(Request)).one()
        assert (failed.error_code, failed.error_param) == ("invalid_value", field)
        assert "token id 258 is beyond the model's vocabulary of 258 tokens" in str(failed.error_message)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_a_text_as_an_end_of_sequence_does(database: Database, ignore_eos: bool) -> None:
    submit(database, "one", stop_token_ids=[ord("d")], ignore_eos=ignore_eos)
    Worker(database, "a", interval_s=AT_END).run()
    with database.read() as session:
        output = session.scalars(select(ChoiceOutput)).one()
        assert (output.finish_reason, output.token_ids[-1]) == ("stop", ord("d"))
        assert output.token_ids.count(ord("d")) == 1


def test_a_worker_that_lost_its_leases_writes_nothing(database: Database) -> None:
    submit(database, "one")
    stale, owner = Worker(database, "a"), Worker(database, "b")
    for _ in range(3):
        stale.runner.run_once(notified=stale.work_waits())
    lapse_leases(database)
    owner.run()
    published = len(stale.events)
    stale.run()
    assert len(stale.events) == published
    assert len(texts(database)) == 1


def test_a_released_request_is_continued_without_counting_an_attempt(database: Database) -> None:
    submit(database, "one")
    leaving = Worker(database, "a")
    for _ in range(3):
        leaving.runner.run_once(notified=leaving.work_waits())
    leaving.runner.hand_back()
    with database.read() as session:
        request = session.scalars(select(Request)).one()
        assert (request.status, request.attempts) == ("queued", 0)
        assert list(session.scalars(select(Partial)))
    Worker(database, "b", interval_s=AT_END).run()
    assert len(texts(database)[0, 0]) == MAX_TOKENS


def test_a_prompt_that_does_not_fit_fails_alone(database: Database) -> None:
    submit(database, "x" * 500, "short")
    worker = Worker(database, "a", interval_s=AT_END)
    worker.run()
    with database.read() as session:
        failed, done = session.scalars(select(Request).order_by(Request.request_index))
        assert (failed.status, failed.error_code, failed.error_param) == ("failed", "context_length_exceeded", "prompt")
        assert done.status == "completed"
        assert session.scalars(select(JobRow)).one().requests_failed == 1
    (event,) = [e for e in worker.events if e.index == 0]
    assert event.type == "failed"
    assert event.error is not None
    assert event.error["code"] == "context_length_exceeded"


def test_a_cancelled_job_stops_at_the_next_flush(database: Database) -> None:
    submit(database, "one", "two", "three", "four", "five")
    worker = Worker(database, "a")
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    with database.write() as session:
        assert writes.request_cancel(session, "batch_1") == "cancelling"
    worker.run()
    with database.read() as session:
        assert session.scalars(select(JobRow)).one().status == "cancelled"
        assert {r.status for r in session.scalars(select(Request))} == {"cancelled"}


REASONED = "I add.\n</think>\n\n4, and all is said."


def reasons(prefix: tuple[int, ...]) -> Tensor:
    """Logits that write a reasoning and an answer after the prompt's start marker."""
    logits = torch.zeros(VOCAB)
    written = len(prefix) - bytes(token % 256 for token in prefix).index(b"<think>\n") - len(b"<think>\n")
    logits[REASONED.encode()[written % len(REASONED)]] = 30.0
    return logits


def reasoning_codec(**options: Any) -> Codec:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<bos><think>\n{# </think> #}"
    return Codec(tokenizer, frozenset({EOS}), OPTIONS.max_context, VOCAB, **options)


@pytest.mark.parametrize("turns", [1, 5])
def test_a_request_keeps_its_plan_when_its_worker_dies_and_another_model_continues(
    database: Database, turns: int
) -> None:
    body = GenerationRequest(model=MODEL, prompt="2+2?", sampling=SamplingParameters(seed=1)).stored()
    with database.write() as session:
        writes.insert_job(session, NewJob("batch_1", MODEL, CHAT_ENDPOINT, 3600.0), [NewRequest("a", body)])
    recommended = {"top_k": 1, "max_tokens": len(REASONED)}
    dying = Worker(database, "b", reasons, codec=reasoning_codec(sampling_defaults=recommended))
    for _ in range(turns):
        dying.runner.run_once(notified=dying.work_waits())
    with database.read() as session:
        begun = bool(session.scalar(select(func.count()).select_from(Partial)))
        row = session.scalars(select(Request)).one()
    if begun:
        assert row.sampling_defaults == recommended, "it is written no later than the first tokens"
    lapse_leases(database)
    Worker(
        database,
        "c",
        reasons,
        codec=reasoning_codec(sampling_defaults=recommended if not begun else {"top_k": 3}, reasoning_parser="auto"),
        interval_s=AT_END,
    ).run()
    with database.read() as session:
        row, output = session.scalars(select(Request)).one(), session.scalars(select(ChoiceOutput)).one()
        (view,) = queries.outputs(session, "batch_1")
    assert (output.text, output.finish_reason) == (REASONED, "length")
    assert output.reasoning_tokens == view.reasoning_tokens == REASONED.index("</think>") + len("</think>")
    assert row.sampling_defaults == view.sampling_defaults == recommended
    assert (row.answer_format or {})["reasoning"]["opened"] is True


def test_a_failed_step_is_retried_without_visible_effect(database: Database) -> None:
    failures = iter([True])

    def fragile(prefix: tuple[int, ...]) -> Tensor:
        if len(prefix) > 12 and next(failures, False):
            raise RuntimeError("out of memory")
        return words(prefix)

    submit(database, "one", "two", job_id="undisturbed")
    Worker(database, "a", interval_s=AT_END).run()
    expected = texts(database)
    with database.write() as session:
        session.execute(text("DELETE FROM outputs"))
    submit(database, "one", "two")
    worker = Worker(database, "b", fragile)
    worker.run()
    assert next(failures, None) is None, "the step did not fail"
    assert texts(database) == expected
    with database.read() as session:
        requests = session.scalars(select(Request).where(Request.job_id == "batch_1"))
        assert {(r.status, r.attempts) for r in requests} == {("completed", 1)}
    for index in range(2):
        own = [e for e in worker.events if e.index == index]
        assert [e.seq for e in own] == list(range(len(own)))


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_that_fails_alone_ends_in_an_error_row_and_the_others_complete(database: Database, n: int) -> None:
    def broken(prefix: tuple[int, ...]) -> Tensor:
        if ord("!") in prefix and len(prefix) > 12:
            raise RuntimeError("out of memory")
        return words(prefix)

    submit(database, "one", "two", "three!", "four", "five", n=n)
    worker = Worker(database, "a", broken)
    worker.run()
    assert set(texts(database)) == {(index, choice) for index in (0, 1, 3, 4) for choice in range(n)}
    with database.read() as session:
        request = session.scalars(select(Request).where(Request.request_index == 2)).one()
        assert (request.status, request.error_code, request.error_status_code) == ("failed", "engine_error", 500)
        assert session.scalars(select(JobRow)).one().status == "completed"
    own = [e for e in worker.events if (e.index, e.choice) == (2, 0)]
    assert own[-1].type == "failed"
    assert [e.seq for e in own] == list(range(len(own)))


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_requests_of_an_ended_job_are_dropped_at_the_next_flush(database: Database, ending: str) -> None:
    submit(database, "one", "two", "three")
    worker = Worker(database, "a")
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    with database.write() as session:
        if ending == "cancelled":
            writes.request_cancel(session, "batch_1")
        else:
            session.execute(text("UPDATE jobs SET expires_at = 0"))
            writes.end_jobs(session)
    worker.runner.run_once()  # the interval is 0: this turn ends with a flush
    forwards = worker.model.forwards
    worker.runner.run_once()  # the engine drops them, and says that it has room
    worker.runner.run_once()
    assert not worker.runner.busy
    assert worker.model.forwards == forwards
    with database.read() as session:
        assert session.scalars(select(JobRow)).one().status == ending
        assert {r.status for r in session.scalars(select(Request))} == {ending}


def test_interactive_requests_have_reserved_slots_when_a_batch_fills_the_engine(database: Database) -> None:
    submit(database, "one", "two", "three", "four", max_tokens=100)
    worker = Worker(database, "a", reserved=1, interval_s=3600.0)
    for _ in range(3):
        worker.runner.run_once(notified=worker.work_waits())
    submit(database, "now", job_id="chat", priority=1, max_tokens=5)
    for _ in range(12):
        worker.runner.run_once(notified=worker.work_waits())
    with database.read() as session:
        statuses = dict(session.execute(select(JobRow.id, JobRow.status)).all())
    assert statuses == {"chat": "completed", "batch_1": "in_progress"}, "and its end was not kept for the next flush"


def test_a_freed_slot_is_filled_without_a_poll_although_slots_are_reserved(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.serving.requests.request_loop._POLL_S", float("inf"))
    submit(database, "one", "two", "three", "four", "five", max_tokens=5)
    worker = Worker(database, "a", reserved=1)
    worker.runner.run_once(notified=True)
    ends_at = time.monotonic() + 10
    while len(texts(database)) < 5:
        assert time.monotonic() < ends_at
        worker.runner.run_once()


def _is_over(database: Database, job_id: str) -> bool:
    with database.read() as session:
        return session.get_one(JobRow, job_id).finished_at is not None


def test_a_worker_whose_requests_end_together_claims_waiting_ones_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.serving.requests.request_loop._POLL_S", float("inf"))
    count = 2 * OPTIONS.max_sequences + 1
    submit(database, *map(str, range(count)), max_tokens=5, ignore_eos=True)
    worker = Worker(database, "a")
    worker.runner.run_once(notified=True)
    while worker.runner.busy:  # a resident that finds its runner idle sleeps
        worker.runner.run_once()
    assert len(texts(database)) == count


def test_claims_take_a_small_share_of_the_decoding_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, claim_s, turn_s = Clock(), 0.02, 0.005
    claimed_at: list[float] = []
    real = leases.claim

    def slow_claim(*arguments: Any, **named: Any) -> Any:
        claimed_at.append(clock())
        clock.advance(claim_s)
        return real(*arguments, **named)

    monkeypatch.setattr(leases, "claim", slow_claim)
    monkeypatch.setattr("worker.serving.requests.request_loop.time", SimpleNamespace(monotonic=clock, time=time.time))
    submit(database, "long", max_tokens=150)
    submit(database, *map(str, range(30)), job_id="batch_2", max_tokens=3)
    worker = Worker(database, "a", interval_s=0.05)
    worker.runner.run_once(notified=True)
    while not _is_over(database, "batch_1"):
        clock.advance(turn_s)
        worker.runner.run_once()
    assert claim_s * len(claimed_at) < 0.1 * clock() + 2 * claim_s
