"""A quantisation that can't run is refused at start, in a sentence that says what works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.errors import SetupError
from tests.models import tiny
from worker.engine.kv.fp8 import has_fp8_kv
from worker.engine.quantization.weights import QuantizationMethod, quantize
from worker.loading.quantization import choose_kv_dtype, chosen_quantization, refuse_unpacked, weights_sentence
from worker.settings import WorkerSettings


@pytest.mark.parametrize(
    ("device", "given", "said"),
    [
        ("cuda", {"quantization": "int8"}, "runs on a CPU only; on a GPU set BASIC_QUANTIZATION=fp8"),
        ("cuda", {"quantization": "fp8", "tp": 2}, "works on one device that holds the whole model; start with --tp 1"),
        ("cpu", {"quantization": "int8", "tp": 2}, "start with --tp 1"),
        ("cuda", {"quantization": "fp8", "device_map": "auto"}, "without BASIC_DEVICE_MAP"),
    ],
)
def test_a_combination_that_cannot_run_is_refused(device: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SetupError, match=said):
        chosen_quantization(WorkerSettings(**given), torch.device(device))


def test_a_method_is_chosen_where_it_runs() -> None:
    assert chosen_quantization(WorkerSettings(), torch.device("cuda")) is None
    assert chosen_quantization(WorkerSettings(quantization="int8"), torch.device("cpu")) is QuantizationMethod.INT8
    assert chosen_quantization(WorkerSettings(quantization="fp8"), torch.device("cuda")) is QuantizationMethod.FP8
    dynamic = WorkerSettings(quantization="fp8-dynamic")
    assert chosen_quantization(dynamic, torch.device("cpu")) is QuantizationMethod.FP8_DYNAMIC


def test_fp8_kv_is_held_by_every_rank_and_refused_for_layers_on_several_devices() -> None:
    model = tiny()
    choose_kv_dtype(WorkerSettings(device_map="auto"), model)
    assert not has_fp8_kv(model)
    with pytest.raises(SetupError, match="BASIC_KV_DTYPE=fp8 needs layers that stay on one device"):
        choose_kv_dtype(WorkerSettings(kv_dtype="fp8", device_map="auto"), model)
    choose_kv_dtype(WorkerSettings(kv_dtype="fp8", tp=2), model)
    assert has_fp8_kv(model)


def test_a_model_that_no_kernel_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.loading.quantization.kernels_for", lambda _: None)
    model = tiny()
    refuse_unpacked(model, "tiny")  # not quantised
    quantize(model, QuantizationMethod.INT8)
    with pytest.raises(SetupError, match="tiny with int8 weights needs the compiled CPU kernels"):
        refuse_unpacked(model, "tiny")


def test_the_sentence_about_weights_says_what_is_in_memory() -> None:
    said = weights_sentence({"bfloat16": 54 << 20, "int8": 128 << 20, "float32": 1 << 19})
    assert said == "Weights: 128.0 MiB int8, 54.0 MiB bfloat16, 0.5 MiB float32"
