"""Where the record lies: the data directory and the database URL, read once from the environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import platformdirs
from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Directory = Annotated[Path, AfterValidator(Path.expanduser)]  # an environment variable may hold a ~ that no shell read

_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<file>[^?]+)", re.DOTALL)
_PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def default_data_dir() -> Path:
    """Return `.basic/` beside the sources in a checkout, and the user's data directory when installed."""
    if (_PACKAGE_PARENT / "pyproject.toml").exists():
        return _PACKAGE_PARENT / ".basic"
    return Path(platformdirs.user_data_dir("basic"))


# Docker and Kubernetes lay secrets there as files: `basic_database_url` is read like BASIC_DATABASE_URL, which wins.
_SECRETS = Path("/run/secrets")


class StorageSettings(BaseSettings):
    """Settings of the record. `database_url` empty means SQLite in the data directory."""

    model_config = SettingsConfigDict(
        env_prefix="BASIC_", frozen=True, extra="forbid", secrets_dir=_SECRETS if _SECRETS.is_dir() else None
    )

    data_dir: Directory = Field(
        default_factory=default_data_dir,
        description="Directory of all that is kept on this machine.",
        json_schema_extra={"default_rule": "`.basic` in a checkout, else the data directory of the user"},
    )
    database_url: str = Field(
        "", description="SQLAlchemy URL; empty: SQLite `basic.sqlite3` in the data directory.", repr=False
    )

    @property
    def resolved_database_url(self) -> str:
        """The URL to connect to."""
        return self.database_url or sqlite_url(self.data_dir / "basic.sqlite3")


def sqlite_url(file: Path) -> str:
    """Return the SQLAlchemy URL of a SQLite file. SQLAlchemy reads `?` as the end of the path, and decodes `%`."""
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None if it is of another database, in memory, or a URI that SQLite reads."""
    found = _SQLITE.match(url)
    named = unquote(found["file"]) if found else ""
    return None if not named or named == ":memory:" or named.startswith("file:") else Path(named)
