"""The `basic` command: submit, watch and fetch jobs, and run the service. The work is in the client and the servers.

Whatever needs more than the client's packages is imported by the command that needs it. Commands of other packages plug
themselves in through the entry points `basic.commands`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from jobs.cli.csv_export import write_csv
from jobs.cli.keys import key_commands
from jobs.cli.render import closing_table, findings_table, jobs_table, make_console, make_view, status_table
from jobs.client.client import Client, Job, local_service
from jobs.client.outcome import info_words
from jobs.client.prompts import Lines
from jobs.client.results import JobInfo, Output
from jobs.control_characters import safe
from jobs.errors import (
    BasicError,
    ChildRefused,
    InvalidValue,
    NotFound,
    NotRetryable,
    RequestRefused,
    SetupError,
    UnknownSetting,
)
from jobs.input_format import reject_output_suffix
from jobs.json_lines import json_line, one_line
from jobs.logs import without_secrets
from jobs.messages import MAX_COMPARED_REQUESTS, TOOLS_TEMPERATURE, Endpoint, JobStatus
from jobs.processes import BAD_SETTINGS_STATUS
from jobs.reports.stats_tables import stats_tables
from jobs.settings import JobsSettings, refuse_unknown_settings, settings_sentence
from storage.settings import sqlite_file

if TYPE_CHECKING:
    from jobs.local.state import LocalService

FAILED = 1
WRONG_USE = 2

_WRITTEN = (
    "answers are written as JSON lines",
    ".jsonl .ndjson .json .txt",
    "In Python, job.dataframe() gives them as a table, with to_csv, to_parquet and to_excel.",
)
_PATIENCE_S = 8.0  # a person who forgot `basic up` should not wait longer to be told

_NO_JOB = "There is no job yet; submit one with: basic submit FILE.jsonl"
_JOB_ID = re.compile(r"batch_[0-9a-f]{32}")
_ID_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what the service takes
_MOST_NAMED = 5  # ids in one sentence

app = typer.Typer(
    name="basic",
    help="Asynchronous batch generation with adaptive draft trees.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
database_commands = typer.Typer(help="The SQL database.", no_args_is_help=True)
app.add_typer(database_commands, name="db")
app.add_typer(key_commands, name="keys")

JobId = Annotated[str | None, typer.Argument(metavar="[JOB]", help="Id or its beginning; left out: your newest job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Run the command line; every error is one sentence on standard error and an exit status."""
    try:
        refuse_unknown_settings()
        plug_in_commands(app)
        app()
    except (UnknownSetting, ValidationError) as exc:
        _fail(_settings_sentence(exc), WRONG_USE)
    except ChildRefused as exc:
        _fail(str(exc), BAD_SETTINGS_STATUS)
    except BasicError as exc:
        _fail(str(exc), FAILED)
    except ModuleNotFoundError as exc:
        if _is_ours(exc):
            raise  # a fault of ours, not of the installation
        _fail(str(_not_installed(_extra(sys.argv[1:2], exc), exc)), FAILED)


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="One request a line (JSON or text); - for stdin.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the text until the job ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show a progress bar until the job ends.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Wait, then write the answers here.")] = None,
    model: Annotated[str | None, typer.Option(help="Target model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Of lines that name none: 0 decodes greedily, 1 is OpenAI's.")
    ] = TOOLS_TEMPERATURE,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    endpoint: Annotated[Endpoint | None, typer.Option(help="Of all requests; left out: what the lines name.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again under the same key adds nothing.")
    ] = None,
    compare_plain: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COMPARED_REQUESTS, help="Decode so many both ways when it is done, and time it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job: a file with one request a line.

    A line is a JSON string, an object with prompt or messages, a line of an OpenAI batch file, or plain text. What a
    line names for itself, such as its temperature, wins over the options.

    Example: basic submit examples/prompts.jsonl --follow --max-tokens 128
    """
    if output is not None:
        reject_output_suffix(output, *_WRITTEN)
        _refuse_unwritable(output, "--output")
    lines = _read_file(file)
    with _connect() as client:
        job = client.submit(
            lines,
            model=model,
            endpoint=endpoint,
            idempotency_key=idempotency_key,
            compare_plain=compare_plain,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        if follow:
            raise typer.Exit(_watch(client, job, as_json, output))
        if wait or output is not None:
            raise typer.Exit(_wait(job, as_json, output))
        info = job.info()
        if as_json:
            _print_json(info)
        else:
            typer.echo(f"Submitted {info.request_counts.total} requests as job {info.id}")
            greedy = ", decoded greedily" if temperature == 0 else ""
            typer.echo(f"Lines that name no temperature have {temperature:g}{greedy}")
            typer.echo(f"Watch it: basic follow {info.id}")
        raise typer.Exit(_say_refused(job, info))


@app.command()
def follow(job: JobId = None, as_json: AsJson = False) -> None:
    """Watch a job until it ends, from whatever is written already.

    Example: basic follow
    """
    with _connect() as client:
        raise typer.Exit(_watch(client, _find(client, job), as_json))


@app.command()
def status(
    job: JobId = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show a progress bar until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a job is.

    Example: basic status --wait
    """
    with _connect() as client:
        found = _find(client, job)
        if wait:
            raise typer.Exit(_wait(found, as_json))
        info = found.info()
        _print_json(info) if as_json else make_console().print(status_table(info, time.time()))


@app.command()
def results(
    job: JobId = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines to this file.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only requests that ended without an answer.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends, as answers come.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the answers of a job so far, in its order.

    Example: basic results --output answers.jsonl
    """
    if output is not None:
        reject_output_suffix(output, *_WRITTEN)
        _refuse_unwritable(output, "--output")
    with _connect() as client:
        found = _find(client, job)
        answers = found.outputs(failed=failed, follow=follow)
        if output is not None:
            _write_results(answers, output)
            return
        for answer in answers:
            if as_json:
                typer.echo(json_line(answer))
                continue
            typer.echo(f"{safe(answer.custom_id)} ({answer.status})")
            for choice in answer.choices:
                typer.echo(safe(choice.text))
            if answer.error is not None:
                typer.echo(safe(answer.error.message))


@app.command()
def retry(
    job: JobId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the new job until it ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show a progress bar until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the requests of an ended job again that have no answer, as a new job.

    Example: basic retry --wait
    """
    with _connect() as client:
        ended = _find(client, job)
        info = ended.info()
        if info.status is JobStatus.COMPLETED and not info.request_counts.failed:
            said = f"There is nothing to run again: every request of {info.id} has an answer"
            _print_json(info) if as_json else typer.echo(said)
            return
        if info.status is JobStatus.COMPLETED and not _may_succeed(ended):
            raise NotRetryable(
                "The requests that failed would fail again: their lines are wrong. "
                f"See why: basic results --failed {info.id}    Correct them and submit those: basic submit FILE"
            )
        again = ended.retry()
        if follow:
            raise typer.Exit(_watch(client, again, as_json))
        if wait:
            raise typer.Exit(_wait(again, as_json))
        info = again.info()
        if as_json:
            _print_json(info)
        else:
            typer.echo(f"Running {info.request_counts.total} requests of {info.retry_of} again as job {info.id}")
            typer.echo(f"Watch it: basic follow {info.id}")


@app.command()
def cancel(job: Annotated[str, typer.Argument(help="Job id, or its beginning.")], as_json: AsJson = False) -> None:
    """Cancel a job; what is finished stays.

    Example: basic cancel batch_0123456789abcdef
    """
    with _connect() as client:
        info = _find(client, job).cancel()
        _print_json(info) if as_json else typer.echo(f"Job {info.id} is {info_words(info)}")


@app.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first. In a narrow window ids are cut; commands take the beginning of an id.

    Example: basic jobs --limit 5
    """
    with _connect() as client:
        listed = client.jobs(limit)
        if as_json:
            _print_json(listed)
        elif listed:
            console = make_console()
            console.print(jobs_table(listed, console.width, time.time()))
        else:
            typer.echo(_NO_JOB)


@app.command()
def stats(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Job id, or its beginning; everything if left out.")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line a job, for spreadsheets.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw plots into this file.")] = None,
) -> None:
    """Say how fast a job ran, or everything so far, and how much speculation paid.

    Example: basic stats --plot stats.png
    """
    if plot is not None:
        reject_output_suffix(plot, "plots are drawn as PNG", ".png")
        _refuse_unwritable(plot, "--plot")
    with _connect() as client:
        job_id = None if job is None else _find(client, job).id
        if as_csv:
            _print_csv(client, job_id)
            return
        numbers = client.run(lambda client: client.job_stats(job_id) if job_id else client.stats())
        if plot is not None:
            _plot(numbers, job_id, plot)
        if as_json:
            _print_json(numbers)
        elif plot is None:
            make_console().print(stats_tables(numbers))


@app.command("report")
def write_report(
    job: JobId = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="Where to write it.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a report of a job: one HTML file with numbers, plots, errors and samples.

    Example: basic report -o report.html
    """
    reject_output_suffix(output, "a report is HTML", ".html .htm", "A browser prints it as PDF.")
    _refuse_unwritable(output, "--output")
    with _connect() as client:
        found = _find(client, job)
        numbers = client.run(lambda client: client.job_stats(found.id))
        with _needs("plot"):
            from jobs.reports.report import report

            page = report(found.info(), numbers, found.outputs())
    with _writing(output, "--output"):
        output.write_text(page, encoding="utf-8")
    typer.echo(f"Wrote {output}")


def _print_csv(client: Client, job_id: str | None) -> None:
    rows = client.run(lambda client: client.job_rows(job_id))
    write_csv(rows, list(rows[0]) if rows else ["id"], sys.stdout)


def _plot(numbers: dict[str, Any], job_id: str | None, path: Path) -> None:
    with _needs("plot"):
        from jobs.reports.plots import save_png

        with _writing(path, "--plot"):
            save_png(numbers, job_id or "All jobs", path)
    typer.echo(f"Wrote {path}", err=True)


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running and return.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on this machine: queue, database, worker and REST shim. Ctrl-C stops it.

    Example: basic up --detach
    """
    with _needs("worker"):
        from jobs.local import service as local
    settings = JobsSettings()

    def announce(service: LocalService) -> None:
        typer.echo(json.dumps(asdict(service)) if as_json else _announcement(service, detach))

    if not detach:
        raise typer.Exit(local.up(settings, announce=announce))
    announce(local.start_detached(settings))


@app.command()
def down() -> None:
    """Stop the service that `basic up` runs.

    Example: basic down
    """
    with _needs("api"):
        from jobs.local import service as local
    stopped = local.down(JobsSettings().data_dir)
    typer.echo("Stopped" if stopped else "Nothing was running")


@app.command()
def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the URL here once connections are taken.")] = None,
) -> None:
    """Serve the REST shim.

    Example: basic api --host 0.0.0.0 --port 8000
    """
    with _needs("api"):
        from jobs.api.server import serve
    given = {name: value for name, value in (("api_host", host), ("api_port", port)) if value is not None}
    serve(JobsSettings().model_copy(update=given), ready_file)


@database_commands.command("upgrade")
def database_upgrade() -> None:
    """Bring the database to the schema of this version; makes it if there is none.

    Example: basic db upgrade
    """
    with _needs("api"):
        from jobs.schema_check import upgrade_schema
    upgrade_schema(JobsSettings().resolved_database_url)
    typer.echo("The database is up to date")


@database_commands.command("prune")
def database_prune(
    steps_older_than: Annotated[str, typer.Option(metavar="AGE", help="Digits and m, h or d: 30d.")],
    as_json: AsJson = False,
) -> None:
    """Delete the decoding steps of jobs that ended longer ago; jobs and outputs stay.

    Example: basic db prune --steps-older-than 30d
    """
    with _needs("api"):
        from jobs.schema_check import explain_database_errors, require_schema
        from storage.prune import prune_steps
        from storage.session import Database
    age_s = _age_s(steps_older_than)
    url = JobsSettings().resolved_database_url
    require_schema(url)
    with explain_database_errors(url):
        database = Database.open(url, statement_timeout_s=None)
        deleted = sum(prune_steps(database, age_s))
    database.dispose()
    typer.echo(json.dumps({"deleted_steps": deleted}) if as_json else f"Deleted {deleted:,} steps")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at every part of this installation and say what is wrong and what to do; status 1 if something is.

    Example: basic doctor
    """
    with _needs("api"):
        from jobs.upkeep.doctor import examine
    found = examine(JobsSettings())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        rows = ((finding.part, finding.status, finding.message, finding.advice) for finding in found)
        make_console().print(findings_table(rows))
    raise typer.Exit(FAILED if any(finding.status == "problem" for finding in found) else 0)


def plug_in_commands(to: typer.Typer) -> None:
    """Add the commands of other packages; where one can't be imported, commands that say what to install."""
    for entry in entry_points(group="basic.commands"):
        try:
            to.add_typer(entry.load())
        except ModuleNotFoundError as exc:
            _add_placeholders(to, entry, exc)


# What `worker.cli` brings, for an installation that can't import it.
_WORKER_COMMANDS = ("worker", "generate", "bench", "plan", "models", "draft")
_EXTRAS = {"matplotlib": "plot", "pandas": "pandas", "psycopg": "postgres"}  # which brings a package; else the command
_OURS = ("jobs", "storage", "worker", "migrations")


def _add_placeholders(to: typer.Typer, entry: EntryPoint, missing: ModuleNotFoundError) -> None:
    def explain() -> None:
        raise _not_installed(entry.name, missing)

    for name in _WORKER_COMMANDS:
        options = {"ignore_unknown_options": True, "allow_extra_args": True}
        to.command(name, hidden=True, context_settings=options)(explain)


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        raise _not_installed(extra, exc) from exc


def _is_ours(missing: ModuleNotFoundError) -> bool:
    return (missing.name or "").partition(".")[0] in _OURS


def _extra(command: list[str], missing: ModuleNotFoundError) -> str:
    """Return the extra to install for a command that lacks a package."""
    by_command = "worker" if set(command) & {*_WORKER_COMMANDS, "up"} else "api"
    return _EXTRAS.get((missing.name or "").partition(".")[0], by_command)


def _not_installed(extra: str, missing: ModuleNotFoundError) -> SetupError:
    return SetupError(f"This command needs {missing.name}; install it with: pip install 'basic-batch[{extra}]'")


def _age_s(age: str) -> float:
    match = re.fullmatch(r"([0-9]{1,5})([mhd])", age)
    if match is None:
        raise typer.BadParameter("must be digits and m, h or d, such as 30d", param_hint="--steps-older-than")
    return float(int(match[1]) * {"m": 60, "h": 3600, "d": 86_400}[match[2]])


def _read_file(path: Path) -> Lines:
    """Return what a file holds."""
    try:
        if str(path) == "-":
            return Lines(sys.stdin.buffer.read(), name="Standard input")
        return Lines.read(path)
    except OSError as exc:
        raise typer.BadParameter(f"{path} can't be read: {exc.strerror}", param_hint="FILE") from exc


def _connect() -> Client:
    return Client(patience_s=_PATIENCE_S)


def _find(client: Client, asked: str | None) -> Job:
    """Return the job that is meant: by its id, by the beginning of its id, or the newest of the caller's own."""
    if asked is None:
        newest = client.jobs(limit=1, mine=True)
        if not newest:
            raise NotFound(_NO_JOB)
        return client.job(newest[0].id)
    if _JOB_ID.fullmatch(asked):
        return client.job(asked)
    listed = client.jobs(limit=_MOST_NAMED, id_prefix=asked) if _ID_PREFIX.fullmatch(asked) else []
    found = [job.id for job in listed]
    for job_id in found if len(found) == 1 else [job_id for job_id in found if job_id == asked]:
        return client.job(job_id)
    if found:
        raise InvalidValue(f"More than one job begins with {safe(asked)!r}: {', '.join(found)}. Give more of the id.")
    raise NotFound(f"There is no job whose id begins with {safe(asked[:80])!r}; `basic jobs` lists the newest.")


def _wait(job: Job, as_json: bool, output: Path | None = None) -> int:
    """Show how far a job is until it ends and return the exit status; Ctrl-C leaves the job running."""
    try:
        info = job.wait(progress=True)
    except KeyboardInterrupt:
        typer.echo(f"The job goes on. Wait for it again: basic status --wait {job.id}", err=True)
        return FAILED
    if as_json:
        _print_json(info)
    return _end(job, info, output)


def _end(job: Job, info: JobInfo, output: Path | None) -> int:
    """Write the answers, say what to do about failures, and return the exit status."""
    if output is not None:
        _write_results(job.outputs(), output)
    if info.request_counts.failed:
        again = f"Run them again: basic retry {info.id}"
        if not _may_succeed(job):
            again = "They would fail again: correct their lines and submit those"
        typer.echo(
            f"{info.request_counts.failed} of {info.request_counts.total} requests failed. See why: "
            f"basic results --failed {info.id}    {again}",
            err=True,
        )
    answered = info.request_counts.completed > 0
    return 0 if info.status is JobStatus.COMPLETED and answered else FAILED


_REFUSED = {RequestRefused.code, *(kind.code for kind in RequestRefused.__subclasses__())}


def _may_succeed(job: Job) -> bool:
    """Return whether a failed request could end otherwise: one that was refused for what its line says could not."""
    return any(output.error is None or output.error.code not in _REFUSED for output in job.outputs(failed=True))


def _say_refused(job: Job, info: JobInfo) -> int:
    """Say why requests were refused as soon as they were submitted; return the exit status, of failure if all were."""
    counts = info.request_counts
    refused = next(job.outputs(failed=True), None) if counts.failed else None
    if refused is None or refused.error is None:
        return 0
    typer.echo(
        f"{counts.failed} of {counts.total} requests failed at once, the first of them so: "
        f"{safe(refused.error.message)}    See all: basic results --failed {info.id}",
        err=True,
    )
    return FAILED if counts.failed == counts.total else 0


def _watch(client: Client, job: Job, as_json: bool, output: Path | None = None) -> int:
    """Show a job until it ends and return the exit status; Ctrl-C leaves the job running."""
    try:
        _watch_events(job, as_json)
    except KeyboardInterrupt:
        typer.echo(f"The job goes on. Watch it again: basic follow {job.id}", err=True)
        return FAILED
    info = job.info()
    if not as_json:
        make_console().print(closing_table(info, job.stats(), _database_place(client)))
    return _end(job, info, output)


def _watch_events(job: Job, as_json: bool) -> None:
    if as_json:
        for event in job.follow():
            typer.echo(json_line(event))
        return
    console = make_console()
    with make_view(console, job.info()) as view:
        for event in job.follow():
            view.show(event)


def _database_place(client: Client) -> str | None:
    """Return where the database is, if it is on this machine and ours to know."""
    service = local_service(JobsSettings())
    if service is None or service.api_url.rstrip("/") != client.api_url:
        return None
    file = sqlite_file(service.database_url)
    return without_secrets(service.database_url) if file is None else str(file)


def _write_results(answers: Iterable[Output], path: Path) -> None:
    """Write answers as JSON lines; a file that was there stays whole until the new one is."""
    count = 0
    is_device = path.exists() and not path.is_file()  # or a pipe: written to, not replaced
    part = path if is_device else path.with_name(path.name + ".part")
    with _writing(path, "--output"):
        with part.open("w", encoding="utf-8") as file:
            for answer in answers:
                file.write(json_line(answer) + "\n")
                count += 1
        if part != path:
            part.replace(path)
    typer.echo(f"Wrote {count} answers to {path}", err=True)


def _refuse_unwritable(path: Path, option: str) -> None:
    """Refuse a file that can't be written before any work is done for it."""
    folder = path.parent
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"there is no folder {folder}; make it first"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = os.strerror(errno.EACCES)
    else:
        return
    raise typer.BadParameter(f"{path} can't be written: {why}", param_hint=option)


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    """Say in one sentence that a file can't be written."""
    try:
        yield
    except OSError as exc:
        raise typer.BadParameter(f"{path} can't be written: {exc.strerror}", param_hint=option) from exc


def _announcement(service: LocalService, detached: bool) -> str:
    stop = "Stop it with: basic down" if detached else "Ctrl-C stops it"
    addresses = Path(service.data_dir, "up.json")
    return (
        f"bASIC answers at {service.api_url}\nEverything lies in {service.data_dir}\n"
        f"Addresses of queue and database, with the password: {addresses}\n{stop}"
    )


def _print_json(value: BaseModel | list[JobInfo] | dict[str, Any]) -> None:
    if isinstance(value, BaseModel):
        typer.echo(one_line(value.model_dump_json()))
    elif isinstance(value, list):
        typer.echo(json.dumps([item.model_dump(mode="json") for item in value]))
    else:
        typer.echo(json.dumps(value))


def _settings_sentence(exc: UnknownSetting | ValidationError) -> str:
    return str(exc) if isinstance(exc, UnknownSetting) else settings_sentence(exc)


def _fail(sentence: str, status: int) -> None:
    typer.echo(f"basic: {sentence}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
