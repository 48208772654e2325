"""`basic submit`, `follow`, `status`, `results`, `retry`, `cancel` and `rm`."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated

import typer

from jobs.cli import lookup
from jobs.cli.estimate import prompt_counter, report_check
from jobs.cli.lookup import find_job
from jobs.cli.options import (
    FAILED,
    AsJson,
    BudgetSeconds,
    BudgetTokens,
    Cache,
    IdColumn,
    IdempotencyKey,
    JobId,
    Keep,
    Labels,
    MaxConcurrent,
    MaxTokens,
    MessagesColumn,
    Model,
    Name,
    OfEndpoint,
    PriorityClass,
    PromptColumn,
    SchemaFile,
    Seed,
    SourceFile,
    Temperature,
    Template,
    budget_of,
    columns_of,
    print_json,
    read_labels,
    read_seed,
    source_of,
)
from jobs.cli.output_files import append_outputs, refuse_output_file, write_outputs
from jobs.cli.render import (
    choice_lines,
    closing_table,
    make_console,
    make_view,
    numerics_lines,
    status_table,
)
from jobs.client import Client, Job
from jobs.client.outcome import job_status_text
from jobs.client.parameters import Parameters
from jobs.client.response_format import schema_file
from jobs.client.results import JobInfo
from jobs.client.service_location import local_service
from jobs.control_characters import safe
from jobs.errors import NotRetryable, RequestRefused
from jobs.json_lines import json_line
from jobs.logs import without_secrets
from jobs.messages import MAX_COMPARED_REQUESTS, TOOLS_TEMPERATURE, JobStatus
from jobs.settings import JobsSettings
from storage.settings import sqlite_file

_REFUSED_CODES = {RequestRefused.code, *(kind.code for kind in RequestRefused.__subclasses__())}


def submit(
    file: SourceFile,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the text until the job ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show a progress bar until the job ends.")] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Wait, then write the outputs: .jsonl, .csv or .parquet, or a URL."),
    ] = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    template: Template = None,
    id_column: IdColumn = None,
    keep: Keep = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = TOOLS_TEMPERATURE,
    seed: Seed = None,
    cache: Cache = None,
    schema: SchemaFile = None,
    endpoint: OfEndpoint = None,
    name: Name = None,
    label: Labels = None,
    priority: PriorityClass = None,
    max_concurrent: MaxConcurrent = None,
    idempotency_key: IdempotencyKey = None,
    budget_tokens: BudgetTokens = None,
    budget_seconds: BudgetSeconds = None,
    compare_plain: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_COMPARED_REQUESTS,
            help="After the job, decode this many requests with and without drafts and compare the times.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print rows, tokens and refusals, and submit nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job: a file with one request per line.

    A line is a JSON string, an object with prompt or messages, a line of an OpenAI batch file, or plain text.
    Parameters that a line sets, such as its temperature, override the options. A table is CSV, TSV, a JSON array,
    Parquet or Arrow; it may lie at a URL such as s3://bucket/data.parquet.

    Example: basic submit examples/prompts.jsonl --follow --max-tokens 128

    Example: basic submit reviews.parquet --template "Translate: {text}" --keep label -o answers.parquet

    Example: basic submit prompts.txt --schema person.schema.json --output people.jsonl

    Example: basic submit prompts.jsonl --name nightly --label team=search --priority low --max-concurrent 8

    Example: basic submit prompts.jsonl --dry-run
    """
    if output is not None:
        refuse_output_file(output)
    columns = columns_of(prompt_column, messages_column, template, id_column, keep)
    labels = read_labels(label)
    prompts = source_of(file)
    form = None if schema is None else schema_file(schema)
    parameters: Parameters = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": read_seed(seed),
        "cache": cache,
        "response_format": form,
    }
    with lookup.connect() as client:
        if dry_run:
            count = prompt_counter()
            check = client.check(prompts, model=model, endpoint=endpoint, columns=columns, count=count, **parameters)
            raise typer.Exit(report_check(check, as_json))
        job = client.submit(
            prompts,
            model=model,
            endpoint=endpoint,
            name=name,
            labels=labels or None,
            priority=priority,
            max_concurrent=max_concurrent,
            idempotency_key=idempotency_key,
            columns=columns,
            compare_plain=compare_plain,
            budget=budget_of(budget_tokens, budget_seconds),
            **parameters,
        )
        if follow:
            raise typer.Exit(_follow(client, job, as_json, output))
        if wait or output is not None:
            raise typer.Exit(_wait(job, as_json, output))
        info = job.info()
        if as_json:
            print_json(info)
        else:
            typer.echo(f"Submitted {info.request_counts.total} requests as job {info.id}")
            greedy = " (greedy decoding)" if temperature == 0 else ""
            typer.echo(f"Temperature of lines that set none: {temperature:g}{greedy}")
            typer.echo(f"Follow it with: basic follow {info.id}")
        raise typer.Exit(_report_refused(job, info))


def follow(job: JobId = None, as_json: AsJson = False) -> None:
    """Show the text of a job as it is generated, until the job ends.

    Example: basic follow
    """
    with lookup.connect() as client:
        raise typer.Exit(_follow(client, find_job(client, job), as_json))


def status(
    job: JobId = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show a progress bar until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the progress of a job.

    Example: basic status --wait
    """
    with lookup.connect() as client:
        found = find_job(client, job)
        if wait:
            raise typer.Exit(_wait(found, as_json))
        info = found.info()
        print_json(info) if as_json else make_console().print(status_table(info, time.time()))


def results(
    job: JobId = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Write to this file or URL: .jsonl, .csv, .tsv or .parquet."),
    ] = None,
    prompt: Annotated[bool, typer.Option("--prompt", help="Add the prompts.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only requests without a result.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print or append outputs as requests end, until the job ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the outputs of a job so far, in the order of its requests, or write them to a file.

    With --follow, a .jsonl file grows as requests end; the same command continues it after an interruption.

    Example: basic results --output answers.parquet --prompt
    """
    if output is not None:
        refuse_output_file(output)
    with lookup.connect() as client:
        found = find_job(client, job)
        if output is not None and follow:
            append_outputs(
                lambda cursor: found.outputs(failed=failed, follow=True, prompt=prompt, cursor=cursor), output
            )
            return
        outputs = found.outputs(failed=failed, follow=follow, prompt=prompt)
        if output is not None:
            write_outputs(outputs, output)
            return
        numerics: Counter[str] = Counter()
        for item in outputs:
            if as_json:
                typer.echo(json_line(item))
                continue
            numerics.update(choice.numerics for choice in item.choices if choice.numerics is not None)
            typer.echo(f"{safe(item.custom_id)} ({item.status})")
            for choice in item.choices:
                for line in choice_lines(choice):
                    typer.echo(line)
            if item.error is not None:
                typer.echo(safe(item.error.message))
        for line in numerics_lines(numerics):
            typer.echo(line, err=True)


def retry(
    job: JobId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the text until the new job ends.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show a progress bar until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit the requests of an ended job that have no result as a new job.

    Example: basic retry --wait
    """
    with lookup.connect() as client:
        ended = find_job(client, job)
        info = ended.info()
        if info.status is JobStatus.COMPLETED and not info.request_counts.failed:
            sentence = f"Nothing to retry: every request of {info.id} has a result"
            print_json(info) if as_json else typer.echo(sentence)
            return
        if info.status is JobStatus.COMPLETED and not _may_succeed(ended):
            raise NotRetryable(
                "The failed requests would fail again: their lines are invalid. "
                f"See why: basic results --failed {info.id}    Correct the lines and submit them: basic submit FILE"
            )
        again = ended.retry()
        if follow:
            raise typer.Exit(_follow(client, again, as_json))
        if wait:
            raise typer.Exit(_wait(again, as_json))
        info = again.info()
        if as_json:
            print_json(info)
        else:
            typer.echo(f"Submitted {info.request_counts.total} requests of {info.retry_of} again as job {info.id}")
            typer.echo(f"Follow it with: basic follow {info.id}")


def cancel(job: Annotated[str, typer.Argument(help="Job id or a prefix of it.")], as_json: AsJson = False) -> None:
    """Cancel a job. Outputs of completed requests are kept.

    Example: basic cancel batch_0123456789abcdef
    """
    with lookup.connect() as client:
        info = find_job(client, job).cancel()
        print_json(info) if as_json else typer.echo(f"Job {info.id} is {job_status_text(info)}")


def rm(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB…", help="Job ids or prefixes of them.")],
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel jobs that still run, then erase them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase jobs that have ended: prompts, outputs, steps, and files that no other job reads. There is no way back.

    Example: basic rm batch_0123456789abcdef
    """
    with lookup.connect() as client:
        for found in [find_job(client, job) for job in jobs]:
            found.delete(cancel=cancel)
            print_json({"id": found.id, "deleted": True}) if as_json else typer.echo(f"Erased job {found.id}")


def _wait(job: Job, as_json: bool, output: str | None = None) -> int:
    """Show a progress bar until the job ends and return the exit status. Ctrl-C does not stop the job."""
    try:
        info = job.wait(progress=True)
    except KeyboardInterrupt:
        typer.echo(f"The job is still running. Wait for it again: basic status --wait {job.id}", err=True)
        return FAILED
    if as_json:
        print_json(info)
    return _finish(job, info, output)


def _follow(client: Client, job: Job, as_json: bool, output: str | None = None) -> int:
    """Show the text until the job ends and return the exit status. Ctrl-C does not stop the job."""
    try:
        _show_events(job, as_json)
    except KeyboardInterrupt:
        typer.echo(f"The job is still running. Follow it again: basic follow {job.id}", err=True)
        return FAILED
    info = job.info()
    if not as_json:
        make_console().print(closing_table(info, job.stats(), _local_database(client)))
    return _finish(job, info, output)


def _show_events(job: Job, as_json: bool) -> None:
    if as_json:
        for event in job.follow():
            typer.echo(json_line(event))
        return
    console = make_console()
    with make_view(console, job.info()) as view:
        for event in job.follow():
            view.show(event)


def _finish(job: Job, info: JobInfo, output: str | None) -> int:
    """Write the outputs, say what to do about failed requests, and return the exit status."""
    if output is not None:
        write_outputs(job.outputs(), output)
    if info.request_counts.failed:
        advice = f"Retry them: basic retry {info.id}"
        if not _may_succeed(job):
            advice = "A retry would fail too: correct their lines and submit those"
        typer.echo(
            f"{info.request_counts.failed} of {info.request_counts.total} requests failed. See why: "
            f"basic results --failed {info.id}    {advice}",
            err=True,
        )
    has_results = info.request_counts.completed > 0
    return 0 if info.status is JobStatus.COMPLETED and has_results else FAILED


def _may_succeed(job: Job) -> bool:
    """Return whether a retry of a failed request could succeed: not if the request itself is invalid."""
    return any(output.error is None or output.error.code not in _REFUSED_CODES for output in job.outputs(failed=True))


def _report_refused(job: Job, info: JobInfo) -> int:
    """Report requests that the service refused at submission; return FAILED if it refused all of them."""
    counts = info.request_counts
    refused = next(job.outputs(failed=True), None) if counts.failed else None
    if refused is None or refused.error is None:
        return 0
    typer.echo(
        f"{counts.failed} of {counts.total} requests were refused, the first because: "
        f"{safe(refused.error.message)}    See all: basic results --failed {info.id}",
        err=True,
    )
    return FAILED if counts.failed == counts.total else 0


def _local_database(client: Client) -> str | None:
    """Return the file or URL of the database if the service runs on this machine, else None."""
    service = local_service(JobsSettings())
    if service is None or service.api_url.rstrip("/") != client.api_url:
        return None
    file = sqlite_file(service.database_url)
    return without_secrets(service.database_url) if file is None else str(file)
