"""The training pipeline: generate texts, extract features, train the draft, evaluate it, write it with its card.

Every stage reuses the files that it finds, so the same call resumes an interrupted run. Under `accelerate launch` all
processes extract features and train together; the main process writes the files.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.speculation.drafting import Drafter
from worker.loading.drafts import DrafterFactory, load_draft
from worker.loading.loader import load_engine
from worker.loading.model_store import OnMessage
from worker.settings import SUFFIX, WorkerSettings
from worker.training import self_generated
from worker.training.config import Recipe
from worker.training.evaluation import BUDGETS, Evaluation, MakeDrafter, evaluate
from worker.training.features import Example, FeatureDataset, extract_features
from worker.training.replay import ReplayTarget, replay
from worker.training.self_generated import Text
from worker.training.target import Target, load_target
from worker.training.trainable_drafts import trainable_draft
from worker.training.trainer import Report, train

_PROCESS_TIMEOUT = timedelta(days=7)  # other processes wait while the main process generates or evaluates
_EPOCH_TEXTS, _EPOCH_NODES = 16, 8  # held-out texts and nodes per step of the evaluation after each epoch
_RECIPE, _TEXTS, _FEATURES, CARD = "recipe.json", "texts.jsonl", "features", "card.json"


class ProgressDisplay(Protocol):
    """Display of the stages of a long run."""

    def part(self, name: str, total: int) -> Callable[..., None]:
        """Add a bar; return a function that takes the amount done since its last call, and a note."""


class _NoBars:
    """Displays nothing: for processes other than the main one."""

    def part(self, name: str, total: int) -> Callable[..., None]:
        return lambda *_: None


def train_draft(
    settings: WorkerSettings,
    recipe: Recipe,
    out: Path,
    prompts: Sequence[str],
    command: str,
    bars: ProgressDisplay,
    on_message: OnMessage,
) -> Evaluation | None:
    """Train a draft for the settings' target and write it into `out`; intermediate files go into `out`/work.

    Return the evaluation in the main process, None in the others. Raises InvalidValue if `out` has the files of another
    recipe, and ModelRefused or SetupError for the target.
    """
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=_PROCESS_TIMEOUT)
    if not processes.is_main_process:
        bars, on_message = _NoBars(), lambda _: None
    work = out / "work"
    with processes.main_process_first():  # the others find its files
        _claim_folder(work, settings, recipe)
        texts = _texts(settings, recipe, work, prompts, bars, on_message)
    target = load_target(settings)
    taps = tapped_layers(target.identity.layers)
    _features(target, taps, texts, work, bars, (processes.process_index, processes.num_processes))
    processes.wait_for_everyone()
    dataset = FeatureDataset(work / _FEATURES)
    draft = trainable_draft(target, recipe, texts[recipe.held_out :])
    held_out = [dataset[index] for index in range(recipe.held_out)]
    replay_target = ReplayTarget(held_out, target.vocabulary, target.device)
    history = train(
        draft.loss,
        draft.network,
        dataset,
        recipe,
        work,
        lambda: replay(held_out[:_EPOCH_TEXTS], replay_target, draft.drafter, _EPOCH_NODES).expected_acceptance,
        _show_report(bars.part("Training", 100)),
    )
    if not processes.is_main_process:
        return None
    draft.network.load_state_dict(load_file(work / "best.safetensors"))
    files = draft.save(out)
    evaluation = _evaluate(held_out, target, draft.drafter, bars)
    card = _card(settings, recipe, texts, history, files, command, evaluation, processes.num_processes)
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return evaluation


@dataclass(frozen=True, slots=True)
class TextsOfPair:
    """A target and its draft, with texts that the target has written and their hidden states."""

    target: Target
    draft: DrafterFactory
    examples: list[Example]

    def make_drafter(self, hidden: HiddenStates) -> Drafter:
        """Return the drafter that jobs use, with one slot."""
        return self.draft.make(hidden, 1, hidden.capacity, None)()


def evaluate_draft(
    settings: WorkerSettings,
    recipe: Recipe,
    work: Path,
    prompts: Sequence[str],
    bars: ProgressDisplay,
    on_message: OnMessage,
) -> Evaluation:
    """Evaluate the settings' draft with the suffix index, as jobs use it, on text that the target writes."""
    pair = texts_of_pair(settings, recipe, work, prompts, bars, on_message)
    return _evaluate(pair.examples, pair.target, pair.make_drafter, bars)


def texts_of_pair(
    settings: WorkerSettings,
    recipe: Recipe,
    work: Path,
    prompts: Sequence[str],
    bars: ProgressDisplay,
    on_message: OnMessage,
) -> TextsOfPair:
    """Load the settings' target and draft, and let the target write and read texts; files in `work` are reused."""
    _claim_folder(work, settings, recipe)
    texts = _texts(settings, recipe, work, prompts, bars, on_message)
    target = load_target(settings)
    draft = load_draft(settings, target.model, target.tokenizer)
    taps = draft.taps or tapped_layers(target.identity.layers)
    dataset = _features(target, taps, texts, work, bars)
    return TextsOfPair(target, draft, [dataset[index] for index in range(len(dataset))])


def _claim_folder(work: Path, settings: WorkerSettings, recipe: Recipe) -> None:
    """Record target and recipe in the folder; raises InvalidValue if it belongs to others."""
    wanted = {"target": settings.target, "recipe": asdict(recipe)}
    file = work / _RECIPE
    if file.exists() and json.loads(file.read_text()) != wanted:
        raise InvalidValue(
            f"{work} has the files of another recipe or target (see {file}); choose another directory or delete it",
            param="--out",
        )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n")


def _texts(
    settings: WorkerSettings,
    recipe: Recipe,
    work: Path,
    prompts: Sequence[str],
    bars: ProgressDisplay,
    on_message: OnMessage,
) -> list[Text]:
    file = work / _TEXTS
    if self_generated.complete(file, recipe):
        texts = self_generated.read(file)
    else:
        # Generate in plain mode: training a draft needs no other draft.
        loaded = load_engine(settings.model_copy(update={"mode": "plain", "draft": SUFFIX}), on_message)
        texts = self_generated.write(loaded, recipe, file, prompts, bars.part("Writing", recipe.tokens))
    if len(texts) <= recipe.held_out + recipe.rows:
        raise InvalidValue(
            f"{len(texts)} texts are too few: {recipe.held_out} are held out and a batch takes {recipe.rows}; "
            "raise the number of tokens",
            param="--tokens",
        )
    return texts


def _features(
    target: Target,
    taps: Sequence[int],
    texts: Sequence[Text],
    work: Path,
    bars: ProgressDisplay,
    process: tuple[int, int] = (0, 1),
) -> FeatureDataset:
    packed = target.packed(taps, max(len(text.ids) for text in texts))
    tokens = sum(len(text.ids) for text in texts) // process[1]
    return extract_features(packed, texts, work / _FEATURES, bars.part("Reading", tokens), process)


def _show_report(advance: Callable[..., None]) -> Callable[[Report], None]:
    """Return a function that shows a training report on a bar of 100."""
    shown = 0

    def show(report: Report) -> None:
        nonlocal shown
        done = 100 * report.update // report.updates
        accuracy = report.accuracy[0] if report.accuracy else 0.0
        expected = "" if report.expected_acceptance is None else f", E(A) {report.expected_acceptance:.3f}"
        advance(done - shown, f"loss {report.loss:.3f}, accuracy {accuracy:.0%}{expected}")
        shown = done

    return show


def _evaluate(
    held_out: Sequence[Example], target: Target, make_drafter: MakeDrafter, bars: ProgressDisplay
) -> Evaluation:
    advance = bars.part("Evaluating", len(BUDGETS) + 1)
    return evaluate(held_out, target.vocabulary, target.device, make_drafter, advance)


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
    """Return the draft's card: how it was made, with versions and checksums, and how it was evaluated."""
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
