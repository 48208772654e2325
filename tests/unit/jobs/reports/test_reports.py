"""Statistics for users: `basic stats` as table, CSV and plots, and a DataFrame in Python."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas
import pytest

from jobs.api.app import make_api
from jobs.client import Client
from jobs.reports.plots import PLOTS, svg
from jobs.settings import JobsSettings
from jobs.tables.csv_export import cell, write_csv
from storage import speedup_checks
from storage.records import SpeedupCheckResult
from storage.session import Database
from tests.in_process import InProcess
from tests.unit.jobs.api.test_routes import answer_all
from tests.unit.jobs.cli.test_cli import Run, prompts, run

__all__ = ["prompts", "run"]  # fixtures

NOTHING: dict[str, Any] = {"acceptance": [], "minutes": [], "batch_sizes": [], "reliability": []}


def test_stats_show_the_speed_up_and_its_basis(run: Run, prompts: str, database: Database) -> None:
    run("submit", prompts)
    assert "not measured" in run("stats")
    answer_all(database)

    table = run("stats")

    assert "1 completed, 1 failed, 2 in all" in table
    assert "1.80x (by the calibrated time of plain steps; no plain step checked it)" in table


def test_stats_show_the_result_of_a_speed_up_check(run: Run, prompts: str, database: Database) -> None:
    job_id = json.loads(run("submit", prompts, "--compare-plain", "20", "--json"))["id"]
    answer_all(database)
    assert "20 requests wait for an idle worker" in flat(run("stats", job_id))
    rows = [SpeedupCheckResult(0, 3, 10.0, 20.0, 1.5, True), SpeedupCheckResult(1, 3, 10.0, 22.0, 1.5, False)]
    with database.write() as session:
        speedup_checks.save_check(session, "w", job_id, rows)

    table = run("stats", job_id)

    assert "2.10x ± 0.20 (1 of 2 texts differ, which is a fault, 1.5 at a time)" in flat(table)
    run("submit", prompts, "--compare-plain", "101", status=2)


def test_stats_show_why_a_speed_up_check_was_given_up(run: Run, prompts: str, database: Database) -> None:
    job_id = json.loads(run("submit", prompts, "--compare-plain", "20", "--json"))["id"]
    answer_all(database)
    with database.write() as session:
        row = SpeedupCheckResult(0, error_code="poison", error_message="The worker process died twice.")
        speedup_checks.save_check(session, "", job_id, [row])

    assert "compared with plain given up, poison: The worker process died twice." in flat(run("stats", job_id))


def flat(table: str) -> str:
    """The words of a table, wherever its lines end."""
    return " ".join(table.split())


def test_csv_has_one_row_per_job(run: Run, prompts: str, database: Database) -> None:
    ids = [json.loads(run("submit", prompts, "--json"))["id"] for _ in range(2)]
    answer_all(database)

    rows = list(csv.DictReader(io.StringIO(run("stats", "--csv"))))
    (row,) = csv.DictReader(io.StringIO(run("stats", ids[0], "--csv")))

    assert [found["id"] for found in rows] == ids[::-1]
    assert row in rows
    assert (row["completion_tokens"], row["speedup"]) == ("2", "1.8")


def test_the_plot_is_a_picture(run: Run, prompts: str, database: Database, tmp_path: Path) -> None:
    run("submit", prompts)
    answer_all(database)
    path = tmp_path / "stats.png"

    run("stats", "--plot", str(path))

    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PLOTS)
def test_plots_without_data_say_so(name: str) -> None:
    picture = ElementTree.fromstring(svg(NOTHING, name))

    assert "nothing measured" in "".join(picture.itertext())


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "\r=1", "＝1"])
def test_formulas_are_escaped(text: str) -> None:
    assert cell(text) == f"'{text}"


def test_other_cells_are_unchanged() -> None:
    assert [cell(value) for value in (-1.5, 3, None, True, "a=b", "")] == [-1.5, 3, None, True, "a=b", ""]


def test_csv_survives_quotes_and_lines() -> None:
    file = io.StringIO()
    write_csv([{"text": 'a "b"\nc,d', "n": -1}, {"text": "=x"}], ["text", "n"], file)
    assert list(csv.reader(io.StringIO(file.getvalue()))) == [["text", "n"], ['a "b"\nc,d', "-1"], ["'=x", ""]]


def test_client_stats_return_a_data_frame_of_jobs(settings: JobsSettings, database: Database) -> None:
    transport = InProcess(make_api(settings, database, notify=lambda job_id, model: True))
    with Client("http://service", transport=transport) as client:
        job = client.submit(["Hello"])
        answer_all(database)
        table = client.stats()

    assert isinstance(table, pandas.DataFrame)
    assert list(table["id"]) == [job.id]
    assert table["speedup"][0] == pytest.approx(1.8)


def test_a_report_is_one_file_with_escaped_texts(run: Run, database: Database, tmp_path: Path) -> None:
    lines = '"Hello"\n{"prompt": "", "custom_id": "<b>bold</b>"}\n'
    run("submit", "-", stdin=lines)
    answer_all(database, text="<script>alert(1)</script>\x1b[31m\u202e" + "x" * 100_000)
    path = tmp_path / "report.html"

    run("report", "-o", str(path))

    page = path.read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == len(PLOTS)
    assert not any(forbidden in page for forbidden in ("<script", "\x1b", "\u202e", "src=", "@import", "<link"))
