"""Laws of paged KV over ranks: bits of one rank on any number, one message a step, and the first rank's page tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import local
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import packed, tiny
from tests.shards import ThreadChannel, on_ranks
from tests.unit.worker.engine.cpu.test_kernels import compiled
from tests.unit.worker.engine.harness import decode, engine, greedy_and_sampled, options, outputs
from worker.drafters.model import ModelDrafter
from worker.engine.cpu.packing import pack
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.packed_model import PackedModel
from worker.engine.model.sharding import as_shard
from worker.engine.options import Mode
from worker.engine.output_lengths import OutputLengths
from worker.engine.paged.cuda_graphs import Captured, CaptureFailed
from worker.engine.paged.kv import PagedKv
from worker.engine.parallel.commands import CommandKind, RankCommand
from worker.engine.parallel.leader_model import LeaderModel
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import Segment, chain
from worker.engine.shards.shard import Shard, parts_of

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1}
SYSTEM = [2 + i % 37 for i in range(20)]  # more than a page, and not a whole number of pages
PROMPTS = [[*SYSTEM, 7, 8], [3, 4, 5], [*SYSTEM, 9]]
PAGES: dict[str, Any] = {"slots": 4, "capacity": 96, "paged": True, "kv_tokens": 7 * 16}


@dataclass
class Written:
    """What ranks wrote."""

    texts: list[list[int]]
    logits: Tensor
    preemptions: int
    forwards: int
    copies: int  # of prefixes
    held: list[list[int]]  # blocks of each slot at the end
    pools: Tensor  # keys and values of every block


def whole(dtype: torch.dtype) -> PreTrainedModel:
    compiled(dtype)
    model = tiny("llama", **SHAPE)
    model.to(dtype)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    return model


def pools(kv: Any) -> Tensor:
    return torch.stack([kv.keys, kv.values])


def write(target: PackedModel) -> Written:
    """Decode with drafts, sampled too, with prefixes that are shared and with preemptions."""
    seen: list[Tensor] = []
    copies: list[int] = []
    forward, copy_prefix = target.forward, target.copy_prefix

    def watched(segments: Sequence[Segment]) -> Tensor:
        seen.append(forward(segments))
        return seen[-1]

    def copied(source: int, slot: int, length: int) -> None:
        copies.append(length)
        copy_prefix(source, slot, length)

    target.forward = watched  # type: ignore[method-assign]
    target.copy_prefix = copied  # type: ignore[method-assign, assignment]
    some = greedy_and_sampled(Sampling(temperature=0.9, top_k=20, top_p=0.95), PROMPTS, max_tokens=12)
    chosen = options(Mode.PAPER, kv_tokens=PAGES["kv_tokens"], page_tokens=16, prefill_rows=50, max_context=80)
    draft = packed(tiny("llama", **SHAPE), slots=4, capacity=160)  # the same weights, in float32
    running = engine(target, ModelDrafter(draft, "draft", draft.config.vocab_size), chosen)
    results = decode(running, some)
    assert any(result.stats.accepted_tokens for result in results), "no draft was of any use"
    assert isinstance(target.kv, PagedKv)
    held = [target.kv.blocks_of(slot) for slot in range(target.kv.slots)]
    return Written(outputs(some), torch.cat(seen), running.preemptions, len(seen), len(copies), held, pools(target.kv))


def split(model: PreTrainedModel, ranks: int, prepare: Callable[[PreTrainedModel], object] = pack) -> Written:
    """Return what the ranks of a split model wrote, with the pools of all of them."""
    channel = ThreadChannel(ranks)

    def on_rank(shard: PreTrainedModel, rank: int) -> Any:
        if rank:
            kv: Any = channel.follow(shard, rank)._packed[0].kv
            assert not kv.pool.used, "a follower took pages of its own"
            return pools(kv)
        try:
            return write(LeaderModel(shard, channel, 0, **PAGES))  # type: ignore[arg-type]
        finally:
            channel.send([RankCommand(CommandKind.END)])

    written: Written
    written, *others = on_ranks(model, ranks, on_rank, prepare)
    assert len(channel.sent) == 1 + written.forwards + 1, "a step is one message, beside the first and the last"
    written.pools = torch.cat([written.pools, *others], dim=4)  # of all KV heads
    return written


def alone(model: PreTrainedModel, prepare: Callable[[PreTrainedModel], object] = pack) -> Written:
    """Return what one rank writes."""
    model.set_attn_implementation(ATTENTION_NAME)
    as_shard(model, Shard(parts_of(8, 4)))
    prepare(model)
    return write(PackedModel(model, **PAGES))


def pack_with_fp8_kv(model: PreTrainedModel) -> None:
    store_kv_in_fp8(model)
    pack(model)


@pytest.mark.parametrize(
    ("dtype", "prepare"),
    [(torch.float32, pack), (torch.bfloat16, pack), (torch.bfloat16, pack_with_fp8_kv)],
    ids=["float32", "bfloat16", "fp8"],
)
def test_ranks_over_paged_kv_have_the_bits_of_one_rank_under_drafts_and_preemption(
    dtype: torch.dtype, prepare: Callable[[PreTrainedModel], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Admit sequences as if each answer ended with the next token, so that memory runs out.
    monkeypatch.setattr(OutputLengths, "expected", lambda _, group, decoded: np.array(decoded, np.int64) + 1)
    exact = alone(whole(dtype), prepare)
    assert exact.preemptions, "no sequence lost its memory"
    assert exact.copies, "no prefix was shared"
    blocks = sorted({block for slot in exact.held for block in slot})
    for ranks in (2, 4) if prepare is pack else (2,):
        found = split(whole(dtype), ranks, prepare)
        assert found.texts == exact.texts
        assert torch.equal(found.logits, exact.logits)
        assert (found.held, found.preemptions) == (exact.held, exact.preemptions)
        assert torch.equal(found.pools[:, :, blocks], exact.pools[:, :, blocks]), "followers lack entries"


class Capture:
    """A capture that notes the shapes; from one of them on it fails."""

    def __init__(self, taken: int, most: int) -> None:
        self.names: list[str] = []
        self._bytes, self._most = taken, most

    def __call__(self, work: Any) -> Captured[Any]:
        self.names.append(work.args[0].name)
        if len(self.names) > self._most:
            raise CaptureFailed("out of memory")
        return Captured(work, self._bytes)


@pytest.mark.parametrize(("taken", "most"), [((1, 0), (9, 9)), ((0, 9), (9, 9)), ((0, 0), (9, 2)), ((0, 0), (2, 9))])
def test_every_rank_captures_the_same_forwards_in_the_same_order(
    taken: tuple[int, int], most: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever memory the captures of each rank take, and whether they fail."""
    here = local()
    captures = [Capture(*limits) for limits in zip(taken, most, strict=True)]
    monkeypatch.setattr("worker.engine.paged.shape_buckets.BUCKETS", (1, 2, 4, 6, 8))
    monkeypatch.setattr("worker.engine.paged.shape_buckets.GRAPH_BYTES", 3)
    monkeypatch.setattr("worker.engine.paged.shape_buckets.graph_capture", lambda _: captures[here.rank])
    channel = ThreadChannel(2)
    rows = [chain(slot, 0, [5 + slot], keep_last=True) for slot in range(3)]

    def on_rank(shard: PreTrainedModel, rank: int) -> Tensor | None:
        here.rank = rank
        if rank:
            channel.follow(shard, rank)
            return None
        target = LeaderModel(shard, channel, 0, **PAGES)  # type: ignore[arg-type]
        target.prepare()
        found = torch.cat([target.forward(rows[:count]) for count in (1, 2, 3)])
        channel.send([RankCommand(CommandKind.END)])
        return found

    found = on_ranks(whole(torch.float32), 2, on_rank, pack)[0]
    assert captures[0].names == captures[1].names
    assert len(captures[0].names) > 2
    exact = packed(whole(torch.float32), slots=4, capacity=96)
    assert found is not None
    assert torch.allclose(found, torch.cat([exact.forward(rows[:count]) for count in (1, 2, 3)]), atol=1e-4)
