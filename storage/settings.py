"""Storage settings: data directory and database URL, from the environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

import platformdirs
from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Directory = Annotated[Path, AfterValidator(Path.expanduser)]  # expands a ~ that no shell has expanded

_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<file>[^?]+)", re.DOTALL)
_PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def default_data_dir() -> Path:
    """Return `.basic/` in the checkout, or the user's data directory when installed."""
    if (_PACKAGE_PARENT / "pyproject.toml").exists():
        return _PACKAGE_PARENT / ".basic"
    return Path(platformdirs.user_data_dir("basic"))


# Docker and Kubernetes mount secrets here: the file `basic_database_url` sets BASIC_DATABASE_URL unless that is set.
_SECRETS = Path("/run/secrets")


class StorageSettings(BaseSettings):
    """Settings of the database. An empty `database_url` means SQLite in the data directory."""

    model_config = SettingsConfigDict(
        env_prefix="BASIC_", frozen=True, extra="forbid", secrets_dir=_SECRETS if _SECRETS.is_dir() else None
    )

    data_dir: Directory = Field(
        default_factory=default_data_dir,
        description="Directory of all local files, such as the database, keys and logs.",
        json_schema_extra={"default_rule": "`.basic` in a checkout, else the data directory of the user"},
    )
    database_url: str = Field(
        "", description="SQLAlchemy URL; empty: SQLite `basic.sqlite3` in the data directory.", repr=False
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read no .env file: there is none, and looking for each field in it takes 40 % of the time."""
        return init_settings, env_settings, file_secret_settings

    @property
    def resolved_database_url(self) -> str:
        """The database URL, with the default applied."""
        return self.database_url or sqlite_url(self.data_dir / "basic.sqlite3")


def sqlite_url(file: Path) -> str:
    """Return the SQLAlchemy URL of a SQLite file; `?` and `%` in the path are escaped."""
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None: another database, in memory, or a URI that SQLite itself reads."""
    found = _SQLITE.match(url)
    name = unquote(found["file"]) if found else ""
    return None if not name or name == ":memory:" or name.startswith("file:") else Path(name)
