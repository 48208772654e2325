"""Every attention path computes softcap, sinks, windows, latents and heads of any size as the formula says.

With FP8 KV too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families import TEXT
from worker.engine.attention_options import AttentionOptions
from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.cpu.kernels import kernels
from worker.engine.cpu.kv import CpuKv
from worker.engine.kv.dense import DenseKv
from worker.engine.kv.fp8 import decoded, encoded
from worker.engine.model.attention import AttentionPlan, DenseAttentionPlan
from worker.engine.paged.attention import paged_plan
from worker.engine.paged.kv import PagedKv
from worker.engine.segments import Segment, chain

HEADS, LENGTH = 4, 20
CPU = torch.device("cpu")
Plan = Callable[[Sequence[Segment]], AttentionPlan]
Rows = tuple[Tensor, Tensor, Tensor]  # queries, keys and values [heads, n, dim]
OPTIONS = {
    "softcap": AttentionOptions(0.7, softcap=1.5),
    "sinks": AttentionOptions(0.4, sinks=torch.tensor([0.5, -1.0, 3.0, 20.0])),
    "both, in a window": AttentionOptions(0.4, 6, 2.0, torch.tensor([0.5, -1.0, 3.0, 0.0])),
}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of stored keys; the first `latent_dim` numbers of each are its value, unless that is 0."""

    kv_heads: int
    dim: int
    latent_dim: int


APART, LATENTS = KvLayout(2, 8, 0), KvLayout(1, 48, 30)


def dense(in_fp8: bool, of: KvLayout = APART) -> Plan:
    kv = DenseKv(1, 2, of.kv_heads, 40, of.dim, torch.float32, CPU, in_fp8=in_fp8, latent_dim=of.latent_dim)
    return lambda segments: DenseAttentionPlan(segments, kv, HEADS // of.kv_heads)


def paged(in_fp8: bool, of: KvLayout = APART) -> Plan:
    shape = (1, 2, of.kv_heads, 40, of.dim, torch.float32, CPU)
    group = HEADS // of.kv_heads
    kv = PagedKv(*shape, block_size=16, group=group, in_fp8=in_fp8, latent_dim=of.latent_dim)
    return lambda segments: paged_plan(segments, kv)


def compiled(in_fp8: bool, of: KvLayout = APART) -> Plan:
    ours = kernels(torch.float32)
    if ours is None:
        pytest.skip("no C compiler here")
    stored = -(-of.dim // ours.panel) * ours.panel  # heads are padded to panels
    kv = CpuKv(1, 2, of.kv_heads, 40, stored, torch.float32, ours, in_fp8=in_fp8, latent_dim=of.latent_dim)
    return lambda segments: CpuAttentionPlan(segments, kv, HEADS, ours)


def tree() -> Segment:
    """Return a root with two children, and a child of the second."""
    seen = np.tril(np.ones((4, 4), np.bool_))
    seen[2, 1] = seen[3, 1] = False
    return Segment(0, LENGTH, LENGTH, np.arange(4), LENGTH + seen.sum(1) - 1, seen, np.arange(4))


def by_formula(seen: Rows, options: AttentionOptions) -> Tensor:
    """Return the attention [heads, dim] of one row over the rows [heads, n, dim] that it sees, itself last."""
    query, keys, values = seen[0][:, -1], *seen[1:]
    group, first = HEADS // len(keys), 0 if options.window is None else max(0, keys.shape[1] - options.window)
    keys, values = (x[:, first:].repeat_interleave(group, 0) for x in (keys, values))
    scores = torch.einsum("hd,hnd->hn", query, keys) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    weights = scores.exp()
    total = weights.sum(1) + (0.0 if options.sinks is None else options.sinks.exp())
    return torch.einsum("hn,hnd->hd", weights / total.unsqueeze(1), values)


def joined(prompt: Rows, below: Rows, own: Tensor) -> Rows:
    """Return the rows of a prompt, and those below it that a row of a tree sees."""
    query, keys, values = (torch.cat([x[:, :LENGTH], y[:, own]], 1) for x, y in zip(prompt, below, strict=True))
    return query, keys, values


def stored(rows: Rows, in_fp8: bool) -> Rows:
    """Return queries, and keys and values as they are read."""
    query, *both = rows
    key, value = (decoded(*encoded(x), torch.float32) if in_fp8 else x for x in both)
    return query, key, value


def check(plan: Plan, options: AttentionOptions, in_fp8: bool, of: KvLayout = APART) -> None:
    """Attend a prompt beside another sequence, then a tree, and compare each row with the formula.

    With FP8 the formula has the rounded keys and values, those of the same forward too.
    """
    random, mixed = torch.Generator().manual_seed(0), of.latent_dim or of.dim

    def rows(count: int) -> Rows:
        query, key, value = (torch.randn(n, count, of.dim, generator=random) for n in (HEADS, of.kv_heads, of.kv_heads))
        return query, key, key if of.latent_dim else value

    prompt, below = rows(LENGTH + 3), rows(4)
    beside = [chain(0, 0, TEXT[:LENGTH], keep_last=True), chain(1, 0, TEXT[:3], keep_last=True)]
    ours = plan(beside).attend(0, *prompt, options)[:LENGTH]
    prompt = stored(prompt, in_fp8)
    query, keys, values = prompt
    exact = [by_formula((query[:, :n], keys[:, :n], values[:, :n]), options) for n in range(1, LENGTH + 1)]
    torch.testing.assert_close(ours[..., :mixed], torch.stack(exact)[..., :mixed], rtol=1e-4, atol=1e-5)
    shown = tree()
    ours = plan([shown]).attend(0, *below, options)
    below = stored(below, in_fp8)
    assert shown.visible is not None
    exact = [by_formula(joined(prompt, below, own), options) for own in torch.from_numpy(shown.visible)]
    torch.testing.assert_close(ours[..., :mixed], torch.stack(exact)[..., :mixed], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("of", [APART, LATENTS], ids=["", "latents"])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("path", [dense, paged, compiled])
def test_a_path_attends_as_the_formula_says(
    path: Callable[[bool, KvLayout], Plan], options: AttentionOptions, in_fp8: bool, of: KvLayout
) -> None:
    check(path(in_fp8, of), options, in_fp8, of)
