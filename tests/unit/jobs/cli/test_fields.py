"""`basic fields` and the page that it generates."""

from __future__ import annotations

from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.submission.fields import FIELDS, MESSAGE_FIELDS
from tests.paths import ROOT


def test_the_page_of_fields_is_what_the_command_prints_and_lists_every_field() -> None:
    printed = CliRunner().invoke(app, ["fields", "--markdown"]).stdout
    assert (ROOT / "docs" / "fields.md").read_text() == printed, (
        "docs/fields.md is not up to date: run basic fields --markdown > docs/fields.md"
    )
    rows = [line for line in printed.splitlines() if line.startswith("| `")]
    assert len(rows) == len(FIELDS) + len(MESSAGE_FIELDS)
    shown = CliRunner().invoke(app, ["fields"]).stdout
    assert all(field.name in shown for field in FIELDS)
