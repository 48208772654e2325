"""The output layer of a split model: each rank has a share of its columns."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import pad

from worker.engine.shards.shard import Shard


def deal_output(whole: nn.Linear, shard: Shard) -> nn.Linear:
    """Return this rank's columns of an output layer; zeros fill the last share, so that all are equal."""
    if shard.ranks == 1:
        return whole
    columns = -(-whole.out_features // shard.ranks)
    own = slice(shard.rank * columns, (shard.rank + 1) * columns)
    part = nn.Linear(whole.in_features, columns, bias=whole.bias is not None, device="meta")
    weight = whole.weight.detach()[own]
    part.weight = nn.Parameter(pad(weight, (0, 0, 0, columns - len(weight))), requires_grad=False)
    if whole.bias is not None:
        part.bias = nn.Parameter(pad(whole.bias.detach()[own], (0, columns - len(weight))), requires_grad=False)
    return part
