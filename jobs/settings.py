"""Settings of the API server, ingest process and clients: addresses and limits. Read once, when a process starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from ipaddress import ip_network
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings

from jobs.errors import SetupError, UnknownSetting
from jobs.messages import model_name
from storage.settings import Directory, StorageSettings

Settings = TypeVar("Settings", bound=BaseSettings)

DEFAULT_TARGET = "smollm2-135m-instruct"
_NAME = re.compile(r"\*|(?:\*\.)?[\w-]+(?:\.[\w-]+)*\.?(?::[0-9]{1,5})?|\[?[0-9a-fA-F:.]+\]?(?::[0-9]{1,5})?|")


class JobsSettings(StorageSettings):
    """Settings of clients, producers, the API server and the queue."""

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", description="URL of the Redis server: queue and pub/sub.", repr=False
    )
    api_url: str = Field("http://127.0.0.1:8000", description="URL of the API server, for clients.")
    api_key: str = Field("", description="API key that clients send; empty: none.", repr=False)
    api_host: str = Field("127.0.0.1", description="Address on which the API server listens.")
    api_port: int = Field(8000, ge=0, le=65535, description="Port on which the API server listens; 0: any free port.")
    api_names: str = Field(
        "",
        description="Host names of the API server that calls may use besides its address, comma-separated; "
        "*.NAME: all subdomains, *: any.",
    )
    target: str = Field(
        DEFAULT_TARGET,
        description="Target model: a known name, a hub id, a local directory or a GGUF file. Several, with commas "
        "between them, share the device of one worker; the first is the model of requests that name none.",
    )
    model_aliases: str = Field(
        "",
        description="Other names of models: pairs NAME=MODEL with commas between them, such as "
        "`gpt-4o-mini=smollm2-135m-instruct`.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of log lines: text or json.")
    max_requests: int = Field(50_000, gt=0, description="Maximum requests per job.")
    max_requests_queued: int = Field(1_000_000, gt=0, description="Maximum queued requests of all callers together.")
    interactive_timeout_s: float = Field(600, gt=0, description="Timeout of a single (interactive) request, seconds.")
    max_streams: int = Field(1_000, gt=0, description="Maximum open streams of one API server.")
    max_streams_per_key: int = Field(100, gt=0, description="Maximum open streams per API key.")
    max_body_bytes: int = Field(200_000_000, gt=0, description="Maximum bytes of a submission.")
    max_file_bytes: int = Field(200_000_000, gt=0, description="Maximum bytes of an uploaded file.")
    cache: Literal["on", "opt-in", "off"] = Field(
        "on",
        description="Whether a request that equals an earlier one of its owner gets a copy of its answer; on: unless "
        "its field cache is false; opt-in: if it is true; off: never.",
    )
    file_days: float = Field(30, gt=0, description="Days to keep a file without expires_after.")
    prompt_days: float = Field(0, ge=0, description="Days to keep the prompts of jobs that have ended; 0: for ever.")
    output_days: float = Field(0, ge=0, description="Days to keep the outputs of jobs that have ended; 0: for ever.")
    step_days: float = Field(0, ge=0, description="Days to keep the decoding steps of jobs that ended; 0: for ever.")
    max_json_bytes: int = Field(16_000_000, gt=0, description="Maximum bytes of a JSON body (NDJSON: max_body_bytes).")
    max_line_bytes: int = Field(10_000_000, gt=0, description="Maximum bytes of a line in NDJSON bodies and files.")
    max_prompt_chars: int = Field(1_000_000, gt=0, description="Maximum characters of a prompt.")
    completion_window_s: float = Field(86_400, gt=0, description="Seconds until an unfinished job expires.")
    lease_s: float = Field(
        20.0, gt=0, description="Seconds until a worker's unrenewed claim lapses; more than the longest step."
    )
    signing_key: str = Field(
        "",
        description="Ed25519 key that signs reports of verifications: PEM, or a file of it, which is created if it is "
        "missing; empty: `signing.key` in the data directory.",
        repr=False,
    )
    partials_interval_s: float = Field(0.5, gt=0, description="Seconds between commits of new tokens.")
    webhook_networks: str = Field(
        "",
        description="Networks that webhooks may call besides public addresses, also over http, comma-separated, "
        "such as `10.0.0.0/8`.",
    )
    webhook_timeout_s: float = Field(10.0, gt=0, le=300, description="Seconds that a webhook may take to answer.")
    webhook_retry_s: float = Field(
        86_400, ge=0, description="Seconds for which a webhook that fails is tried again; then its event is dead."
    )

    @property
    def targets(self) -> tuple[str, ...]:
        """`target` as a tuple: one worker serves all of them."""
        return targets_of(self.target)

    @property
    def default_model(self) -> str:
        """Public name of the model of requests that name none."""
        return model_name(self.targets[0])

    @property
    def resolved_signing_key(self) -> Path | str:
        """The signing key as PEM, or its file, with the default applied."""
        if self.signing_key.startswith("-----BEGIN"):
            return self.signing_key
        return Path(self.signing_key).expanduser() if self.signing_key else self.data_dir / "signing.key"

    @property
    def served_names(self) -> tuple[str, ...]:
        """`api_names` as a tuple, in lower case."""
        return tuple(name.strip().lower() for name in self.api_names.split(",") if name.strip())

    @property
    def aliases(self) -> dict[str, str]:
        """`model_aliases` as a dict from name to model."""
        pairs = (pair.partition("=") for pair in self.model_aliases.split(",") if pair.strip())
        return {name.strip(): model.strip() for name, _, model in pairs}

    @field_validator("target")
    @classmethod
    def _targets_have_names_of_their_own(cls, target: str) -> str:
        names = [model_name(name) for name in targets_of(target)]
        if len(names) > 1 and not all(names):
            raise ValueError("there is an empty name between commas")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two models have the name {twice!r}; rename the directory of one")
        return target

    @field_validator("webhook_networks")
    @classmethod
    def _networks_are_networks(cls, networks: str) -> str:
        for part in networks.split(","):
            if part.strip():
                ip_network(part.strip())  # its ValueError says what is wrong
        return networks

    @field_validator("model_aliases")
    @classmethod
    def _aliases_are_pairs(cls, aliases: str) -> str:
        for pair in aliases.split(","):
            name, _, model = pair.partition("=")
            if pair.strip() and not (name.strip() and model.strip()):
                raise ValueError(f"{pair.strip()!r} is not a pair; write NAME=MODEL, comma-separated")
        return aliases

    @field_validator("api_names")
    @classmethod
    def _names_are_hosts(cls, names: str) -> str:
        for name in names.split(","):
            if not _NAME.fullmatch(name.strip()):
                raise ValueError(
                    f"{name.strip()!r} is not a host name; write names such as basic.example.com or "
                    "basic.example.com:8443, comma-separated and without http://"
                )
        return names


def targets_of(target: str) -> tuple[str, ...]:
    """Split a list at its commas; the path of a file or directory may have some itself."""
    one = "," not in target or Path(target).expanduser().exists()
    return (target,) if one else tuple(name.strip() for name in target.split(","))


def read_settings(kind: type[Settings]) -> Settings:
    """Read settings from the environment; raise SetupError, naming the variable, if a value is invalid."""
    try:
        return kind()
    except ValidationError as exc:
        raise SetupError(settings_sentence(exc)) from exc


def settings_sentence(exc: ValidationError) -> str:
    """Return which variable is invalid, and why, without its value, which may be a secret."""
    first = exc.errors(include_url=False, include_input=False)[0]
    return f"BASIC_{str(first['loc'][0]).upper()}: {first['msg']}"


def settings_classes() -> dict[str, type[BaseSettings]]:
    """Return the settings class of every installed package, by the name of its entry point in `basic.settings`."""
    return {entry.name: entry.load() for entry in entry_points(group="basic.settings")}


def refuse_unknown_settings(environ: Mapping[str, str] = os.environ) -> None:
    """Raise UnknownSetting if no settings class reads a BASIC_… variable: it is probably misspelt."""
    known = {f"BASIC_{name.upper()}" for settings in settings_classes().values() for name in settings.model_fields}
    for name in sorted(environ):
        if name.startswith("BASIC_") and name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UnknownSetting(f"{name} is set, but there is no such setting{hint}")


__all__ = [
    "DEFAULT_TARGET",
    "Directory",
    "JobsSettings",
    "read_settings",
    "refuse_unknown_settings",
    "settings_classes",
    "settings_sentence",
    "targets_of",
]


def environment(settings: JobsSettings) -> dict[str, str]:
    """Return the environment of a child: that of this process and every setting that is not a default."""
    given = {f"BASIC_{name.upper()}": str(value) for name, value in settings.model_dump(exclude_unset=True).items()}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **given}
