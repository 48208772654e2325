"""Laws of `basic plan`: parameter counts are exact, placements fit, and refusals name alternatives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from tests.models import SHAPE, tiny
from tests.shards import Absent
from worker.cli import commands
from worker.engine.errors import ModelRefused
from worker.engine.kv.fp8 import store_kv_in_fp8
from worker.engine.model.architecture import kv_bytes_per_token
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.packed_model import PackedModel
from worker.engine.model.sharding import shard_config
from worker.engine.quantization.weights import QuantizationMethod, quantize, quantized_weights
from worker.engine.segments import chain
from worker.engine.shards.output_layer import deal_output
from worker.engine.shards.shard import Shard
from worker.planning.devices import DEVICES, GIB, KERNELS_PER_LAYER
from worker.planning.forecast import Machine, speculate, step, sums_sent
from worker.planning.plan import Placement, PlanRequest, command, pick, placements
from worker.planning.shapes import ModelShape, shape_from_config, shape_of

TARGET, DRAFT = "DeepSeek-R1-Distill-Qwen-32B", "DeepSeek-R1-Distill-Qwen-1.5B"
H100 = Machine(DEVICES["h100"], "bfloat16")


@pytest.fixture(scope="module")
def target() -> ModelShape:
    return shape_of(TARGET)


@pytest.fixture(scope="module")
def draft() -> ModelShape:
    return shape_of(DRAFT)


@pytest.fixture(scope="module")
def plan_request(target: ModelShape, draft: ModelShape) -> PlanRequest:
    return PlanRequest(target, draft, H100, gpus=8, sequences=64, context=4096)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # own and tied output weights
def test_a_shape_has_the_parameters_of_the_loaded_model(architecture: str) -> None:
    model = tiny(architecture)
    shape = shape_from_config("tiny", model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.kv_entries(1) * model.dtype.itemsize == kv_bytes_per_token(model)
    assert shape.kv_entries(2) * 2 == shape.kv_entries(1)


def test_fp8_weights_take_the_bytes_that_are_counted_once_they_are_loaded() -> None:
    model = tiny("llama").to(torch.bfloat16)  # type: ignore[arg-type]
    shape = shape_from_config("tiny", model.config)
    quantize(model, QuantizationMethod.FP8)
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
    weights = [found[0] for layer in linear if (found := quantized_weights([layer]))]
    rest = sum(p.nbytes for p in model.parameters()) - sum(2 * weight.values.numel() for weight in weights)
    stored = sum(weight.values.nbytes + weight.scale.nbytes for weight in weights)
    assert Machine(DEVICES["h100"], "bfloat16", fp8=True).weights_bytes(shape, 1) == rest + stored


def test_fp8_weights_leave_more_memory_to_kv_on_one_gpu_and_are_not_split(plan_request: PlanRequest) -> None:
    fp8 = replace(plan_request, machine=replace(H100, fp8=True), sequences=0)
    chosen, before = pick(placements(fp8)), placements(replace(plan_request, sequences=0))[0]
    assert chosen is not None
    assert (chosen.ranks, chosen.exact) == (1, True)
    assert chosen.kv_tokens > 3 * before.kv_tokens
    assert chosen.best_tokens_per_s > before.best_tokens_per_s
    assert "BASIC_QUANTIZATION=fp8 basic worker --replicas 8 --tp 1" in command(fp8, chosen)
    assert {choice.refusal for choice in placements(fp8) if choice.ranks in (2, 4)} == {
        "FP8 weights are held whole by one GPU"
    }


def test_fp8_kv_takes_the_bytes_that_are_counted_once_it_is_loaded() -> None:
    model = tiny("llama").to(torch.bfloat16)  # type: ignore[arg-type]
    store_kv_in_fp8(model)
    shape = shape_from_config("tiny", model.config)
    assert Machine(DEVICES["h100"], "bfloat16", fp8_kv=True).kv_bytes(shape, 1) == kv_bytes_per_token(model)


def test_fp8_kv_holds_nearly_twice_the_tokens_and_a_step_reads_half_the_context(plan_request: PlanRequest) -> None:
    wide = replace(plan_request, machine=replace(H100, fp8=True), sequences=0)
    chosen, before = pick(placements(replace(wide, machine=replace(wide.machine, fp8_kv=True)))), pick(placements(wide))
    assert chosen is not None
    assert before is not None
    assert 1.95 < chosen.kv_tokens / before.kv_tokens < 2.0
    assert chosen.step is not None
    plain = step(wide.target, wide.machine, 1, chosen.sequences, chosen.sequences, 1300)
    assert chosen.step.context_ms < 0.55 * plain.context_ms
    fp8 = replace(wide, machine=replace(H100, fp8_kv=True))
    assert "BASIC_KV_DTYPE=fp8 basic worker" in command(fp8, chosen)


def test_the_production_pair_has_its_published_size(target: ModelShape, draft: ModelShape) -> None:
    assert (target.parameters, draft.parameters) == (32_763_876_352, 1_777_088_000)
    assert (target.kv_entries(1) * 2, draft.kv_entries(1) * 2) == (262_144, 28_672)
    assert (target.widths, draft.widths) == ([1, 2, 4, 8], [1, 2])


def test_every_fitting_placement_fits(plan_request: PlanRequest) -> None:
    for placement in placements(plan_request):
        if placement.refusal is not None:
            continue
        assert plan_request.draft is not None
        kv = 2 * placement.kv_tokens * plan_request.target.kv_entries(placement.ranks)
        draft_kv = 2 * placement.kv_tokens * plan_request.draft.kv_entries(placement.draft_ranks)
        assert placement.weights_bytes + kv + draft_kv < H100.device.memory_bytes
        assert placement.sequences * plan_request.mean_tokens <= placement.kv_tokens


def test_more_ranks_hold_fewer_weights_each_and_more_kv_tokens(plan_request: PlanRequest) -> None:
    on_first = [placement for placement in placements(plan_request) if placement.draft_ranks == 1]
    assert [placement.name.split(",")[0] for placement in on_first] == ["8 x 1 GPU", "4 x TP 2", "2 x TP 4", "1 x TP 8"]
    assert [p.weights_bytes for p in on_first] == sorted((p.weights_bytes for p in on_first), reverse=True)
    assert [p.kv_tokens for p in on_first] == sorted(p.kv_tokens for p in on_first)


def test_heads_that_cannot_be_split_are_refused_with_alternatives(plan_request: PlanRequest, draft: ModelShape) -> None:
    refused = {p.ranks: p.refusal for p in placements(replace(plan_request, target=draft, draft=None))}
    assert refused[1] is None
    assert refused[2] is None
    assert "--tp 1, 2" in str(refused[4])
    assert "--tp 1, 2" in str(refused[8])


def test_what_is_too_large_for_the_gpus_is_refused_with_its_size(plan_request: PlanRequest) -> None:
    small = replace(plan_request, machine=replace(H100, device=H100.device.with_memory(24)))
    by_name = {p.name: p for p in placements(small)}
    assert "leave no memory" in str(by_name["8 x 1 GPU"].refusal)
    chosen = pick(list(by_name.values()))
    assert chosen is not None
    assert chosen.ranks >= 4
    assert pick(placements(replace(small, gpus=1))) is None


def test_a_step_is_never_faster_than_its_weights_can_be_read(target: ModelShape) -> None:
    for ranks in target.widths:
        parts = step(target, H100, ranks, sequences=1, rows=1, context=1)
        floor_ms = 1e3 * 2 * target.read_parameters(ranks) / H100.device.bytes_per_s
        assert parts.step_ms >= parts.weights_ms > floor_ms
    assert step(target, H100, 1, 1, 1, 1).traffic_ms == 0


def test_rows_are_free_until_matrix_products_take_longer_than_reading_weights(
    target: ModelShape,
) -> None:
    one, few = (step(target, H100, 1, 1, rows, 1) for rows in (1, 16))
    many = step(target, H100, 1, 1, 4096, 1)
    assert few.step_ms - few.draws_ms == pytest.approx(one.step_ms - one.draws_ms)
    assert many.step_ms == pytest.approx(
        many.products_ms + many.context_ms + many.ramp_ms + many.draws_ms + many.host_ms
    )
    assert many.step_ms > one.step_ms


def test_the_chain_depth_grows_with_acceptance_and_is_0_if_drafting_is_slower(
    target: ModelShape, draft: ModelShape
) -> None:
    depths = [
        speculate(
            target,
            draft,
            H100,
            ranks=1,
            draft_ranks=1,
            sequences=8,
            context=1024,
            acceptance=acceptance,
            max_depth=10,
        ).depth
        for acceptance in (0.0, 0.5, 0.7, 0.9)
    ]
    assert depths[0] == 0
    assert depths == sorted(set(depths))


def test_sequences_are_those_whose_prompt_and_half_of_whose_answer_fit(plan_request: PlanRequest) -> None:
    request = replace(plan_request, sequences=0, context=0)
    short, long = (placements(replace(request, output_tokens=tokens))[0] for tokens in (1000, 7000))
    assert short.kv_tokens == long.kv_tokens
    assert (short.sequences, long.sequences) == (short.kv_tokens // 800, long.kv_tokens // 3800)
    assert short.context > 4096, "the context is the model's own as far as the memory holds it"


def test_host_work_counts_in_a_step_by_its_sequences(target: ModelShape) -> None:
    few, many = (step(target, H100, 1, sequences, 256, 1) for sequences in (16, 256))
    assert many.step_ms - few.step_ms == pytest.approx(many.host_ms - few.host_ms + many.context_ms - few.context_ms)
    assert many.host_ms > 2 * few.host_ms


def test_every_placement_of_a_model_that_our_kernels_hold_is_exact(plan_request: PlanRequest) -> None:
    assert all(choice.exact for choice in placements(plan_request))
    assert not shape_from_config("other", tiny("gemma3").config).splits_exactly


def test_a_placement_that_is_not_exact_is_picked_only_if_no_exact_one_fits(plan_request: PlanRequest) -> None:
    dealt = replace(plan_request, target=replace(plan_request.target, splits_exactly=False))
    choices = placements(dealt)
    assert [choice.exact for choice in choices] == [choice.ranks == 1 for choice in choices]
    chosen = pick(choices)
    assert chosen is not None
    assert chosen.exact
    in_float32 = placements(replace(dealt, machine=Machine(DEVICES["h100"], "float32")))
    assert all(choice.exact for choice in in_float32)
    small = pick(placements(replace(dealt, machine=replace(H100, device=H100.device.with_memory(40)))))
    assert small is not None
    assert not small.exact


def test_only_steps_of_one_h100_count_as_measured(plan_request: PlanRequest) -> None:
    assert [choice.measured for choice in placements(plan_request)] == [True, False, False, False, False]
    h200 = replace(plan_request, machine=Machine(DEVICES["h200"], "bfloat16"))
    assert not any(choice.measured for choice in placements(h200))


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_holds_the_parameters_that_its_shard_has(tied: bool) -> None:
    config = tiny("llama").config
    config.tie_word_embeddings, config.vocab_size = tied, 60
    shape, own = shape_from_config("tiny", config), shard_config(config, 2)
    own.tie_word_embeddings = False
    make_model: Any = LlamaForCausalLM._from_config  # transformers leaves it untyped
    shard = make_model(own)
    shard.lm_head = deal_output(shard.lm_head, Shard(2, Absent(0, 2)))
    held = sum(parameter.numel() for parameter in shard.parameters())
    assert shape.rank_parameters(2) == held
    assert shape.read_parameters(2) == held - shard.get_input_embeddings().weight.numel()


def test_the_traffic_of_a_step_is_what_ranks_read_of_each_other(target: ModelShape) -> None:
    for ranks in (2, 4, 8):
        few, many = (step(target, H100, ranks, 64, rows, 800).traffic_ms for rows in (64, 128))
        read = 64 * (ranks - 1) * sums_sent(target, ranks, 64) * 64 * 5120 * 4
        logits = (ranks - 1) / ranks * 64 * target.vocabulary * 4
        assert many - few == pytest.approx(1e3 * (read + logits) / H100.device.link_bytes_per_s)
    assert [sums_sent(target, ranks, 64) for ranks in (2, 4, 8)] == [2, 2, 2], "one of each product"


def test_two_ranks_are_predicted_to_verify_64_rows_of_the_production_target_in_19_ms(target: ModelShape) -> None:
    for device in ("h100", "h200"):
        assert step(target, Machine(DEVICES[device], "bfloat16"), 2, 64, 64, 800).step_ms < 19


def test_the_pick_has_the_most_tokens_per_second_and_a_complete_command(plan_request: PlanRequest) -> None:
    choices = placements(plan_request)
    chosen = pick(choices)
    assert chosen is not None
    assert all(c.refusal or not c.exact or c.best_tokens_per_s <= chosen.best_tokens_per_s for c in choices)
    line = command(plan_request, chosen)
    assert f"--replicas {chosen.replicas} --tp {chosen.ranks} --target {TARGET} --draft {DRAFT}" in line


def test_the_command_reads_a_directory_and_prints_json(tmp_path: Path) -> None:
    tiny("qwen2").config.save_pretrained(tmp_path)
    options = ["--target", str(tmp_path), "--draft", "none", "--gpus", "2", "--dtype", "float32", "--json"]
    done = CliRunner().invoke(commands, ["plan", *options])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [p["name"] for p in said["placements"]] == ["2 x 1 GPU", "1 x TP 2"]
    assert said["pick"]["name"] == "2 x 1 GPU"  # a tiny model gains nothing from a second GPU
    assert str(tmp_path) in said["command"]


def test_an_adapter_has_the_shape_of_its_base_which_is_named(tmp_path: Path) -> None:
    named, other = "smollm2-135m-instruct", DRAFT
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": named}))
    (tmp_path / "adapter_model.safetensors").touch()
    assert shape_of(str(tmp_path)) == replace(shape_of(named), name=str(tmp_path), base=named)
    assert shape_of(str(tmp_path), other).parameters == shape_of(other).parameters
    arguments = ["plan", "--target", str(tmp_path), "--draft", "none", "--json"]
    printed = CliRunner().invoke(commands, arguments)
    assert json.loads(printed.stdout)["target"]["base"] == named
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelRefused, match="names no base model; set BASIC_BASE_MODEL"):
        shape_of(str(tmp_path))


def test_a_model_without_a_configuration_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=TARGET):
        shape_of(str(tmp_path))


def test_a_placement_that_does_not_fit_has_no_throughput() -> None:
    assert Placement(1, 1, 0, GIB, refusal="too large").best_tokens_per_s == 0


VIEWS = {"view", "transpose", "permute", "slice", "select", "unsqueeze", "expand", "alias", "detach", "t", "split"}
VIEWS |= {"reshape", "_unsafe_view", "empty"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def test_a_layer_launches_as_many_kernels_as_the_forecast_assumes() -> None:
    counts = []
    make_model: Any = Qwen2ForCausalLM._from_config  # transformers leaves it untyped
    for layers in (1, 2):
        config = Qwen2Config(**SHAPE | {"num_hidden_layers": layers})
        model = PackedModel(
            make_model(config, attn_implementation=ATTENTION_NAME),
            slots=1,
            capacity=64,
            cpu_kernels=False,
        )
        with Operations() as operations:
            model.forward([chain(0, 1, [3, 4, 5], keep_last=True)])
        counts.append(operations.count)
    assert counts[1] - counts[0] == KERNELS_PER_LAYER
