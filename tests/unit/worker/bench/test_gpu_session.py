"""The GPU session: it fits its time, and a stage that fails or hangs does not hide the others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny
from worker.bench import gpu_turns
from worker.bench.gpu_session import SessionSizes, Stage, run, split_stages, stages


def test_the_deadlines_of_all_stages_add_up_to_less_than_ten_minutes() -> None:
    planned = stages(SessionSizes("model", 16, "1,64", 800, 32_000, "64,256", "152064", 20, "draft", None, "1,128"))
    assert sum(stage.deadline_s for stage in planned) < 10 * 60
    assert planned[-1].deadline_s <= 3 * 60, "speed-ups by acceptance take three minutes at most"
    assert planned[0].name == "correctness"


def test_a_split_model_is_checked_and_measured_in_less_than_eight_minutes() -> None:
    planned = split_stages(SessionSizes("model", 16, "1,64", 800, 32_000, "64", "152064", 20, "draft", None, "1"))
    assert sum(stage.deadline_s for stage in planned) < 8 * 60
    assert planned[0].name == "correctness"
    shares = [stage.command for stage in planned if stage.name.startswith("TP")]
    assert [command[command.index("--ranks") + 1] for command in shares] == ["2", "4", "8"]
    assert all(command[-1] == "none,peers,gathered" for command in shares), "alone, and with both exchanges"


def test_results_of_a_stage_that_hangs_are_kept_and_its_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 2.0, output=b'{"step_ms": 1.5}\na note\n')

    monkeypatch.setattr(subprocess, "run", hangs)
    result, end = run(Stage("steps", 2.0, ()))
    assert result == {"stage": "steps", "step_ms": 1.5}
    assert end["ended"] == "stopped after 2 s"


def test_a_stage_that_fails_reports_its_last_lines() -> None:
    (end,) = run(Stage("steps", 60.0, ("-c", "raise SystemExit('no memory')")))
    assert (end["ended"], end["last_lines"]) == ("exit status 1", ["no memory"])


def test_the_gap_is_the_time_of_a_turn_without_the_work_of_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny().config.save_pretrained(tmp_path)
    gpu_turns.main(model=str(tmp_path), sequences="2", steps=3, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["sequences"], line["sampled"]) for line in lines] == [(2, False), (2, True)]
    for line in lines:
        assert line["gap_ms"] == pytest.approx(line["turn_ms"] - line["device_ms"])
        assert line["device_ms"] > 0
