"""Benchmark plain and OPT-Tree decoding next to transformers' own `generate`, in one process on the same prompts.

Every mode gets the same token ids, dtype and threads. The modes alternate within each run, so that a slow period of the
machine affects all of them; the median over runs is reported. `python -m worker.benchmark` compares plain and
speculative decoding of one prompt.
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
from worker.engine.sampling.parameters import Sampling, noise_key
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
_LOOKUP_TOKENS = 4  # draft tokens per step of transformers' prompt lookup
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """Prompts, modes, batch sizes and number of runs of a benchmark."""

    prompts: tuple[str, ...]
    batches: tuple[int, ...]
    modes: tuple[str, ...]
    max_tokens: int
    runs: int
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one mode at one batch size: a row of the report."""

    mode: str
    batch: int
    temperature: float
    drafter: str | None
    tokens_per_s: float  # median over runs
    tokens_per_step: float | None  # per sequence and decoding step; None: not reported by transformers
    runs: int
    tokens_per_s_of_runs: tuple[float, ...]
    same_text: bool | None  # greedy only: same token ids as plain decoding
    # Share of the step time outside the networks: planning and bookkeeping; median over runs.
    host_share: float | None = None
    # Draft tokens of the last run, when drafts are known; None: none result.
    expected_over_accepted: float | None = None


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """Results of a benchmark, with device and models."""

    device: str
    dtype: str
    target: str
    draft: str
    results: tuple[Result, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the public JSON form."""
        return asdict(self)

    def rate(self, mode: str, batch: int) -> float | None:
        """Return the tokens per second of a mode and batch size; None if not measured."""
        return next((r.tokens_per_s for r in self.results if (r.mode, r.batch) == (mode, batch)), None)


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One pass over the prompts."""

    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    steps: int | None  # decoding steps summed over sequences, without prefill
    host_share: float | None = None  # share of the step time outside the forwards of target and draft
    expected: float = 0.0  # expected number of accepted draft tokens
    accepted: int = 0  # accepted draft tokens

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(map(len, self.token_ids))

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Decode = Callable[[int], TimedRun]  # argument: batch size


def run(settings: WorkerSettings, plan: BenchmarkPlan, on_message: OnMessage = lambda _: None) -> BenchmarkReport:
    """Measure every mode of the plan at every batch size."""
    loaded = load_engine(settings, on_message)
    prompts = encode(loaded, plan.prompts, plan.max_tokens)
    decoders: dict[str, Decode] = {
        mode: decode(loaded, prompts, plan.max_tokens, Mode(mode), plan.temperature)
        for mode in plan.modes
        if mode in OWN_MODES
    }
    decoders |= _peers(settings, loaded, prompts, plan)
    results: list[Result] = []
    for batch in plan.batches:
        results += _measure(decoders, batch, plan, loaded, on_message)
    dtype = f"{loaded.dtype}, {loaded.quantization} weights" if loaded.quantization else loaded.dtype
    dtype += f", {loaded.kv_dtype} KV" if loaded.kv_dtype != loaded.dtype else ""
    return BenchmarkReport(loaded.device, dtype, loaded.name, _drafter(loaded), tuple(results))


def encode(loaded: LoadedModel, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids of prompts sent as chat requests."""
    return [loaded.codec.encode(request_for(loaded.name, p, max_tokens=max_tokens), CHAT_ENDPOINT) for p in prompts]


def run_alternating(
    decoders: Mapping[str, Decode], batch: int, runs: int, on_message: OnMessage = lambda _: None
) -> dict[str, list[TimedRun]]:
    """Run each decoder `runs` times at a batch size; the decoders alternate, so that machine load affects all."""
    timed_runs: dict[str, list[TimedRun]] = {name: [] for name in decoders}
    for number in range(runs):
        for name, timed in timed_runs.items():
            on_message(f"Batch {batch}, run {number + 1} of {runs}: {name}")
            timed.append(decoders[name](batch))
    return timed_runs


def _measure(
    decoders: dict[str, Decode], batch: int, plan: BenchmarkPlan, loaded: LoadedModel, on_message: OnMessage
) -> list[Result]:
    batched = {mode: decoder for mode, decoder in decoders.items() if batch == 1 or _supports_batches(mode)}
    timed_runs = run_alternating(batched, batch, plan.runs, on_message)
    plain = timed_runs.get(Mode.PLAIN.value)
    return [_result(mode, batch, plan, runs, plain[0] if plain else None, loaded) for mode, runs in timed_runs.items()]


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


def _supports_batches(mode: str) -> bool:
    """Return whether a mode decodes batches; transformers speculates for one sequence at a time only."""
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
    """Return a function that decodes the prompts with bASIC's engine at a batch size.

    `make_drafter` replaces the loaded drafter. As in a worker process, the learned state is kept from run to run;
    `state` is its start.
    """
    if state is None:
        state = loaded.initial_state(make_drafter) if mode is Mode.OPT_TREE else SpeculationState()

    def timed(batch: int) -> TimedRun:
        sequences_at_once = min(batch, loaded.options.max_sequences)
        options = replace(loaded.options, mode=mode, max_sequences=sequences_at_once)
        draft_time = _DraftTime()
        new_drafter = make_drafter or loaded.make_drafter
        engine = loaded.engine(options, lambda: _TimedDrafter(new_drafter(), draft_time), state)
        sequences = new_sequences(loaded, prompts, max_tokens, temperature)
        steps, accepted = 0, 0
        expected = step_ms = verify_ms = 0.0
        started = perf_counter()
        for sequence in sequences:
            engine.add(sequence)
        while engine.busy:
            before = perf_counter()
            results = engine.step()
            if len(results):
                step_ms += (perf_counter() - before) * 1e3
                verify_ms += results.verify_ms
            steps += int((results.steps > 0).sum())
            expected += float(results.expected_accepted.sum())
            accepted += int(results.accepted_tokens.sum())
        seconds = perf_counter() - started
        host_share = (step_ms - verify_ms - draft_time.ms) / step_ms if step_ms else None
        return TimedRun(tuple(tuple(s.output_ids) for s in sequences), seconds, steps, host_share, expected, accepted)

    return timed


def new_sequences(
    loaded: LoadedModel, prompts: Sequence[list[int]], max_tokens: int, temperature: float
) -> list[EngineSequence]:
    """Return one sequence per prompt, each with its own sampling noise."""
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


class _DraftTime:
    """Milliseconds spent in drafters."""

    ms = 0.0


class _TimedDrafter:
    """A drafter whose time is added to a `_DraftTime`."""

    def __init__(self, drafter: Drafter, draft_time: _DraftTime) -> None:
        self._drafter, self._time = drafter, draft_time
        self.name = drafter.name
        self.num_uncached_tokens, self.commit, self.drop = drafter.num_uncached_tokens, drafter.commit, drafter.drop

    @property
    def forward_free(self) -> Drafter | None:
        part = self._drafter.forward_free
        if part is self._drafter:
            return self
        return None if part is None else _TimedDrafter(part, self._time)

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        started = perf_counter()
        offered = self._drafter.expand(forest, frontier)
        self._time.ms += (perf_counter() - started) * 1e3
        return offered


def _peers(
    settings: WorkerSettings, loaded: LoadedModel, prompts: Sequence[list[int]], plan: BenchmarkPlan
) -> dict[str, Decode]:
    modes = [mode for mode in plan.modes if mode in PEER_MODES]
    if settings.draft in ("", SUFFIX) or is_head(resolve(settings.draft, settings.cache_dir)):
        modes = [mode for mode in modes if mode != "transformers-assisted"]
    if not modes:
        return {}
    model = load_peer(resolve(settings.target, settings.cache_dir, base=settings.base_model), loaded)
    extra: dict[str, dict[str, Any]] = {
        "transformers-greedy": {},
        "transformers-prompt-lookup": {"prompt_lookup_num_tokens": _LOOKUP_TOKENS},
    }
    if "transformers-assisted" in modes:
        extra["transformers-assisted"] = {
            "assistant_model": load_peer(resolve(settings.draft, settings.cache_dir), loaded)
        }
    return {mode: peer(model, loaded, prompts, plan.max_tokens, plan.temperature, **extra[mode]) for mode in modes}


def load_peer(path: str, loaded: LoadedModel) -> Any:
    """Load a model with transformers, unfused. Any: transformers' types do not declare `generate`."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, loaded.dtype), device_map=loaded.device_type)


def peer(
    model: Any, loaded: LoadedModel, prompts: Sequence[list[int]], max_tokens: int, temperature: float, **extra: Any
) -> Decode:
    """Return a function that decodes the prompts with transformers' `generate(**extra)` in padded batches."""
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
    """Decode left-padded prompts with transformers; return each completion up to its end-of-sequence token."""
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
    """Return the report as a table, with speed-ups over plain decoding and over transformers."""
    result = Table(title=f"{report.target}, {report.dtype}, {report.device}; drafts: {report.draft}")
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
        result.add_column(column, justify="left" if column == "mode" else "right", no_wrap=column == "mode")
    for r in report.results:
        result.add_row(
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
    return result


def _ratio(rate: float, base: float | None) -> str:
    return f"{rate / base:.2f}x" if base else "-"


def read_prompts(path: Path | None, limit: int) -> tuple[str, ...]:
    """Return up to `limit` prompts of a JSONL file of objects with `prompt`; default: the examples.

    Raises InvalidValue with the number of an invalid line.
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
                f"{source} must have one JSON object with `prompt` per line", param="prompt", line=number
            ) from error
    if not prompts:
        raise InvalidValue(f"{source} has no prompts", param="--prompts")
    return tuple(prompts)


def parse_batches(text: str) -> tuple[int, ...]:
    """Parse batch sizes such as `1,8,32`. Raises InvalidValue."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidValue(f"{text!r} is not a list of batch sizes such as 1,8,32", param="--batch") from error
    if min(sizes) < 1:
        raise InvalidValue(f"{text!r}: batch sizes must be at least 1", param="--batch")
    return sizes


def parse_modes(text: str | None) -> tuple[str, ...]:
    """Parse modes such as `plain,opt-tree`; None: all modes. Raises InvalidValue for an unknown mode."""
    known = (*OWN_MODES, *PEER_MODES)
    modes = tuple(part.strip() for part in text.split(",")) if text else known
    unknown = [mode for mode in modes if mode not in known]
    if unknown:
        raise InvalidValue(f"{unknown[0]!r} is not a mode; choose from {', '.join(known)}", param="--modes")
    return modes


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare plain and speculative decoding of one prompt, like the benchmark of the seed project."""
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
