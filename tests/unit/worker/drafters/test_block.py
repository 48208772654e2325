"""Laws of the block drafter: its layers look up what it was trained to foresee, and no text depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tests.heads import TOKENS, block_network, network, packed_block, tapped, with_block
from tests.models import tiny
from tests.unit.worker.engine.grammar.grammars import OBJECT, WIDTH, bound_by, constrained_engine, vocabulary
from tests.unit.worker.engine.harness import (
    FLAT_COSTS,
    decode,
    engine,
    options,
    outputs,
    plain_texts,
    resumed_after,
    sequences,
)
from worker.drafters.block import BlockDrafter
from worker.drafters.block_beam import BeamPaths, expand_beams, make_paths
from worker.drafters.block_network import BlockNetwork
from worker.drafters.block_paths import CompiledPaths, PathTables, TorchPaths
from worker.drafters.head_unroll import unroll
from worker.drafters.mixed import MixedDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.engine import Engine
from worker.engine.model.loading import embeddings, output_weights
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import Segment, chain
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.training.block_loss import unroll_blocks

IDS = [5, 9, 2, 7, 7, 30, 41, 8, 12, 3]
ROOT = 5  # position of the newest committed token; those behind it are a path below it


def foreseen(net: BlockNetwork, model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the logits [depth, n] of a path below a root, as training sees them."""
    embedded = model.get_input_embeddings()(torch.tensor([IDS])).detach()
    below = embedded[:, ROOT + 1 : ROOT + net.shape.depth].unsqueeze(1)
    rows = output_weights(model)[TOKENS]
    with torch.no_grad():
        out: Tensor = unroll_blocks(net, embedded, hidden, torch.tensor([[ROOT]]), below)[0, 0] @ rows.T
        return out


@pytest.mark.parametrize(("cpu_kernels", "paged"), [(True, None), (False, None), (False, True)])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_tree_has_the_logits_that_training_saw(layers: int, cpu_kernels: bool, paged: bool | None) -> None:
    model = tiny("llama")
    net = block_network(model, layers)
    hidden = torch.randn(1, len(IDS), net.fuse.in_features)
    wanted = foreseen(net, model, hidden)
    block = packed_block(model, net, cpu_kernels=cpu_kernels, paged=paged)
    target = tapped(model, cpu_kernels=cpu_kernels)
    assert target.hidden is not None
    (text,) = sequences([IDS[: ROOT + 1]])
    text.slot = 1
    target.hidden.write([chain(1, 0, IDS, keep_last=True)], hidden[0])
    drafter, forest = BlockDrafter(block, target.hidden, "block"), Forest([text])
    drafter._run(forest, forest.roots)
    node = forest.roots
    for depth in range(block.depth):
        torch.testing.assert_close(drafter._paths.logits(forest, node)[0], wanted[depth], rtol=1e-3, atol=1e-3)
        node = forest.add_layer(node, Candidates(np.array([[IDS[ROOT + 1 + depth]]]), np.ones((1, 1))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_lookups_are_those_of_torch(dtype: torch.dtype) -> None:
    model = tiny("llama")
    net = block_network(model)
    tables = PathTables(net, embeddings(model).to(dtype), output_weights(model)[TOKENS].to(dtype), TOKENS)
    torch.manual_seed(1)
    both = [TorchPaths(tables), make_paths(tables, 8)]
    assert isinstance(both[1], CompiledPaths)
    base, gates = torch.randn(2 * tables.depth, len(TOKENS)), torch.randn(2 * tables.depth, 2 * tables.rank)
    forest = Forest(sequences()[:3])
    for paths in both:
        paths.begin(base, gates, np.array([1, -1, 0]), tables.depth)
    nodes = np.array([0, 2])
    for _ in range(tables.depth):
        looked_up, wanted = (paths.logits(forest, nodes) for paths in both)
        torch.testing.assert_close(looked_up, wanted, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-4)
        nodes = forest.add_layer(nodes, Candidates(np.tile([4, 7, 60], (len(nodes), 1)), np.full((len(nodes), 3), 0.5)))
        nodes = np.roll(nodes, 1)  # any order will do


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3), Sampling(0.7, top_k=20, top_p=0.9, min_p=0.01)])
def test_compiled_growth_gets_what_a_layer_offers(sampling: Sampling) -> None:
    both = [with_block(tiny("llama")) for _ in range(2)]
    drafter, sources = both[0][1], []
    find = drafter.source
    drafter.source = lambda *given: sources.append(find(*given)) or sources[-1]  # type: ignore[method-assign, func-returns-value]
    both[1][1].source = lambda *_: None  # type: ignore[method-assign]
    texts = [sequences(sampling=sampling, max_tokens=12) for _ in both]
    for some in texts:
        some[0].sampling = Sampling()  # beside those that draw
    steps = [decode(engine(*one, options(Mode.PAPER)), some) for one, some in zip(both, texts, strict=True)]
    compiled, layered = ([(r.stats.tree_nodes, r.stats.accepted_tokens) for r in one] for one in steps)
    assert compiled == layered
    assert sources
    assert all(sources)
    assert find(Forest(sequences(sampling=Sampling(repetition_penalty=1.3))), np.arange(1)) is None


@pytest.mark.parametrize(("rows", "beam"), [(4096, 64), (3, 1)])
def test_trees_over_a_beam_are_those_of_layers_if_it_holds_what_they_expand(rows: int, beam: int) -> None:
    both = [with_block(tiny("llama")) for _ in range(2)]
    drafter = both[0][1]
    drafter._paths = BeamPaths(drafter._head.paths, drafter._paths.width, rows=rows, beam=beam)  # type: ignore[attr-defined]
    both[1][1]._paths = TorchPaths(both[1][1]._head.paths)
    texts = [sequences() for _ in both]
    steps = [decode(engine(*one, options(Mode.PAPER)), some) for one, some in zip(both, texts, strict=True)]
    over_beams, layered = ([(r.stats.tree_nodes, r.stats.accepted_tokens) for r in one] for one in steps)
    assert outputs(texts[0]) == outputs(texts[1])
    assert (over_beams == layered) == (beam > 1)
    assert max(nodes for nodes, _ in over_beams) > 1


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations; refuses those that wait for a device, or whose shapes depend on values."""

    waits = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "_to_cpu")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        assert name not in self.waits, f"{name} waits for the device"
        tensors = [a for a in args if isinstance(a, Tensor)]
        indices = args[1] if name == "index" else []
        assert not any(i is not None and i.dtype is torch.bool for i in indices), "shapes depend on values"
        self.seen.append(f"{name} {[tuple(t.shape) for t in tensors]}")
        return func(*args, **(kwargs or {}))


def test_a_beam_grows_without_a_wait_by_the_same_operations_whatever_the_tables() -> None:
    tables = packed_block(tiny("llama"), block_network(tiny("llama"))).paths
    seen = []
    for seed in range(2):
        torch.manual_seed(seed)
        base, gates = torch.randn(2 * tables.depth, len(TOKENS)), torch.randn(2 * tables.depth, 2 * tables.rank)
        if seed:
            base[0] = torch.nan  # a broken draft
        with _Recording() as recording:
            found = expand_beams(tables, base, gates, beam=5, children=3)
        seen.append(recording.seen)
        assert found.shape == (2, tables.depth, 5, 8)
        assert not found.isnan().any()
    assert seen[0] == seen[1]
    assert len(seen[0]) > 20


def test_a_step_takes_one_forward_whatever_its_depth() -> None:
    target, drafter = with_block(tiny("llama"))
    forwards: list[int] = []
    run = drafter._head.forward

    def counted(segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        forwards.append(len(segments))
        return run(segments, states)

    drafter._head.forward = counted  # type: ignore[method-assign]
    results = decode(engine(target, drafter, options(Mode.PAPER)), sequences([[2, 3, 4, 5, 6]], max_tokens=20))
    assert max(result.stats.tree_depth for result in results) > 1
    assert len(forwards) == sum(result.stats.tree_nodes > 0 for result in results)


def test_as_many_depths_are_foreseen_as_most_trees_have_lately_and_one_more() -> None:
    _, drafter = with_block(tiny("llama"))

    def foreseen_after(deepest: int, steps: int) -> int:
        """Return the depths of the next step, after steps whose trees had this depth."""
        for _ in range(steps):
            forest, nodes = Forest(sequences([[2, 3, 4]])), np.arange(1)
            for _ in range(deepest):
                nodes = forest.add_layer(nodes, Candidates(np.array([[5]]), np.ones((1, 1))))
            drafter.commit(forest, 0, nodes, [5])
        drafter._run(forest, forest.roots)
        drafter.drop(forest.sequences[0])
        return drafter._depth

    assert [foreseen_after(1, 16), foreseen_after(2, 7), foreseen_after(2, 1), foreseen_after(1, 9)] == [2, 2, 3, 2]
    assert foreseen_after(4, 16) == drafter._head.depth


@pytest.mark.parametrize("mode", [Mode.PAPER, Mode.OPT_TREE])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8), Sampling(repetition_penalty=1.3)])
def test_text_with_a_block_drafter_is_the_text_without(sampling: Sampling, mode: Mode) -> None:
    target, drafter = with_block(tiny("llama"))
    drafted = sequences(sampling=sampling)
    decode(engine(target, MixedDrafter(drafter, SuffixDrafter()), options(mode)), drafted)
    assert outputs(drafted) == plain_texts(sampling=sampling)


def test_a_block_drafter_proposes_the_same_in_a_batch_as_alone() -> None:
    def accepted(together: bool) -> list[int]:
        target, drafter = with_block(tiny("llama"))
        running, some = engine(target, drafter, options(Mode.PAPER)), sequences()
        results = decode(running, some) if together else [r for s in some for r in decode(running, [s])]
        return [sum(r.stats.accepted_tokens for r in results if r.number == s.number) for s in some]

    assert accepted(together=True) == accepted(together=False)


def test_texts_under_grammars_and_after_a_restart_are_those_of_plain_decoding() -> None:
    bound = (OBJECT, None, OBJECT)
    plain = bound_by(bound)
    decode(constrained_engine(Mode.PLAIN), plain)
    target, drafter = with_block(tiny("llama", vocab=WIDTH), torch.arange(WIDTH))
    running = Engine(target, drafter, options(Mode.PAPER), FLAT_COSTS, vocabulary=vocabulary())
    for some in (bound_by(bound), resumed_after(5, outputs(plain), bound_by(bound))):
        decode(running, some)
        assert outputs(some) == outputs(plain)


def test_a_path_may_hold_tokens_that_the_drafter_does_not_propose() -> None:
    model = tiny("llama")
    net = block_network(model)
    tables = packed_block(model, net).paths
    ids = np.array([int(TOKENS[3]), int(TOKENS[3]) + 1])
    units = net.unit(model.get_input_embeddings()(torch.from_numpy(ids)))
    torch.testing.assert_close(tables.read(ids), units.detach() @ tables.token.T)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_block_drafter_that_starts_from_a_head_foresees_the_first_depth_as_the_head_does(layers: int) -> None:
    model = tiny("llama")
    head, net = network(model), block_network(model, layers)
    net.start_from(head)
    embedded = model.get_input_embeddings()(torch.tensor([IDS])).detach()
    hidden, roots = torch.randn(1, len(IDS), net.fuse.in_features), torch.tensor([[ROOT, ROOT + 1]])
    with torch.no_grad():
        first = unroll_blocks(net, embedded, hidden, roots, torch.zeros(1, 2, 3, embedded.shape[2]))[0, :, 0]
        torch.testing.assert_close(first, next(unroll(head, embedded, hidden, 1))[0, ROOT : ROOT + 2])
