"""The engine benchmark on random weights: its table and its JSON lines."""

from __future__ import annotations

import json

import pytest
from typer import BadParameter

from tests.models import tiny
from worker.bench.gpu_engine import Rates, main
from worker.engine.options import Mode
from worker.engine.speculation.cost_model import CostModel

MODES = ("plain", "opt-tree", "paper")
RATES = Rates(4, {Mode.PLAIN: [1.0, 4.0, 2.0], Mode.OPT_TREE: [3.0, 1.0, 9.0], Mode.PAPER: [5.0] * 3}, False)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny().config.save_pretrained(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measured costs: they affect drafting, not the output format."""
    monkeypatch.setattr("worker.bench.gpu_engine.calibrate", lambda *_: CostModel({1: 1.0}))


def test_json_output_is_one_line_per_batch_size(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(model=shape, draft="same", layers=1, sequences="1,2", tokens=6, runs=2, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["sequences"], line["texts_agree"]) for line in lines] == [(1, True), (2, True)]
    assert all(len(line[mode]) == 2 and min(line[mode]) > 0 for line in lines for mode in MODES)


def test_the_default_output_is_a_table(
    shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(model=shape, draft="same", layers=1, sequences="1", tokens=4, runs=1)
    said = capsys.readouterr().out
    assert "texts agree" in said
    assert "{" not in said


def test_the_table_has_the_median_run_and_the_speedup() -> None:
    assert RATES.cells() == ["4", "2", "3", "5", "1.50", "NO"]


def test_a_shape_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(BadParameter, match="no-such-model"):
        main(model="/no-such-model", sequences="1")
