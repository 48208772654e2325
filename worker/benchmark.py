"""The benchmark: plain and OPT-Tree decoding beside transformers' own `generate`, in one run on the same prompts.

Every mode gets the same token ids, dtype and threads. Modes take turns within a run, so that a slow minute of the
machine hits all of them; the median over runs counts. `python -m worker.benchmark` compares plain and speculative
decoding of one prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from jobs.errors import InvalidValue
from jobs.messages import CHAT_ENDPOINT
from worker.drafters.head_file import is_head
from worker.engine.options import Mode
from worker.engine.sampling.sampling import Sampling, noise_key
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.generate import request_for
from worker.loading.loader import LoadedModel, load_engine
from worker.loading.model_store import OnMessage, resolve
from worker.settings import SUFFIX, WorkerSettings

OWN_MODES = tuple(mode.value for mode in (Mode.PLAIN, Mode.OPT_TREE, Mode.PAPER))
PEER_MODES = ("transformers-greedy", "transformers-prompt-lookup", "transformers-assisted")
_LOOKUP_TOKENS = 4  # tokens that transformers' prompt lookup proposes per step
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """What to measure."""

    prompts: tuple[str, ...]
    batches: tuple[int, ...]
    modes: tuple[str, ...]
    max_tokens: int
    runs: int
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the report."""

    mode: str
    batch: int
    temperature: float
    drafter: str | None
    tokens_per_s: float  # median over runs
    tokens_per_step: float | None  # per sequence and decoding step; None where the peer does not say
    runs: int
    tokens_per_s_of_runs: tuple[float, ...]
    same_text: bool | None  # greedy: equal to plain decoding, token for token
    host_share: float | None = None  # of the steps' time: planning and bookkeeping, no network; median over runs
    expected_over_accepted: float | None = None  # draft tokens of the last run, when drafts are known; None: none shown


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """What was measured, and on what."""

    device: str
    dtype: str
    target: str
    draft: str
    results: tuple[Result, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the public JSON form."""
        return asdict(self)

    def rate(self, mode: str, batch: int) -> float | None:
        """Return the tokens per second of a row, if it was measured."""
        return next((r.tokens_per_s for r in self.results if (r.mode, r.batch) == (mode, batch)), None)


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One pass over the prompts."""

    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    steps: int | None  # decoding steps, summed over sequences; prefill not counted
    host_share: float | None = None  # of the steps' time: neither the target's forward nor a draft's
    expected: float = 0.0  # draft tokens that the trees were expected to bring
    accepted: int = 0  # that they brought

    @property
    def tokens(self) -> int:
        """All tokens written."""
        return sum(map(len, self.token_ids))

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Decode = Callable[[int], TimedRun]  # takes the batch size


def run(settings: WorkerSettings, plan: BenchmarkPlan, say: OnMessage = lambda _: None) -> BenchmarkReport:
    """Measure every mode of the plan at every batch size."""
    loaded = load_engine(settings, say)
    prompts = encode(loaded, plan.prompts, plan.max_tokens)
    runners: dict[str, Decode] = {
        mode: decode(loaded, prompts, plan.max_tokens, Mode(mode), plan.temperature)
        for mode in plan.modes
        if mode in OWN_MODES
    }
    runners |= _peers(settings, loaded, prompts, plan)
    results: list[Result] = []
    for batch in plan.batches:
        results += _measure(runners, batch, plan, loaded, say)
    return BenchmarkReport(loaded.device, loaded.dtype, loaded.name, _drafter(loaded), tuple(results))


def encode(loaded: LoadedModel, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids of prompts as chat requests have them."""
    return [loaded.codec.encode(request_for(loaded.name, p, max_tokens=max_tokens), CHAT_ENDPOINT) for p in prompts]


def run_rounds(
    runners: Mapping[str, Decode], batch: int, runs: int, say: OnMessage = lambda _: None
) -> dict[str, list[TimedRun]]:
    """Run each so often at a batch size, one after the other within a run: a slow minute hits all of them."""
    taken: dict[str, list[TimedRun]] = {name: [] for name in runners}
    for turn in range(runs):
        for name, timed in taken.items():
            say(f"Batch {batch}, run {turn + 1} of {runs}: {name}")
            timed.append(runners[name](batch))
    return taken


def _measure(
    runners: dict[str, Decode], batch: int, plan: BenchmarkPlan, loaded: LoadedModel, say: OnMessage
) -> list[Result]:
    able = {mode: runner for mode, runner in runners.items() if batch == 1 or _batches(mode)}
    taken = run_rounds(able, batch, plan.runs, say)
    plain = taken.get(Mode.PLAIN.value)
    return [_result(mode, batch, plan, runs, plain[0] if plain else None, loaded) for mode, runs in taken.items()]


def _result(
    mode: str, batch: int, plan: BenchmarkPlan, runs: list[TimedRun], plain: TimedRun | None, loaded: LoadedModel
) -> Result:
    rates = [r.rate for r in runs]
    steps = runs[0].steps
    shares = [r.host_share for r in runs if r.host_share is not None]
    speculates = mode in (Mode.OPT_TREE.value, Mode.PAPER.value)
    return Result(
        mode=mode,
        batch=batch,
        temperature=plan.temperature,
        drafter=_drafter(loaded) if speculates else None,
        tokens_per_s=round(median(rates), 2),
        tokens_per_step=round((runs[0].tokens - len(plan.prompts)) / steps, 3) if steps else None,
        runs=len(runs),
        tokens_per_s_of_runs=tuple(round(rate, 2) for rate in rates),
        same_text=None if plain is None or plan.temperature else runs[0].token_ids == plain.token_ids,
        host_share=round(median(shares), 4) if shares else None,
        expected_over_accepted=round(runs[-1].expected / runs[-1].accepted, 3) if runs[-1].accepted else None,
    )


def _batches(mode: str) -> bool:
    """transformers speculates for one sequence at a time only."""
    return mode not in ("transformers-prompt-lookup", "transformers-assisted")


def _drafter(loaded: LoadedModel) -> str:
    return loaded.draft or "suffix"


def decode(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    max_tokens: int,
    mode: Mode,
    temperature: float,
    make_drafter: Callable[[], Drafter] | None = None,
    state: SpeculationState | None = None,
) -> Decode:
    """Return what decodes the prompts with our engine at a batch size; without `make_drafter`, with its own drafts.

    A worker keeps its state with them for its whole life, so a run begins with that of the runs before, or of
    whoever gives one.
    """
    if state is None:
        state = loaded.initial_state(make_drafter) if mode is Mode.OPT_TREE else SpeculationState()

    def timed(batch: int) -> TimedRun:
        at_once = min(batch, loaded.options.max_sequences)
        options = replace(loaded.options, mode=mode, max_sequences=at_once)
        clock = _DraftClock()
        made = make_drafter or loaded.make_drafter
        engine = loaded.engine(options, lambda: _Clocked(made(), clock), state)
        sequences = fresh(loaded, prompts, max_tokens, temperature)
        steps, accepted = 0, 0
        expected = stepped_ms = verify_ms = 0.0
        started = perf_counter()
        for sequence in sequences:
            engine.add(sequence)
        while engine.busy:
            before = perf_counter()
            numbers = [result.stats for result in engine.step()]
            if numbers:
                stepped_ms += (perf_counter() - before) * 1e3
                verify_ms += numbers[0].verify_ms
            steps += sum(1 for one in numbers if one.step)
            expected += sum(one.expected_accepted for one in numbers)
            accepted += sum(one.accepted_tokens for one in numbers)
        seconds = perf_counter() - started
        host_share = (stepped_ms - verify_ms - clock.ms) / stepped_ms if stepped_ms else None
        return TimedRun(tuple(tuple(s.output_ids) for s in sequences), seconds, steps, host_share, expected, accepted)

    return timed


def fresh(
    loaded: LoadedModel, prompts: Sequence[list[int]], max_tokens: int, temperature: float
) -> list[EngineSequence]:
    """Return sequences that begin with the prompts, each with noise of its own."""
    return [
        EngineSequence(
            key=i,
            ids=list(prompt),
            num_prompt=len(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, key=noise_key(i, 0)),
            eos_ids=loaded.codec.eos_ids,
        )
        for i, prompt in enumerate(prompts)
    ]


class _DraftClock:
    """Milliseconds that drafts took."""

    ms = 0.0


class _Clocked:
    """A drafter whose time counts as a draft's, not as the planner's."""

    def __init__(self, drafter: Drafter, clock: _DraftClock) -> None:
        self._drafter, self._clock = drafter, clock
        self.name = drafter.name
        self.num_uncached_tokens, self.commit, self.drop = drafter.num_uncached_tokens, drafter.commit, drafter.drop

    @property
    def forward_free(self) -> Drafter | None:
        return _Clocked(self._drafter.forward_free, self._clock) if self._drafter.forward_free is not None else None

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        started = perf_counter()
        offered = self._drafter.expand(forest, frontier)
        self._clock.ms += (perf_counter() - started) * 1e3
        return offered


def _peers(
    settings: WorkerSettings, loaded: LoadedModel, prompts: Sequence[list[int]], plan: BenchmarkPlan
) -> dict[str, Decode]:
    wanted = [mode for mode in plan.modes if mode in PEER_MODES]
    if settings.draft in ("", SUFFIX) or is_head(resolve(settings.draft, settings.cache_dir)):
        wanted = [mode for mode in wanted if mode != "transformers-assisted"]
    if not wanted:
        return {}
    model = load_peer(resolve(settings.target, settings.cache_dir), loaded)
    extra: dict[str, dict[str, Any]] = {
        "transformers-greedy": {},
        "transformers-prompt-lookup": {"prompt_lookup_num_tokens": _LOOKUP_TOKENS},
    }
    if "transformers-assisted" in wanted:
        extra["transformers-assisted"] = {
            "assistant_model": load_peer(resolve(settings.draft, settings.cache_dir), loaded)
        }
    return {mode: peer(model, loaded, prompts, plan.max_tokens, plan.temperature, **extra[mode]) for mode in wanted}


def load_peer(path: str, loaded: LoadedModel) -> Any:
    """Load a model as transformers itself runs it; its `generate` is typed for mixins that no model class declares."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, loaded.dtype), device_map=loaded.device_type)


def peer(
    model: Any, loaded: LoadedModel, prompts: Sequence[list[int]], max_tokens: int, temperature: float, **extra: Any
) -> Decode:
    """Return what decodes the prompts with transformers' own generate, in padded batches; `extra` are its arguments."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    def timed(batch: int) -> TimedRun:
        outputs: list[tuple[int, ...]] = []
        started = perf_counter()
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            outputs += _peer_batch(model, loaded, some, {"max_new_tokens": max_tokens, **sampling, **extra})
        return TimedRun(tuple(outputs), perf_counter() - started, None)

    return timed


@torch.inference_mode()
def _peer_batch(
    model: Any, loaded: LoadedModel, prompts: Sequence[list[int]], arguments: dict[str, Any]
) -> list[tuple[int, ...]]:
    """Let transformers decode left-padded prompts; return each completion up to its end-of-sequence token."""
    width = max(map(len, prompts))
    pad = min(loaded.codec.eos_ids, default=0)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=loaded.device_type)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.device_type)
    out = model.generate(
        ids,
        attention_mask=mask,
        eos_token_id=sorted(loaded.codec.eos_ids) or None,
        pad_token_id=pad,
        **arguments,
    )
    return [_until_eos(row.tolist(), loaded.codec.eos_ids) for row in out[:, width:]]


def _until_eos(ids: list[int], eos: frozenset[int]) -> tuple[int, ...]:
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    return tuple(ids[:end])


def table(report: BenchmarkReport) -> Table:
    """Return the report as a table with the ratios people ask for."""
    shown = Table(title=f"{report.target}, {report.dtype}, {report.device}; drafts: {report.draft}")
    for column in (
        "mode",
        "batch",
        "tokens/s",
        "tokens/step",
        "vs plain",
        "vs transformers",
        "same text",
        "host",
        "E/A",
    ):
        shown.add_column(column, justify="left" if column == "mode" else "right", no_wrap=column == "mode")
    for r in report.results:
        shown.add_row(
            r.mode,
            str(r.batch),
            f"{r.tokens_per_s:.1f}",
            f"{r.tokens_per_step:.2f}" if r.tokens_per_step else "-",
            _ratio(r.tokens_per_s, report.rate(Mode.PLAIN.value, r.batch)),
            _ratio(r.tokens_per_s, report.rate("transformers-greedy", r.batch)),
            "-" if r.same_text is None else "yes" if r.same_text else "no",
            f"{r.host_share:.1%}" if r.host_share is not None else "-",
            f"{r.expected_over_accepted:.2f}" if r.expected_over_accepted else "-",
        )
    return shown


def _ratio(rate: float, base: float | None) -> str:
    return f"{rate / base:.2f}x" if base else "-"


def read_prompts(path: Path | None, limit: int) -> tuple[str, ...]:
    """Return up to `limit` prompts of a JSONL file of objects with `prompt`; default: the examples.

    Raises InvalidValue naming the line that is not such an object.
    """
    source = path or EXAMPLES
    prompts: list[str] = []
    for number, line in enumerate(source.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or len(prompts) == limit:
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise InvalidValue(
                f"{source} needs one JSON object with a prompt a line", param="prompt", line=number
            ) from error
    if not prompts:
        raise InvalidValue(f"{source} holds no prompts", param="--prompts")
    return tuple(prompts)


def parse_batches(text: str) -> tuple[int, ...]:
    """Return batch sizes from `1,8,32`; raises InvalidValue."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidValue(f"{text!r} is not a list of batch sizes such as 1,8,32", param="--batch") from error
    if min(sizes) < 1:
        raise InvalidValue(f"{text!r}: a batch has at least one sequence", param="--batch")
    return sizes


def parse_modes(text: str | None) -> tuple[str, ...]:
    """Return modes from `plain,opt-tree`; all when there is none; raises InvalidValue naming an unknown one."""
    known = (*OWN_MODES, *PEER_MODES)
    modes = tuple(part.strip() for part in text.split(",")) if text else known
    unknown = [mode for mode in modes if mode not in known]
    if unknown:
        raise InvalidValue(f"{unknown[0]!r} is no mode; there are {', '.join(known)}", param="--modes")
    return modes


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare plain and speculative decoding of one prompt, as the seed project's benchmark did."""
    parser = argparse.ArgumentParser(prog="python -m worker.benchmark", description=main.__doc__)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args(arguments)
    if given.max_tokens < 1 or given.runs < 1:
        parser.error("--max-tokens and --runs must be at least 1")
    plan = BenchmarkPlan((given.prompt,), (1,), (Mode.PLAIN.value, Mode.OPT_TREE.value), given.max_tokens, given.runs)
    report = run(WorkerSettings(max_sequences=1), plan)
    plain, speculative = (report.rate(mode.value, 1) or 0.0 for mode in (Mode.PLAIN, Mode.OPT_TREE))
    print(f"standard     {plain:8.2f} tokens/s")
    print(f"speculative  {speculative:8.2f} tokens/s")
    print(f"ratio        {speculative / plain:8.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
