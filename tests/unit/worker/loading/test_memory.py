"""Laws of KV memory: derived KV tokens fit, and the context never exceeds what can be admitted."""

from __future__ import annotations

import pytest
import torch

from jobs.errors import SetupError
from tests.models import tiny
from worker.engine.model.architecture import kv_bytes_per_token
from worker.engine.options import EngineOptions
from worker.loading import memory
from worker.loading.memory import with_kv_tokens

CPU = torch.device("cpu")
OPTIONS = EngineOptions(max_sequences=4, max_context=1000, nodes=60, max_depth=10)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    return 1_000_000


def test_kv_bytes_are_the_keys_and_values_of_every_layer() -> None:
    assert kv_bytes_per_token(tiny()) == 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, dimensions, float32


@pytest.mark.parametrize("draft_bytes", [0, 40])
def test_derived_tokens_of_target_and_draft_fit_half_of_the_free_memory(free: int, draft_bytes: int) -> None:
    fitted = with_kv_tokens(OPTIONS, 0, 200, draft_bytes, CPU)
    trees = 4 * 60 * 9 * draft_bytes
    assert 0 <= free / 2 - trees - fitted.total_kv_tokens * (200 + draft_bytes) < 200 + draft_bytes


def test_kv_tokens_are_limited_to_the_slots(free: int) -> None:
    assert with_kv_tokens(OPTIONS, 0, 1, 0, CPU).total_kv_tokens == 4 * (1000 + 60 + 1)


def test_the_context_shrinks_to_what_can_be_admitted() -> None:
    fitted = with_kv_tokens(OPTIONS, 300, 200, 0, CPU)
    assert (fitted.kv_tokens, fitted.max_context) == (300, 239)


def test_slots_allocated_whole_are_limited_to_the_memory() -> None:
    assert with_kv_tokens(OPTIONS, 2500, 200, 0, torch.device("cuda")).max_sequences == 2


def test_paged_slots_may_exceed_what_fits_whole(free: int) -> None:
    fitted = with_kv_tokens(OPTIONS, 2500, 200, 0, torch.device("cuda"), 256)
    assert (fitted.max_sequences, fitted.total_kv_tokens) == (4, 2500)
    derived = with_kv_tokens(OPTIONS, 0, 200, 0, torch.device("cuda"), 256).total_kv_tokens
    assert 0 <= free / 2 - (derived + 4 * 256) * 200 < 200


def test_too_little_memory_names_the_setting() -> None:
    with pytest.raises(SetupError, match="BASIC_KV_TOKENS"):
        with_kv_tokens(OPTIONS, 50, 200, 0, CPU)
