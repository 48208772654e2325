"""One model under the names that people use for it."""

from __future__ import annotations

import pytest

from jobs.errors import SetupError, UnknownModel
from jobs.settings import JobsSettings, read_settings
from jobs.submission.models import ModelNames, known_models
from storage.session import Database

SMOL = "smollm2-135m-instruct"


def models(*names: str, aliases: dict[str, str] | None = None) -> ModelNames:
    return ModelNames(dict.fromkeys(names), aliases)


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (SMOL, SMOL),
        (SMOL, "SmolLM2-135M-Instruct"),
        (SMOL, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (SMOL, "huggingfacetb/smollm2-135m-instruct"),
        (SMOL, f"openai/{SMOL}"),
        (SMOL, f"hosted_vllm/{SMOL}"),
        (SMOL, f"openai/hosted_vllm/{SMOL}"),
        (SMOL, "hosted_vllm/HuggingFaceTB/SmolLM2-135M-Instruct"),
        (SMOL, "gpt-4o-mini"),
        (SMOL, "openai/GPT-4o-mini"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "openai/qwen/qwen2.5-0.5b-instruct"),
        ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("openai/gpt-oss-20b", "openai/gpt-oss-20b"),
    ],
)
def test_hub_id_local_name_case_prefixes_and_aliases_name_one_model(known: str, asked: str) -> None:
    names = models(known, "other", aliases={"gpt-4o-mini": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    assert names.find(asked) == known
    assert names.find("other") == "other"


@pytest.mark.parametrize(
    "asked",
    [
        *("gpt-9", "", "/", "openai/", "openai/gpt-9", "smollm2", "smollm2-135m", f"someone/{SMOL}"),
        *(f"/models/{SMOL}", f"../{SMOL}", f"https://evil/{SMOL}", f"{SMOL}/", f"a/b/{SMOL}", 7, None, [SMOL]),
    ],
)
def test_another_name_is_none(asked: object) -> None:
    assert models(SMOL, "other").find(asked) is None
    with pytest.raises(UnknownModel, match=rf"Available: other, {SMOL}\. BASIC_MODEL_ALIASES"):
        models(SMOL, "other").resolve(asked)


def test_a_name_that_could_mean_two_models_means_none_and_an_exact_name_comes_first() -> None:
    assert models("a/tiny", "b/tiny").find("tiny") is None
    assert models("a/tiny", "b/tiny").find("A/tiny") == "a/tiny"
    assert models("a/tiny", "tiny").find("tiny") == "tiny"
    assert models("tiny", "TINY").find("Tiny") is None
    assert models("tiny", "other", aliases={"tiny": "other"}).find("tiny") == "tiny", "aliases hide no model"
    assert models("tiny", aliases={"gpt": "absent"}).find("gpt") is None


def test_aliases_are_pairs_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_MODEL_ALIASES", "gpt-4o = tiny, ,a/b=c/d")
    assert read_settings(JobsSettings).aliases == {"gpt-4o": "tiny", "a/b": "c/d"}
    monkeypatch.setenv("BASIC_MODEL_ALIASES", "gpt-4o")
    with pytest.raises(SetupError, match=r"BASIC_MODEL_ALIASES: .*'gpt-4o' is not a pair; write NAME=MODEL"):
        read_settings(JobsSettings)


def test_each_target_of_the_settings_is_a_model_and_the_first_is_the_default(database: Database) -> None:
    known = known_models(database, JobsSettings(target="org/small, /models/french"))
    assert (known.names, known.default) == (["french", "org/small"], "org/small")
    assert known.resolve("/models/french") == "french"
