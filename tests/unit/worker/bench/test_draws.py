"""The benchmark of draws prints one line for each vocabulary, kind of sampling and number of rows."""

from __future__ import annotations

import json

import pytest
import typer

from worker.bench import draws


def test_draws_are_measured_for_each_vocabulary_sampling_and_number_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    draws.main(vocabulary="70,130", rows="1,3", repeats=1, device="cpu", dtype="bfloat16", as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 * 2 * len(draws.SAMPLINGS)
    assert {(line["vocabulary"], line["rows"]) for line in lines} == {(70, 1), (70, 3), (130, 1), (130, 3)}
    assert all(line["ms"] > 0 for line in lines)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="must be float32 or bfloat16"):
        draws.main(dtype="int8")
