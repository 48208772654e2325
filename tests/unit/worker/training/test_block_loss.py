"""Laws of the block drafter's loss: it samples roots of answers, weighs depths by what they add, and falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.heads import TOKENS, block_network, network
from tests.models import byte_tokenizer, tiny
from worker.drafters.block_network import BlockNetwork
from worker.drafters.head_file import read_head, target_identity, write_head
from worker.engine.model.loading import embeddings, output_weights
from worker.training import trainer
from worker.training.block_loss import BlockLoss
from worker.training.config import Kind, Recipe
from worker.training.features import Example
from worker.training.losses import TrainingBatch, TrainingVocabulary
from worker.training.target import Target
from worker.training.trainable_drafts import trainable_draft

ROOTS = 5


@pytest.fixture(scope="module")
def loss() -> BlockLoss:
    model = tiny("llama")
    vocabulary = TrainingVocabulary(embeddings(model), output_weights(model)[TOKENS], TOKENS)
    return BlockLoss(block_network(model), vocabulary, ROOTS)


@pytest.fixture(scope="module")
def batch() -> TrainingBatch:
    """Two texts: one of a long answer, and one whose answer is shorter than a block."""
    torch.manual_seed(0)

    def example(length: int, num_prompt: int) -> Example:
        ids = torch.randint(0, 30, (length,)) * 2
        sure = torch.tensor([0.9, 0.1]).expand(length, -1)
        return Example(ids, num_prompt, torch.randn(length, 96), torch.stack([ids.roll(-1), ids], 1), sure)

    return TrainingBatch.collate([example(30, 8), example(12, 10)])


def test_roots_are_tokens_before_which_an_answer_goes_on(loss: BlockLoss, batch: TrainingBatch) -> None:
    for _ in range(20):
        roots = loss._sampled(batch)
        assert roots.shape == (2, ROOTS)
        assert (roots >= batch.first[:, None]).all()
        assert (roots + 1 < batch.length[:, None]).all()


def test_a_row_weighs_what_it_adds_to_the_expected_length() -> None:
    valid = torch.tensor([[[True, True, True], [True, True, False]]])
    logs = torch.tensor([0.9, 0.5, 0.7, 0.4, 0.6]).log().requires_grad_()
    accepted = torch.zeros(valid.shape).masked_scatter(valid, logs.exp())
    accepted.cumprod(-1).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(BlockLoss._weights(valid, logs.detach().exp()), logs.grad)


def test_the_loss_falls_and_every_depth_is_learned(loss: BlockLoss, batch: TrainingBatch) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in loss.network.parameters() if p.requires_grad], 2e-2)
    seen = []
    for _ in range(40):
        seen.append(loss(batch))
        seen[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert all(after > before for before, after in zip(seen[0].accuracy, seen[-1].accuracy, strict=True))


def test_a_block_that_starts_from_a_head_proposes_its_tokens_and_moves_its_weights_less(tmp_path: Path) -> None:
    model = tiny("llama")
    identity = target_identity(model, "tiny", {"a": 0})
    write_head(tmp_path / "head", network(model), TOKENS, identity)
    target = Target("", model, byte_tokenizer(), identity, embeddings(model), output_weights(model))
    recipe = Recipe(Kind.BLOCK, depth=4, rank=8, start=str(tmp_path / "head"), learning_rate=1.0, start_rate=0.25)
    block = trainable_draft(target, recipe, [])
    new, started = trainer._groups(block.network, recipe)
    assert (new["lr"], started["lr"]) == (1.0, 0.25)
    assert len(started["params"]) == sum(weight.requires_grad for weight in network(model).parameters())
    block.save(tmp_path / "block")
    written = read_head(str(tmp_path / "block"), identity)
    assert isinstance(written.network, BlockNetwork)
    assert written.tokens.tolist() == TOKENS.tolist()
