"""A LoRA adapter is a model of its own: its text is that of the model that peft merges, in every kind of LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.errors import SetupError
from jobs.messages import COMPLETIONS_ENDPOINT
from jobs.settings import JobsSettings
from tests.models import load_copy, save_tiny
from worker.checks import checks
from worker.engine.model.loading import load
from worker.generate import generate, request_for
from worker.loading.loader import load_engine
from worker.loading.model_store import resolve
from worker.settings import WorkerSettings

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, when these tests make adapters

PROMPT = "abcabcabcabc"
LAYERS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora-by-layer": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "embedding-and-whole-layer": {"target_modules": [*LAYERS, "embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "french")


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy of a LoRA adapter, to change."""
    return Path(shutil.copytree(plain, tmp_path / "french"))


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Save an adapter of random weights, which are large enough to change the text."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 9, "target_modules": LAYERS, "init_lora_weights": False, **options}
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_peft_merges(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "french", **KINDS[kind])
    expected = merged_by_peft(base, adapter).state_dict()
    found = load(resolve(str(adapter), tmp_path), dtype=torch.float32, device=torch.device("cpu")).state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    plain = load_copy(str(base), dtype=torch.float32, device=torch.device("cpu")).state_dict()
    changed = {name.split(".")[-2] for name in expected if not torch.equal(plain[name], expected[name])}
    assert changed == {*KINDS[kind].get("target_modules", LAYERS), *KINDS[kind].get("modules_to_save", ())}


def test_the_text_of_a_worker_is_that_of_transformers(base: Path, adapter: Path, tmp_path: Path) -> None:
    settings = WorkerSettings(
        target=str(adapter), draft="suffix", dtype="float32", cache_dir=tmp_path, max_context=300, max_sequences=1
    )
    loaded = load_engine(settings, on_message=lambda _: None)
    assert loaded.name == "french"
    request = request_for(loaded.name, PROMPT, max_tokens=24, temperature=0.0, seed=0, stop=())
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = merged_by_peft(base, adapter).generate(prompt, max_new_tokens=24, do_sample=False)
    expected = written[0, prompt.shape[1] :].tolist()
    assert list(generate(loaded, request, endpoint=COMPLETIONS_ENDPOINT).token_ids) == expected
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    of_the_base = model.generate(prompt, max_new_tokens=24, do_sample=False)
    assert of_the_base[0, prompt.shape[1] :].tolist() != expected, "the adapter must change the text"


def test_each_weight_of_a_bfloat16_base_is_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    weights, lora = load_file(half / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    found = load_file(Path(resolve(str(adapter), tmp_path, base=str(half))) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    assert torch.equal(found[f"{name}.weight"], (weights[f"{name}.weight"].float() + 9 / 4 * (b @ a)).bfloat16())


def test_a_merge_is_made_once_and_again_when_the_adapter_changes(adapter: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = resolve(str(adapter), tmp_path, said.append)
    assert resolve(str(adapter), tmp_path, said.append) == first
    assert len(said) == 1
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file)
    assert resolve(str(adapter), tmp_path, said.append) != first


def test_the_base_may_be_named_and_the_tokenizer_of_the_adapter_goes_first(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    change(adapter, base_model_name_or_path="/nowhere/base")
    with pytest.raises(SetupError, match=r"is an adapter of /nowhere/base: there is no .* set BASIC_BASE_MODEL"):
        resolve(str(adapter), tmp_path)
    change(adapter, base_model_name_or_path=None)
    with pytest.raises(SetupError, match="names no base model; set BASIC_BASE_MODEL"):
        resolve(str(adapter), tmp_path)
    (adapter / "chat_template.jinja").write_text("adapter")
    merged = Path(resolve(str(adapter), tmp_path, base=str(base)))
    assert (merged / "chat_template.jinja").read_text() == "adapter"
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def drop_a_weight(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file)


def add_a_weight(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.layers.9.lora_A.weight": torch.ones(1)}, file)


def pickle_it(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop_a_weight, "lacks weights: base_model.model.model.layers.0"),
        (add_a_weight, "has weights for layers that the base lacks: base_model.model.model.layers.9"),
        (pickle_it, "pickles are never loaded"),
        (lambda adapter: change(adapter, alora_invocation_tokens=[1]), "activated LoRA"),
        (lambda adapter: change(adapter, layer_replication=[[0, 1]]), "replicated layers"),
        (lambda adapter: change(adapter, a_later_field=True), "has a_later_field, which peft"),
        (lambda adapter: change(adapter, r=7), "could not be merged"),
        (lambda adapter: change(adapter, peft_type="IA3"), "of type IA3; only LoRA"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "can't be read"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"half"), "could not be merged"),
    ],
)
def test_an_adapter_that_can_not_be_merged_exactly_is_refused_by_name_and_leaves_nothing(
    spoil: Callable[[Path], Any], reason: str, adapter: Path, tmp_path: Path
) -> None:
    spoil(adapter)
    with pytest.raises(SetupError, match=reason):
        resolve(str(adapter), tmp_path)
    assert not list((tmp_path / "models").glob("*"))


def test_an_adapter_of_tied_embeddings_is_refused(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True, num_hidden_layers=1)
    adapter = save_adapter(tied, tmp_path / "french", target_modules=["embed_tokens"])
    with pytest.raises(SetupError, match="ties to its output layer"):
        resolve(str(adapter), tmp_path)


def test_the_doctor_says_into_what_an_adapter_is_merged_or_why_it_is_not(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASIC_TARGET", str(adapter))
    found = next(iter(checks(JobsSettings())))
    assert (found.status, found.message) == ("ok", f"{adapter} is merged into {base} at the first start")
    monkeypatch.setenv("BASIC_TARGET", f"{base},{adapter}")
    assert [finding.message for finding in checks(JobsSettings())][:2] == [f"{base} is in {base}", found.message]
    pickle_it(adapter)
    assert [finding.status for finding in checks(JobsSettings())][:2] == ["ok", "problem"]
