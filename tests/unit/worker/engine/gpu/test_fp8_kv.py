"""FP8 KV in Triton's interpreter: the kernels store the bytes that torch stores, and read what they stand for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "triton", reason="Triton, whose interpreter runs the GPU's kernels here, has no wheel for this system"
)

from tests.unit.worker.engine.gpu.test_kernels import STEPS, network, packed, with_kernels  # noqa: F401
from tests.unit.worker.engine.kv.test_fp8 import DTYPES, rows_of
from tests.unit.worker.engine.model.test_attention import OPTIONS, check
from tests.unit.worker.engine.model.test_attention import paged as paged_kv
from tests.unit.worker.engine.paged.test_attention import pages
from worker.engine.gpu import kernels
from worker.engine.gpu.fused_layers import fuse_on_gpu
from worker.engine.kv.fp8 import encoded, store_kv_in_fp8
from worker.engine.paged.kv import PagedKv


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy names what is not finite
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_store_the_same_bytes_as_torch(dtype: torch.dtype) -> None:
    rows = rows_of(dtype)
    rows[4, 3], rows[5, 30] = torch.nan, -torch.inf  # either half of a row
    kv = PagedKv(1, 1, 1, 40, 32, dtype, torch.device("cpu"), block_size=8, in_fp8=True)
    qkv, still = torch.cat([rows] * 3, 1).float(), (torch.ones_like(rows), torch.zeros_like(rows))
    entries = torch.arange(8, 48).flip(0)
    query = kernels.rotate_and_store(qkv.unsqueeze(0), still, None, 1e-6, kv, 0, entries)
    finite = rows.isfinite().all(1)
    assert torch.equal(query[finite, 0], rows[finite]), "angles of zero turn nothing"
    numbers, exponents = encoded(rows)
    keys, values, of_keys, of_values = (store.flatten(0, 1)[entries, 0] for store in kv.layer(0) if store is not None)
    assert torch.equal(torch.stack([of_keys, of_values]), exponents.repeat(2, 1))
    # Zero has a sign, which turning may change; it is not read.
    unsigned = [torch.where(part == 0x80, 0, part) for part in (keys, values, numbers)]
    assert torch.equal(unsigned[0], unsigned[2])
    assert torch.equal(unsigned[1], unsigned[2])


def test_attention_is_as_the_formula_says() -> None:
    check(paged_kv(in_fp8=True), OPTIONS["both, in a window"], in_fp8=True)


def test_logits_equal_those_of_dense_attention() -> None:
    plain, ours = network("qwen3"), network("qwen3")
    for model in (plain, ours):
        store_kv_in_fp8(model)
    assert fuse_on_gpu(ours, kernels)
    dense, fused = packed(plain, False), packed(ours, True)
    for name in ("prompts", "a tree", "below a tree"):
        pages(fused).poison_free()
        assert torch.allclose(fused.forward(STEPS[name]), dense.forward(STEPS[name]), atol=1e-4), name
