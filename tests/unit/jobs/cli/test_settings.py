"""`basic settings` and the page that it generates."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.app import app
from jobs.cli.settings import known_settings
from jobs.settings import settings_classes
from tests.paths import ROOT


def test_the_settings_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["settings", "--markdown"]).stdout
    assert (ROOT / "docs" / "settings.md").read_text() == printed, (
        "docs/settings.md is not up to date: run basic settings --markdown > docs/settings.md"
    )


def test_every_setting_is_listed_once_with_its_meaning() -> None:
    found = known_settings(settings_classes())
    variables = {f"BASIC_{name.upper()}" for kind in settings_classes().values() for name in kind.model_fields}
    assert sorted(setting.variable for setting in found) == sorted(variables)
    assert [setting.variable for setting in found if not setting.meaning or not setting.default] == []
    printed = CliRunner().invoke(app, ["settings"]).stdout
    assert all(variable in printed for variable in variables)


def test_defaults_do_not_depend_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_API_PORT", "9")
    printed = CliRunner().invoke(app, ["settings", "--markdown"]).stdout
    assert "| `BASIC_API_PORT` | 8000 |" in printed
    assert str(Path.home()) not in printed
    assert str(ROOT) not in printed
