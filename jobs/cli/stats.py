"""`basic stats` and `basic report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli import lookup
from jobs.cli.extras import needs
from jobs.cli.lookup import find_job
from jobs.cli.options import AsJson, JobId, print_json
from jobs.cli.output_files import refuse_unwritable, writing
from jobs.cli.render import make_console
from jobs.client import Client
from jobs.client.results import Statistics
from jobs.input_format import reject_output_suffix
from jobs.reports.stats_tables import stats_tables
from jobs.tables.csv_export import write_csv


def stats(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Job id or a prefix of it. Default: all jobs.")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with one row per job.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw plots into this file.")] = None,
) -> None:
    """Show the speed of a job, or of all jobs, and the speed-up by speculation.

    Example: basic stats --plot stats.png
    """
    if plot is not None:
        reject_output_suffix(plot, "plots are drawn as PNG", ".png")
        refuse_unwritable(plot, "--plot")
    with lookup.connect() as client:
        job_id = None if job is None else find_job(client, job).id
        if as_csv:
            _print_csv(client, job_id)
            return
        statistics = client.run(lambda client: client.job_stats(job_id) if job_id else client.stats())
        if plot is not None:
            _plot(statistics, job_id, plot)
        if as_json:
            print_json(statistics)
        elif plot is None:
            make_console().print(stats_tables(statistics))


def report(
    job: JobId = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="File to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a report of a job: one HTML file with statistics, plots, errors and samples.

    Example: basic report -o report.html
    """
    reject_output_suffix(output, "a report is HTML", ".html .htm", "A browser prints it as PDF.")
    refuse_unwritable(output, "--output")
    with lookup.connect() as client:
        found = find_job(client, job)
        statistics = client.run(lambda client: client.job_stats(found.id))
        with needs("plot"):
            from jobs.reports.report import make_report

            page = make_report(found.info(), statistics, found.outputs())
    with writing(output, "--output"):
        output.write_text(page, encoding="utf-8")
    typer.echo(f"Wrote {output}")


def _print_csv(client: Client, job_id: str | None) -> None:
    rows = client.run(lambda client: client.job_rows(job_id))
    write_csv(rows, list(rows[0]) if rows else ["id"], sys.stdout)


def _plot(statistics: Statistics, job_id: str | None, path: Path) -> None:
    with needs("plot"):
        from jobs.reports.plots import save_png

        with writing(path, "--plot"):
            save_png(statistics, job_id or "All jobs", path)
    typer.echo(f"Wrote {path}", err=True)
