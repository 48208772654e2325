"""`basic keys`: create, list and revoke API keys, directly in the database. Needs no running API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.options import AsJson
from jobs.cli.render import keys_table, make_console
from jobs.client.durations import parse_duration_s
from jobs.errors import InvalidValue, NotFound
from jobs.settings import JobsSettings

if TYPE_CHECKING:
    from storage.keys import KeyView
    from storage.records import NewKey
    from storage.session import Database

_MAX_NAME_CHARS = 100
_Retention = typer.Option(
    metavar="NAME=AGE,…",
    help="How long to keep prompts, outputs and steps after their job has ended, and files, such as "
    "prompts=7d,outputs=30d. Default: BASIC_PROMPT_DAYS and so on.",
)
_Cache = typer.Option(
    "--cache/--no-cache",
    help="Whether its requests may get copies of its earlier answers, where BASIC_CACHE allows it. Default: yes.",
)
_MAX_REQUESTS_PER_MINUTE = 100_000

key_commands = typer.Typer(
    help="Create, list and revoke API keys. As soon as there is one, every /v1 request needs a key: set BASIC_API_KEY, "
    "or api_key of the openai client. Commands of the user who runs `basic up` on the same machine need none.",
    no_args_is_help=True,
)


@key_commands.command()
def create(
    name: Annotated[str, typer.Argument(help="Owner or purpose of the key.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="submit, read or admin (everything, and the jobs of all keys). Repeatable. Default: submit and read."
        ),
    ] = None,
    max_requests_queued: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Maximum queued requests. Default: no limit.")
    ] = None,
    max_tokens_queued: Annotated[
        int | None,
        typer.Option(min=1, max=2**53, help="Maximum estimated tokens of queued requests. Default: no limit."),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_REQUESTS_PER_MINUTE, help="Maximum API requests per minute. Default: no limit."),
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(help="Lifetime: a number and m, h or d, such as 30d. Default: no expiry.")
    ] = None,
    retention: Annotated[str | None, _Retention] = None,
    cache: Annotated[bool, _Cache] = True,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Store the key in this file instead of a new one, unless it is stored already."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It can't be shown again: the database stores only its hash.

    Example: basic keys create alice --max-requests-queued 1000 --expires-in 30d
    """
    from jobs.keys import KeyLimits, new_key
    from storage import keys

    kept_s = _kept_s(retention)
    key, stored = new_key(
        _name(name),
        _scopes(scope),
        KeyLimits(max_requests_queued, max_tokens_queued, requests_per_minute),
        None if expires_in is None else _seconds(expires_in),
        given=None if key_file is None else _read_key(key_file),
    )
    with _database() as database, database.write() as session:
        first = not keys.keys_in_use(session)
        known = keys.find_key(session, stored.id)
        if known is None:
            keys.add_key(session, stored)
            keys.change_retention(session, stored.id, kept_s)
            keys.change_cache(session, stored.id, cache)
    if known is not None:
        _refuse_another(known, stored)
    if as_json:
        about = {"id": stored.id, "name": stored.name, "scopes": stored.scopes}
        typer.echo(json.dumps(about if key_file else {**about, "key": key}))
        return
    if known is not None:
        state = "" if known.valid else ", but it is revoked or expired"
        typer.echo(f"The key {known.id} ({known.name}) is stored already{state}")
        return
    if key_file is not None:
        typer.echo(f"Stored the key in {key_file} as {stored.id}")
        return
    typer.echo(key)
    typer.echo(f"This is {stored.id}. Save the key now: it is not shown again.", err=True)
    if first:
        typer.echo("It is the first key: every /v1 request needs a key now.", err=True)


@key_commands.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, including revoked ones.

    Example: basic keys list --json
    """
    from storage import keys

    with _database() as database, database.read() as session:
        found = keys.list_keys(session)
    if as_json:
        typer.echo(json.dumps([_fields(key) for key in found]))
    elif found:
        make_console().print(keys_table([_fields(key) for key in found]))
    else:
        typer.echo("There is no key. The API server listens on this machine only, and all its users may use it.")


@key_commands.command()
def update(
    key: Annotated[str, typer.Argument(help="Id of the key, or its name if it is unique.")],
    retention: Annotated[str | None, _Retention] = None,
    cache: Annotated[bool | None, _Cache] = None,
) -> None:
    """Change how long what belongs to a key is kept; NAME=default goes back to the settings. Or change its cache.

    Example: basic keys update alice --retention prompts=7d,files=1d,steps=default

    Example: basic keys update alice --no-cache
    """
    from storage import keys

    kept_s = _kept_s(retention)
    with _database() as database, database.write() as session:
        key_id = _find(keys.list_keys(session), key)
        keys.change_retention(session, key_id, kept_s)
        if cache is not None:
            keys.change_cache(session, key_id, cache)
    typer.echo(f"Changed {key_id}")


@key_commands.command()
def revoke(key: Annotated[str, typer.Argument(help="Id of the key, or its name if it is unique.")]) -> None:
    """Revoke a key: it is rejected from now on. Its jobs and files are kept; keys with the scope admin can read them.

    Example: basic keys revoke alice
    """
    from storage import keys

    with _database() as database, database.write() as session:
        key_id = _find(keys.list_keys(session), key)
        keys.revoke_key(session, key_id)
    typer.echo(f"Revoked {key_id}")


def _find(found: list[KeyView], key_or_name: str) -> str:
    """Return the id of the key with this id, or with this name if only one valid key has it."""
    same_id = [key.id for key in found if key.id == key_or_name]
    same_name = [key.id for key in found if key.name == key_or_name and key.revoked_at is None]
    if len(same_name) > 1 and not same_id:
        raise InvalidValue(f"{len(same_name)} keys have the name {key_or_name!r}; give an id: {', '.join(same_name)}")
    for key_id in (*same_id, *same_name):
        return key_id
    raise NotFound(f"There is no key {key_or_name[:80]!r}. List keys with: basic keys list")


def _fields(key: KeyView) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "opens": key.valid,
        "max_requests_queued": key.max_requests_queued,
        "max_tokens_queued": key.max_tokens_queued,
        "requests_per_minute": key.max_requests_per_minute,
        "kept_s": {name: age_s for name in _KEPT if (age_s := getattr(key, f"{name}_kept_s")) is not None},
        "cache": key.cache,
        "created_at": int(key.created_at),
        "expires_at": None if key.expires_at is None else int(key.expires_at),
        "revoked_at": None if key.revoked_at is None else int(key.revoked_at),
    }


def _read_key(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError as exc:
        raise typer.BadParameter(f"{file} can't be read: {exc.strerror}", param_hint="--key-file") from exc


def _refuse_another(known: KeyView, given: NewKey) -> None:
    """Refuse a key whose id belongs to another key. The same key is accepted: start scripts store it at every start."""
    if known.secret_sha256 != given.secret_sha256:
        raise InvalidValue(
            f"{known.id} is the id of another key; `basic keys create` generates a new one", param="--key-file"
        )


def _name(name: str) -> str:
    if not 1 <= len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise typer.BadParameter(f"must be 1 to {_MAX_NAME_CHARS} printable characters", param_hint="NAME")
    return name


def _scopes(given: list[str] | None) -> tuple[Any, ...]:
    from jobs.keys import Scope

    try:
        return tuple(dict.fromkeys(Scope(scope) for scope in given or (Scope.SUBMIT, Scope.READ)))
    except ValueError as exc:
        raise typer.BadParameter(f"must be one of {', '.join(Scope)}", param_hint="--scope") from exc


def _kept_s(retention: str | None) -> dict[str, float | None]:
    """Return the columns of a retention such as `prompts=7d,outputs=30d`."""
    kept: dict[str, float | None] = {}
    for part in retention.split(",") if retention is not None else ():
        name, _, age = part.strip().partition("=")
        if name not in _KEPT:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(_KEPT)}", param_hint="--retention")
        try:
            kept[f"{name}_kept_s"] = None if age == "default" else parse_duration_s(age, zero=True)
        except ValueError as exc:
            raise typer.BadParameter(f"{name}: {exc}, such as 30d", param_hint="--retention") from exc
    return kept


_KEPT = ("prompts", "outputs", "files", "steps")


def _seconds(text: str) -> float:
    try:
        return parse_duration_s(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{exc}, such as 30d", param_hint="--expires-in") from exc


@contextmanager
def _database() -> Iterator[Database]:
    """Open the database; create it if there is none. Its schema must be that of this version."""
    from jobs.schema_check import explain_database_errors, require_schema
    from storage import schema
    from storage.session import Database

    url = _database_url()
    with explain_database_errors(url):
        if schema.current(url) is None:
            schema.upgrade(url)
        require_schema(url)
        database = Database.open(url)
        try:
            yield database
        finally:
            database.dispose()


def _database_url() -> str:
    """Return BASIC_DATABASE_URL, else the URL of the running service, else the default URL."""
    from jobs.client.service_location import local_service

    settings = JobsSettings()
    service = None if settings.database_url else local_service(settings)
    return settings.resolved_database_url if service is None else service.database_url
