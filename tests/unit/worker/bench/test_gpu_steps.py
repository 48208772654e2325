"""Step times of the paged forward: every kind of step is timed, next to the memory-traffic floor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from worker.bench.gpu_steps import Floor, floor_of, main, measure, random_model
from worker.engine.model.architecture import kv_bytes_per_token


def test_every_number_of_rows_is_timed_without_trees_and_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny().config.save_pretrained(tmp_path)
    main(model=str(tmp_path), rows="1,20", context=40, rounds=1, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["rows"], x["sequences"], x["trees"]) for x in lines] == [(1, 1, False), (20, 20, False), (20, 2, True)]
    assert all(x["step_ms"] > 0 and x["times_floor"] == pytest.approx(x["step_ms"] / x["floor_ms"]) for x in lines)


def test_one_long_text_is_timed_among_short_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().config.save_pretrained(tmp_path)
    main(model=str(tmp_path), rows="3", context=20, long_context=200, rounds=1, as_json=True)
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (line["sequences"], line["longest"], line["trees"]) == (3, 200, False)


def test_the_floor_counts_weights_once_and_keys_and_values_once_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.bench.gpu_steps.copy_bytes_per_ms", lambda _: 1.0)
    config = tiny("qwen2").config
    config.tie_word_embeddings = True
    model = random_model(config, 1, torch.device("cpu"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    floors = {(t.rows, t.trees): t.floor_ms for t in measure(model, floor_of(model, None), (20,), 40, 1)}
    assert floors[20, False] == weights + kv_bytes_per_token(model) * (20 * 40 + 20)
    assert floors[20, True] == weights + kv_bytes_per_token(model) * (2 * 40 + 20)


def test_the_floor_of_many_rows_is_that_of_their_arithmetic() -> None:
    floor = Floor(weight_bytes=2000, token_bytes=1, bytes_per_ms=1000.0, flops_per_ms=1e5)
    assert floor.ms(rows=1, entries=0, itemsize=2) == 2.0
    assert floor.ms(rows=1000, entries=0, itemsize=2) == 20.0
