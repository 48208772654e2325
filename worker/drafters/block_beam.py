"""The candidates of a block drafter's trees, computed on a device all at once: no layer waits for the host.

Of every tree and depth the likeliest nodes (a beam) are expanded by operations of fixed shapes, which a GPU replays as
one recorded graph. One copy brings all candidates to the host, where the trees grow over them in C. A node that is not
in the beam has no candidates: trees depend on that, texts don't.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from worker.drafters.block_network import gated
from worker.drafters.block_paths import Paths, PathTables, TorchPaths, TreeDraws, compiled_paths
from worker.engine.cpu.kernels import address, members
from worker.engine.host.growth import offer_function
from worker.engine.host.sources import CompiledSource
from worker.engine.paged.cuda_graphs import CaptureFailed, GraphCapture, graph_capture

MAX_ROWS = 256  # nodes that are expanded at each depth, all trees together: bounds time and memory
MAX_BEAM = 16  # of one tree

log = logging.getLogger(__name__)


class BeamLayout(ctypes.Structure):
    """`beam_t` of growth.c."""

    _fields_ = (*members("depth beam children", ctypes.c_int64), *members("block_of rows", ctypes.c_void_p))


class BeamPaths(TorchPaths):
    """`Paths` on a device, and a `CompiledSource` for trees at temperature 0."""

    looks_ahead, draws, any_depth = True, False, False  # the recorded work has one shape

    def __init__(
        self,
        tables: PathTables,
        children: int,
        *,
        rows: int = MAX_ROWS,
        beam: int = MAX_BEAM,
        capture: GraphCapture | None = None,
    ) -> None:
        """Offer `children` candidates of a node.

        At each depth expand up to `beam` nodes of a tree, and `rows` of all trees, but one of each. `capture` records
        the work; None: the device's default.
        """
        super().__init__(tables)
        self.function = offer_function("offer_beam")
        assert self.function, "without a C compiler trees don't grow over a beam"
        self.width = children
        self._most_rows, self._most_beam = rows, beam
        self._capture = capture or graph_capture(tables.embedding.device)
        self._layout = BeamLayout(depth=tables.depth, children=children)
        self.context = ctypes.addressof(self._layout)
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # by number of blocks
        self._replays: dict[int, Callable[[], Tensor]] = {}

    def source(self, draws: TreeDraws | None) -> CompiledSource:
        """Expand the beams of the step's tables; wait for them once."""
        assert draws is None
        with torch.inference_mode():
            blocks = 1 << (len(self._base) // self._tables.depth - 1).bit_length()
            if blocks not in self._replays:
                self._replays[blocks] = self._recorded(blocks)
            for held, given in zip(self._inputs[blocks], (self._base, self._gates), strict=True):
                held[: given.shape[0]].copy_(given)
            rows = self._replays[blocks]().cpu().numpy()
        self._layout.beam = rows.shape[2]
        self._layout.block_of, self._layout.rows = address(self._block_of), address(rows)
        self._held = rows
        return self

    def _recorded(self, blocks: int) -> Callable[[], Tensor]:
        """Record the work for up to `blocks` trees; return the work itself, which is slower, if that fails."""
        depth = self._tables.depth
        inputs = self._inputs[blocks] = (
            self._base.new_zeros(blocks * depth, self._base.shape[1]),
            self._gates.new_zeros(blocks * depth, self._gates.shape[1]),
        )
        beam = max(1, min(self._most_beam, self._most_rows // blocks))

        def work() -> Tensor:
            return expand_beams(self._tables, *inputs, beam=beam, children=self.width)

        try:
            return self._capture(work).replay
        except CaptureFailed as failure:
            log.warning("Drafting can't be captured and runs slower: %s", failure, extra={"action": "no_graph"})
            return work


@torch.inference_mode()
def expand_beams(tables: PathTables, base: Tensor, gates: Tensor, *, beam: int, children: int) -> Tensor:
    """Return the candidates of `beam` nodes of each block and depth, float64 [blocks, depth, beam, 2 + 2 * children].

    Columns of a node: its parent's index in the beam above (-1: no such node), its token, then the tokens and the
    probabilities of its candidates. `base` [blocks * depth, n] and `gates` [blocks * depth, 2 * rank] are the
    tables. Shapes depend on the arguments' shapes alone, and nothing waits for the host.
    """
    depth, dtype = tables.depth, tables.embedding.dtype
    base, gates = base.view(-1, depth, base.shape[1]), gates.view(-1, depth, gates.shape[1])
    blocks = len(base)
    value = base.new_zeros(blocks, beam, dtype=torch.float64)
    value[:, 0] = 1.0  # the root; the others are none
    parents, ids = torch.full_like(value, -1.0), torch.zeros_like(value)
    paths, layers = base.new_zeros(blocks, beam, tables.rank), []
    for below in range(depth):
        logits = base[:, below].unsqueeze(1).expand(-1, beam, -1)
        if below:
            logits = logits + tables.out(paths.to(dtype)).float()
        found = logits.softmax(-1).topk(children, dim=-1)
        chances = found.values.double().nan_to_num_(0.0)
        layers.append(torch.cat([parents.unsqueeze(-1), ids.unsqueeze(-1), tables.ids[found.indices], chances], dim=-1))
        if below == depth - 1:
            break
        best = (value.unsqueeze(-1) * chances).flatten(1).topk(beam, dim=-1)
        value, above = best.values, best.indices // children
        chosen = found.indices.flatten(1).gather(1, best.indices)
        before = paths.gather(1, above.unsqueeze(-1).expand(-1, -1, tables.rank))
        paths = gated(gates[:, below + 1].unsqueeze(1) + tables.tokens[chosen] + before @ tables.before.T)
        parents, ids = torch.where(value > 0.0, above, -1).double(), tables.ids[chosen].double()
    return torch.stack(layers, dim=1)


def make_paths(tables: PathTables, children: int) -> Paths:
    """Return what looks logits up on the device of the tables."""
    compiled = compiled_paths(tables, children)
    if compiled is not None:
        return compiled
    on_gpu = tables.embedding.device.type == "cuda" and offer_function("offer_beam")
    return BeamPaths(tables, children) if on_gpu else TorchPaths(tables)
