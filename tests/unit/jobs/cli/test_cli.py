from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pyarrow.parquet
import pytest
import typer
from sqlalchemy import select
from typer.testing import CliRunner

from jobs.api.app import make_api
from jobs.api.auth.authentication import Authenticator
from jobs.cli import app as cli
from jobs.cli import lookup
from jobs.cli.options import FAILED, WRONG_USE
from jobs.client import Client
from jobs.errors import InvalidValue, NotFound, NotRetryable, SetupError
from jobs.settings import JobsSettings
from storage.models import Request
from storage.session import Database
from tests.factories import a_key
from tests.in_process import InProcess
from tests.unit.jobs.api.test_routes import answer_all

Run = Callable[..., str]


@pytest.fixture
def run(settings: JobsSettings, database: Database, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command against a service in this process; return what it prints."""
    api = make_api(settings, database, notify=lambda job_id, model: True)
    monkeypatch.setattr(lookup, "connect", lambda: Client("http://service", transport=InProcess(api)))

    def run(*arguments: str, status: int = 0, stdin: str | None = None) -> str:
        result = CliRunner().invoke(cli.app, arguments, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result.stdout

    return run


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"What is the capital of France?"\n{"prompt": "", "custom_id": "empty"}\n')
    return str(path)


def test_a_file_is_submitted_followed_and_its_outputs_are_fetched(run: Run, prompts: str, database: Database) -> None:
    job = json.loads(run("submit", prompts, "--json", "--max-tokens", "5", "--temperature", "0"))
    assert job["request_counts"] == {"total": 2, "completed": 0, "failed": 1}
    answer_all(database, text="Paris\x1b[2J.")
    assert json.loads(run("status", "--json"))["status"] == "completed"
    watched = run("follow", job["id"])
    assert "Paris." in watched
    assert "requests" in watched
    lines = [json.loads(line) for line in run("results", "--json").splitlines()]
    assert [line["custom_id"] for line in lines] == ["request-0", "empty"]
    assert "line 2, prompt" in lines[1]["error"]["message"]
    assert "\x1b" not in run("results")


def test_prompts_come_from_standard_input_too(run: Run) -> None:
    assert "Submitted 1 requests" in run("submit", "-", stdin='"Hello"\n')


def test_a_schema_file_binds_the_answers_of_all_lines(
    run: Run, prompts: str, database: Database, tmp_path: Path
) -> None:
    file = tmp_path / "person.schema.json"
    file.write_text('{"type": "object", "properties": {"name": {"type": "string"}}}')
    run("submit", prompts, "--schema", str(file))
    with database.read() as session:
        body = session.scalars(select(Request.body)).first()
    assert body is not None
    assert json.loads(body["grammar"]["value"]) == json.loads(file.read_text())
    file.write_text("name: string")
    with pytest.raises(InvalidValue, match="not JSON"):
        run("submit", prompts, "--schema", str(file))


def test_results_are_written_to_a_file(run: Run, prompts: str, database: Database, tmp_path: Path) -> None:
    run("submit", prompts)
    answer_all(database)
    path = tmp_path / "answers.jsonl"
    run("results", "--output", str(path))
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]


def test_lines_of_text_are_prompts(run: Run) -> None:
    job = json.loads(run("submit", "-", "--json", stdin="Name a river.\nName a lake.\n"))
    assert job["request_counts"]["total"] == 2


def test_submit_fails_and_prints_the_first_reason_when_every_line_is_refused(run: Run, prompts: str) -> None:
    result = CliRunner().invoke(cli.app, ["submit", "-"], input='{"promt": "Hello"}\n{broken\n')
    assert result.exit_code == FAILED
    assert "2 of 2 requests were refused" in result.stderr
    assert "line 1, promt: " in result.stderr
    result = CliRunner().invoke(cli.app, ["submit", prompts])
    assert result.exit_code == 0
    assert "1 of 2 requests were refused" in result.stderr
    job = json.loads(run("submit", "-", "--json", stdin='{"broken\n' * 2, status=FAILED))
    assert job["request_counts"]["failed"] == 2


@pytest.mark.parametrize("content", ["question,answer\na,b\n", '[{"prompt": "a"}]', "", " \n"])
def test_a_file_without_lines_is_refused(run: Run, content: str) -> None:
    with pytest.raises(InvalidValue, match="Standard input is"):
        run("submit", "-", stdin=content)
    assert json.loads(run("jobs", "--json")) == []


@pytest.mark.parametrize("name", ["out.arrow", "out.xlsx", "out.jsonl.gz", "out.csv.gz"])
def test_outputs_are_not_written_under_the_name_of_another_format(
    run: Run, prompts: str, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    with pytest.raises(InvalidValue, match=r"outputs are written as JSON lines \(.jsonl\)"):
        run("submit", prompts, "--output", str(path))
    assert json.loads(run("jobs", "--json")) == []
    run("submit", prompts)
    with pytest.raises(InvalidValue, match=r"A table is .csv, .tsv or .parquet"):
        run("results", "--output", str(path))
    assert not path.exists()


REVIEWS = 'text,label,score\n"Good, really",fine,7\nBad,poor,\n'


def test_rows_of_a_table_become_prompts_and_come_back_with_their_answers(
    run: Run, database: Database, tmp_path: Path
) -> None:
    table, answers = tmp_path / "reviews.csv", tmp_path / "answers.parquet"
    table.write_text(REVIEWS)
    run("submit", str(table), "--template", "Translate: {text}", "--id-column", "label", "--keep", "text,score")
    answer_all(database)
    run("results", "-o", str(answers), "--prompt")
    rows = pyarrow.parquet.read_table(answers).to_pylist()
    kept = [[row[name] for name in ("custom_id", "prompt", "input_text", "score")] for row in rows]
    assert kept == [
        ["fine", "Translate: Good, really", "Good, really", "7"],
        ["poor", "Translate: Bad", "Bad", None],
    ]
    assert [row["text"] for row in rows] == ["Paris.", "Paris."]
    run("results", "-o", str(answers.with_suffix(".csv")))
    with answers.with_suffix(".csv").open(newline="") as file:
        assert [row["input_text"] for row in csv.DictReader(file)] == ["Good, really", "Bad"]
    assert sorted(path.name for path in tmp_path.glob("answers*")) == ["answers.csv", "answers.parquet"]


def test_standard_input_is_a_table_if_columns_are_named(run: Run) -> None:
    job = json.loads(run("submit", "-", "--prompt-column", "text", "--json", stdin=REVIEWS))
    assert job["request_counts"] == {"total": 2, "completed": 0, "failed": 0}


def test_followed_outputs_are_appended_and_continue_where_they_stopped(
    run: Run, prompts: str, database: Database, tmp_path: Path
) -> None:
    run("submit", prompts)
    answer_all(database)
    path = tmp_path / "answers.jsonl"
    run("results", "--follow", "-o", str(path))
    written = path.read_bytes()
    lines = written.splitlines(keepends=True)
    assert len(lines) == 2
    path.write_bytes(lines[0] + lines[1][:9])  # interrupted within a line
    run("results", "--follow", "-o", str(path))
    assert path.read_bytes() == written
    path.write_text('{"prompt": "mine"}\n')
    run("results", "--follow", "-o", str(path), status=WRONG_USE)
    assert path.read_text() == '{"prompt": "mine"}\n'


def test_reports_and_plots_are_not_written_under_the_name_of_another_format(run: Run) -> None:
    with pytest.raises(InvalidValue, match="HTML"):
        run("report", "-o", "report.pdf")
    with pytest.raises(InvalidValue, match="PNG"):
        run("stats", "--plot", "stats.jpg")


def test_submit_waits_for_the_job_and_results_show_its_failed_requests(
    run: Run, prompts: str, database: Database, tmp_path: Path
) -> None:
    run("submit", prompts)
    answer_all(database)
    path = tmp_path / "answers.jsonl"
    assert json.loads(run("status", "--wait", "--json"))["status"] == "completed"
    assert [json.loads(line)["custom_id"] for line in run("results", "--failed", "--json").splitlines()] == ["empty"]
    assert len(run("results", "--follow", "--json").splitlines()) == 2
    run("results", "--failed", "--output", str(path))
    assert len(path.read_text().splitlines()) == 1


def test_retry_runs_the_failed_requests_as_a_new_job(run: Run, prompts: str, database: Database) -> None:
    job_id = json.loads(run("submit", prompts, "--json"))["id"]
    run("cancel", job_id)
    again = json.loads(run("retry", job_id, "--json"))
    assert (again["retry_of"], again["request_counts"]["total"]) == (job_id, 1)
    answer_all(database)
    assert run("status", again["id"], "--wait") == ""


def test_retry_of_a_job_without_failures_does_nothing_and_succeeds(run: Run, database: Database) -> None:
    run("submit", "-", stdin='"Hello"\n')
    answer_all(database)
    assert "Nothing to retry" in run("retry")
    assert json.loads(run("retry", "--json"))["request_counts"]["failed"] == 0
    assert len(run("jobs", "--json")) > 0
    assert len(json.loads(run("jobs", "--json"))) == 1


def test_invalid_lines_are_not_retried_and_the_advice_is_to_correct_them(
    run: Run, prompts: str, database: Database
) -> None:
    run("submit", prompts)
    answer_all(database)
    result = CliRunner().invoke(cli.app, ["status", "--wait"])
    assert result.exit_code == 0
    assert "1 of 2 requests failed" in result.stderr
    assert "basic retry" not in result.stderr
    assert "correct their lines" in result.stderr
    with pytest.raises(NotRetryable, match="basic results --failed"):
        run("retry")


@pytest.mark.parametrize(
    "command", [("submit", "-", "-o"), ("results", "-o"), ("report", "-o"), ("stats", "--plot")], ids=" ".join
)
def test_an_unwritable_file_is_refused_before_any_other_work(
    command: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    suffix = {"report": ".html", "stats": ".png"}.get(command[0], ".jsonl")
    (tmp_path / f"folder{suffix}").mkdir()
    for place, why in (("missing/out", "there is no folder"), ("folder", "it is a folder")):
        result = CliRunner().invoke(cli.app, [*command, str(tmp_path / f"{place}{suffix}")], input='"Hello"\n')
        assert result.exit_code == 2
        assert why in " ".join(result.stderr.replace("│", "").split())
    assert json.loads(run("jobs", "--json")) == []


def test_a_device_is_written_to_and_not_replaced(run: Run, prompts: str) -> None:
    run("submit", prompts)
    run("results", "--output", "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert not Path("/dev/null.part").exists()


def test_an_id_prefix_names_a_job(run: Run, prompts: str, database: Database) -> None:
    job_id = json.loads(run("submit", prompts, "--json"))["id"]
    short = job_id[:12]
    answer_all(database)
    for command in (["status"], ["follow"], ["results"], ["stats"]):
        assert run(*command, short, "--json") == run(*command, job_id, "--json")
    assert job_id in run("stats", short, "--csv")
    other_id = json.loads(run("submit", prompts, "--json"))["id"]
    assert json.loads(run("cancel", other_id[:12], "--json"))["id"] == other_id
    assert json.loads(run("retry", other_id[:12], "--json"))["retry_of"] == other_id


def test_an_ambiguous_or_unknown_id_prefix_is_refused(run: Run, prompts: str) -> None:
    ids = [json.loads(run("submit", prompts, "--json"))["id"] for _ in range(2)]
    with pytest.raises(InvalidValue, match=r"More than one .* Give more of the id") as refused:
        run("status", "batch_")
    assert all(job_id in str(refused.value) for job_id in ids)
    for nothing in ("batch_x", "%", "\N{SNOWMAN}", "x" * 1000, " "):
        with pytest.raises(NotFound, match="There is no job whose id begins with"):
            run("cancel", nothing)


def test_the_list_of_no_jobs_is_a_sentence(run: Run) -> None:
    assert "There is no job yet" in run("jobs")
    assert run("jobs", "--json") == "[]\n"


def test_the_default_job_is_the_newest_of_the_caller(settings: JobsSettings, database: Database, run: Run) -> None:
    run("submit", "-", "--json", stdin='"Ours"\n')
    key = a_key(database)["authorization"].removeprefix("Bearer ")
    api = make_api(
        settings, database, lambda job_id, model: None, Authenticator(database, local_key="sk-basic-local-1")
    )
    with Client("http://service", key, transport=InProcess(api)) as other:
        theirs = other.submit("Theirs")
    with Client("http://service", "sk-basic-local-1", transport=InProcess(api)) as client:
        assert client.jobs()[0].id == theirs.id
        assert lookup.find_job(client, None).id != theirs.id


def test_submit_prints_that_lines_without_a_temperature_are_decoded_greedily(run: Run, database: Database) -> None:
    lines = '"Hello"\n{"prompt": "Hello", "temperature": 0.5}\n'
    assert "Temperature of lines that set none: 0 (greedy decoding)" in run("submit", "-", stdin=lines)
    run("submit", "-", "--temperature", "1", stdin=lines)
    with database.read() as session:
        bodies = session.scalars(select(Request.body).order_by(Request.job_id, Request.request_index)).all()
    assert sorted(body["sampling"]["temperature"] for body in bodies) == [0, 0.5, 0.5, 1]


def test_jobs_are_listed_and_cancelled(run: Run, prompts: str) -> None:
    job_id = json.loads(run("submit", prompts, "--json"))["id"]
    assert job_id in run("jobs")
    assert json.loads(run("cancel", job_id, "--json"))["status"] == "cancelled"
    assert [job["status"] for job in json.loads(run("jobs", "--json"))] == ["cancelled"]


def test_a_job_that_did_not_complete_is_a_failure(run: Run, prompts: str) -> None:
    job_id = json.loads(run("submit", prompts, "--json"))["id"]
    run("cancel", job_id)
    events = [json.loads(line) for line in run("follow", job_id, "--json", status=FAILED).splitlines()]
    assert events[-1]["status"] == "cancelled"


def test_stats_are_printed_as_json(run: Run, prompts: str, database: Database) -> None:
    run("submit", prompts)
    answer_all(database)
    assert json.loads(run("stats", "--json"))["completion_tokens"] > 0


@pytest.mark.parametrize(
    "arguments",
    [("submit", "nowhere.jsonl"), ("submit",), ("jobs", "--limit", "0"), ("nonsense",), ("status", "--what")],
)
def test_wrong_use_is_status_2(run: Run, arguments: tuple[str, ...]) -> None:
    run(*arguments, status=WRONG_USE)


def test_an_error_is_one_sentence_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BASIC_API_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(lookup, "_PATIENCE_S", 0.0)
    monkeypatch.setattr("sys.argv", ["basic", "jobs"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == FAILED
    assert "Is bASIC running? `basic up` starts it." in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("BASIC_API_PROT", "1"), ("BASIC_API_PORT", "many")])
def test_a_setting_that_is_wrong_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["basic", "jobs"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == WRONG_USE
    assert name in capsys.readouterr().err


def test_a_command_whose_package_is_missing_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = EntryPoint("worker", "a_package_that_is_not_there:commands", "basic.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [missing])
    app = typer.Typer()
    app.add_typer(typer.Typer())
    cli.plug_in_commands(app)
    result = CliRunner().invoke(app, ["bench", "--batch", "8"])
    assert isinstance(result.exception, SetupError)
    assert "pip install 'basic-batch[worker]'" in str(result.exception)


@pytest.mark.parametrize("command", [command.callback for command in cli.app.registered_commands])
def test_every_command_shows_an_example(command: Callable[..., None]) -> None:
    assert "Example: basic" in (command.__doc__ or "")
