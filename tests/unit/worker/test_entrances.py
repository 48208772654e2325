"""Entry points without servers, on a model of two layers: `generate_with_*`, `basic generate`, and the benchmarks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import worker
from jobs.errors import UnsupportedParameter
from jobs.messages import COMPLETIONS_ENDPOINT
from tests.databases import write_migrated
from tests.models import byte_tokenizer, load_copy, save_tiny, tiny
from worker import benchmark, seed, start
from worker.bench import grid, mixed_lengths, schema_validity
from worker.bench.host_costs import __main__ as host_costs
from worker.bench.host_costs.arrivals import KINDS
from worker.benchmark import OWN_MODES
from worker.cli import commands
from worker.engine.cpu.kernels import kernels
from worker.engine.model.loading import load
from worker.engine.options import Mode
from worker.generate import generate as decoded
from worker.generate import request_for, resident_model
from worker.loading import loader
from worker.loading.loader import load_engine
from worker.settings import WorkerSettings

PROMPT = "abcabcabcabc"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny(vocab=258)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def environment(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_TARGET", str(model_dir))
    monkeypatch.setenv("BASIC_MAX_CONTEXT", "300")
    monkeypatch.setattr(loader, "load", load_copy)
    monkeypatch.setattr(loader, "load_engine", lambda settings, *_, **__: resident_model(settings))


def test_the_seeds_functions_write_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.node.placement.allowed_cpus", lambda: {0})  # nothing to split over
    standard = worker.generate_with_standard_model(PROMPT, max_tokens=20)
    assert standard
    assert worker.generate_with_speculative_decoding(PROMPT, max_tokens=20, use_parallel=True) == standard
    assert "".join(worker.generate_with_streaming_speculative_decoding(PROMPT, max_tokens=20)) == standard


@pytest.mark.parametrize(
    ("architecture", "dtype", "ranks"), [("llama", "bfloat16", 2), ("gemma3", "bfloat16", 1), ("gemma3", "float32", 2)]
)
def test_use_parallel_splits_a_model_over_cores_where_that_keeps_its_text(
    architecture: str, dtype: str, ranks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("worker.node.placement.allowed_cpus", lambda: set(range(4)))
    tiny(architecture).config.save_pretrained(tmp_path)  # two KV heads
    if kernels(getattr(torch, dtype)) is None:
        pytest.skip("needs a C compiler")
    assert seed._max_ranks(WorkerSettings(target=str(tmp_path), dtype=dtype)) == ranks


def test_texts_of_mixed_lengths_are_the_same_with_pages_on_demand_and_more_run_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "hello"}))
    monkeypatch.setattr(mixed_lengths, "_SHORTEST", 3)
    monkeypatch.setattr(mixed_lengths, "_LONGEST", 12)
    mixed_lengths.main(prompts=prompts, requests=40, kv_tokens=700, context=300, as_json=True)
    reserved, on_demand = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert reserved["tokens"] == on_demand["tokens"]
    assert on_demand["mean_batch"] > 1.5 * reserved["mean_batch"]


def test_a_failing_stream_raises_where_it_is_read() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        list(worker.generate_with_streaming_speculative_decoding(PROMPT, max_tokens=0))


@pytest.mark.parametrize("mode", ["plain", "opt-tree", "paper"])
def test_generate_prints_text_tokens_and_steps(mode: str) -> None:
    done = CliRunner().invoke(commands, ["generate", PROMPT, "--mode", mode, "--max-tokens", "15", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["completion_tokens"] == len(said["token_ids"]) == sum(s["emitted_tokens"] for s in said["steps"])
    assert said["finish_reason"] in ("stop", "length")
    assert {"tree_nodes", "tree_depth", "accepted_tokens", "draft_ms", "verify_ms", "step_ms"} <= said["steps"][
        0
    ].keys()


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_generate_prints_logprobs_in_the_shape_of_its_endpoint(raw: list[str]) -> None:
    arguments = ["generate", PROMPT, "--mode", "paper", "--max-tokens", "9", "--logprobs", "2", "--json", *raw]
    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    found = said["logprobs"]
    if raw:
        assert len(found["tokens"]) == len(found["text_offset"]) == said["completion_tokens"]
        assert all(
            max(top.values()) == p for top, p in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
        )
    else:
        assert len(found["content"]) == said["completion_tokens"]
        assert all(t["top_logprobs"][0]["logprob"] == t["logprob"] for t in found["content"])


@pytest.mark.parametrize("mode", ["plain", "paper"])
def test_generate_ends_before_a_stop_string(mode: str) -> None:
    def said(*more: str) -> Any:
        arguments = ["generate", PROMPT, "--mode", mode, "--max-tokens", "25", "--json", *more]
        done = CliRunner().invoke(commands, arguments)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    whole = said()["text"]
    stop = whole[8:10]
    stopped = said("--stop", stop)
    assert (stopped["text"], stopped["finish_reason"]) == (whole.partition(stop)[0], "stop")
    assert stopped["completion_tokens"] == len(stopped["token_ids"]) < 25
    assert sum(s["emitted_tokens"] for s in stopped["steps"]) == stopped["completion_tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "  "], "PROMPT: the prompt is empty"),
        (["generate", PROMPT, "--logprobs", "1"], "--logprobs: log-probabilities need --json"),
        (["generate", "x", "--mode", "quick"], "mode"),
        (["generate", "x" * 400], "context of 300 tokens"),
        (["bench", "--modes", "warp"], "'warp' is not a mode"),
        (["bench", "--batch", "one"], "--batch"),
        (["bench", "--batch", "0"], "batch sizes must be at least 1"),
    ],
)
def test_wrong_usage_names_the_error(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code != 0
    assert words in done.output + str(done.exception)


def test_a_prompt_beyond_the_kv_memory_is_refused_as_one_beyond_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_KV_TOKENS", "200")
    done = CliRunner().invoke(commands, ["generate", "x" * 180])
    assert done.exit_code != 0
    assert "context of 139 tokens" in str(done.exception)


def test_a_missing_model_names_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_TARGET", "/nowhere/at/all")
    done = CliRunner().invoke(commands, ["generate", "x"])
    assert done.exit_code != 0
    assert "there is no model directory /nowhere/at/all" in str(done.exception)


def test_the_benchmark_measures_both_engines_on_the_same_tokens(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT}{i}"}) + "\n" for i in range(3)))
    modes = "plain,opt-tree,paper,transformers-greedy,transformers-prompt-lookup"
    arguments = [
        "bench",
        "--prompts",
        str(prompts),
        "--batch",
        "1,2",
        "--modes",
        modes,
        "--max-tokens",
        "6",
        "--runs",
        "1",
    ]
    done = CliRunner().invoke(commands, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert {(r["mode"], r["batch"]) for r in results} == {
        *((mode, 1) for mode in modes.split(",")),
        *((mode, 2) for mode in modes.split(",") if mode != "transformers-prompt-lookup"),
    }
    assert all(r["same_text"] and r["tokens_per_s"] > 0 and r["runs"] == 1 for r in results)


def test_the_grid_has_a_cell_for_every_batch_draft_and_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_MIN_CELL_S", 0.0)
    monkeypatch.setattr(grid, "_MIN_PROMPTS", 2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    arguments = ["bench", "--grid", "--batch", "1,2", "--max-tokens", "3", "--runs", "1", "--json"]
    done = CliRunner().invoke(commands, [*arguments, "--prompts", str(prompts)])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    found = {(r["mode"], r["batch"], r["temperature"], r["drafter"]) for r in results}
    assert found == set(product(OWN_MODES, (1, 2), (0.0, 1.0), ("replay", "random", "suffix")))
    assert all(r["tokens_per_s"] > 0 for r in results)


def test_the_host_costs_of_a_step_are_the_sum_of_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    host_costs.main(sequences="3", mode="plain,trees", steps=4, temperature=0.0, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["mode"], line["nodes_per_step"]) for line in lines] == [("plain", 0), ("trees", 24)]
    for line in lines:
        assert line["tokens_per_step"] >= 3
        assert sum(line["parts_ms"].values()) == pytest.approx(line["median_ms"], abs=0.001)
        assert {"schedule", "plan", "pack", "layout", "walk", "results", "hand over"} <= set(line["parts_ms"])


def test_the_costs_of_arrivals_are_those_of_all_steps_until_they_decode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # of all tests of this process: they would take far longer
    host_costs.main(arrivals=9, runs=1, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompts"] for line in lines] == list(KINDS)
    assert [line["steps"] for line in lines] == [6, 5, 3, 2, 2], "512 tokens of the prompts are prefilled in a step"
    assert all(line["admission_ms"] >= line["admission_best_ms"] > 0 for line in lines)


def test_a_prompt_file_that_is_no_jsonl_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\nnonsense\n')
    done = CliRunner().invoke(commands, ["bench", "--prompts", str(file)])
    assert "line 2" in str(done.exception)


def test_the_seeds_benchmark_prints_both_rates_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--prompt", PROMPT, "--max-tokens", "10", "--runs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["standard", "speculative", "ratio"]
    standard, speculative, ratio = (float(line.split()[1].rstrip("x")) for line in lines)
    assert ratio == pytest.approx(speculative / standard, rel=0.05)


def test_a_model_that_is_refused_ends_every_process_that_loads_it_with_a_sentence_and_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_tiny(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"half")
    done = CliRunner().invoke(commands, ["generate", PROMPT, "--target", str(broken)])
    assert done.exit_code == 78
    assert "is damaged or truncated" in done.stderr.splitlines()[-1]
    write_migrated(tmp_path / "jobs.sqlite3")
    monkeypatch.setenv("BASIC_DATABASE_URL", f"sqlite:///{tmp_path}/jobs.sqlite3")
    assert start.run(WorkerSettings(target=str(broken))) == 78
    assert "is damaged or truncated" in capsys.readouterr().err.splitlines()[-1]


def save_longrope(directory: Path) -> Any:
    """Save a tiny model with longrope, 32 original positions of 512; return it as transformers loads it."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.1] * 16,
        "long_factor": [4.0] * 16,
        "factor": 16.0,
    }
    model = tiny(vocab=258)
    model.config.rope_parameters = rope
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def test_a_text_has_the_factors_of_longrope_that_its_request_alone_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of transformers for texts that stay below the original positions, and that are above from the start."""
    monkeypatch.delenv("BASIC_MAX_CONTEXT")
    monkeypatch.setattr(loader, "load", load)
    own, said = save_longrope(tmp_path / "long"), list[str]()
    settings = WorkerSettings(target=str(tmp_path / "long"), dtype="float32", draft="suffix", max_sequences=2)
    loaded = load_engine(settings, said.append)
    assert loaded.options.max_context == 512
    assert any("more than 32 tokens, prompt and max_tokens together" in sentence for sentence in said)
    assert loaded.numerics.parts["rotary"] == "factors by text"
    for prompt, max_tokens in ((PROMPT, None), (PROMPT, 10), (PROMPT * 4, 12)):
        ids = loaded.codec.tokenizer(prompt, return_tensors="pt").input_ids
        assert (len(ids[0]) > 32) == (prompt != PROMPT)
        longest = 32 if max_tokens is None else len(ids[0]) + max_tokens
        with torch.no_grad():
            exact = own.generate(ids, max_length=longest, do_sample=False, eos_token_id=256, pad_token_id=0)
        for mode in Mode:
            request = request_for("long", prompt, max_tokens=max_tokens)
            done = decoded(loaded, request, endpoint=COMPLETIONS_ENDPOINT, mode=mode)
            assert [*done.prompt_token_ids, *done.token_ids] == exact[0].tolist(), (max_tokens, mode)


def test_answers_by_a_schema_are_valid_and_a_bad_schema_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schemas = {
        "choice": {"enum": ["yes", "no"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    }
    refused = {"unique": {"type": "array", "uniqueItems": True}}
    for name, schema in (schemas | refused).items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(schema))
        done = CliRunner().invoke(commands, ["generate", PROMPT, "--schema", str(file), "--json", "--max-tokens", "60"])
        if name in refused:
            assert isinstance(done.exception, UnsupportedParameter)
            assert "uniqueItems" in str(done.exception)
        else:
            jsonschema.validate(json.loads(json.loads(done.stdout)["text"]), schema)
    file.write_text("".join(json.dumps({"name": n, "schema": s}) + "\n" for n, s in (schemas | refused).items()))
    with pytest.raises(typer.Exit) as ended:
        schema_validity.main(file, temperatures="0,1", max_tokens=60, batch=2, limit=9)
    said = capsys.readouterr().out
    assert ended.value.exit_code == 0, said
    assert "unique: refused" in said
    assert "temperature 0: 2 valid of 3" in said
    assert "temperature 1: 2 valid of 3" in said
