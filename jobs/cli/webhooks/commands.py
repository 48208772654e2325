"""`basic webhooks`: URLs that are called when jobs end, and what was delivered to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from jobs.cli import lookup
from jobs.cli.lookup import find_job
from jobs.cli.options import AsJson, print_json
from jobs.cli.render import make_console
from jobs.cli.webhooks.tables import deliveries_table, webhooks_table
from jobs.client import Client

_PATH = "/v1/webhook_endpoints"
_DELIVERIES = "/v1/webhook_deliveries"
_PAGE = 100

webhook_commands = typer.Typer(
    help="URLs that are called when jobs end, signed as OpenAI and Standard Webhooks do.", no_args_is_help=True
)

Webhook = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Id of the webhook, or a prefix of it.")]


@webhook_commands.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Public https URL that takes a POST.")],
    event: Annotated[
        list[str] | None,
        typer.Option(help="Event such as batch.completed. Repeatable. Default: every event."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name, for people.")] = "",
    job: Annotated[str | None, typer.Option(help="Only of this job. Default: of all jobs of your key.")] = None,
    all_keys: Annotated[
        bool, typer.Option("--all-keys", help="Of the jobs of all keys; needs the scope admin.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add a URL and print the secret that signs its events. It can't be shown again.

    Example: basic webhooks add https://example.com/hook --event batch.completed --event batch.failed
    """
    with lookup.connect() as client:
        fields: dict[str, Any] = {"url": url, "name": name, "all_keys": all_keys}
        fields["event_types"] = event or _call(client, "GET", "/v1/webhook_event_types")["data"]
        if job is not None:
            fields["job_id"] = find_job(client, job).id
        made = _call(client, "POST", _PATH, json=fields)
    if as_json:
        print_json(made)
        return
    typer.echo(made["signing_secret"])
    typer.echo(f"This is the secret of {made['id']}. Save it now: it is not shown again.", err=True)


@webhook_commands.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List the webhooks, newest first.

    Example: basic webhooks list
    """
    with lookup.connect() as client:
        found = _listed(client)
    if as_json:
        print_json({"data": found})
    elif found:
        make_console().print(webhooks_table(found))
    else:
        typer.echo("There is no webhook. Add one with: basic webhooks add URL")


@webhook_commands.command()
def rm(webhook: Webhook) -> None:
    """Remove a webhook, with the events that wait for it.

    Example: basic webhooks rm wh_0123456789abcdef
    """
    with lookup.connect() as client:
        found = _find(client, webhook)
        _call(client, "DELETE", f"{_PATH}/{found}")
    typer.echo(f"Removed {found}")


@webhook_commands.command()
def rotate(
    webhook: Webhook,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="Sign with the old secret too, for a day.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replace the secret of a webhook and print the new one.

    Example: basic webhooks rotate wh_0123456789abcdef --keep-old
    """
    with lookup.connect() as client:
        fields = {"keep_old_secret_active_for_24_hours": keep_old}
        made = _call(client, "POST", f"{_PATH}/{_find(client, webhook)}/rotate_secret", json=fields)
    print_json(made) if as_json else typer.echo(made["signing_secret"])


@webhook_commands.command("test")
def send_sample(
    webhook: Webhook,
    event: Annotated[str, typer.Option(help="Event to send.")] = "batch.completed",
    as_json: AsJson = False,
) -> None:
    """Send a sample event now, and print how the URL answers.

    Example: basic webhooks test wh_0123456789abcdef
    """
    with lookup.connect() as client:
        path = f"{_PATH}/{_find(client, webhook)}/test"
        answer = _call(client, "POST", path, json={"event_type": event})
    print_json(answer) if as_json else typer.echo(f"The URL answered with status {answer['status_code']}")


@webhook_commands.command()
def deliveries(
    webhook: Annotated[str | None, typer.Argument(metavar="[WEBHOOK]", help="Default: all webhooks.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="Only events that are not tried again.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Maximum number of deliveries.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List what was delivered, what waits and what is dead, newest first.

    Example: basic webhooks deliveries --dead
    """
    with lookup.connect() as client:
        path = _DELIVERIES if webhook is None else f"{_PATH}/{_find(client, webhook)}/deliveries"
        found = _call(client, "GET", path, params={"limit": limit} | ({"status": "dead"} if dead else {}))["data"]
    if as_json:
        print_json({"data": found})
    elif found:
        make_console().print(deliveries_table(found))
    else:
        typer.echo("There is no delivery")


@webhook_commands.command()
def redeliver(
    delivery: Annotated[str, typer.Argument(metavar="DELIVERY", help="Id of the delivery.")], as_json: AsJson = False
) -> None:
    """Send an event again, with the same id, such as one that is dead.

    Example: basic webhooks redeliver evt_0123456789abcdef0123456789abcdef
    """
    with lookup.connect() as client:
        queued = _call(client, "POST", f"{_DELIVERIES}/{delivery}/redeliver")
    print_json(queued) if as_json else typer.echo(f"{queued['id']} is {queued['status']}")


def _call(client: Client, method: str, path: str, **arguments: Any) -> dict[str, Any]:
    return client.run(lambda api: api.call(method, path, **arguments))


def _listed(client: Client) -> Sequence[Mapping[str, Any]]:
    return list(_call(client, "GET", _PATH, params={"limit": _PAGE})["data"])


def _find(client: Client, webhook: str) -> str:
    """Return the id of a webhook: the one that is given, or the only one that begins with it."""
    ids = [str(found["id"]) for found in _listed(client) if str(found["id"]).startswith(webhook)]
    return ids[0] if len(ids) == 1 else webhook
