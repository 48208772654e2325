"""A curve has a cell for each acceptance and batch: measured, or with the reason why not."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import InvalidValue
from tests.models import tiny
from tests.unit.worker.bench.acceptance.pairs import PROFILE, TOKENS, tiny_pair
from worker.bench.acceptance import command, pair
from worker.bench.acceptance.curve import AcceptanceCurve, CurveCell, CurvePlan
from worker.bench.acceptance.report import findings, plot, tables
from worker.engine.speculation.cost_model import CostModel

PLAN = CurvePlan((PROFILE.with_rates("0.7", (0.7,)),), (1, 2, 64), TOKENS, runs=2, cell_s=60.0)


def _curve(seconds_left: float = 600.0) -> list[CurveCell]:
    return list(AcceptanceCurve(tiny_pair(), PLAN, time.thread_time, lambda: seconds_left).cells())


def test_every_cell_is_measured_or_says_why_not() -> None:
    one, two, many = _curve()
    for cell in (one, two):
        assert len(cell.speedups) == PLAN.runs
        assert cell.texts_agree
        assert cell.tokens_per_step >= 1.0
        assert not cell.skipped
    assert many.skipped.startswith("no memory")
    assert many.speedup is None


def test_cells_after_the_deadline_say_that_time_is_out() -> None:
    assert [cell.skipped for cell in _curve(0.0)[:2]] == ["out of time"] * 2


def test_a_cell_below_what_is_claimed_is_named_with_its_steps() -> None:
    cell = CurveCell("0.7", 0.7, 16, (0.5, 1.4, 1.44), 2.0, 3.0, (("guard", 5), ("tree", 9)))
    assert cell.speedup == pytest.approx(1.42), "the first run still finds out what the draft costs and gains"
    assert findings([cell]) == ["Acceptance 0.7, batch 16: 1.420, below 1.5; steps of the last run: 5 guard, 9 tree."]
    assert findings([replace(cell, profile="0.5")]) == []
    assert "differ" in findings([replace(cell, profile="0.5", texts_agree=False)])[0]


def test_a_curve_has_tables_and_a_plot(tmp_path: Path) -> None:
    cells = [CurveCell("0.7", 0.7, 1, (1.9,)), CurveCell("0.7", 0.7, 8, skipped="out of time")]
    speedups, tokens = tables("pair", cells)
    assert [list(column.cells) for column in speedups.columns] == [["0.7"], ["1.90"], ["out of time"]]
    assert len(tokens.columns) == 3
    plot("pair", cells, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("draft", ["head", "model"])
def test_the_command_prints_a_line_for_each_cell_of_any_shapes(
    draft: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "calibrate", lambda *_: CostModel({1: 10.0, 64: 11.0}))
    tiny().config.save_pretrained(tmp_path)
    options = command.CurveOptions(
        str(tmp_path), draft if draft == "head" else str(tmp_path), "0.6,smollm2-135m-head", (1,), 8, 1, as_json=True
    )
    assert command.run(options, lambda _: None) == 0
    *cells, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(cell["profile"], cell["batch"], cell["texts_agree"]) for cell in cells] == [
        ("0.6", 1, True),
        ("smollm2-135m-head", 1, True),
    ]
    assert all(cell["speedup"] > 0 for cell in cells)
    assert isinstance(last["findings"], list)


def test_a_text_that_differs_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "calibrate", lambda *_: CostModel({1: 10.0}))
    monkeypatch.setattr(AcceptanceCurve, "cells", lambda _: [CurveCell("0.7", 0.7, 1, (1.9,), texts_agree=False)])
    tiny().config.save_pretrained(tmp_path)
    options = command.CurveOptions(str(tmp_path), "head", "0.7", (1,), 4, 1, as_json=True)
    assert command.run(options, lambda _: None) == command.TEXTS_DIFFER


def test_all_acceptances_are_the_rates_and_every_packaged_profile() -> None:
    assert {"0.5", "0.7", "0.9", "qwen3-32b-eagle3"} < {profile.name for profile in command.parse_acceptance("all")}
    with pytest.raises(InvalidValue, match="no-such-pair"):
        command.parse_acceptance("0.5,no-such-pair")
