"""Laws of KV memory: derived tokens and sequences fit, and the context never exceeds what can be admitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import SetupError
from tests.models import TOKENIZER_VOCAB, save_tiny, tiny
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.model.architecture import kv_bytes_per_token
from worker.engine.options import MAX_STEP_NODES, EngineOptions
from worker.engine.quantization.weights import QuantizationMethod
from worker.loading.capacity import choose_capacity, largest_forward
from worker.loading.drafts import DrafterFactory
from worker.loading.memory import KvMemory, fit, least_weight_bytes
from worker.settings import WorkerSettings

OPTIONS = EngineOptions(max_sequences=4, max_context=10_000, nodes=60, max_depth=10)
MEMORY = KvMemory(free_bytes=10_000_000, share=0.92, token_bytes=200)


def test_kv_bytes_are_the_keys_and_values_of_every_layer() -> None:
    assert kv_bytes_per_token(tiny()) == 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, dimensions, float32


@pytest.mark.parametrize("draft_bytes", [0, 40])
@pytest.mark.parametrize("page_tokens", [1, 64])
def test_derived_tokens_and_the_draft_nodes_of_one_step_fill_the_share(draft_bytes: int, page_tokens: int) -> None:
    memory = replace(MEMORY, draft_token_bytes=draft_bytes, page_tokens=page_tokens)
    tokens = fit(replace(OPTIONS, max_sequences=8), 0, memory).total_kv_tokens
    trees = MAX_STEP_NODES * (200 + 9 * draft_bytes)
    assert tokens % page_tokens == 0
    assert 0 <= 9_200_000 - trees - tokens * (200 + draft_bytes) < page_tokens * (200 + draft_bytes)


def test_kv_tokens_are_limited_to_the_slots() -> None:
    assert fit(OPTIONS, 0, replace(MEMORY, token_bytes=1)).total_kv_tokens == 4 * (10_000 + 60 + 1)


def test_the_context_shrinks_to_what_can_be_admitted() -> None:
    fitted = fit(OPTIONS, 300, MEMORY)
    assert (fitted.kv_tokens, fitted.max_context) == (300, 239)


def test_slots_allocated_whole_are_limited_to_the_memory() -> None:
    assert fit(OPTIONS, 25_000, replace(MEMORY, whole_slots=True)).max_sequences == 2


def test_paged_slots_may_exceed_what_fits_whole() -> None:
    fitted = fit(OPTIONS, 2500, replace(MEMORY, page_tokens=64))
    assert (fitted.max_sequences, fitted.total_kv_tokens, fitted.page_tokens) == (4, 2496, 64)


@pytest.mark.parametrize(("tokens", "sequences"), [(100_000, 256), (25_600, 100), (300, 1)])
def test_derived_sequences_shrink_with_the_memory(tokens: int, sequences: int) -> None:
    options = replace(OPTIONS, max_sequences=256)
    assert fit(options, tokens, MEMORY, derive_sequences=True).max_sequences == sequences
    assert fit(options, tokens, MEMORY).max_sequences == 256  # chosen: each sequence may be short


def test_the_largest_forward_has_logits_for_every_root_and_draft_node() -> None:
    options = replace(OPTIONS, max_context=40, prefill_rows=32)  # more rows than the context has positions
    model = tiny()
    assert largest_forward(model, options)().shape == (4 + MAX_STEP_NODES, model.config.vocab_size)


class Ranks:
    """Another rank has half of the memory that the first one has."""

    def min_free_bytes(self, options: EngineOptions, own: Callable[[], int]) -> int:
        return own() // 2


def test_the_rank_with_the_least_memory_decides_how_many_tokens_and_sequences_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.loading.capacity.available_bytes", lambda _, share: int(2e7 * share))
    draft, model = DrafterFactory(None, (), 0, lambda *_: lambda: SuffixDrafter()), tiny()

    def chosen(tp: int, ranks: Any) -> EngineOptions:
        settings = WorkerSettings(tp=tp, max_sequences=0, max_context=0, kv_tokens=0, memory_share=1.0)
        return choose_capacity(settings, model, draft, ranks, lambda _: None)

    alone, split = chosen(1, None), chosen(2, Ranks())
    assert (alone.max_context, split.max_context) == (512, 512), "that of the model"
    trees = MAX_STEP_NODES * kv_bytes_per_token(model)
    assert [o.total_kv_tokens for o in (alone, split)] == [(n - trees) // 1024 for n in (10_000_000, 2_500_000)]
    assert all(o.max_sequences == o.total_kv_tokens // 256 for o in (alone, split))


def test_the_least_bytes_of_weights_are_those_that_a_load_takes_and_a_damaged_file_has_none(tmp_path: Path) -> None:
    target, model = str(save_tiny(tmp_path / "target")), tiny(vocab=TOKENIZER_VOCAB)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert least_weight_bytes([target, None], torch.float32, None) == 4 * numbers
    assert least_weight_bytes([target, target], torch.bfloat16, None) == 2 * 2 * numbers
    assert numbers <= least_weight_bytes([target], torch.bfloat16, QuantizationMethod.FP8) < 1.1 * numbers
    (tmp_path / "target" / "model.safetensors").write_bytes(b"half")
    assert least_weight_bytes([target], torch.float32, None) == 0


def test_too_little_memory_names_the_setting() -> None:
    with pytest.raises(SetupError, match="BASIC_KV_TOKENS"):
        fit(OPTIONS, 50, MEMORY)
