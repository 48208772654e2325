"""Load an engine from the settings: target, draft, tokenizer, memory and calibration.

The worker, `basic generate`, the benchmarks and the legacy functions all use it, so that they run the same engine.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
import transformers
from transformers.utils import logging as transformers_logging

from jobs.errors import SetupError
from jobs.messages import model_name
from storage.numerics import Numerics
from storage.speculation_states import DraftIdentity
from worker.engine.cpu.compiler import processor
from worker.engine.engine import Engine
from worker.engine.grammar.vocabulary import GrammarVocabulary
from worker.engine.kv.fp8 import kv_dtype_of
from worker.engine.model.architecture import is_dealt_by_transformers, long_text_tokens, max_positions
from worker.engine.model.backend import batch_dependence, fuse_layers, stored_bytes
from worker.engine.model.checkpoint import weight_files
from worker.engine.model.loading import gather_embeddings, load, local_folder, native_dtype
from worker.engine.model.offload import OffloadOptions
from worker.engine.model.packed_model import LanguageModel, PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.quantization.weights import QuantizationMethod, quantization_method
from worker.engine.sampling.sampling import prepare as prepare_draws
from worker.engine.segments import chain
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.loading.calibration import calibrate, calibrate_drafts, measure_drafts
from worker.loading.capacity import choose_capacity
from worker.loading.drafts import draft_path, load_draft, uses_head
from worker.loading.memory import available_bytes, least_weight_bytes
from worker.loading.model_store import OnMessage, resolve
from worker.loading.numerics import numerics_of
from worker.loading.quantization import choose_kv_dtype, chosen_quantization, refuse_unpacked, weights_sentence
from worker.loading.rank_processes import RankProcesses
from worker.loading.tensor_parallel import TARGET, RankGroup
from worker.loading.weights_hash import weights_hash
from worker.settings import WorkerSettings
from worker.sharing.access import DeviceAccess, SoleAccess
from worker.text.codec import Codec, eos_ids, load_tokenizer
from worker.text.generation_config import sampling_defaults
from worker.text.grammar_tokenizer import grammar_tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Loaded models with codec and calibration; makes engines that share them, one at a time."""

    name: str  # public name of the target
    draft: str | None  # public name of the draft; None: suffix index only
    device: str  # name for people
    device_type: str  # cpu or cuda
    ranks: int  # devices that share the target (tensor parallel size)
    dtype: str
    quantization: str | None  # how the weights of linear layers are stored; None: in `dtype`
    numerics: Numerics  # what fixes the bits of its texts
    kv_dtype: str  # of stored keys and values
    codec: Codec
    grammars: GrammarVocabulary
    target: PackedModel
    make_drafter: Callable[[], Drafter]
    options: EngineOptions
    costs: CostModel
    draft_times: tuple[DraftTimes, DraftTimes | None]  # of the drafter, and of its part without a network
    speculation_state: SpeculationState  # learned with its own drafter and mode
    draft_identity: DraftIdentity  # what that state holds for

    def initial_state(self, make_drafter: Callable[[], Drafter] | None = None) -> SpeculationState:
        """Return the speculation state before the first step. A drafter other than its own is measured now."""
        if make_drafter is None:
            return SpeculationState.of(*self.draft_times)
        slots = (self.options.max_sequences, self.options.draft_slot_tokens)
        return SpeculationState.of(*_of_parts(make_drafter(), lambda drafter: measure_drafts(drafter, *slots)[0]))

    def engine(
        self,
        options: EngineOptions | None = None,
        make_drafter: Callable[[], Drafter] | None = None,
        speculation_state: SpeculationState | None = None,
        target: LanguageModel | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> Engine:
        """Return a new engine over the loaded models; arguments replace the defaults of the settings.

        Engines with the default drafter and mode share what they learn about speculation; others need a
        `speculation_state`.
        Two engines at a time each need their own `target`, such as a part of the slots.
        """
        chosen = options or self.options
        drafter = None if chosen.mode is Mode.PLAIN else (make_drafter or self.make_drafter)()
        own = make_drafter is None and chosen.mode is self.options.mode
        learned = speculation_state or (self.speculation_state if own else None)
        return Engine(
            target or self.target, drafter, chosen, self.costs, learned, vocabulary=self.grammars, clock=clock
        )


def load_engine(
    settings: WorkerSettings,
    on_message: OnMessage = lambda _: None,
    access: DeviceAccess | None = None,
    processes: RankProcesses | None = None,
) -> LoadedModel:
    """Load the models of the settings and calibrate them; `on_message` takes sentences about the progress.

    `access` is that to a device which other models share: its memory is divided, and calibration takes turns.
    Raises ModelRefused or SetupError for models that are missing, unsupported or don't fit together.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # noise in a log
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = native_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    quantization = chosen_quantization(settings, device)
    path = resolve(settings.target, settings.cache_dir, on_message, base=settings.base_model)
    access = access or SoleAccess()
    access.admit(
        lambda: least_weight_bytes([path, draft_path(settings)], dtype, quantization),
        lambda: available_bytes(device, settings.memory_share),
    )
    on_message(f"Loading {settings.target} in {str(dtype).removeprefix('torch.')} on {device.type}")
    ranks = RankGroup.start(settings, path, device, processes) if settings.tp > 1 else None
    model = load(
        path,
        dtype=dtype,
        device=device,
        ranks=settings.tp,
        offload=_spread(settings),
        quantization=quantization,
        context=settings.max_context,
        factors_by_text=settings.tp == 1 and not settings.device_map,
    )
    refuse_unpacked(model, settings.target)
    choose_kv_dtype(settings, model)
    quantized = quantization_method(model)
    if uses_head(settings):
        gather_embeddings(model)
    tokenizer = load_tokenizer(path)
    config = model.config.get_text_config()
    draft = load_draft(settings, model, tokenizer, ranks)
    if draft.name:
        on_message(f"Drafting with {draft.name}{', which learns from all texts' if draft.learns else ''}")
    if settings.draft_learning_threads and not draft.learns:
        on_message("BASIC_DRAFT_LEARNING_THREADS has no effect: only a head of `basic draft train` learns")
    fuse_layers(model)
    if quantized is not None:
        on_message(weights_sentence(stored_bytes(model)))
    cause = batch_dependence(model)
    if cause is not None:
        on_message(f"Warning: the bits of a text may depend on the others in its batch: {cause}")
    options = choose_capacity(settings, model, draft, ranks, on_message, access)
    vocabulary = min(len(tokenizer), config.vocab_size)
    pack = PackedModel if ranks is None else partial(ranks.lead, index=TARGET)
    target = pack(
        model,
        slots=options.max_sequences,
        capacity=options.slot_tokens,
        defined_ids=vocabulary,
        tapped=draft.taps,
        kv_tokens=options.total_kv_tokens,
    )
    target.prepare()
    logits = target.forward([chain(0, 0, [0], keep_last=True)])
    prepare_draws(logits)
    target.truncate(0, 0)
    ends, width = eos_ids(tokenizer, model.generation_config), logits.shape[-1]
    grammars = GrammarVocabulary(partial(grammar_tokenizer, tokenizer, ends, width), ends, width, vocabulary)
    defaults, ignored = sampling_defaults(model.generation_config, settings.generation_config)
    modes = (settings.special_in_content, settings.reasoning_parser, defaults)
    codec = Codec(tokenizer, ends, options.max_context, vocabulary, *modes, long_text_tokens(config))
    for finding in (*codec.findings, *ignored):
        on_message(finding)
    folder = local_folder(path)
    numerics = numerics_of(
        model,
        codec,
        folder,
        weights=weights_hash(weight_files(folder), settings.cache_dir, on_message),
        quantization=quantized,
        kv_dtype=kv_dtype_of(model),
        ranks=settings.tp if is_dealt_by_transformers(model) else 1,
        depends_on_batch=cause is not None,
    )
    on_message("Calibrating")
    key = _cost_key(settings, options, target, device, draft.taps, quantized)
    make_drafter = draft.make(target.hidden, options.max_sequences, options.draft_slot_tokens, options.draft_kv_tokens)
    cached = settings.cache_dir / "costs"
    longest = min(options.slot_tokens, max_positions(config) or options.slot_tokens)
    costs = calibrate(target, longest, key, cached, turn=access.turn)
    draft_slots = (options.max_sequences, options.draft_slot_tokens)
    draft_times = _of_parts(
        make_drafter(),
        lambda drafter: calibrate_drafts(drafter, *draft_slots, (*key, drafter.name), cached, turn=access.turn),
    )
    name = model_name(settings.target)
    shown_device = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return LoadedModel(
        name=name,
        draft=draft.name,
        device=shown_device,
        device_type=device.type,
        ranks=settings.tp,
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantized,
        numerics=numerics,
        kv_dtype=str(kv_dtype_of(model)).removeprefix("torch."),
        codec=codec,
        grammars=grammars,
        target=target,
        make_drafter=make_drafter,
        options=options,
        costs=costs,
        draft_times=draft_times,
        speculation_state=SpeculationState.of(*draft_times),
        draft_identity=_draft_identity(
            name, draft.name, shown_device, (settings.mode, *_kind(settings, target, device, quantized))
        ),
    )


def _draft_identity(target: str, draft: str | None, device: str, kind: tuple[object, ...]) -> DraftIdentity:
    """Return what learned speculation holds for: memory and context don't change what drafts cost and gain."""
    key = hashlib.sha256(repr((target, draft, kind)).encode()).hexdigest()[:32]
    return DraftIdentity(key, device, target, draft)


def _of_parts(drafter: Drafter, times_of: Callable[[Drafter], DraftTimes]) -> tuple[DraftTimes, DraftTimes | None]:
    """Return the times of a drafter, and of its part without a network (None: it has no such part, or no other)."""
    part = drafter.forward_free
    return times_of(drafter), None if part is None or part is drafter else times_of(part)


def _spread(settings: WorkerSettings) -> OffloadOptions | None:
    """Return the offloading plan of a target that is larger than the GPUs, if the settings ask for one."""
    if not settings.device_map:
        return None
    if settings.tp > 1:
        raise SetupError("BASIC_DEVICE_MAP offloads the layers of one process; it can't be combined with --tp")
    return OffloadOptions(settings.cache_dir / "offload" / model_name(settings.target).replace("/", "--"))


def _cost_key(
    settings: WorkerSettings,
    options: EngineOptions,
    target: PackedModel,
    device: torch.device,
    taps: tuple[int, ...],
    quantized: QuantizationMethod | None,
) -> tuple[object, ...]:
    """Return the cache key of the calibration: everything that changes the cost of a step."""
    return (settings.target, options.slot_tokens, taps, *_kind(settings, target, device, quantized))


def _kind(
    settings: WorkerSettings, target: PackedModel, device: torch.device, quantized: QuantizationMethod | None
) -> tuple[object, ...]:
    """Return what changes the speed of the same model: device, parallelism, dtype, quantisation, threads, versions."""
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    versions = (torch.__version__, transformers.__version__, target.version)
    stored = str(target.dtype) if quantized is None else f"{target.dtype} {quantized}"
    if settings.kv_dtype != "auto":
        stored += f" KV {settings.kv_dtype}"
    return (device_name, settings.tp, stored, torch.get_num_threads(), *versions)
