"""The bench of quantised weights compares each form with the first one, token by token."""

from __future__ import annotations

from math import inf

import torch

from tests.unit.worker.engine.bits import TEXT
from tests.unit.worker.engine.cpu.test_kernels import quick
from tests.unit.worker.engine.quantization.test_quantized_models import quick as quantized
from worker.bench.quantization.measure import measure_distances, measure_steps


def test_distances_are_those_from_the_first_form_and_zero_for_the_same_weights() -> None:
    models = {
        "none": quick("llama", torch.bfloat16),
        "again": quick("llama", torch.bfloat16),
        "int8": quantized("int8"),
    }
    none, again, int8 = measure_distances(models, dict.fromkeys(models, 1.0), [TEXT[:20], TEXT[20:31]])
    assert (none.divergence, none.same_top, none.tokens) == (again.divergence, 1.0, 31) == (0.0, 1.0, 31)
    assert none.loss == again.loss
    assert 0.0 < int8.divergence < 0.1
    assert int8.divergence_p99 >= int8.divergence


def test_each_form_is_timed_at_each_number_of_rows() -> None:
    steps = measure_steps({"none": quick("llama"), "fp8": quantized("fp8")}, rows=3, rounds=2)
    assert [(step.form, step.rows) for step in steps] == [("none", 3), ("fp8", 3)]
    assert all(0 < step.wall_ms < inf for step in steps)
    assert all(0 <= step.cpu_ms < inf for step in steps), "a clock of CPU time may stand still during so short a step"
