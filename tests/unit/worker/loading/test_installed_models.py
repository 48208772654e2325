"""`basic models list | ps | rm`: what is on this machine, who serves it, and that nothing in use is deleted."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from storage import writes
from storage.session import Database
from storage.settings import sqlite_url
from tests.databases import write_migrated
from tests.factories import a_worker_card
from worker.cli import commands
from worker.loading.model_store import PACKAGED

CONFIG = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "max_position_embeddings": 64}


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"x" * 1000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a packaged model, a converted one, one of the hub, and a download under way."""
    monkeypatch.setenv("BASIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("BASIC_DATABASE_URL", sqlite_url(tmp_path / "basic.sqlite3"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    models = tmp_path / "cache/models"
    for name in ("smollm2-135m-instruct", "mine-0123456789ab", ".mine-under-way"):
        write_model(models / name)
    snapshots = tmp_path / "hub/models--acme--tiny/snapshots"
    write_model(snapshots / ("a" * 40))
    refs = snapshots.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    return models


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(commands, ["models", *arguments])
    assert done.exit_code == status, done.exception
    return done.output if status == 0 else str(done.exception)


def listed() -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in json.loads(run("list", "--json"))}


def serve(database: Database, target: str, draft: str | None = None, hostname: str | None = None) -> None:
    card = a_worker_card(id=f"worker-{target}", hostname=hostname or socket.gethostname(), target=target, draft=draft)
    with database.write() as session:
        writes.register_worker(session, card)


@pytest.fixture
def database(cache: Path) -> Iterator[Database]:
    file = cache.parents[1] / "basic.sqlite3"
    write_migrated(file)
    database = Database.open(sqlite_url(file))
    yield database
    database.dispose()


def test_the_list_has_what_is_installed_with_its_size_and_what_can_be_pulled(cache: Path) -> None:
    found = listed()
    assert found.keys() == {"smollm2-135m-instruct", "mine-0123456789ab", "acme/tiny"}
    assert [found[name]["source"] for name in sorted(found)] == ["hub", "converted", "packaged"]
    for model in found.values():
        assert model["bytes"] == 1000 + len(json.dumps(CONFIG))
        assert (model["architecture"], model["dtype"], model["context_tokens"]) == ("LlamaForCausalLM", "bfloat16", 64)
    run("rm", "smollm2-135m-instruct")
    assert listed()["smollm2-135m-instruct"]["installed"] is False
    assert "not downloaded" in run("list")


def test_a_machine_without_a_cache_lists_the_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    assert listed().keys() == PACKAGED.keys()


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "mine-0123456789ab", "acme/tiny"])
def test_a_removed_model_is_gone_and_the_others_stay(cache: Path, name: str) -> None:
    before = {model for model, fields in listed().items() if fields["installed"]}
    assert run("rm", name) == f"Removed {name}: 0 MB are free\n"
    assert {model for model, fields in listed().items() if fields["installed"]} == before - {name}
    assert (cache / ".mine-under-way").is_dir()


def test_a_name_that_is_not_installed_is_refused_with_those_that_are(cache: Path) -> None:
    for name in ("other", "../models/mine-0123456789ab", ".mine-under-way", ""):
        assert "is not on this machine; installed: acme/tiny, mine-0123456789ab" in run("rm", name, status=1)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "target", "draft"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct", None),
        ("smollm2-135m-instruct", "other", "smollm2-135m-instruct"),
        ("mine-0123456789ab", "mine.gguf", None),
        ("mine-0123456789ab", "other", "/models/mine.gguf"),
        ("acme/tiny", "acme/tiny", None),
    ],
)
def test_a_model_that_a_worker_of_this_machine_serves_stays(
    cache: Path, database: Database, name: str, target: str, draft: str | None
) -> None:
    serve(database, target, draft)
    assert "a worker of this machine serves" in run("rm", name, status=1)
    assert listed()[name]["installed"]
    run("rm", name, "--force")
    assert name not in listed() or not listed()[name]["installed"]


def test_workers_of_other_machines_and_stopped_ones_hold_nothing(cache: Path, database: Database) -> None:
    serve(database, "acme/tiny", hostname="another")
    run("rm", "acme/tiny")
    serve(database, "smollm2-135m-instruct")
    with database.write() as session:
        writes.mark_stopped(session, "worker-smollm2-135m-instruct")
    run("rm", "smollm2-135m-instruct")


def test_ps_shows_live_workers_with_their_load(cache: Path, database: Database) -> None:
    assert run("ps") == "No worker runs. Start one with: basic worker\n"
    serve(database, "acme/tiny", "suffix")
    with database.write() as session:
        load = {"sequences": 3, "waiting_sequences": 0, "max_sequences": 64, "kv_tokens": 90, "kv_capacity_tokens": 900}
        writes.update_load(session, "worker-acme/tiny", load)
    (worker,) = json.loads(run("ps", "--json"))
    assert (worker["model"], worker["draft"], worker["sequences"], worker["max_sequences"]) == (
        "acme/tiny",
        "suffix",
        3,
        64,
    )
    shown = run("ps")
    assert "3 of 64" in shown
    assert "90 of 900 (10%)" in shown
