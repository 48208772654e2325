"""Models for tests: tiny random transformers models, and a lookup table whose distributions are known exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import Module
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import load
from worker.engine.model.packed_model import PackedModel
from worker.engine.segments import KvMove, Segment

VOCAB = 61
TOKENIZER_VOCAB = 258  # of `byte_tokenizer`; a model that reads its tokens needs at least as many
JSON_VOCAB = 300  # of `json_tokenizer`
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the compiled kernels take multiples of this
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WINDOW = 8  # of the sliding layers: smaller than the texts of the tests

ARCHITECTURES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama": lambda shape: LlamaForCausalLM(LlamaConfig(**shape)),
    "qwen2": lambda shape: Qwen2ForCausalLM(Qwen2Config(**shape)),
    "qwen3": lambda shape: Qwen3ForCausalLM(Qwen3Config(**shape)),
    "mistral": lambda shape: MistralForCausalLM(MistralConfig(**shape, sliding_window=WINDOW)),
    "gemma3": lambda shape: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **shape,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}


def tiny(architecture: str = "llama", seed: int = 0, vocab: int = VOCAB, **shape: int) -> PreTrainedModel:
    """Return a random float32 model of an architecture; the same seed gives the same weights."""
    return copied(_tiny(architecture, seed, vocab, **shape))


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model, to change."""
    made = _copied(model, {})
    assert isinstance(made, PreTrainedModel)
    return made


def load_copy(path: str, **given: Any) -> PreTrainedModel:
    """Load a model like `worker.engine.model.loading.load`, but once per process: each caller gets a copy.

    Not for models with longrope, whose parts know each other.
    """
    return load(path, **given) if given.get("offload") else copied(_loaded(path, **given))


@cache
def _loaded(path: str, **given: Any) -> PreTrainedModel:
    return load(path, **given)


def _copied(module: Module, copies: dict[int, Any]) -> Module:
    """Return what copy.deepcopy returns, in a third of the time: empty containers, which are most, are new.

    `copies` has the copies made so far by the id of the original, as in copy.deepcopy.
    """
    if id(module) in copies:
        found: Module = copies[id(module)]
        return found
    copied = copies[id(module)] = module.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            own: Any = {key: None if child is None else _copied(child, copies) for key, child in value.items()}
        elif isinstance(value, dict | set | list) and not value:
            own = type(value)()
        else:
            own = copy.deepcopy(value, copies)
        vars(copied)[name] = own
    return copied


@cache
def _tiny(architecture: str, seed: int, vocab: int, **shape: int) -> PreTrainedModel:
    """Make a model once per process: a copy takes a sixth of the time."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]({**SHAPE, "vocab_size": vocab, **shape})
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # nearly uniform otherwise; sharper models repeat text as real ones do
    return model


def save_tiny(directory: Path, architecture: str = "llama", seed: int = 0, **shape: int) -> Path:
    """Save a tiny random float32 model with a byte tokenizer; return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _saved(architecture, seed, **shape).items():
        (directory / name).write_bytes(content)
    return directory


@cache
def _saved(architecture: str, seed: int, **shape: int) -> dict[str, bytes]:
    """Return the files of a model, which transformers writes once per process."""
    with TemporaryDirectory() as folder:
        tiny(architecture, seed, vocab=TOKENIZER_VOCAB, **shape).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def packed(model: PreTrainedModel, slots: int = 5, capacity: int = 512) -> PackedModel:
    """Return a model wrapped for packed decoding, with fused layers where a compiler is there, as a worker has it."""
    model.set_attn_implementation(ATTENTION_NAME)
    fuse_layers(model)
    return PackedModel(model, slots=slots, capacity=capacity)


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte (ids 0..255), `<eos>` (256) and `<bos>` (257), and a chat template."""
    alphabet = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    backend = Tokenizer(BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")  # type: ignore[no-untyped-call]
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "<bos>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bos>assistant: {% endif %}"
        )
    return tokenizer


@cache
def json_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of JSON_VOCAB tokens that merges what JSON often has; `<eos>` is 0."""
    words = '{"name": "value", "kind": null, "ok": true, "no": false}, ["alpha", "beta", 10, 11], kind name value'
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=JSON_VOCAB, special_tokens=["<eos>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([words] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")  # type: ignore[no-untyped-call]


@dataclass
class TableModel:
    """A language model whose logits are a function of the text, so that the distribution of every draw is known."""

    logits: Callable[[tuple[int, ...]], Tensor]  # text -> [vocab]
    forwards: int = 0
    rows: int = 0
    _slots: dict[int, dict[int, int]] = field(default_factory=dict)  # slot -> KV index -> token

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Return the logits of each kept row, from the text that the row sees."""
        self.forwards += 1
        rows = [self._row(segment, int(row)) for segment in segments for row in self._store(segment).keep]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move accepted tokens to the end of the committed prefix."""
        for move in moves:
            slot = self._slots[move.slot]
            kept = [slot[int(source)] for source in move.sources]
            slot.update({move.destination + i: token for i, token in enumerate(kept)})

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the prefix of a text."""
        beginning = {i: self._slots[source][i] for i in range(length)}
        self._slots.setdefault(target, {}).update(beginning)

    def truncate(self, slot: int, length: int) -> None:
        """Drop the tokens of a slot after `length`."""
        self._slots[slot] = {i: token for i, token in self._slots.get(slot, {}).items() if i < length}

    def clear(self) -> None:
        """Drop the tokens of all slots."""
        self._slots.clear()

    def _store(self, segment: Segment) -> Segment:
        slot = self._slots.setdefault(segment.slot, {})
        self.rows += len(segment.ids)
        slot.update(enumerate(segment.ids.tolist(), segment.start))
        return segment

    def _row(self, segment: Segment, row: int) -> Tensor:
        slot, end = self._slots[segment.slot], segment.start + row + 1
        seen: Iterable[int] = range(end)
        if segment.visible is not None:
            seen = [*range(segment.prefix), *(segment.prefix + segment.visible[row].nonzero()[0]).tolist()]
        text = tuple(map(slot.__getitem__, seen))
        assert len(text) == int(segment.positions[row]) + 1, "a row sees as many tokens as its position says"
        return self.logits(text)
