"""Where the record lies: the data directory and the database URL, read once from the environment."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

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

    data_dir: Path = Field(
        default_factory=default_data_dir, description="Directory of all that is kept on this machine."
    )
    database_url: str = Field(
        "", description="SQLAlchemy URL; empty: SQLite `basic.sqlite3` in the data directory.", repr=False
    )

    @property
    def resolved_database_url(self) -> str:
        """The URL to connect to."""
        return self.database_url or f"sqlite:///{self.data_dir / 'basic.sqlite3'}"
