"""Laws of training: the loss falls, a resumed run gives the same weights, replay accepts what decoding accepts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.heads import TOKENS, network, packed_head, tapped
from tests.models import tiny
from tests.unit.worker.engine.harness import PROMPTS, decode, engine, options, sequences
from worker.drafters.head import HeadDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.loading import embeddings, output_weights
from worker.engine.options import Mode
from worker.training import self_generated as self_generated
from worker.training import trainer
from worker.training.config import Recipe
from worker.training.features import FeatureDataset, extract_features
from worker.training.losses import HeadLoss, TrainingBatch, TrainingVocabulary, most_frequent
from worker.training.replay import ReplayTarget, replay
from worker.training.self_generated import Text
from worker.training.trainer import Report, train

RECIPE = Recipe(epochs=3, rows=2, held_out=2, unroll=2, learning_rate=1e-2)
TAPS = 2  # of the tiny target's two layers


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    """Return texts of a tiny target."""
    target = tapped(tiny("llama"))
    some = sequences([[2 + i, *prompt] for i in range(2) for prompt in PROMPTS], max_tokens=20)
    decode(engine(target, None, options(Mode.PLAIN)), some)
    return [Text(tuple(s.ids), s.num_prompt, greedy=True) for s in some]


@pytest.fixture(scope="module")
def dataset(texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> FeatureDataset:
    return extract_features(tapped(tiny("llama")), texts, tmp_path_factory.mktemp("features"))


def head_loss() -> HeadLoss:
    model = tiny("llama")
    net = network(model)
    vocabulary = TrainingVocabulary(embeddings(model), output_weights(model)[TOKENS], TOKENS)
    return HeadLoss(net, vocabulary, RECIPE.unroll, 0.8)


def trained(
    dataset: FeatureDataset, folder: Path, reports: list[Report], measured: Sequence[float] = (1, 2, 3, 4)
) -> HeadLoss:
    loss, values = head_loss(), iter(measured)
    folder.mkdir(exist_ok=True)
    train(loss, loss.network, dataset, RECIPE, folder, lambda: float(next(values)), reports.append)
    return loss


@cache
def undisturbed(dataset: FeatureDataset) -> tuple[HeadLoss, list[Report]]:
    """Train as the recipe says, once for all laws that compare with it."""
    reports: list[Report] = []
    with TemporaryDirectory() as folder:
        return trained(dataset, Path(folder), reports), reports


def test_an_example_has_the_text_and_the_targets_features(texts: list[Text], dataset: FeatureDataset) -> None:
    assert len(dataset) == len(texts)
    for number, text in enumerate(texts):
        example = dataset[number]
        assert tuple(example.ids.tolist()) == text.ids
        # a greedy text has the most probable tokens
        assert example.next_ids[text.num_prompt - 1 : -1, 0].tolist() == list(text.ids[text.num_prompt :])
        assert (example.next_probabilities.sum(-1) <= 1.001).all()


def test_existing_features_are_reused(texts: list[Text], tmp_path: Path) -> None:
    extract_features(tapped(tiny("llama")), texts, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    extract_features(tapped(tiny("llama")), texts, tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_the_loss_falls(dataset: FeatureDataset) -> None:
    _, reports = undisturbed(dataset)
    assert reports[-1].update == reports[-1].updates
    assert reports[-1].loss < 0.95 * reports[0].loss  # a running mean, first updates included
    assert reports[-1].accuracy[0] > reports[0].accuracy[0]


def test_an_interrupted_training_ends_with_the_same_weights(
    dataset: FeatureDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = undisturbed(dataset)
    monkeypatch.setattr(trainer, "_CHECKPOINT_S", 0.0)
    monkeypatch.setattr(trainer, "_CLOCK_UPDATES", 5)  # the first of the second epoch

    class Interrupted(Exception):
        pass

    def interrupt(report: Report) -> None:
        if report.update == 6:
            raise Interrupted

    loss = head_loss()
    (tmp_path / "parts").mkdir()
    with pytest.raises(Interrupted):
        train(loss, loss.network, dataset, RECIPE, tmp_path / "parts", lambda: 1.0, interrupt)
    reports: list[Report] = []
    rest = trained(dataset, tmp_path / "parts", reports, measured=(2, 3, 4))
    assert reports[0].update == 6  # the sixth update was not in the checkpoint
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, rest.network.state_dict()[name]), name


def test_an_evaluation_that_was_interrupted_is_made_up_for(
    dataset: FeatureDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_CHECKPOINT_S", 0.0)
    monkeypatch.setattr(trainer, "_CLOCK_UPDATES", 1)
    recipe, loss = replace(RECIPE, epochs=1), head_loss()

    def interrupted() -> float:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(loss, loss.network, dataset, recipe, tmp_path, interrupted, lambda _: None)
    assert train(loss, loss.network, dataset, recipe, tmp_path, lambda: 1.5, lambda _: None) == (1.5,)


def test_training_stops_when_held_out_acceptance_no_longer_grows(dataset: FeatureDataset, tmp_path: Path) -> None:
    reports: list[Report] = []
    trained(dataset, tmp_path, reports, measured=(1.0, 1.001))
    assert reports[-1].epoch == 2


def test_the_best_weights_are_saved(dataset: FeatureDataset, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    loss = trained(dataset, tmp_path, [], measured=(1.0, 2.0, 0.5))
    best = load_file(tmp_path / "best.safetensors")
    last = loss.network.state_dict()
    assert any(not torch.equal(best[name].float(), last[name].bfloat16().float()) for name in best)


def test_the_loss_covers_only_the_answer(dataset: FeatureDataset) -> None:
    batch = TrainingBatch.collate([dataset[0], dataset[2]])
    for step in (0, 1):
        mask = batch.loss_mask(step)
        for row, number in enumerate((0, 2)):
            example = dataset[number]
            expected = list(range(example.num_prompt - 1, len(example.ids) - 1 - step))
            assert mask[row].nonzero().ravel().tolist() == expected


def test_the_vocabulary_is_the_most_frequent_tokens_then_the_lowest() -> None:
    assert most_frequent([[5, 5, 9], [9, 5, 30]], 2, 61).tolist() == [5, 9]
    assert most_frequent([[5]], 3, 61).tolist() == [0, 1, 5]


def test_replay_accepts_what_decoding_accepts(texts: list[Text], dataset: FeatureDataset) -> None:
    model = tiny("llama")
    head = packed_head(model, network(model), slots=1)
    target = tapped(model, slots=1)
    assert target.hidden is not None
    texts = texts[:4]
    some = sequences([list(text.ids[: text.num_prompt]) for text in texts], max_tokens=20)
    chosen = options(Mode.PAPER, max_sequences=1, nodes=6, threshold=0.0, max_depth=8)
    results = decode(engine(target, HeadDrafter(head, target.hidden, "head"), chosen), some)
    decoded = [r.stats.accepted_tokens for r in results if r.stats.step]
    examples = [dataset[number] for number in range(len(texts))]
    replayed = replay(
        examples,
        ReplayTarget(examples, 61, torch.device("cpu")),
        lambda hidden: HeadDrafter(head, hidden, "head"),
        nodes=6,
    )
    assert replayed.accepted.tolist() == decoded


def test_more_nodes_never_accept_fewer_tokens(dataset: FeatureDataset) -> None:
    examples = [dataset[number] for number in range(4)]

    def make(_: HiddenStates) -> SuffixDrafter:
        return SuffixDrafter()

    replay_target = ReplayTarget(examples, 61, torch.device("cpu"))
    reached = [replay(examples, replay_target, make, nodes).tokens_per_step for nodes in (1, 4, 16)]
    assert reached == sorted(reached)


def test_a_truncated_last_line_is_dropped(texts: list[Text], tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts[:3]) + '{"ids": [1, 2')
    assert self_generated.read(file) == texts[:3]
    shutil.rmtree(tmp_path)
