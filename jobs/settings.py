"""Settings of the doors: where Redis and the shim are, and the limits of what they accept. Read once, at the edge."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings

from jobs.errors import SetupError, UnknownSetting
from storage.settings import Directory, StorageSettings

Settings = TypeVar("Settings", bound=BaseSettings)

DEFAULT_TARGET = "smollm2-135m-instruct"
_NAME = re.compile(r"\*|(?:\*\.)?[\w-]+(?:\.[\w-]+)*\.?(?::[0-9]{1,5})?|\[?[0-9a-fA-F:.]+\]?(?::[0-9]{1,5})?|")


class JobsSettings(StorageSettings):
    """Settings of clients, producers, the shim and the queue."""

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", description="Redis-protocol server: queue and pub/sub.", repr=False
    )
    api_url: str = Field("http://127.0.0.1:8000", description="Where clients find the REST shim.")
    api_key: str = Field("", description="Key that clients send; empty: none.", repr=False)
    api_host: str = Field("127.0.0.1", description="Address the shim listens on.")
    api_port: int = Field(8000, ge=0, le=65535, description="Port the shim listens on; 0: a free one.")
    api_names: str = Field(
        "",
        description="Host names by which the API server may be called besides its address, comma-separated; "
        "*.NAME: all below it, *: any.",
    )
    target: str = Field(
        DEFAULT_TARGET, description="Target model: a known name, a hub id, a local directory or a GGUF file."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people (text) or machines (json).")
    max_requests: int = Field(50_000, gt=0, description="Requests one job may hold.")
    max_requests_queued: int = Field(1_000_000, gt=0, description="Requests that may wait in all, whoever sent them.")
    interactive_timeout_s: float = Field(
        600, gt=0, description="Seconds within which the answer to a single request must be written."
    )
    max_streams: int = Field(1_000, gt=0, description="Streams the shim keeps open at once.")
    max_streams_per_key: int = Field(100, gt=0, description="Streams one key may keep open at once.")
    max_body_bytes: int = Field(200_000_000, gt=0, description="Bytes of one submission.")
    max_file_bytes: int = Field(200_000_000, gt=0, description="Bytes of one uploaded file.")
    file_days: float = Field(30, gt=0, description="Days a file is kept that brings no expires_after.")
    max_json_bytes: int = Field(16_000_000, gt=0, description="Bytes of one JSON body; lines may have more in all.")
    max_line_bytes: int = Field(10_000_000, gt=0, description="Bytes of one line of a batch file.")
    max_prompt_chars: int = Field(1_000_000, gt=0, description="Characters of one prompt, before it is tokenized.")
    completion_window_s: float = Field(86_400, gt=0, description="Seconds after which an unfinished job expires.")
    lease_s: float = Field(
        20.0, gt=0, description="Seconds a worker's claim lasts without renewal; longer than the longest step."
    )
    partials_interval_s: float = Field(0.5, gt=0, description="Seconds between two commits of new tokens.")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names of `api_names`, in lower case."""
        return tuple(name.strip().lower() for name in self.api_names.split(",") if name.strip())

    @field_validator("api_names")
    @classmethod
    def _names_are_hosts(cls, names: str) -> str:
        for name in names.split(","):
            if not _NAME.fullmatch(name.strip()):
                raise ValueError(
                    f"{name.strip()!r} is no host name; write names such as basic.example.com or "
                    "basic.example.com:8443, comma-separated and without http://"
                )
        return names


def read_settings(kind: type[Settings]) -> Settings:
    """Return the settings of the environment; raise SetupError, with the variable's name, if one can't be used."""
    try:
        return kind()
    except ValidationError as exc:
        raise SetupError(settings_sentence(exc)) from exc


def settings_sentence(exc: ValidationError) -> str:
    """Return which variable has a value that can't be used, and why. The value may be a secret, so it is not told."""
    first = exc.errors(include_url=False, include_input=False)[0]
    return f"BASIC_{str(first['loc'][0]).upper()}: {first['msg']}"


def refuse_unknown_settings(environ: Mapping[str, str] = os.environ) -> None:
    """Raise UnknownSetting if a BASIC_… variable is read by no settings class: a typo must not be ignored."""
    known: set[str] = set()
    for entry in entry_points(group="basic.settings"):
        settings: type[BaseSettings] = entry.load()
        known |= {f"BASIC_{name.upper()}" for name in settings.model_fields}
    for name in sorted(environ):
        if name.startswith("BASIC_") and name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UnknownSetting(f"{name} is set, but nothing reads a variable of this name{hint}")


__all__ = [
    "DEFAULT_TARGET",
    "Directory",
    "JobsSettings",
    "read_settings",
    "refuse_unknown_settings",
    "settings_sentence",
]
