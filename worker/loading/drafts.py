"""Drafts: from the setting to what makes drafters. A head or a language model on disk, mixed with the suffix index.

A target that comes with a draft of its own uses it unless the setting says not.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from jobs.messages import model_name
from worker.drafters.head import HeadDrafter, PackedHead
from worker.drafters.head_file import is_head, read_head, target_identity
from worker.drafters.mixed import MixedDrafter
from worker.drafters.model import ModelDrafter, SharedVocabulary
from worker.drafters.suffix import SuffixDrafter
from worker.engine.errors import ModelRefused, TokenizersDiffer
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.architecture import kv_bytes_per_token, max_positions
from worker.engine.model.backend import fuse_layers
from worker.engine.model.checkpoint import draft_kind, folder_of, refuse_unreadable
from worker.engine.model.loading import embeddings, load, output_weights
from worker.engine.model.offload import input_device
from worker.engine.model.packed_model import PackedModel
from worker.engine.speculation.drafting import Drafter
from worker.loading.model_store import resolve
from worker.loading.tensor_parallel import DRAFT, RankGroup, draft_tp_size
from worker.settings import SUFFIX, WorkerSettings
from worker.text.codec import first_mismatched_id, load_tokenizer, shared_token_ids

_ALIKE = 0.5  # of the target's token ids, at least, that a draft must spell alike
_SHIPPED = Path(__file__).resolve().parent.parent / "shipped_drafts"  # a folder for each packaged target that has one

MakeDrafter = Callable[[], Drafter]


@dataclass(frozen=True, slots=True)
class Draft:
    """What drafts for a target."""

    name: str | None  # public name of the network, if there is one
    taps: tuple[int, ...]  # layers of the target whose outputs it reads
    token_bytes: int  # memory that each token of a text takes
    # Takes the target's states, slots, the capacity of each, and of all together (None: each in full).
    make: Callable[[HiddenStates | None, int, int, int | None], MakeDrafter]


def load_draft(
    settings: WorkerSettings, model: PreTrainedModel, tokenizer: Tokenizer, ranks: RankGroup | None = None
) -> Draft:
    """Return the draft that the settings choose for a loaded target, whose layers are not fused yet.

    With `ranks` the target is split over them. Raises ModelRefused or TokenizersDiffer, with what differs and what to
    do, if it can't draft for the target.
    """
    path = draft_path(settings)
    if path is None:
        return Draft(None, (), 0, lambda *_: SuffixDrafter)
    if is_head(path):
        return _with_head(path, settings, model, tokenizer)
    refuse_unsupported_draft(path)
    return _with_model(path, settings, model, tokenizer, ranks)


def draft_path(settings: WorkerSettings) -> str | None:
    """Return where the draft of the settings lies; None: only what texts repeat."""
    if settings.draft == SUFFIX or settings.mode == "plain":
        return None
    if settings.draft:
        return resolve(settings.draft, settings.cache_dir)
    own = shipped(settings.target)
    return str(own) if own else None


def uses_head(settings: WorkerSettings) -> bool:
    """Return whether the settings choose a head, which reads weights and states of its target."""
    path = draft_path(settings)
    return path is not None and is_head(path)


def shipped(target: str) -> Path | None:
    """Return the folder of the draft that comes with bASIC for a packaged target."""
    folder = _SHIPPED / target
    return folder if "/" not in target and folder.is_dir() else None


def shared_words(
    target: Tokenizer, draft: Tokenizer, target_name: str, draft_name: str, known: int
) -> SharedVocabulary:
    """Return the tokens of a target and of a draft that knows the ids below `known`.

    Raises TokenizersDiffer, naming the first id, unless both spell most of the target's ids alike: what is drafted
    changes no text, but hardly anything would be accepted.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    shared = [i for i in shared_token_ids(ours, theirs) if i < known]
    if len(shared) < _ALIKE * len(ours):
        first = first_mismatched_id(ours, theirs) or 0
        raise TokenizersDiffer(
            f"{draft_name} can't draft for {target_name}: they spell {len(shared)} of {len(ours)} token ids alike, and "
            f"token id {first} is {target.convert_ids_to_tokens(first)!r} in the target's tokenizer and "
            f"{draft.convert_ids_to_tokens(first)!r} in the draft's; choose a draft with the target's tokenizer"
        )
    return SharedVocabulary(np.array(shared, np.int64), known)


def refuse_unsupported_draft(path: str) -> None:
    """Raise ModelRefused for a draft that is made for other programs."""
    folder = folder_of(path)
    kind = None if folder is None else draft_kind(folder)
    if kind is not None:
        raise ModelRefused(
            f"{path} is {kind}, which this version can't run; set BASIC_DRAFT to a smaller language model with the "
            "target's tokenizer, to a head of `basic draft train`, or to suffix"
        )


def _with_head(path: str, settings: WorkerSettings, model: PreTrainedModel, tokenizer: Tokenizer) -> Draft:
    whose = target_identity(model, model_name(settings.target), tokenizer.get_vocab())
    head = read_head(path, whose)
    # Read now: the target's output weights are packed once its layers are fused.
    embedding, tokens = embeddings(model), head.tokens.to(input_device(model))
    rows = output_weights(model)[tokens].clone()
    shape = head.network.shape
    name = model_name(settings.draft) if settings.draft else f"{settings.target}-head"

    def make(hidden: HiddenStates | None, slots: int, capacity: int, _: int | None) -> MakeDrafter:
        assert hidden is not None, "a head reads hidden states"
        net = PackedHead(deepcopy(head.network), embedding, rows, tokens, slots=slots, capacity=capacity)
        net.prepare()
        return lambda: MixedDrafter(HeadDrafter(net, hidden, name), SuffixDrafter())

    entry = 2 * shape.layers * shape.kv_heads * shape.head_dim + len(shape.taps) * shape.width
    return Draft(name, shape.taps, entry * model.dtype.itemsize, make)


def _with_model(
    path: str, settings: WorkerSettings, model: PreTrainedModel, tokenizer: Tokenizer, ranks: RankGroup | None
) -> Draft:
    refuse_unreadable(path)
    draft_tokenizer = load_tokenizer(path)
    everywhere = ranks is not None and settings.draft_ranks == "all"
    network = load(
        path, dtype=model.dtype, device=input_device(model), ranks=draft_tp_size(path, settings) if everywhere else 1
    )
    config = network.config.get_text_config()
    words = shared_words(tokenizer, draft_tokenizer, settings.target, settings.draft, config.vocab_size)
    fuse_layers(network)
    name = model_name(settings.draft)

    def make(_: HiddenStates | None, slots: int, capacity: int, kv_tokens: int | None) -> MakeDrafter:
        packed: PackedModel
        if everywhere and ranks is not None:
            packed = ranks.lead(network, DRAFT, slots=slots, capacity=capacity, kv_tokens=kv_tokens)
        else:
            packed = PackedModel(network, slots=slots, capacity=capacity, kv_tokens=kv_tokens)
        packed.prepare()
        return lambda: MixedDrafter(
            ModelDrafter(packed, name, len(tokenizer), shared=words, positions=max_positions(config)), SuffixDrafter()
        )

    return Draft(name, (), kv_bytes_per_token(network), make)
