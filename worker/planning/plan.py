"""Placements of a target and its draft on a node's GPUs: which fit, their predicted speed, and the best one.

Memory is computed by the worker's own function (`loading.memory.fit`), so a plan never promises KV memory that the
worker would not allocate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.errors import SetupError
from worker.engine.options import EngineOptions
from worker.engine.paged.attention import GPU_BLOCK
from worker.engine.paged.shape_buckets import BUCKETS
from worker.loading.memory import GPU_SHARE, KvMemory, fit
from worker.planning.devices import GIB, MEASURED
from worker.planning.forecast import Machine, Speculation, Step, speculate, step
from worker.planning.shapes import ModelShape

_RESERVED_BYTES = 2 * GIB  # CUDA context, library workspaces and fragmentation


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Models to place, and their expected use."""

    target: ModelShape
    draft: ModelShape | None
    machine: Machine
    gpus: int
    sequences: int = 0  # maximum per replica; 0: as many as fit
    context: int = 0  # maximum tokens of prompt and completion; 0: the target's own
    prompt_tokens: int = 300  # of a usual request
    output_tokens: int = 1000  # of its answer
    kv_tokens: int = 0  # BASIC_KV_TOKENS; 0: as many as fit
    acceptance: float = 0.6  # assumed probability that the target accepts a draft token
    nodes: int = 60
    max_depth: int = 10

    @property
    def is_measured(self) -> bool:
        """Whether steps of one GPU were compared with their prediction on this device, in these formats."""
        machine, fp8 = self.machine, self.machine.fp8 or self.machine.fp8_kv or self.target.has_fp8_weights
        return machine.device.name == MEASURED and machine.dtype == "bfloat16" and not fp8

    @property
    def mean_tokens(self) -> int:
        """KV tokens of a running sequence in the mean: pages are taken as the answer grows."""
        return self.prompt_tokens + self.output_tokens // 2


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout of the node. If `refusal` is None it fits, and the fields after it are set."""

    replicas: int
    ranks: int  # of each replica: its tensor parallel size
    draft_ranks: int  # 0: no draft, 1: on rank 0 only, else split like the target
    weights_bytes: int  # on the fullest GPU
    exact: bool = True  # a text depends on its request alone; not so if transformers split a model in bfloat16
    measured: bool = False  # steps of this kind were compared with the prediction
    refusal: str | None = None
    kv_tokens: int = 0  # per replica
    sequences: int = 0  # per replica, of the usual length
    context: int = 0  # maximum tokens of prompt and completion
    step: Step | None = None  # a plain step
    tokens_per_s: float = 0.0  # of the node, plain
    drafted: Speculation | None = None
    drafted_tokens_per_s: float = 0.0  # of the node, with the draft

    @property
    def name(self) -> str:
        """Name of the layout, such as `4 x TP 2, draft split`."""
        whole = f"{self.replicas} x 1 GPU" if self.ranks == 1 else f"{self.replicas} x TP {self.ranks}"
        where = {0: "", 1: ", draft on the first rank"}.get(self.draft_ranks, ", draft split")
        return whole + (where if self.ranks > 1 else "")

    @property
    def best_tokens_per_s(self) -> float:
        """Throughput of the engine, which drafts only if that is faster."""
        return max(self.tokens_per_s, self.drafted_tokens_per_s)

    def as_json(self) -> dict[str, Any]:
        """Return the public JSON form."""
        row = {"name": self.name, **asdict(self), "best_tokens_per_s": self.best_tokens_per_s}
        if self.step is not None:
            row["step"]["step_ms"] = self.step.step_ms
        return row


def placements(request: PlanRequest) -> list[Placement]:
    """Return every layout of the node, with its predicted speed or why it doesn't fit."""
    return [_placement(request, ranks, draft_ranks) for ranks, draft_ranks in _layouts(request)]


def pick(choices: list[Placement]) -> Placement | None:
    """Return the exact placement with the most tokens per second, then the fewest ranks; None if nothing fits.

    One that is not exact is returned only if no exact one fits.
    """
    fitting = [choice for choice in choices if choice.refusal is None]
    return max(fitting, key=lambda choice: (choice.exact, choice.best_tokens_per_s, -choice.ranks), default=None)


def command(request: PlanRequest, chosen: Placement) -> str:
    """Return the command that starts a placement."""
    variables = []
    if request.sequences:
        variables.append(f"BASIC_MAX_SEQUENCES={request.sequences}")
    if request.context:
        variables.append(f"BASIC_MAX_CONTEXT={chosen.context}")
    if request.kv_tokens:
        variables.append(f"BASIC_KV_TOKENS={request.kv_tokens}")
    if chosen.draft_ranks > 1:
        variables.append("BASIC_DRAFT_RANKS=all")
    if request.machine.fp8:
        variables.append("BASIC_QUANTIZATION=fp8")
    if request.machine.fp8_kv:
        variables.append("BASIC_KV_DTYPE=fp8")
    words = ["basic worker", f"--replicas {chosen.replicas}", f"--tp {chosen.ranks}", f"--target {request.target.name}"]
    words.append(f"--draft {request.draft.name}" if request.draft else "--draft suffix")
    return " ".join([*variables, *words, f"--dtype {request.machine.dtype}"])


def _layouts(request: PlanRequest) -> Iterator[tuple[int, int]]:
    """Yield (ranks, draft ranks): every tensor parallel size that uses all GPUs, with both draft placements."""
    for ranks in range(1, request.gpus + 1):
        if request.gpus % ranks:
            continue
        yield ranks, 0 if request.draft is None else 1
        if request.draft is not None and ranks > 1 and request.target.splits(ranks) and request.draft.splits(ranks):
            yield ranks, ranks


def _placement(request: PlanRequest, ranks: int, draft_ranks: int) -> Placement:
    draft_bytes = request.machine.weights_bytes(request.draft, draft_ranks) if request.draft else 0
    placement = Placement(
        replicas=request.gpus // ranks,
        ranks=ranks,
        draft_ranks=draft_ranks,
        weights_bytes=request.machine.weights_bytes(request.target, ranks) + draft_bytes,
        exact=ranks == 1 or request.machine.dtype == "float32" or request.target.splits_exactly,
        measured=ranks == 1 and request.is_measured,
    )
    if not request.target.splits(ranks):
        return replace(placement, refusal=split_refusal(request.target, ranks))
    if ranks > 1 and (request.machine.fp8 or request.target.has_fp8_weights):
        return replace(placement, refusal="FP8 weights are held whole by one GPU")
    free = request.machine.device.memory_bytes - _RESERVED_BYTES - placement.weights_bytes
    if free <= 0:
        return replace(
            placement,
            refusal=f"weights of {placement.weights_bytes / GIB:.1f} GiB leave no memory for KV on a GPU of "
            f"{request.machine.device.memory_bytes / GIB:.0f} GiB",
        )
    try:
        fitted = _fitted(request, free, ranks, draft_ranks)
    except SetupError as error:
        return replace(placement, refusal=str(error))
    return _rated(request, replace(placement, kv_tokens=fitted.total_kv_tokens, context=fitted.max_context), fitted)


def split_refusal(shape: ModelShape, ranks: int) -> str:
    """Return why a model can't be split over `ranks` ranks, and what to do instead."""
    sizes = ", ".join(map(str, shape.widths))
    return (
        f"{shape.heads} heads over {shape.kv_heads} KV heads can't be split over {ranks} ranks; "
        f"{shape.name} can run with --tp {sizes}, with more replicas beside it"
    )


def _fitted(request: PlanRequest, free: int, ranks: int, draft_ranks: int) -> EngineOptions:
    options = EngineOptions(
        max_sequences=request.sequences or BUCKETS[-1],
        max_context=request.context or request.target.context_tokens,
        nodes=request.nodes,
        max_depth=request.max_depth,
    )
    memory = KvMemory(
        free_bytes=free,
        share=GPU_SHARE,
        token_bytes=request.machine.kv_bytes(request.target, ranks),
        draft_token_bytes=request.machine.kv_bytes(request.draft, draft_ranks) if request.draft else 0,
        page_tokens=GPU_BLOCK,
    )
    return fit(options, request.kv_tokens, memory, derive_sequences=not request.sequences)


def _rated(request: PlanRequest, placement: Placement, fitted: EngineOptions) -> Placement:
    context = min(fitted.max_context, request.mean_tokens)
    sequences = max(1, min(fitted.max_sequences, fitted.total_kv_tokens // context))
    plain = step(request.target, request.machine, placement.ranks, sequences, sequences, context)
    rated = replace(
        placement,
        sequences=sequences,
        step=plain,
        tokens_per_s=1e3 * placement.replicas * sequences / plain.step_ms,
    )
    if request.draft is None:
        return rated
    drafted = speculate(
        request.target,
        request.draft,
        request.machine,
        ranks=placement.ranks,
        draft_ranks=placement.draft_ranks,
        sequences=sequences,
        context=context,
        acceptance=request.acceptance,
        max_depth=request.max_depth,
    )
    rate = 1e3 * placement.replicas * sequences * drafted.tokens_per_step / drafted.step_ms
    return replace(rated, drafted=drafted, drafted_tokens_per_s=rate)
