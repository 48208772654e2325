"""Tables of webhooks and of their deliveries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from jobs.control_characters import safe


def webhooks_table(webhooks: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row per webhook."""
    identity = Column("id", no_wrap=True)  # never cut, so that it can be copied
    table = Table(identity, Column("url", overflow="fold"), "name", "events", "of", box=None, pad_edge=False)
    for webhook in webhooks:
        of = "all keys" if webhook["all_keys"] else webhook["job_id"] or "your key"
        events = ", ".join(webhook["event_types"])
        table.add_row(webhook["id"], Text(safe(webhook["url"])), Text(safe(webhook["name"])), events, of)
    return table


def deliveries_table(deliveries: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row per delivery of a webhook."""
    identity = Column("id", no_wrap=True)
    table = Table(identity, "event", "job", "state", "attempts", Column("last answer", overflow="fold"), box=None)
    for delivery in deliveries:
        answer = " ".join(str(part) for part in (delivery["last_status_code"], delivery["last_error"]) if part)
        columns = (delivery["id"], delivery["event_type"], delivery["job_id"], delivery["status"])
        table.add_row(*columns, str(delivery["attempts"]), Text(safe(answer)))
    return table
