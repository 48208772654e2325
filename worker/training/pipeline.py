"""The school: from a target's name to a trained draft, its card, and what it is worth.

texts -> lessons -> trainer -> evaluation, one after the other; whatever is there already is not made again, so the same
call goes on where an interrupted one stopped. The processes of an `accelerate launch` read the texts and train as one;
the first of them writes what there is to write.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import PartialState
from safetensors.torch import load_file

from jobs.errors import InvalidValue
from worker.drafters.head_file import file_sha256
from worker.drafters.head_network import tapped_layers
from worker.loading.drafts import load_draft
from worker.loading.loader import OnMessage, load_engine
from worker.settings import SUFFIX, WorkerSettings
from worker.training import self_generated as self_generated
from worker.training.config import Recipe
from worker.training.evaluation import BUDGETS, Evaluation, MakeDrafter, evaluate
from worker.training.features import Example, FeatureDataset, extract_features
from worker.training.replay import ReplayTarget, replay
from worker.training.self_generated import Text
from worker.training.target import Target, load_target
from worker.training.trainable_drafts import trainable_draft
from worker.training.trainer import Report, train

_PATIENCE = timedelta(days=7)  # of processes that wait for the first to write or to judge
_JUDGED, _JUDGED_AT = 16, 8  # texts, and nodes a step, for E(A) between epochs
_RECIPE, _TEXTS, _LESSONS, CARD = "recipe.json", "texts.jsonl", "lessons", "card.json"


class Progress(Protocol):
    """Who shows people how far the work is."""

    def part(self, name: str, total: int) -> Callable[..., None]:
        """Begin a part of the work; return what takes how much more of it is done, and a note."""


class _Silence:
    """Nobody is shown anything."""

    def part(self, name: str, total: int) -> Callable[..., None]:
        return lambda *_: None


def train_draft(
    settings: WorkerSettings,
    recipe: Recipe,
    out: Path,
    prompts: Sequence[str],
    command: str,
    progress: Progress,
    say: OnMessage,
) -> Evaluation | None:
    """Train a draft for the settings' target and write it into `out`; what it was made from lies in `out`/work.

    Of several processes the first returns the evaluation, the others None. Raises InvalidValue if `out` holds the work
    of another recipe, and ModelRefused or SetupError for the target.
    """
    team = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    if not team.is_main_process:
        progress, say = _Silence(), lambda _: None
    work = out / "work"
    with team.main_process_first():  # the others find everything there
        _remember(work, settings, recipe)
        texts = _texts(settings, recipe, work, prompts, progress, say)
    target = load_target(settings)
    _lessons(
        target, tapped_layers(target.identity.layers), texts, work, progress, (team.process_index, team.num_processes)
    )
    team.wait_for_everyone()
    lessons = FeatureDataset(work / _LESSONS)
    draft = trainable_draft(target, recipe, texts[recipe.held_out :])
    held_out = [lessons[number] for number in range(recipe.held_out)]
    replay_target = ReplayTarget(held_out, target.vocabulary, target.device)
    history = train(
        draft.student,
        draft.network,
        lessons,
        recipe,
        work,
        lambda: replay(held_out[:_JUDGED], replay_target, draft.drafter, _JUDGED_AT).expected_acceptance,
        _told(progress.part("Training", 100)),
    )
    if not team.is_main_process:
        return None
    draft.network.load_state_dict(load_file(work / "best.safetensors"))
    files = draft.write(out)
    evaluation = _judged(held_out, target, draft.drafter, progress)
    card = _card(settings, recipe, texts, history, files, command, evaluation, team.num_processes)
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return evaluation


def evaluate_draft(
    settings: WorkerSettings, recipe: Recipe, work: Path, prompts: Sequence[str], progress: Progress, say: OnMessage
) -> Evaluation:
    """Measure the settings' draft as jobs have it, with the suffix index, on texts that the target writes."""
    _remember(work, settings, recipe)
    texts = _texts(settings, recipe, work, prompts, progress, say)
    target = load_target(settings)
    draft = load_draft(settings, target.model, target.tokenizer)
    taps = draft.taps or tapped_layers(target.identity.layers)
    lessons = _lessons(target, taps, texts, work, progress)
    held_out = [lessons[number] for number in range(len(lessons))]
    return _judged(held_out, target, lambda hidden: draft.make(hidden, 1, hidden.capacity, None)(), progress)


def _remember(work: Path, settings: WorkerSettings, recipe: Recipe) -> None:
    """Note what the folder's work is for; raises InvalidValue if it is for something else."""
    wanted = {"target": settings.target, "recipe": asdict(recipe)}
    file = work / _RECIPE
    if file.exists() and json.loads(file.read_text()) != wanted:
        raise InvalidValue(
            f"{work} holds the work of another recipe or target (see {file}); choose another directory or delete it",
            param="--out",
        )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n")


def _texts(
    settings: WorkerSettings, recipe: Recipe, work: Path, prompts: Sequence[str], progress: Progress, say: OnMessage
) -> list[Text]:
    file = work / _TEXTS
    if self_generated.complete(file, recipe):
        texts = self_generated.read(file)
    else:
        # The target writes in plain mode: no draft is needed to train one.
        loaded = load_engine(settings.model_copy(update={"mode": "plain", "draft": SUFFIX}), say)
        texts = self_generated.write(loaded, recipe, file, prompts, progress.part("Writing", recipe.tokens))
    if len(texts) <= recipe.held_out + recipe.rows:
        raise InvalidValue(
            f"{len(texts)} texts are too few: {recipe.held_out} are held out, and an update takes {recipe.rows}; "
            "let the target write more",
            param="--tokens",
        )
    return texts


def _lessons(
    target: Target,
    taps: Sequence[int],
    texts: Sequence[Text],
    work: Path,
    progress: Progress,
    share: tuple[int, int] = (0, 1),
) -> FeatureDataset:
    packed = target.packed(taps, max(len(text.ids) for text in texts))
    tokens = sum(len(text.ids) for text in texts) // share[1]
    return extract_features(packed, texts, work / _LESSONS, progress.part("Reading", tokens), share)


def _told(part: Callable[..., None]) -> Callable[[Report], None]:
    """Return what shows where a training stands, in hundredths."""
    shown = 0

    def tell(report: Report) -> None:
        nonlocal shown
        done = 100 * report.update // report.updates
        first = report.right[0] if report.right else 0.0
        expected = "" if report.expected_acceptance is None else f", E(A) {report.expected_acceptance:.3f}"
        part(done - shown, f"loss {report.loss:.3f}, {first:.0%} of next tokens foreseen{expected}")
        shown = done

    return tell


def _judged(held_out: Sequence[Example], target: Target, make_drafter: MakeDrafter, progress: Progress) -> Evaluation:
    done = progress.part("Judging", len(BUDGETS) + 1)
    return evaluate(held_out, target.vocabulary, target.device, make_drafter, done)


def _card(
    settings: WorkerSettings,
    recipe: Recipe,
    texts: Sequence[Text],
    history: Sequence[float],
    files: Sequence[Path],
    command: str,
    evaluation: Evaluation,
    processes: int,
) -> dict[str, Any]:
    """Return everything that somebody needs to trust a draft or to make it again."""
    return {
        "target": settings.target,
        "command": command,
        "recipe": asdict(recipe),
        "texts": {
            "count": len(texts),
            "tokens": sum(text.written for text in texts),
            "greedy": sum(text.greedy for text in texts),
        },
        "expected_acceptance_by_epoch": [round(value, 4) for value in history],
        "held_out": evaluation.as_json(),
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "processes": processes,
        },
        "sha256": {file.name: file_sha256(file) for file in files},
    }
