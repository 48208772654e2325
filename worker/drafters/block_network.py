"""The block drafter's network: one forward foresees all depths below a root (cf. DFlash, arXiv 2602.06036).

Rows of committed tokens are those of a head (`head_network`); the root's row predicts depth 1. For each further depth
there is one more row: it reads the root's token and the state before it again, the state moved by an offset that is
learned for the depth, and sits at the depth's position. It sees the committed tokens, and no other row below the root.
So training can run it for any subset of the roots of a text.

Such a row can't know which tokens lie between. The path head adds that: a small gated recurrence over the tokens of a
path, whose output is added to the row's before the output weights. It generalises the Markov head of DSpark (a low-rank
bias by the parent's token): its gates also read the row's output. It runs per node, and takes no forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.engine.errors import ModelRefused
from worker.engine.options import MAX_BLOCK_DEPTH

MAX_RANK = 4096


@dataclass(frozen=True, slots=True)
class BlockShape(HeadShape):
    """Shape of a block drafter's network."""

    depth: int = 6  # of the trees: rows below a root, its own included
    rank: int = 128  # width of the path head; even, since bfloat16 is packed in pairs

    def __post_init__(self) -> None:
        """Raise ModelRefused for sizes that no block drafter has."""
        for name, size, highest in (("depth", self.depth, MAX_BLOCK_DEPTH), ("rank", self.rank, MAX_RANK)):
            if not isinstance(size, int) or not 2 <= size <= highest:
                raise ModelRefused(f"a block drafter's {name} is a number from 2 to {highest}, not {size!r}")


class PathHead(nn.Module):
    """Makes the rows of a block conditional on the tokens of a path."""

    def __init__(self, width: int, rank: int) -> None:
        """Start without an effect: the output weights are zero."""
        super().__init__()
        self.state = nn.Linear(width, 2 * rank, bias=False)
        self.token = nn.Linear(width, 2 * rank, bias=False)
        self.before = nn.Linear(rank, 2 * rank, bias=False)
        self.out = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def advance(self, states: Tensor, tokens: Tensor, before: Tensor) -> Tensor:
        """Return the paths [..., rank] that end in some nodes.

        `states` and `tokens` [..., 2 * rank] are what `state` and `token` make of the row's output and of the node's
        token, `before` [..., rank] are the parents' paths: zeros for a root.
        """
        return gated(states + tokens + self.before(before))


def gated(x: Tensor) -> Tensor:
    """Return the first half of the last dimension, as a SiLU gate, times the second half."""
    gate, value = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * value


class BlockNetwork(HeadNetwork):
    """The trained part of a block drafter."""

    shape: BlockShape

    def __init__(self, shape: BlockShape) -> None:
        """Start as a random head whose further rows hardly differ."""
        super().__init__(shape)
        self.offsets = nn.Parameter(0.1 * torch.randn(shape.depth - 1, shape.width))  # of depths 2, 3, …
        self.path = PathHead(shape.width, shape.rank)

    @staticmethod
    def of_head(name: str) -> bool:
        """Return whether a weight is one that a head has too."""
        return name != "offsets" and not name.startswith("path.")

    @torch.no_grad()
    def start_from(self, head: HeadNetwork) -> None:
        """Take the weights of a head for the same target; further layers start without an effect."""
        self.load_state_dict(head.state_dict(), strict=False)
        further: list[Any] = list(self.model.layers)[head.shape.layers :]
        for layer in further:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
