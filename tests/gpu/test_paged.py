"""The GPU's way on a GPU, against the CPU in float32, and in half precision against itself without recordings."""

from __future__ import annotations

import pytest
import torch

from tests.models import ARCHITECTURES, tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, sequences
from tests.unit.worker.engine.test_paged_attention import STEPS, buckets, model
from worker.drafters.suffix import SuffixDrafter
from worker.engine.attention import ATTENTION_NAME
from worker.engine.language_model import PackedModel
from worker.engine.options import Mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on_gpu(architecture: str, dtype: torch.dtype) -> PackedModel:
    network = tiny(architecture).to("cuda", dtype)  # type: ignore[arg-type]
    network.set_attn_implementation(ATTENTION_NAME)
    return PackedModel(network, slots=4, capacity=512)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_logits_are_those_of_the_cpu(architecture: str) -> None:
    cpu, gpu = model(architecture, paged=False), on_gpu(architecture, torch.float32)
    for _ in range(2):  # recorded, then replayed
        for name, step in STEPS.items():
            assert torch.allclose(gpu.forward(step).cpu(), cpu.forward(step), atol=1e-3), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_flash_kernel_agrees_with_gathered_attention(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = on_gpu(architecture, torch.bfloat16)
    ours = [flash.forward(step).float() for step in STEPS.values()]
    monkeypatch.setattr("worker.engine.paged_attention.PagedPlan._takes_flash", lambda *_: False)
    gathered = on_gpu(architecture, torch.bfloat16)
    for name, rows in zip(STEPS, ours, strict=True):
        expected = gathered.forward(STEPS[name]).float()
        assert (rows - expected).abs().max() <= 0.05 * expected.abs().max(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_replayed_forward_has_the_bits_of_the_same_forward_run(architecture: str) -> None:
    gpu = on_gpu(architecture, torch.bfloat16)
    for step in STEPS.values():
        replayed = gpu.forward(step)
        shape = buckets(gpu).shape_for(step)
        if shape is not None:
            with torch.inference_mode():
                run, _ = buckets(gpu)._once(shape)
            assert torch.equal(run[: len(replayed)], replayed)


def test_texts_on_a_gpu_are_those_of_the_cpu_in_float32() -> None:
    cpu, gpu = sequences(), sequences()
    decode(engine(model(paged=False), None, options(Mode.PLAIN)), cpu)
    decode(engine(on_gpu("llama", torch.float32), SuffixDrafter(), options(Mode.PAPER)), gpu)
    assert outputs(gpu) == outputs(cpu)
