"""Record the acceptance profile of a target and its draft on text that the target writes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.errors import InvalidValue
from worker.bench.acceptance.recorder import ProfileRecorder
from worker.drafters.mixed import MixedDrafter
from worker.settings import WorkerSettings
from worker.terminal import print_message
from worker.training.config import Recipe
from worker.training.pipeline import ProgressDisplay, texts_of_pair
from worker.training.replay import ReplayTarget, replay


def record_pair(
    settings: WorkerSettings,
    name: str,
    prompts: Sequence[str],
    tokens: int,
    nodes: int,
    work: Path,
    command: str,
    bars: ProgressDisplay,
) -> dict[str, Any]:
    """Return the profile of the settings' draft, without the suffix index: trees of `nodes` nodes, temperature 0.

    Files in `work` are reused. Raises InvalidValue if the draft runs no network, and what loading the pair raises.
    """
    recipe = Recipe(seed=1, tokens=tokens, greedy_share=1.0, held_out=0, rows=1)
    pair = texts_of_pair(settings, recipe, work, prompts, bars, print_message)
    target = ReplayTarget(pair.examples, pair.target.vocabulary, pair.target.device)
    drafter = pair.make_drafter(target.hidden)
    if not isinstance(drafter, MixedDrafter):
        raise InvalidValue("the suffix index has no network whose acceptance could be recorded", param="--draft")
    texts = [example.ids[example.num_prompt :].tolist() for example in pair.examples]
    recorder = ProfileRecorder(drafter.network, texts)
    result = replay(pair.examples, target, lambda _: recorder, nodes)
    card = {
        "target": settings.target,
        "draft": drafter.network.name,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "prompts": "given" if prompts else "written by the target",
        "temperature": 0,
        "nodes": nodes,
        "tokens_per_step": round(result.tokens_per_step, 4),
    }
    return recorder.as_json(name, card)
