"""`basic keys`: make, list and revoke the keys of the shim. Works on the database itself, with or without a shim."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.render import keys_table, make_console
from jobs.client.durations import parse_duration_s
from jobs.errors import InvalidValue, NotFound
from jobs.settings import JobsSettings

if TYPE_CHECKING:
    from storage.keys import KeyView
    from storage.records import NewKey
    from storage.session import Database

_MOST_NAME_CHARS = 100
_MOST_A_MINUTE = 100_000

key_commands = typer.Typer(
    help="Keys to the REST shim. From the first one on, every call below /v1 needs one: clients send BASIC_API_KEY, "
    "the openai client its api_key. On the machine where `basic up` runs, commands of the same user need none.",
    no_args_is_help=True,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@key_commands.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="submit, read or admin (all of it, and everybody's jobs); may be repeated. [submit, read]"),
    ] = None,
    max_requests_queued: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Requests in the queue.")
    ] = None,
    max_tokens_queued: Annotated[
        int | None, typer.Option(min=1, max=2**53, help="Tokens these may come to read and write, estimated.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, max=_MOST_A_MINUTE, help="Calls of the shim.")
    ] = None,
    expires_in: Annotated[str | None, typer.Option(help="Digits and m, h or d, such as 30d. [never]")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record the key in this file instead of a new one, unless it is recorded."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, once: only its hash is kept.

    Example: basic keys create alice --max-requests-queued 1000 --expires-in 30d
    """
    from jobs.keys import KeyLimits, new_key
    from storage import keys

    key, recorded = new_key(
        _name(name),
        _scopes(scope),
        KeyLimits(max_requests_queued, max_tokens_queued, requests_per_minute),
        None if expires_in is None else _seconds(expires_in),
        given=None if key_file is None else _read_key(key_file),
    )
    with _database() as database, database.write() as session:
        first = not keys.keys_in_use(session)
        known = keys.find_key(session, recorded.id)
        if known is None:
            keys.add_key(session, recorded)
    if known is not None:
        _refuse_another(known, recorded)
    if as_json:
        about = {"id": recorded.id, "name": recorded.name, "scopes": recorded.scopes}
        typer.echo(json.dumps(about if key_file else {**about, "key": key}))
        return
    if known is not None:
        state = "" if known.valid else ", and it opens nothing any more"
        typer.echo(f"The key {known.id} ({known.name}) is recorded already{state}")
        return
    if key_file is not None:
        typer.echo(f"Recorded the key in {key_file} as {recorded.id}")
        return
    typer.echo(key)
    typer.echo(f"This is {recorded.id}; keep the key now, it is not shown again.", err=True)
    if first:
        typer.echo("It is the first one: from now on every call below /v1 needs a key.", err=True)


@key_commands.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List all keys, revoked ones too.

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
        typer.echo("There is no key: the shim listens on this machine only, and everybody on it may use it.")


@key_commands.command()
def revoke(key: Annotated[str, typer.Argument(help="The key's id, or its name if no other key has it.")]) -> None:
    """Revoke a key: from now on it opens nothing. Its jobs and files stay, for keys with the scope admin.

    Example: basic keys revoke alice
    """
    from storage import keys

    with _database() as database, database.write() as session:
        key_id = _find(keys.list_keys(session), key)
        keys.revoke_key(session, key_id)
    typer.echo(f"{key_id} opens nothing any more")


def _find(found: list[KeyView], asked: str) -> str:
    """Return the id of the key that is meant: by its id, or by a name that one working key has."""
    same_id = [key.id for key in found if key.id == asked]
    same_name = [key.id for key in found if key.name == asked and key.revoked_at is None]
    if len(same_name) > 1 and not same_id:
        raise InvalidValue(f"{len(same_name)} keys have the name {asked!r}; give an id: {', '.join(same_name)}")
    for key_id in (*same_id, *same_name):
        return key_id
    raise NotFound(f"There is no key {asked[:80]!r}; `basic keys list` shows those there are.")


def _fields(key: KeyView) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "opens": key.valid,
        "max_requests_queued": key.max_requests_queued,
        "max_tokens_queued": key.max_tokens_queued,
        "requests_per_minute": key.max_requests_per_minute,
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
    """Refuse a key that has the id of another one. The same key again is no fault: migrations run at every start."""
    if known.secret_sha256 != given.secret_sha256:
        raise InvalidValue(f"{known.id} is another key's id; `basic keys create` makes one", param="--key-file")


def _name(name: str) -> str:
    if not 1 <= len(name) <= _MOST_NAME_CHARS or not name.isprintable():
        raise typer.BadParameter(f"must be 1 to {_MOST_NAME_CHARS} printable characters", param_hint="NAME")
    return name


def _scopes(given: list[str] | None) -> tuple[Any, ...]:
    from jobs.keys import Scope

    try:
        return tuple(dict.fromkeys(Scope(scope) for scope in given or (Scope.SUBMIT, Scope.READ)))
    except ValueError as exc:
        raise typer.BadParameter(f"must be one of {', '.join(Scope)}", param_hint="--scope") from exc


def _seconds(text: str) -> float:
    try:
        return parse_duration_s(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{exc}, such as 30d", param_hint="--expires-in") from exc


@contextmanager
def _database() -> Iterator[Database]:
    """Open the database of this installation, of the schema of this version; make it if there is none yet."""
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
    """Return where the keys are: where the environment says, else in the service that runs, else where one would be."""
    from jobs.client.service_location import local_service

    settings = JobsSettings()
    service = None if settings.database_url else local_service(settings)
    return settings.resolved_database_url if service is None else service.database_url
