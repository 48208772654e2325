"""Step times of the paged forward: every kind of step is timed, next to the memory-traffic floor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from worker.bench import gpu_steps
from worker.bench.gpu_steps import (
    ExchangeKind,
    Floor,
    OneDeviceExchange,
    floor_of,
    main,
    measure,
    random_model,
    random_shard,
)
from worker.engine.model.architecture import kv_bytes_per_token
from worker.engine.shards.exchange import PeerSums
from worker.planning.shapes import shape_from_config


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_steps._COPY_BYTES, "cpu", 1 << 20)


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


def test_the_share_of_the_first_rank_is_timed_with_an_exchange_on_one_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    main(model=str(tmp_path), rows="2", context=20, rounds=1, ranks=2, exchange="none,gathered", as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["ranks"], line["exchange"]) for line in lines} == {(2, "none"), (2, "gathered")}
    assert all(line["step_ms"] > 0 and line["floor_ms"] > 0 for line in lines)


def test_kernels_find_the_sums_of_all_ranks_on_one_device() -> None:
    for kind in ExchangeKind:
        exchange = OneDeviceExchange(4, kind, 8, torch.device("cpu"))
        own = exchange.room_for_sums(2, 3, 8, torch.device("cpu")).fill_(1.0)
        sums = exchange.sums_of_all(own)
        if isinstance(sums, PeerSums):
            assert (sums.ranks, sums.each, sums.pads) == (4, 2, None)
            assert int(sums.addresses[0]) == own.data_ptr()
        else:
            assert sums.shape == (2 if kind is ExchangeKind.NONE else 8, 3, 8)
            assert sums.sum() == own.sum()


def test_the_floor_of_a_share_has_its_columns_of_the_output_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.bench.gpu_steps.copy_bytes_per_ms", lambda _: 1.0)
    config = tiny("llama").config
    floors = [
        floor_of(random_shard(config, ranks, ExchangeKind.NONE, torch.device("cpu")), None).weight_bytes
        for ranks in (1, 2)
    ]
    shape = shape_from_config("tiny", config)
    size = floors[0] // shape.read_parameters(1)
    assert floors[1] == pytest.approx(size * shape.read_parameters(2), rel=0.01)


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
