"""The logits below the nodes of trees, from the tables of a block drafter: in C on a CPU, else in torch."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn

from worker.drafters.block_network import BlockNetwork, gated
from worker.drafters.head import fixed_linear, indices_of
from worker.engine import host
from worker.engine.cpu.compiler import library
from worker.engine.cpu.kernels import Kernels, address, bound, members
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.host.sources import CompiledSource
from worker.engine.sampling.native import RankingFunctions, ranking_functions
from worker.engine.sampling.parameters import ParameterArray
from worker.engine.segments import BoolArray, IntArray
from worker.engine.speculation.draft_tree import Forest

_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_PANEL = 32  # `PANEL` of block.c


class PathTables:
    """The path head, with its products with the target's embeddings and output weights."""

    @torch.inference_mode()
    def __init__(self, network: BlockNetwork, embedding: Tensor, output: Tensor, tokens: Tensor) -> None:
        """Multiply the weights out for the `tokens` [n] that can be proposed; `output` [n, width] are theirs."""
        weights = (getattr(network.path, name).weight.detach() for name in ("state", "token", "before", "out"))
        state, self.token, self.before, out = (weight.to(embedding.device, torch.float32) for weight in weights)
        self.depth, self.rank, self.eps = network.shape.depth, network.shape.rank, network.shape.eps
        self.state: nn.Module = fixed_linear(state.to(embedding.dtype))
        self.out = fixed_linear((output.float() @ out).to(embedding.dtype))  # [n, rank]
        self.embedding, self.ids = embedding, tokens
        self.row = np.full(len(embedding), -1)  # in `tokens`, by id; -1: not among them
        self.row[tokens.cpu().numpy()] = np.arange(len(tokens))
        self.tokens = self._of_ids(tokens)  # [n, 2 * rank]

    def pack(self, kernels: Kernels) -> None:
        """Read rows with compiled kernels from now on."""
        assert isinstance(self.state, nn.Linear)
        self.state = PackedLinear([self.state], kernels, floats=True)

    def gates(self, states: Tensor) -> Tensor:
        """Return what the path head reads of a row's output: [..., 2 * rank] from [..., width]."""
        gates: Tensor = self.state(states).float()
        return gates

    def read(self, ids: IntArray) -> Tensor:
        """Return the inputs of the path head for tokens `ids` [n]: [n, 2 * rank]."""
        rows = self.row[ids]
        known = self.tokens.index_select(0, torch.from_numpy(rows.clip(0)).to(self.tokens.device))
        if (rows < 0).any():  # of another drafter, or forced by a grammar
            at = torch.from_numpy(np.flatnonzero(rows < 0)).to(known.device)
            known[at] = self._of_ids(torch.from_numpy(ids[rows < 0]).to(known.device))
        return known

    def _of_ids(self, ids: Tensor) -> Tensor:
        embedded = self.embedding[ids].float()
        scale = torch.rsqrt(embedded.square().mean(-1, keepdim=True) + self.eps)
        entries: Tensor = (embedded * scale) @ self.token.T
        return entries


class TreeDraws(NamedTuple):
    """What a draw above temperature 0 needs to know of the trees of a step."""

    sampled: BoolArray  # [trees]
    parameters: ParameterArray  # [trees]
    keys: IntArray  # [trees, depth] of the noise


class Paths(Protocol):
    """Looks logits up, layer by layer."""

    looks_ahead: bool  # it has a `source`
    draws: bool  # its source can rank with the noise of draws
    any_depth: bool  # tables may have fewer layers than the network foresees

    def begin(self, base: Tensor, gates: Tensor, block_of: IntArray, depth: int) -> None:
        """Take the tables of a step for `depth` layers: logits `base` [blocks * depth, n] and gates [.., 2 * rank].

        `block_of` [trees] says which block is whose; -1: a tree has none.
        """

    def logits(self, forest: Forest, nodes: IntArray) -> Tensor:
        """Return the logits [nodes, n] below the nodes of a layer, ascending, and keep their paths for the next one."""

    def source(self, draws: TreeDraws | None) -> CompiledSource:
        """Return where C finds the candidates of the step's tables; `draws` None: all trees are at temperature 0."""


class TorchPaths:
    """`Paths` in torch, on any device."""

    looks_ahead, draws, any_depth = False, False, True

    def __init__(self, tables: PathTables) -> None:
        self._tables = tables
        self._base = self._gates = self._paths = torch.empty(0)  # paths [parents, rank]
        self._block_of = self._parents = np.empty(0, np.int64)
        self._depth = tables.depth

    def begin(self, base: Tensor, gates: Tensor, block_of: IntArray, depth: int) -> None:
        """Take the tables of a step."""
        self._base, self._gates, self._block_of, self._depth = base, gates, block_of, depth

    @torch.inference_mode()
    def logits(self, forest: Forest, nodes: IntArray) -> Tensor:
        """Return the logits below nodes: see `PathHead.advance` for their paths."""
        depth, tables, device = forest.depth[nodes], self._tables, self._base.device
        at = torch.from_numpy(self._block_of[forest.tree[nodes]] * self._depth + depth).to(device)
        logits = self._base.index_select(0, at)
        if depth[0]:
            parents = torch.from_numpy(indices_of(forest.parent[nodes], self._parents)).to(device)
            read = self._gates.index_select(0, at) + tables.read(forest.token[nodes])
            self._paths = gated(torch.addmm(read, self._paths.index_select(0, parents), tables.before.T))
            logits += tables.out(self._paths.to(tables.embedding.dtype))
        else:
            self._paths = logits.new_zeros(len(nodes), tables.rank)
        self._parents = nodes
        return logits

    def source(self, draws: TreeDraws | None) -> CompiledSource:
        """Raise NotImplementedError: C can't read a device's tables."""
        raise NotImplementedError


class _BlockLayout(ctypes.Structure):
    """`block_t` of block.c."""

    _fields_ = (
        *members("depth columns rank width halves", _SIZE),
        ("eps", ctypes.c_float),
        *members("row_of_id tokens token embedding before out ids topk process add_noise", _ADDRESS),
        ("children", _SIZE),
        *members("base gates block_of sampled parameters keys noise noise_made scratch", _ADDRESS),
        *members("rows capacity", _SIZE),
        *members("parents paths older", _ADDRESS),
    )


class CompiledPaths:
    """`Paths` in C, and a `CompiledSource`."""

    looks_ahead, draws, any_depth = True, True, True

    def __init__(self, compiled: ctypes.CDLL, ranking: RankingFunctions, tables: PathTables, children: int) -> None:
        """Offer `children` candidates of a node."""
        out = _in_panels(tables.out.weight.detach())
        kept = (tables.tokens, tables.token.T.contiguous(), tables.embedding, tables.before.T.contiguous(), out)
        self._columns = len(tables.ids)
        self._held = (*kept, tables.row, tables.ids.contiguous())
        read, *others = (part.data_ptr() for part in kept)
        self._layout = _BlockLayout(
            tables.depth, self._columns, tables.rank, tables.embedding.shape[1], out.dtype is torch.bfloat16,
            tables.eps, address(tables.row), read, *others, self._held[-1].data_ptr(),
            ranking.topk, ranking.process, ranking.add_noise, children,
        )  # fmt: skip
        self._scratch = np.empty(ranking.scratch_size(self._columns), np.uint8)
        self._layout.scratch = address(self._scratch)
        self._noise = np.empty((0, self._columns), np.float32)
        functions = ctypes.PyDLL(compiled._name)
        self._logits = bound(functions.block_logits, *[_ADDRESS] * 3, _SIZE, _ADDRESS)
        finalize(self, functions.release_block, ctypes.byref(self._layout))
        self.function = ctypes.cast(compiled.offer_block, ctypes.c_void_p).value or 0
        self.context, self.width = ctypes.addressof(self._layout), children
        self._tables: tuple[object, ...] = ()
        self._draws: tuple[object, ...] = ()

    def begin(self, base: Tensor, gates: Tensor, block_of: IntArray, depth: int) -> None:
        """Take the tables of a step."""
        layout, base, gates = self._layout, base.contiguous(), gates.contiguous()
        self._tables = base, gates, block_of
        layout.depth = depth
        layout.base, layout.gates, layout.block_of = base.data_ptr(), gates.data_ptr(), address(block_of)

    def source(self, draws: TreeDraws | None) -> CompiledSource:
        """Return this: C reads the tables themselves."""
        layout = self._layout
        if draws is None:
            layout.sampled = None
            return self
        rows = len(draws.keys) * draws.keys.shape[1]  # of at most as many tables
        if len(self._noise) < rows:
            self._noise = np.empty((2 * rows, self._columns), np.float32)
            layout.noise = address(self._noise)
        made = np.zeros(rows, np.uint8)
        self._draws = draws, made
        layout.sampled, layout.parameters = address(draws.sampled), address(draws.parameters)
        layout.keys, layout.noise_made = address(draws.keys), address(made)
        return self

    def logits(self, forest: Forest, nodes: IntArray) -> Tensor:
        """Return the logits below nodes."""
        order = nodes.argsort(kind="stable")  # with chains that a grammar forces they may not ascend
        ascending, logits = nodes[order], torch.empty(len(nodes), self._columns)
        self._logits(self.context, forest.layout, address(ascending), len(nodes), logits.data_ptr())
        if np.array_equal(ascending, nodes):
            return logits
        restored = torch.empty_like(logits)
        restored[torch.from_numpy(order)] = logits
        return restored


def _in_panels(out: Tensor) -> Tensor:
    """Return weights [n, rank] as block.c reads them: [panels, rank, _PANEL]."""
    padded = nn.functional.pad(out, (0, 0, 0, -len(out) % _PANEL))
    return padded.view(-1, _PANEL, out.shape[1]).transpose(1, 2).contiguous()


def compiled_paths(tables: PathTables, children: int) -> CompiledPaths | None:
    """Return the compiled lookups; None for a device or dtype that has none, and without a C compiler."""
    ranking = ranking_functions(tables.embedding.device)
    compiled = _compiled() if ranking and tables.embedding.dtype in (torch.float32, torch.bfloat16) else None
    return None if compiled is None or ranking is None else CompiledPaths(compiled, ranking, tables, children)


@cache
def _compiled() -> ctypes.CDLL | None:
    return library(Path(host.__file__).with_name("block.c"))
