"""Every documented value of every setting starts. The settings and their values are read from the settings classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from jobs.errors import SetupError
from jobs.settings import read_settings
from tests.models import load_copy, save_tiny
from worker.loading import loader, model_store
from worker.loading.loader import load_engine
from worker.node.supervisor import is_needed, supervise
from worker.settings import WorkerSettings

FILES = {"basic.sqlite3"}  # a description names it, and it is no value
NOT_HERE = {("replicas", "0")}  # as many as there are GPUs: the supervisor starts them


def documented(field: FieldInfo) -> set[str]:
    """Return the values that a field's type and description name."""
    found = {str(value) for value in get_args(field.annotation)} if get_origin(field.annotation) is Literal else set()
    said = field.description or ""
    found |= set(re.findall(r"`([^`]+)`", said)) - FILES
    found |= set(re.findall(r"(?:^|[;,] |\. )([a-z0-9-]+):", said)) - {"empty"}
    return found | ({""} if "empty:" in said else set())


def values() -> Iterator[tuple[str, str]]:
    """Return every setting with each of its documented values."""
    fields: dict[str, FieldInfo] = {}
    for entry in entry_points(group="basic.settings"):
        fields |= entry.load().model_fields
    for name, field in fields.items():
        yield from ((name, value) for value in sorted(documented(field)))


def test_the_values_are_found_in_the_classes() -> None:
    found = set(values())
    assert {("draft", "suffix"), ("draft", "none"), ("draft", ""), ("device_map", "auto"), ("api_port", "0")} <= found
    assert {("mode", "paper"), ("dtype", "bfloat16"), ("draft_ranks", "all"), ("log_format", "json")} <= found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Observed(WorkerSettings):
    """Settings that note which fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in WorkerSettings.model_fields:
            READ.add(name)
        return super().__getattribute__(name)


READ: set[str] = set()
LOADED: list[dict[str, Any]] = []  # the fields that a load has read, with their values


def load_once(settings: WorkerSettings) -> None:
    """Load the engine, unless a load that read the same values has succeeded: most settings are of other processes."""
    if any(all(getattr(settings, name) == value for name, value in read.items()) for read in LOADED):
        return
    READ.clear()
    observed = Observed.model_construct(**vars(settings))
    assert load_engine(observed).name
    LOADED.append({name: getattr(settings, name) for name in READ})


@pytest.mark.parametrize(("name", "value"), sorted(values()))
def test_every_documented_value_of_every_setting_starts(
    name: str, value: str, tiny: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"target": tiny, "cache_dir": cache_dir, "max_sequences": 2, "max_context": 64, name: value}
    for setting, said in given.items():
        monkeypatch.setenv(f"BASIC_{setting.upper()}", str(said))
    monkeypatch.setattr(loader, "load", load_copy)  # most settings change what is made of the model, and not it
    monkeypatch.setattr(model_store, "_pull_from_hub", lambda hub_id: pytest.fail(f"{hub_id} is not on this machine"))
    assert model_store.main() == 0
    settings = read_settings(WorkerSettings)
    if (name, value) in NOT_HERE:
        assert is_needed(settings)
    else:
        load_once(settings)


@pytest.mark.parametrize("draft", ["suffix", "none"])
def test_suffix_and_none_are_not_downloaded_as_models(draft: str) -> None:
    assert WorkerSettings(target="tiny", draft=draft).models == ("tiny",)


def test_an_unused_draft_is_not_downloaded() -> None:
    assert WorkerSettings(target="tiny", draft="some/draft").models == ("tiny", "some/draft")
    assert WorkerSettings(target="tiny", draft="some/draft", mode="plain").models == ("tiny",)


def test_each_of_several_targets_has_its_draft() -> None:
    def drafts(draft: str) -> list[tuple[str, str]]:
        return [(one.target, one.draft) for one in WorkerSettings(target="a, b", draft=draft).for_each_target()]

    assert drafts("") == [("a", ""), ("b", "")]
    assert drafts("none") == [("a", "suffix"), ("b", "suffix")]
    assert drafts(",none") == [("a", ""), ("b", "suffix")]
    assert drafts("some/draft, suffix") == [("a", "some/draft"), ("b", "suffix")]
    assert WorkerSettings(target="a,b", draft=",c").for_each_target()[1].models == ("b", "c")


def test_drafts_that_can_belong_to_more_than_one_target_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_TARGET", "a,b")
    monkeypatch.setenv("BASIC_DRAFT", "some/draft")
    with pytest.raises(
        SetupError, match=r"BASIC_DRAFT: .*1 drafts for 2 targets; name one for each, in the same order"
    ):
        read_settings(WorkerSettings)


@pytest.mark.parametrize(
    ("target", "why"), [("x/a,/y/a,/z/a", "the name 'a'"), ("a,,b", "empty name"), ("a,", "empty name")]
)
def test_targets_without_a_name_of_their_own_are_refused(
    target: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASIC_TARGET", target)
    with pytest.raises(SetupError, match=f"BASIC_TARGET: .*{why}"):
        read_settings(WorkerSettings)


def test_a_path_with_a_comma_is_one_target(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert WorkerSettings(target=str(folder)).targets == (str(folder),)


def test_commands_that_load_one_model_refuse_several(tmp_path: Path) -> None:
    with pytest.raises(
        SetupError, match="a,b names several models, which only a worker serves; name one with --target"
    ):
        load_engine(WorkerSettings(target="a,b", cache_dir=tmp_path))


@pytest.mark.parametrize(("name", "value"), [("tp", 2), ("device_map", "auto")])
def test_several_models_are_not_spread_over_devices(name: str, value: Any) -> None:
    with pytest.raises(SetupError, match=f"BASIC_{name.upper()} spreads one model over devices"):
        supervise(WorkerSettings(target="a,b", **{name: value}))


def test_a_value_that_is_none_of_the_documented_ones_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BASIC_DTYPE", "float16")
    with pytest.raises(SetupError, match=r"^BASIC_DTYPE: .*'bfloat16'"):
        read_settings(WorkerSettings)
    assert model_store.main() == 78
    assert capsys.readouterr().err.startswith("BASIC_DTYPE: ")
