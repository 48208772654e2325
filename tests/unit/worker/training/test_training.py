"""Laws of training: the loss falls, an interruption changes nothing, and replay counts what decoding would accept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.heads import TOKENS, network, packed_head, tapped
from tests.models import tiny
from tests.unit.worker.engine.harness import PROMPTS, decode, engine, options, sequences
from worker.drafters.head import HeadDrafter
from worker.drafters.suffix import SuffixDrafter
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.loading import embeddings, output_weights
from worker.engine.options import Mode
from worker.training import self_generated as self_generated
from worker.training import trainer
from worker.training.config import Recipe
from worker.training.features import FeatureDataset, extract_features
from worker.training.losses import Batch, HeadLoss, most_frequent
from worker.training.replay import ReplayTarget, replay
from worker.training.self_generated import Text
from worker.training.trainer import Report, train

RECIPE = Recipe(epochs=4, rows=2, held_out=2, unroll=2, learning_rate=1e-2)
TAPS = 2  # of the tiny target's two layers


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    """What a tiny target writes."""
    target = tapped(tiny("llama"))
    some = sequences([[2 + i, *prompt] for i in range(3) for prompt in PROMPTS], max_tokens=24)
    decode(engine(target, None, options(Mode.PLAIN)), some)
    return [Text(tuple(s.ids), s.num_prompt, greedy=True) for s in some]


@pytest.fixture(scope="module")
def lessons(texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> FeatureDataset:
    return extract_features(tapped(tiny("llama")), texts, tmp_path_factory.mktemp("lessons"))


def a_student() -> HeadLoss:
    model = tiny("llama")
    net = network(model)
    return HeadLoss(net, embeddings(model), output_weights(model)[TOKENS], TOKENS, RECIPE.unroll, 0.8)


def trained(
    lessons: FeatureDataset, folder: Path, reports: list[Report], measured: Sequence[float] = (1, 2, 3, 4)
) -> HeadLoss:
    student, said = a_student(), iter(measured)
    folder.mkdir(exist_ok=True)
    train(student, student.network, lessons, RECIPE, folder, lambda: float(next(said)), reports.append)
    return student


def test_a_lesson_is_the_text_and_what_the_target_thought_of_it(texts: list[Text], lessons: FeatureDataset) -> None:
    assert len(lessons) == len(texts)
    for number, text in enumerate(texts):
        example = lessons[number]
        assert tuple(example.ids.tolist()) == text.ids
        # a greedy text is what the target found likeliest
        assert example.next_ids[text.num_prompt - 1 : -1, 0].tolist() == list(text.ids[text.num_prompt :])
        assert (example.next_probabilities.sum(-1) <= 1.001).all()


def test_lessons_are_not_made_twice(texts: list[Text], tmp_path: Path) -> None:
    extract_features(tapped(tiny("llama")), texts, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    extract_features(tapped(tiny("llama")), texts, tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def test_the_loss_falls(lessons: FeatureDataset, tmp_path: Path) -> None:
    reports: list[Report] = []
    trained(lessons, tmp_path, reports)
    assert reports[-1].update == reports[-1].updates
    assert reports[-1].loss < 0.95 * reports[0].loss  # a running mean, first updates included
    assert reports[-1].right[0] > reports[0].right[0]


def test_an_interrupted_training_ends_with_the_same_weights(
    lessons: FeatureDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(lessons, tmp_path / "whole", [])
    monkeypatch.setattr(trainer, "_CHECKPOINT_S", 0.0)  # after every update

    class Interrupted(Exception):
        pass

    def interrupt(report: Report) -> None:
        if report.update == 9:
            raise Interrupted

    student = a_student()
    (tmp_path / "parts").mkdir()
    with pytest.raises(Interrupted):
        train(student, student.network, lessons, RECIPE, tmp_path / "parts", lambda: 1.0, interrupt)
    reports: list[Report] = []
    rest = trained(lessons, tmp_path / "parts", reports, measured=(2, 3, 4))
    assert reports[0].update == 9  # the ninth was not in the checkpoint
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, rest.network.state_dict()[name]), name


def test_training_stops_when_held_out_acceptance_no_longer_grows(lessons: FeatureDataset, tmp_path: Path) -> None:
    reports: list[Report] = []
    trained(lessons, tmp_path, reports, measured=(1.0, 1.001))
    assert reports[-1].epoch == 2


def test_the_weights_that_are_kept_are_the_best(lessons: FeatureDataset, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    student = trained(lessons, tmp_path, [], measured=(1.0, 2.0, 0.5))
    best = load_file(tmp_path / "best.safetensors")
    last = student.network.state_dict()
    assert any(not torch.equal(best[name].float(), last[name].bfloat16().float()) for name in best)


def test_only_what_follows_the_prompt_is_learned(lessons: FeatureDataset) -> None:
    batch = Batch.of([lessons[0], lessons[2]])
    for ahead in (0, 1):
        rows = batch.rows(ahead)
        for row, number in enumerate((0, 2)):
            example = lessons[number]
            expected = list(range(example.num_prompt - 1, len(example.ids) - 1 - ahead))
            assert rows[row].nonzero().ravel().tolist() == expected


def test_the_commonest_tokens_are_chosen_and_rarely_filled_up() -> None:
    assert most_frequent([[5, 5, 9], [9, 5, 30]], 2, 61).tolist() == [5, 9]
    assert most_frequent([[5]], 3, 61).tolist() == [0, 1, 5]


def test_replay_accepts_what_decoding_accepts(texts: list[Text], lessons: FeatureDataset) -> None:
    model = tiny("llama")
    head = packed_head(model, network(model), slots=1)
    target = tapped(model, slots=1)
    assert target.hidden is not None
    texts = texts[:6]
    some = sequences([list(text.ids[: text.num_prompt]) for text in texts], max_tokens=24)
    chosen = options(Mode.PAPER, max_sequences=1, nodes=6, threshold=0.0, max_depth=8)
    results = decode(engine(target, HeadDrafter(head, target.hidden, "head"), chosen), some)
    decoded = [r.stats.accepted_tokens for r in results if r.stats.step]
    told = [lessons[number] for number in range(len(texts))]
    replayed = replay(
        told, ReplayTarget(told, 61, torch.device("cpu")), lambda hidden: HeadDrafter(head, hidden, "head"), nodes=6
    )
    assert replayed.accepted.tolist() == decoded


def test_more_nodes_never_foresee_less(lessons: FeatureDataset) -> None:
    told = [lessons[number] for number in range(4)]

    def make(_: HiddenStates) -> SuffixDrafter:
        return SuffixDrafter()

    replay_target = ReplayTarget(told, 61, torch.device("cpu"))
    reached = [replay(told, replay_target, make, nodes).tokens_per_step for nodes in (1, 4, 16)]
    assert reached == sorted(reached)


def test_a_last_line_that_was_cut_off_is_no_text(texts: list[Text], tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts[:3]) + '{"ids": [1, 2')
    assert self_generated.read(file) == texts[:3]
    shutil.rmtree(tmp_path)
