"""`basic up`, `down`, `api` and `doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.extras import needs
from jobs.cli.options import FAILED, AsJson
from jobs.cli.render import findings_table, make_console
from jobs.settings import JobsSettings

if TYPE_CHECKING:
    from jobs.local.state import LocalService


def up(
    detach: Annotated[bool, typer.Option("--detach", help="Start the service in the background and return.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on this machine: queue, database, API server and worker. Ctrl-C stops it.

    Example: basic up --detach
    """
    with needs("worker"):
        from jobs.local import service as local
    settings = JobsSettings()

    def announce(service: LocalService) -> None:
        typer.echo(json.dumps(asdict(service)) if as_json else _announcement(service, detach))

    if not detach:
        raise typer.Exit(local.up(settings, announce=announce))
    announce(local.start_detached(settings))


def down() -> None:
    """Stop the service that `basic up` started.

    Example: basic down
    """
    with needs("api"):
        from jobs.local import service as local
    stopped = local.down(JobsSettings().data_dir)
    typer.echo("Stopped" if stopped else "Nothing was running")


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: BASIC_API_HOST.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port. Default: BASIC_API_PORT."),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write the URL to this file when the server accepts connections.")
    ] = None,
) -> None:
    """Run the API server.

    Example: basic api --host 0.0.0.0 --port 8000
    """
    with needs("api"):
        from jobs.api.server import serve
    given = {name: value for name, value in (("api_host", host), ("api_port", port)) if value is not None}
    serve(JobsSettings().model_copy(update=given), ready_file)


def doctor(as_json: AsJson = False) -> None:
    """Check every part of this installation and say what to do about problems. Exit status 1 if there is one.

    Example: basic doctor
    """
    with needs("api"):
        from jobs.upkeep.doctor import examine
    findings = examine(JobsSettings())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        rows = ((finding.part, finding.status, finding.message, finding.advice) for finding in findings)
        make_console().print(findings_table(rows))
    raise typer.Exit(FAILED if any(finding.status == "problem" for finding in findings) else 0)


def _announcement(service: LocalService, detached: bool) -> str:
    stop = "Stop it with: basic down" if detached else "Ctrl-C stops it"
    addresses = Path(service.data_dir, "up.json")
    return (
        f"bASIC is running at {service.api_url}\nData directory: {service.data_dir}\n"
        f"Addresses of queue and database, with passwords: {addresses}\n{stop}"
    )
