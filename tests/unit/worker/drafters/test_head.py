"""Laws of the head: it reads the states that it was trained on, and its proposals never change the target's text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.heads import TOKENS, network, packed_head, paged_answers, tapped, with_head
from tests.models import ARCHITECTURES, VOCAB, tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, plain_texts, sequences
from worker.drafters.head import HeadDrafter
from worker.drafters.head_unroll import unroll
from worker.drafters.mixed import MixedDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import Segment, chain

IDS = [5, 9, 2, 7, 7, 30, 41, 8, 12, 3]


@pytest.mark.parametrize("cpu_kernels", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tapped_states_are_those_that_transformers_shows(architecture: str, cpu_kernels: bool) -> None:
    model = tiny(architecture)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        shown = model.model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    target = tapped(model, cpu_kernels=cpu_kernels)
    target.forward([chain(1, 0, IDS, keep_last=True)])
    assert target.hidden is not None
    ours = target.hidden.read(1, 0, len(IDS)).view(len(IDS), -1, model.config.hidden_size)
    # transformers shows the last layer's output behind the final norm, so only the earlier ones can be compared
    torch.testing.assert_close(ours[:, 0], shown[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("cpu_kernels", "paged"), [(True, None), (False, None), (False, True)])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_head_sees_in_a_tree_what_it_was_trained_to_see(layers: int, cpu_kernels: bool, paged: bool | None) -> None:
    model = tiny("llama")
    net = network(model, layers)
    learned = network(model, layers)
    head = packed_head(model, net, cpu_kernels=cpu_kernels, paged=paged)
    embedded = model.get_input_embeddings()(torch.tensor([IDS])).detach()
    hidden = torch.randn(1, len(IDS), net.fuse.in_features)
    with torch.no_grad():
        steps = [out[0] for out in unroll(learned, embedded, hidden, 3)]
    before = torch.cat([torch.zeros(1, net.shape.width), head.states(hidden[0, :-1])])
    # the text up to token 5 is committed; tokens 6 and 7 are nodes below it
    _, states = head.forward([chain(0, 0, IDS[:6], keep_last=True)], before[:6])
    torch.testing.assert_close(states[0], steps[0][5], rtol=1e-3, atol=1e-3)
    for depth in (1, 2):
        nodes = np.array([IDS[5 + depth]])
        seen = np.ones((1, depth), np.bool_)
        segment = Segment(0, 6, 5 + depth, nodes, np.array([5 + depth]), seen, np.array([0]))
        _, states = head.forward([segment], states)
        torch.testing.assert_close(states[0], steps[depth][5], rtol=1e-3, atol=1e-3)


def test_no_bit_of_a_head_depends_on_memory_that_was_never_written() -> None:
    for spoilt, clean in zip(paged_answers(spoilt=True), paged_answers(spoilt=False), strict=True):
        assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("mode", [Mode.PAPER, Mode.OPT_TREE])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8), Sampling(repetition_penalty=1.3)])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_text_with_a_head_is_the_text_without(architecture: str, sampling: Sampling, mode: Mode) -> None:
    target, drafter = with_head(tiny(architecture))
    drafted = sequences(sampling=sampling)
    decode(engine(target, MixedDrafter(drafter, SuffixDrafter()), options(mode)), drafted)
    assert outputs(drafted) == plain_texts(architecture, sampling=sampling)


def test_a_head_proposes_the_same_in_a_batch_as_alone() -> None:
    def accepted(together: bool) -> list[int]:
        target, drafter = with_head(tiny("llama"))
        running = engine(target, drafter, options(Mode.PAPER))
        some = sequences()
        results = decode(running, some) if together else [r for s in some for r in decode(running, [s])]
        return [sum(r.stats.accepted_tokens for r in results if r.number == s.number) for s in some]

    assert accepted(together=True) == accepted(together=False)


def test_a_head_proposes_only_its_own_tokens() -> None:
    target, drafter = with_head(tiny("llama"))
    offered: set[int] = set()

    class Listening(HeadDrafter):
        def expand(self, forest, frontier):  # type: ignore[no-untyped-def]
            candidates = drafter.expand(forest, frontier)
            offered.update(candidates.tokens.ravel().tolist())
            return candidates

        num_uncached_tokens, commit, drop = drafter.num_uncached_tokens, drafter.commit, drafter.drop

    assert target.hidden is not None
    decode(engine(target, Listening(drafter._head, target.hidden, "head"), options(Mode.PAPER)), sequences())
    assert offered
    assert offered <= set(TOKENS.tolist())
    assert max(offered) < VOCAB
