"""Paged decoding on a GPU: the CPU's logits in float32; in half precision a row has the same bits in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.heads import network, packed_head
from tests.models import ARCHITECTURES, VOCAB, tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, resumed_after, sequences
from tests.unit.worker.engine.paged.test_attention import SAMPLED, STEPS, buckets, model, tree
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.quantization.weights import QuantizationMethod, quantize
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import KvMove, chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LONG = [int(i) for i in np.random.default_rng(1).integers(2, 60, 900)]  # several chunks of attention
KNOWN = [name for name in ARCHITECTURES if name != "gemma3"]


def packed(network: PreTrainedModel, dtype: torch.dtype, slots: int = 8, capacity: int = 1024) -> PackedModel:
    network.to("cuda", dtype)  # type: ignore[arg-type]
    network.set_attn_implementation(ATTENTION_NAME)
    fuse_layers(network)
    return PackedModel(network, slots=slots, capacity=capacity)


def on_gpu(architecture: str, dtype: torch.dtype, seed: int = 0) -> PackedModel:
    return packed(tiny(architecture, seed), dtype)


Change = Callable[[PreTrainedModel], None]
STORED: dict[str, Change] = {
    "FP8 KV": store_kv_in_fp8,
    "FP8 weights": partial(quantize, kind=QuantizationMethod.FP8),
    "FP8 weights and activations": partial(quantize, kind=QuantizationMethod.FP8_DYNAMIC),
}


def real_sizes(slots: int = 8, capacity: int = 1024, change: Change = lambda _: None) -> PackedModel:
    """Return two random layers with the widths of a 1.5B model: products in more than one tile and step."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=1536, intermediate_size=8960, num_hidden_layers=2, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config)
    network.train(False)
    change(network)
    return packed(network, torch.bfloat16, slots, capacity)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_logits_are_those_of_the_cpu(architecture: str) -> None:
    cpu, gpu = model(architecture, paged=False), on_gpu(architecture, torch.float32)
    for _ in range(2):  # captured, then replayed
        for name, step in STEPS.items():
            assert torch.allclose(gpu.forward(step).cpu(), cpu.forward(step), atol=1e-3), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_logits_are_near_those_of_the_cpu(architecture: str) -> None:
    cpu, gpu = model(architecture, paged=False), on_gpu(architecture, torch.bfloat16)
    for name, step in STEPS.items():
        expected = cpu.forward(step)
        assert (gpu.forward(step).cpu().float() - expected).abs().max() <= 0.1 * expected.abs().max(), name


@pytest.mark.parametrize("change", STORED.values(), ids=STORED)
def test_logits_of_a_model_in_fp8_are_near_those_of_the_cpu(change: Change) -> None:
    models = [tiny("qwen3") for _ in range(2)]
    for made in models:
        change(made)
        made.set_attn_implementation(ATTENTION_NAME)
    fuse_layers(models[0])
    cpu, gpu = PackedModel(models[0], slots=8, capacity=1024), packed(models[1], torch.float32)
    for name, step in STEPS.items():
        expected = cpu.forward(step)
        # Sums in another order may round a number to the next one of FP8.
        assert (gpu.forward(step).cpu() - expected).abs().max() <= 0.1 * expected.abs().max(), name


@pytest.mark.parametrize("change", STORED.values(), ids=STORED)
def test_a_row_of_a_model_in_fp8_has_the_same_bits_in_any_batch_in_any_pieces_and_in_a_tree(change: Change) -> None:
    gpu, path = real_sizes(change=change), [0, 1, 3, 4]
    whole = last_logits(gpu, LONG[:700], ())
    for pieces in ((699,), (300, 300), (17, 600)):
        assert torch.equal(last_logits(gpu, LONG[:700], pieces), whole), pieces
    nodes = tree(0, 700)
    alone = [
        gpu.forward([chain(0, 700 + depth, [int(nodes.ids[node])], keep_last=True)])[0].clone()
        for depth, node in enumerate(path)
    ]
    for others in (0, 4):
        rest = [chain(slot, 0, LONG[: 90 * slot], keep_last=True) for slot in range(1, others + 1)]
        logits = gpu.forward([nodes, *rest])
        for row, node in enumerate(path):
            assert torch.equal(logits[node], alone[row]), (others, row)


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


def last_logits(gpu: PackedModel, text: Sequence[int], pieces: Sequence[int]) -> Tensor:
    """Return the last logits of a prompt that is read in pieces of these sizes, the rest in one."""
    start = 0
    for size in (*pieces, len(text) - sum(pieces)):
        logits = gpu.forward([chain(0, start, list(text[start : start + size]), keep_last=True)])
        start += size
    return logits[-1].clone()


@pytest.mark.parametrize("pieces", [(899,), (1, 898), (300, 300), (880, 5, 5, 5), (17, 600, 270)])
def test_a_prompt_has_the_same_bits_in_any_pieces(pieces: tuple[int, ...]) -> None:
    gpu = real_sizes()
    whole = last_logits(gpu, LONG, ())
    assert torch.equal(last_logits(gpu, LONG, pieces), whole)


@pytest.mark.parametrize("others", [0, 1, 3, 7])
def test_a_row_has_the_same_bits_in_any_batch(others: int) -> None:
    gpu = real_sizes()
    expected = last_logits(gpu, LONG, (899,))
    for slot in range(1, others + 1):
        gpu.forward([chain(slot, 0, LONG[slot : 40 * slot], keep_last=True)])
    step = [chain(slot, 40 * slot - slot, [5], keep_last=True) for slot in range(1, others + 1)]
    logits = gpu.forward([chain(0, 899, [LONG[899]], keep_last=True), *step])
    assert torch.equal(logits[0], expected)


@pytest.mark.parametrize("count", [65, 130, 192, 300, 600, 1000])
def test_a_row_has_the_same_bits_in_a_captured_forward_of_any_size(count: int) -> None:
    gpu = real_sizes(slots=count, capacity=128)
    gpu.forward([chain(0, 0, LONG[:99], keep_last=True)])
    step = [chain(0, 99, [LONG[99]], keep_last=True)]
    expected = gpu.forward(step)[0].clone()
    others = [chain(slot, 0, [LONG[slot % 900]], keep_last=True) for slot in range(1, count)]
    for _ in range(2):  # captured, then replayed
        assert torch.equal(gpu.forward([*step, *others])[0], expected)
    assert gpu.capture_failures == {}


def test_a_long_text_and_short_ones_have_the_bits_that_they_have_alone() -> None:
    gpu = real_sizes(slots=8, capacity=8192)
    lengths = [8000, *[100 * slot for slot in range(1, 8)]]
    for slot, length in enumerate(lengths):
        gpu.forward([chain(slot, 0, (LONG * 9)[:length], keep_last=True)])
    step = [chain(slot, length, [5], keep_last=True) for slot, length in enumerate(lengths)]
    alone = [gpu.forward([one])[0].clone() for one in step]
    for row, expected in zip(gpu.forward(step), alone, strict=True):
        assert torch.equal(row, expected)


def test_slices_that_bound_the_memory_of_partial_results_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = real_sizes(slots=1, capacity=2048)
    whole = gpu.forward([chain(0, 0, (LONG * 2)[:1500], keep_last=True)])[0].clone()
    monkeypatch.setattr("worker.engine.paged.rows.MAX_PART_BYTES", 1 << 20)
    assert torch.equal(gpu.forward([chain(0, 0, (LONG * 2)[:1500], keep_last=True)])[0], whole)


@pytest.mark.parametrize("many", [False, True])
def test_a_row_has_the_same_bits_in_a_tree(many: bool) -> None:
    """Along the path 0, 1, 3, 4 of the tree, each row has the bits of the same token decoded alone."""
    gpu = real_sizes()
    prefix, path = 700, [0, 1, 3, 4]
    nodes = tree(0, prefix)
    alone = []
    gpu.forward([chain(0, 0, LONG[:prefix], keep_last=True)])
    for depth, node in enumerate(path):
        alone.append(gpu.forward([chain(0, prefix + depth, [int(nodes.ids[node])], keep_last=True)])[0].clone())
    rest = [chain(slot, 0, LONG[: 90 * slot], keep_last=True) for slot in range(1, 5)] if many else []
    logits = gpu.forward([nodes, *rest])
    for row, node in enumerate(path):
        assert torch.equal(logits[node], alone[row]), f"depth {row}"


def test_accepted_rows_are_what_plain_rows_would_have_stored() -> None:
    gpu = real_sizes()
    nodes = tree(0, 700)
    path = [0, 1, 3, 4]
    gpu.forward([chain(0, 0, LONG[:700], keep_last=True)])
    for depth, node in enumerate(path):
        gpu.forward([chain(0, 700 + depth, [int(nodes.ids[node])], keep_last=True)])
    expected = gpu.forward([chain(0, 704, [9], keep_last=True)]).clone()
    gpu.forward([chain(0, 0, LONG[:700], keep_last=True)])
    gpu.forward([nodes])
    gpu.compact([KvMove(0, 700, 700 + np.array(path))])
    assert torch.equal(gpu.forward([chain(0, 704, [9], keep_last=True)]), expected)


def test_a_draft_head_gives_the_same_on_a_gpu_and_on_a_cpu() -> None:
    """In a bucket, and in a prompt that fits none."""
    cpu, gpu = (packed_head(target, network(target)) for target in (tiny(), tiny().to("cuda")))  # type: ignore[arg-type]
    states = torch.randn(40, tiny().config.hidden_size)
    steps = [[chain(0, 0, LONG[:40], keep_last=True)], [chain(1, 0, LONG[:4], keep_last=True), tree(2, 0)]]
    for step in steps * 2:
        some = states[: sum(len(s.ids) for s in step)]
        for ours, expected in zip(gpu.forward(step, some.to("cuda")), cpu.forward(step, some), strict=True):
            assert torch.allclose(ours.cpu(), expected, atol=1e-3)


def test_texts_on_a_gpu_are_those_of_the_cpu_in_float32() -> None:
    cpu, gpu = sequences(), sequences()
    decode(engine(model(paged=False), None, options(Mode.PLAIN)), cpu)
    decode(engine(on_gpu("llama", torch.float32), SuffixDrafter(), options(Mode.PAPER)), gpu)
    assert outputs(gpu) == outputs(cpu)


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_half_precision_texts_depend_on_nothing_but_the_request(architecture: str, sampling: Sampling) -> None:
    alone = sequences(max_tokens=40, sampling=sampling)
    target = on_gpu(architecture, torch.bfloat16)
    for sequence in alone:
        decode(engine(target, None, options(Mode.PLAIN)), [sequence])
    for mode, batch, prefill in ((Mode.PLAIN, 4, 3), (Mode.PAPER, 2, 7), (Mode.PAPER, 4, 500), (Mode.OPT_TREE, 3, 7)):
        drafter = ModelDrafter(on_gpu(architecture, torch.bfloat16), "same", VOCAB)
        together = sequences(max_tokens=40, sampling=sampling)
        decode(engine(target, drafter, options(mode, max_sequences=batch, prefill_rows=prefill)), together[::-1])
        assert outputs(together) == outputs(alone), (mode, batch, prefill)
    resumed = resumed_after(9, outputs(alone), sequences(max_tokens=40, sampling=sampling))
    decode(engine(target, SuffixDrafter(), options(Mode.PAPER)), resumed)
    assert outputs(resumed) == outputs(alone)
