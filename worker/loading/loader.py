"""LoadedModel: from settings to a ready engine. The one place where models, drafter, codec and cost model meet.

Used by the worker process, by `basic generate`, by the benchmark and the seed functions, so that all of them run the
same engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from jobs.errors import SetupError
from jobs.messages import model_name
from worker.engine.cpu.compiler import processor
from worker.engine.engine import Engine
from worker.engine.model.architecture import batch_dependent_rope, kv_bytes_per_token, max_positions
from worker.engine.model.backend import fuse_layers, uses_paged_kv
from worker.engine.model.loading import gather_embeddings, load, native_dtype
from worker.engine.model.offload import OffloadOptions
from worker.engine.model.packed_model import LanguageModel, PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.paged.attention import GPU_BLOCK
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.loading.calibration import calibrate, calibrate_drafts, measure_drafts
from worker.loading.drafts import load_draft, uses_head
from worker.loading.memory import available_bytes, with_kv_tokens
from worker.loading.model_store import resolve
from worker.loading.tensor_parallel import TARGET, RankGroup
from worker.settings import WorkerSettings
from worker.text.codec import Codec, eos_ids, load_tokenizer

OnMessage = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Loaded models and what belongs to them; makes engines that share them, one at a time."""

    name: str  # public name of the target
    draft: str | None  # public name of the draft model, if there is one
    device: str  # its name, for people
    device_type: str  # torch's name of it: cpu or cuda
    ranks: int  # how many such devices share the target
    dtype: str
    codec: Codec
    target: PackedModel
    make_drafter: Callable[[], Drafter]
    options: EngineOptions
    costs: CostModel
    draft_times: tuple[DraftTimes, DraftTimes | None]  # of its drafts, and of their part that runs no network
    speculation_state: SpeculationState  # with its drafts in its mode

    def initial_state(self, make_drafter: Callable[[], Drafter] | None = None) -> SpeculationState:
        """Return what is known before the first step of its own drafts, or of others, which are measured now."""
        if make_drafter is None:
            return SpeculationState.of(*self.draft_times)
        room = (self.options.max_sequences, self.options.draft_slot_tokens)
        return SpeculationState.of(*_of_parts(make_drafter(), lambda drafter: measure_drafts(drafter, *room)))

    def engine(
        self,
        options: EngineOptions | None = None,
        make_drafter: Callable[[], Drafter] | None = None,
        speculation_state: SpeculationState | None = None,
        target: LanguageModel | None = None,
    ) -> Engine:
        """Return a fresh engine over the loaded models, with other options or drafts if they are given.

        An engine with its own draft shares what was learned before; give `speculation_state` for another draft or mode.
        Two engines at a time each need a `target` of their own, say a part of the slots.
        """
        chosen = options or self.options
        drafter = None if chosen.mode is Mode.PLAIN else (make_drafter or self.make_drafter)()
        own = make_drafter is None and chosen.mode is self.options.mode
        learned = speculation_state or (self.speculation_state if own else None)
        return Engine(target or self.target, drafter, chosen, self.costs, learned)


def load_engine(settings: WorkerSettings, say: OnMessage = lambda _: None) -> LoadedModel:
    """Load what the settings name and calibrate it.

    Raises ModelRefused or SetupError, with what to do, for models that are missing, unsupported or don't fit together.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # in a log each of its steps is noise
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = native_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    path = resolve(settings.target, settings.cache_dir, say)
    say(f"Loading {settings.target} in {str(dtype).removeprefix('torch.')} on {device.type}")
    ranks = RankGroup.start(settings, path, device) if settings.tp > 1 else None
    model = load(path, dtype=dtype, device=device, ranks=settings.tp, offload=_spread(settings))
    if uses_head(settings):
        gather_embeddings(model)
    tokenizer = load_tokenizer(path)
    config = model.config.get_text_config()
    options = engine_options(settings, _context(settings, config, say))
    draft = load_draft(settings, model, tokenizer, ranks)
    if draft.name:
        say(f"Drafting with {draft.name}")
    fuse_layers(model)
    # Hidden states for a head lie in slots taken in full, so there the sequences can't take their memory bit by bit.
    blocks = GPU_BLOCK if uses_paged_kv(model) and not draft.taps else None
    free = _free(settings, ranks)
    options = with_kv_tokens(
        options, settings.kv_tokens, kv_bytes_per_token(model), draft.token_bytes, device, blocks, free
    )
    vocabulary = min(len(tokenizer), config.vocab_size)
    pack = PackedModel if ranks is None else partial(ranks.lead, number=TARGET)
    target = pack(
        model,
        slots=options.max_sequences,
        capacity=options.slot_tokens,
        defined_ids=vocabulary,
        tapped=draft.taps,
        kv_tokens=options.total_kv_tokens,
    )
    target.prepare()
    ends = eos_ids(tokenizer, model.generation_config)
    codec = Codec(tokenizer, ends, options.max_context, vocabulary, settings.special_in_content)
    for finding in codec.findings:
        say(finding)
    say("Measuring this machine")
    key = _cost_key(settings, options, target, device, draft.taps)
    make_drafter = draft.make(target.hidden, options.max_sequences, options.draft_slot_tokens, options.draft_kv_tokens)
    folder = settings.cache_dir / "costs"
    costs = calibrate(target, min(options.slot_tokens, max_positions(config) or options.slot_tokens), key, folder)
    room = (options.max_sequences, options.draft_slot_tokens)
    draft_times = _of_parts(
        make_drafter(), lambda drafter: calibrate_drafts(drafter, *room, (*key, drafter.name), folder)
    )
    return LoadedModel(
        name=model_name(settings.target),
        draft=draft.name,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        device_type=device.type,
        ranks=settings.tp,
        dtype=str(dtype).removeprefix("torch."),
        codec=codec,
        target=target,
        make_drafter=make_drafter,
        options=options,
        costs=costs,
        draft_times=draft_times,
        speculation_state=SpeculationState.of(*draft_times),
    )


def _context(settings: WorkerSettings, config: PretrainedConfig, say: OnMessage) -> int:
    """Return the longest text that is taken, and say so if it is shorter than the settings and the model allow."""
    most = max_positions(config) or settings.max_context
    kind = batch_dependent_rope(config)
    if kind and most < settings.max_context:
        say(
            f"Texts may have {most} tokens: beyond, the {kind} rotary embeddings of {settings.target} change with the "
            "other texts of a batch"
        )
    return min(settings.max_context, most)


def _of_parts(drafter: Drafter, times_of: Callable[[Drafter], DraftTimes]) -> tuple[DraftTimes, DraftTimes | None]:
    """Return the times of a drafter, and of its part that runs no network."""
    return times_of(drafter), None if drafter.forward_free is None else times_of(drafter.forward_free)


def _free(settings: WorkerSettings, ranks: RankGroup | None) -> Callable[[torch.device], int]:
    """Return how to find out what memory there is: here, or on the rank that has least."""

    def free(device: torch.device) -> int:
        mine = available_bytes(device, settings.memory_share / settings.tp)
        return mine if ranks is None else ranks.min_free_bytes(mine)

    return free


def _spread(settings: WorkerSettings) -> OffloadOptions | None:
    """Return how to lay out a target that fits no other way, if the settings say that it does not."""
    if not settings.device_map:
        return None
    if settings.tp > 1:
        raise SetupError("BASIC_DEVICE_MAP lays one process's layers out; it can't be combined with --tp, unset one")
    return OffloadOptions(settings.cache_dir / "offload" / model_name(settings.target).replace("/", "--"))


def _cost_key(
    settings: WorkerSettings, options: EngineOptions, target: PackedModel, device: torch.device, taps: tuple[int, ...]
) -> tuple[object, ...]:
    """Return everything that changes what a step costs."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    versions = (torch.__version__, transformers.__version__, target.version)
    threads = torch.get_num_threads()
    return (settings.target, settings.tp, str(target.dtype), where, threads, options.slot_tokens, taps, *versions)


def engine_options(settings: WorkerSettings, context_tokens: int) -> EngineOptions:
    """Return the engine's dials from the worker's settings."""
    return EngineOptions(
        mode=Mode(settings.mode),
        max_sequences=settings.max_sequences,
        max_context=context_tokens,
        prefill_rows=settings.prefill_rows,
        nodes=settings.nodes,
        threshold=settings.threshold,
        max_depth=settings.max_depth,
    )
