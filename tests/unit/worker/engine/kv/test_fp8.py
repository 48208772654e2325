"""Keys and values in FP8: what is stored is the same on every path, and a text has one form, with drafts or without."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from tests.models import packed, tiny
from tests.unit.worker.engine.bits import check_moves, check_rows, check_threads
from tests.unit.worker.engine.cpu.test_kernels import compiled
from tests.unit.worker.engine.harness import decode, drafter, engine, options, outputs, sequences
from worker.engine.attention_options import AttentionOptions
from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.cpu.kv import CpuKv
from worker.engine.kv.dense import DenseKv
from worker.engine.kv.fp8 import decoded, encoded, has_fp8_kv, store_kv_in_fp8
from worker.engine.model.architecture import kv_bytes_per_token
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.output_lengths import OutputLengths
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import chain

DTYPES = [torch.float32, torch.bfloat16]
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95)
PROMPTS = [[*range(2, 30), 7, 8], [3, 4, 5], [*range(2, 30), 9], [11], [*range(2, 30), 7, 8]]


def rows_of(dtype: torch.dtype) -> torch.Tensor:
    """Return rows of every size: usual ones, tiny and huge ones, zeros, ties, and numbers far below the largest."""
    torch.manual_seed(0)
    rows = torch.randn(40, 32) * torch.logspace(-42, 36, 40)[:, None]
    rows[0], rows[1] = 0.0, torch.arange(32) / 16 + 1.0  # ties: four bits hold half of them
    rows[2] = torch.logspace(-9, 0, 32) * 3
    rows[3] = torch.arange(32) * 2.0**-10  # numbers below the normal ones, once 2^7 is the largest
    rows[3, 0] = 128.0
    return rows.to(dtype)


@cache
def quick(dtype: torch.dtype = torch.bfloat16) -> PackedModel:
    compiled(dtype)
    model = tiny().to(dtype)  # type: ignore[arg-type]
    store_kv_in_fp8(model)
    fuse_layers(model)
    return packed(model, capacity=160)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_row_is_exact_in_the_dtype_and_as_near_as_four_bits_allow(dtype: torch.dtype) -> None:
    rows = rows_of(dtype)
    found = decoded(*encoded(rows), torch.float64)
    assert torch.equal(found.to(dtype).double(), found)
    tops = rows.double().abs().amax(1, keepdim=True)
    least = torch.maximum(tops, torch.tensor(2.0**-95))  # rows below it have the scale of the smallest exponent
    assert ((found - rows.double()).abs() <= rows.double().abs() / 16 + least * 2**-17).all()
    assert torch.equal(decoded(*encoded(found.to(dtype)), torch.float64), found), "what is rounded stays as it is"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_kernels_store_the_same_numbers_as_torch(dtype: torch.dtype) -> None:
    """A row that sees itself only is its value, so the attention shows what is stored."""
    rows, ours = rows_of(dtype).unsqueeze(0), compiled(dtype)
    kv = CpuKv(1, 40, 1, 4, 32, dtype, ours, in_fp8=True)
    step = [chain(slot, 0, [0], keep_last=True) for slot in range(40)]
    shown = CpuAttentionPlan(step, kv, 1, ours).attend(0, rows * 0, rows * 0, rows, AttentionOptions(1.0))
    assert torch.equal(shown[:, 0], decoded(*encoded(rows[0]), dtype))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_not_finite(spoilt: float) -> None:
    """A damaged state must not become a plausible text."""
    row = torch.ones(3, 1, 32)
    row[1, 0, 5] = spoilt
    numbers, exponents = encoded(row)
    assert decoded(numbers, exponents, torch.float32).isnan().all(-1)[:, 0].tolist() == [False, True, False]
    ours = compiled()
    kv, plain = CpuKv(1, 1, 1, 4, 32, torch.float32, ours, in_fp8=True), torch.ones(1, 3, 32)
    step = [chain(0, 0, [0, 0, 0], keep_last=True)]
    for key, value in ((plain, row.transpose(0, 1)), (row.transpose(0, 1), plain)):
        found = CpuAttentionPlan(step, kv, 1, ours).attend(0, plain, key, value, AttentionOptions(1.0))
        assert found.isnan().any(-1)[:, 0].tolist() == [False, True, True], "a row sees itself and those before it"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_in_a_batch_in_a_tree_and_in_any_chunk(dtype: torch.dtype) -> None:
    check_rows(quick(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accepted_path_and_a_copied_prefix_keep_their_scales(dtype: torch.dtype) -> None:
    check_moves(quick(dtype))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    check_threads(quick())


@cache
def plain_texts(sampling: Sampling) -> list[list[int]]:
    """Return what each sequence writes alone."""
    some = sequences(PROMPTS, sampling=sampling)
    for sequence in some:
        decode(engine(quick(), None, options(Mode.PLAIN, prefill_rows=50)), [sequence])
    return outputs(some)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["suffix", "same"])
def test_drafts_preemption_sharing_and_order_change_no_text(
    kind: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, drafted = plain_texts(sampling), sequences(PROMPTS, sampling=sampling)
    monkeypatch.setattr(OutputLengths, "expected", lambda _, group, decoded: np.array(decoded, np.int64) + 1)
    running = engine(quick(), drafter(kind), options(Mode.PAPER, max_sequences=3, kv_tokens=64))
    results = decode(running, drafted[::-1])
    assert outputs(drafted) == plain
    assert any(result.stats.tree_nodes for result in results), "no tree was verified, so nothing was tested"
    assert running.preemptions, "memory did not run out"


def test_a_token_takes_half_of_the_bytes_and_an_exponent_for_each_head() -> None:
    model = tiny().to(torch.bfloat16)  # type: ignore[arg-type]
    wide = kv_bytes_per_token(model)
    assert not has_fp8_kv(model)
    store_kv_in_fp8(model)
    heads = 2 * 2 * 2  # keys and values, layers, KV heads
    assert kv_bytes_per_token(model) == wide // 2 + heads
    stores = {"dense": DenseKv(2, 3, 2, 16, 32, torch.bfloat16, torch.device("cpu"), in_fp8=True)._pair.stores}
    ours = compiled(torch.bfloat16)
    kv = CpuKv(2, 3, 2, 64, 32, torch.bfloat16, ours, in_fp8=True)
    stores["compiled"] = (kv.keys, kv.values)
    entries = {"dense": 3 * 16, "compiled": 3 * 64}
    for name, parts in stores.items():
        assert sum(part.nbytes for part in parts) == entries[name] * kv_bytes_per_token(model), name
