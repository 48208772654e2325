"""`basic draft train` as users start it: one process, and several processes that train one draft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import save_tiny

BIN = Path(sys.executable).parent
ALONE = (str(BIN / "basic"),)
TOGETHER = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", *ALONE)


def run(*command: str, cache_dir: Path, **environment: str) -> str:
    told = {"BASIC_CACHE_DIR": str(cache_dir), "BASIC_DTYPE": "float32", "BASIC_MAX_CONTEXT": "512"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | told)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(("kind", "start", "processes"), [("head", TOGETHER, 2), ("model", ALONE, 1)])
def test_a_draft_is_trained_and_drafts(kind: str, start: tuple[str, ...], processes: int, tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(40)))
    out = tmp_path / "draft"
    train = (*start, "draft", "train", "--target", str(target), "--out", str(out), "--kind", kind, "--json")
    train = (*train, "--tokens", "3000", "--epochs", "1", "--prompts", str(prompts))

    said = json.loads(run(*train, cache_dir=tmp_path))

    card: dict[str, Any] = json.loads((out / "card.json").read_text())
    assert card["made_with"]["processes"] == processes
    assert card["held_out"] == said
    assert said["budgets"][0]["tokens_per_step"] >= 1.0
    drafted, plain = (
        json.loads(run(*ALONE, "generate", "hello", "--target", str(target), *more, "--json", cache_dir=tmp_path))
        for more in (("--draft", str(out), "--mode", "paper"), ("--mode", "plain"))
    )
    assert drafted["token_ids"] == plain["token_ids"]
