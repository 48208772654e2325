"""Create drafters from the settings: a head or a language model on disk, mixed with the suffix index.

A packaged target that ships with a draft uses it unless BASIC_DRAFT names another. Its head is used if drafts learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from jobs.messages import model_name
from worker.drafters.block import head_drafter, pack_head
from worker.drafters.block_network import BlockNetwork
from worker.drafters.eagle3_file import TargetShape, is_eagle3, read_eagle3
from worker.drafters.eagle3_network import Eagle3Network
from worker.drafters.head import HeadDrafter
from worker.drafters.head_file import is_head, is_own_head, read_head, target_identity
from worker.drafters.head_network import HeadNetwork
from worker.drafters.mixed import MixedDrafter
from worker.drafters.model import ModelDrafter, SharedVocabulary
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.errors import ModelRefused, TokenizersDiffer
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.architecture import kv_bytes_per_token, max_positions
from worker.engine.model.backend import fuse_layers
from worker.engine.model.checkpoint import draft_kind, folder_of, refuse_unreadable
from worker.engine.model.loading import embeddings, load, output_weights
from worker.engine.model.offload import input_device
from worker.engine.model.packed_model import PackedModel
from worker.engine.quantization.weights import QuantizationMethod
from worker.engine.speculation.drafting import Drafter
from worker.learning.head_learner import HeadLearner
from worker.loading.model_store import pull, resolve
from worker.loading.quantization import choose_kv_dtype, chosen_quantization, refuse_unpacked
from worker.loading.tensor_parallel import DRAFT, RankGroup, draft_tp_size
from worker.settings import SUFFIX, WorkerSettings
from worker.text.codec import load_tokenizer

_MIN_SHARED_IDS = 0.5  # of the target's token ids: share that the draft must decode to the same bytes
_SHIPPED = Path(__file__).resolve().parent.parent / "shipped_drafts"  # folders by packaged target

MakeDrafter = Callable[[], Drafter]


@dataclass(frozen=True, slots=True)
class DrafterFactory:
    """Makes drafters of one draft for a target, each with KV slots of its own."""

    name: str | None  # public name of the network; None: suffix index only
    taps: tuple[int, ...]  # layers of the target whose hidden states it reads
    token_bytes: int  # bytes of memory per token of a sequence
    # Takes the target's hidden states, slots, tokens per slot, and tokens of all slots (None: slots * tokens per slot).
    make: Callable[[HiddenStates | None, int, int, int | None], MakeDrafter]
    learns: bool = False  # from the texts of jobs


def load_draft(
    settings: WorkerSettings, model: PreTrainedModel, tokenizer: Tokenizer, ranks: RankGroup | None = None
) -> DrafterFactory:
    """Load the draft of the settings for a loaded target whose layers are not fused yet.

    `ranks` are the ranks of a tensor parallel target. Raises ModelRefused or TokenizersDiffer if the draft can't draft
    for the target.
    """
    path = draft_path(settings)
    if path is None:
        return DrafterFactory(None, (), 0, lambda *_: SuffixDrafter)
    if is_head(path):
        folder = folder_of(path)
        assert folder is not None, "a head is a directory or a downloaded hub id"
        loaded = _own_head if is_own_head(folder) else _eagle3_head
        head = loaded(folder, settings, model, tokenizer)
        if settings.draft_learning_threads and type(head.network) is HeadNetwork:
            return _with_head(head, model, learning_threads=settings.draft_learning_threads)
        return _with_head(head, model, chosen_quantization(settings, model.device))
    refuse_unsupported_draft(path)
    return _with_model(path, settings, model, tokenizer, ranks)


def draft_path(settings: WorkerSettings) -> str | None:
    """Return the path or hub id of the settings' draft; None: suffix index only."""
    if settings.draft == SUFFIX or settings.mode == "plain":
        return None
    if settings.draft:
        path = resolve(settings.draft, settings.cache_dir)
        return path if Path(path).is_dir() else _head_of_hub(path, settings)
    default = (shipped_head if settings.draft_learning_threads else shipped_draft)(settings.target)
    return str(default) if default else None


def uses_head(settings: WorkerSettings) -> bool:
    """Return whether the settings' draft is a head, which reads weights and hidden states of the target."""
    path = draft_path(settings)
    return path is not None and is_head(path)


def shipped_draft(target: str) -> Path | None:
    """Return the folder of the draft that ships with bASIC for a packaged target."""
    return _shipped(target)


def shipped_head(target: str) -> Path | None:
    """Return the folder of the head that ships too: block drafters start from it, and it can learn from jobs."""
    return _shipped(f"{target}-head")


def _shipped(name: str) -> Path | None:
    folder = _SHIPPED / name
    return folder if "/" not in name and folder.is_dir() else None


def learner_of(drafter: Drafter) -> HeadLearner | None:
    """Return what trains a drafter while it drafts; None if it does not learn."""
    network = drafter.network if isinstance(drafter, MixedDrafter) else drafter
    learner = network.learner if isinstance(network, HeadDrafter) else None
    return learner if isinstance(learner, HeadLearner) else None


def shared_vocabulary(
    target: Tokenizer, draft: Tokenizer, target_name: str, draft_name: str, vocabulary: int
) -> SharedVocabulary:
    """Return the token ids that target and draft share; the draft has the ids below `vocabulary`.

    Raises TokenizersDiffer, with the first id that differs, unless they share `_MIN_SHARED_IDS` of the target's ids.
    Outputs would be correct all the same, but hardly any draft token would be accepted.
    """
    target_vocab, draft_vocab = target.get_vocab(), draft.get_vocab()
    shared = [i for i in _shared_token_ids(target_vocab, draft_vocab) if i < vocabulary]
    if len(shared) < _MIN_SHARED_IDS * len(target_vocab):
        first = _first_mismatched_id(target_vocab, draft_vocab) or 0
        raise TokenizersDiffer(
            f"{draft_name} can't draft for {target_name}: they share {len(shared)} of {len(target_vocab)} token ids; "
            f"id {first} is {target.convert_ids_to_tokens(first)!r} in the target's tokenizer and "
            f"{draft.convert_ids_to_tokens(first)!r} in the draft's; choose a draft with the target's tokenizer"
        )
    return SharedVocabulary(np.array(shared, np.int64), vocabulary)


def refuse_unsupported_draft(path: str) -> None:
    """Raise ModelRefused for a draft in a format of another system, such as EAGLE or Medusa."""
    folder = folder_of(path)
    kind = None if folder is None else draft_kind(folder)
    if kind is not None:
        raise ModelRefused(
            f"{path} is {kind}, which this version can't run; set BASIC_DRAFT to a smaller language model with the "
            "target's tokenizer, to a head made by `basic draft train`, or to suffix"
        )


def _head_of_hub(path: str, settings: WorkerSettings) -> str:
    """Download a draft of a hub id if its configuration is that of an EAGLE-3 head; return its path."""
    try:
        config = hf_hub_download(path, "config.json")
    except (OSError, ValueError, HfHubHTTPError):
        return path
    return pull(path, settings.cache_dir) if is_eagle3(Path(config).parent) else path


@dataclass(frozen=True, slots=True)
class _LoadedHead:
    """A head of any format, with its embeddings and output weights."""

    name: str
    network: HeadNetwork | Eagle3Network
    tokens: Tensor
    output: Tensor
    embedding: Tensor


def _own_head(folder: Path, settings: WorkerSettings, model: PreTrainedModel, tokenizer: Tokenizer) -> _LoadedHead:
    """Read a head of `basic draft train`. Call it before the layers are fused, which packs the output weights."""
    head = read_head(str(folder), target_identity(model, model_name(settings.target), tokenizer.get_vocab()))
    tokens = head.tokens.to(input_device(model))
    kind = "block" if isinstance(head.network, BlockNetwork) else "head"
    name = model_name(settings.draft) if settings.draft else f"{settings.target}-{kind}"
    return _LoadedHead(name, head.network, tokens, output_weights(model)[tokens].clone(), embeddings(model))


def _eagle3_head(folder: Path, settings: WorkerSettings, model: PreTrainedModel, _: Tokenizer) -> _LoadedHead:
    """Read a published head. Its own embeddings and output weights take precedence over the target's."""
    config, device = model.config.get_text_config(), input_device(model)
    name = model_name(settings.target)
    target = TargetShape(name, config.num_hidden_layers, config.hidden_size, config.vocab_size)
    head = read_eagle3(folder, target)
    tokens = head.tokens.to(device)
    output = output_weights(model)[tokens].clone() if head.output is None else head.output.to(device, model.dtype)
    embedding = embeddings(model) if head.embedding is None else head.embedding.to(device, model.dtype)
    return _LoadedHead(model_name(settings.draft), head.network, tokens, output, embedding)


def _with_head(
    head: _LoadedHead, model: PreTrainedModel, quantization: QuantizationMethod | None = None, learning_threads: int = 0
) -> DrafterFactory:
    """Return the factory of a head; with `learning_threads` it learns, so its weights stay as they are."""
    shape = head.network.shape

    def make(hidden: HiddenStates | None, slots: int, capacity: int, _: int | None) -> MakeDrafter:
        assert hidden is not None, "a head reads hidden states"
        network = deepcopy(head.network)
        packed = pack_head(
            network,
            head.embedding,
            head.output,
            head.tokens,
            slots=slots,
            capacity=capacity,
            quantization=quantization,
        )
        packed.prepare()
        if not learning_threads:
            return lambda: MixedDrafter(head_drafter(packed, hidden, head.name), SuffixDrafter())
        assert isinstance(head.network, HeadNetwork), "other heads don't learn"
        learner = HeadLearner(packed, head.network, head.output, threads=learning_threads)
        return lambda: MixedDrafter(HeadDrafter(packed, hidden, head.name, learner), SuffixDrafter())

    entry_numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim + len(shape.taps) * _width(model)
    token_bytes = entry_numbers * model.dtype.itemsize
    return DrafterFactory(head.name, shape.taps, token_bytes, make, learns=learning_threads > 0)


def _width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _with_model(
    path: str, settings: WorkerSettings, model: PreTrainedModel, tokenizer: Tokenizer, ranks: RankGroup | None
) -> DrafterFactory:
    refuse_unreadable(path)
    draft_tokenizer = load_tokenizer(path)
    on_all_ranks = ranks is not None and settings.draft_ranks == "all"
    network = load(
        path,
        dtype=model.dtype,
        device=input_device(model),
        ranks=draft_tp_size(path, settings) if on_all_ranks else 1,
        quantization=chosen_quantization(settings, model.device),
        context=settings.max_context,
    )
    refuse_unpacked(network, settings.draft)
    choose_kv_dtype(settings, network)
    config = network.config.get_text_config()
    shared = shared_vocabulary(tokenizer, draft_tokenizer, settings.target, settings.draft, config.vocab_size)
    fuse_layers(network)
    name = model_name(settings.draft)

    def make(_: HiddenStates | None, slots: int, capacity: int, kv_tokens: int | None) -> MakeDrafter:
        packed: PackedModel
        if on_all_ranks and ranks is not None:
            packed = ranks.lead(network, DRAFT, slots=slots, capacity=capacity, kv_tokens=kv_tokens)
        else:
            packed = PackedModel(network, slots=slots, capacity=capacity, kv_tokens=kv_tokens)
        packed.prepare()
        return lambda: MixedDrafter(
            ModelDrafter(packed, name, len(tokenizer), shared=shared, positions=max_positions(config)), SuffixDrafter()
        )

    return DrafterFactory(name, (), kv_bytes_per_token(network), make)


def _shared_token_ids(target: Mapping[str, int], draft: Mapping[str, int]) -> list[int]:
    """Return the ids with the same token in both vocabularies, ascending."""
    return sorted(i for token, i in target.items() if draft.get(token) == i)


def _first_mismatched_id(target: Mapping[str, int], draft: Mapping[str, int]) -> int | None:
    """Return the first id with different tokens in two vocabularies, or None."""
    a, b = ({i: token for token, i in vocab.items()} for vocab in (target, draft))
    return min((i for i in a.keys() | b.keys() if a.get(i) != b.get(i)), default=None)
