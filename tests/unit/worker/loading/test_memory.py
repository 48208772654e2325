"""Laws of KV memory: what is derived fits, and no text may be longer than what can be admitted."""

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


def test_a_token_of_a_model_takes_its_keys_and_values_in_every_layer() -> None:
    assert kv_bytes_per_token(tiny()) == 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, dimensions, float32


@pytest.mark.parametrize("draft_bytes", [0, 40])
def test_derived_tokens_of_target_and_draft_fit_half_of_the_free_memory(free: int, draft_bytes: int) -> None:
    fitted = with_kv_tokens(OPTIONS, 0, 200, draft_bytes, CPU)
    trees = 4 * 60 * 9 * draft_bytes
    assert 0 <= free / 2 - trees - fitted.total_kv_tokens * (200 + draft_bytes) < 200 + draft_bytes


def test_more_than_all_slots_can_hold_is_not_needed(free: int) -> None:
    assert with_kv_tokens(OPTIONS, 0, 1, 0, CPU).total_kv_tokens == 4 * (1000 + 60 + 1)


def test_the_context_shrinks_to_what_can_be_admitted() -> None:
    fitted = with_kv_tokens(OPTIONS, 300, 200, 0, CPU)
    assert (fitted.kv_tokens, fitted.max_context) == (300, 239)


def test_where_slots_are_taken_in_full_there_are_only_as_many_as_fit() -> None:
    assert with_kv_tokens(OPTIONS, 2500, 200, 0, torch.device("cuda")).max_sequences == 2


def test_where_slots_take_block_by_block_there_may_be_more_of_them_than_fit_in_full(free: int) -> None:
    fitted = with_kv_tokens(OPTIONS, 2500, 200, 0, torch.device("cuda"), 256)
    assert (fitted.max_sequences, fitted.total_kv_tokens) == (4, 2500)
    derived = with_kv_tokens(OPTIONS, 0, 200, 0, torch.device("cuda"), 256).total_kv_tokens
    assert 0 <= free / 2 - (derived + 4 * 256) * 200 < 200


def test_no_room_for_any_text_says_what_to_set() -> None:
    with pytest.raises(SetupError, match="BASIC_KV_TOKENS"):
        with_kv_tokens(OPTIONS, 50, 200, 0, CPU)
