"""Check the fields that a submission manages its job by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.messages import Priority
from jobs.submission.managed.budget import budget_columns
from jobs.submission.managed.labels import joined_labels, one_line
from jobs.submission.values import check_metadata, shown
from storage.dialect import storable

MAX_NAME_CHARS: Final = 128
MAX_CONCURRENT: Final = 1_000_000
MANAGED_FIELDS: Final = frozenset({"name", "labels", "priority", "max_concurrent", "budget"})


@dataclass(frozen=True, slots=True)
class Managed:
    """The fields as the caller gives them, not validated yet; None: not given."""

    name: Any = None
    labels: Any = None
    priority: Any = None
    max_concurrent: Any = None
    budget: Any = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Managed:
        """Return those of a body."""
        return cls(**{name: fields.get(name) for name in MANAGED_FIELDS})

    def columns(self, metadata: Any) -> dict[str, Any]:
        """Return the columns of a new job with this metadata; raise InvalidValue. Its `name` is the default name."""
        labels = joined_labels(check_metadata(metadata), self.labels)
        return {
            "name": _metadata_name(labels) if self.name is None else check_name(self.name),
            "metadata": labels,
            "priority_class": check_priority(self.priority).rank,
            "max_concurrent": check_max_concurrent(self.max_concurrent),
            **budget_columns(self.budget),
        }


NOTHING_MANAGED: Final = Managed()


def check_name(name: Any) -> str:
    """Return the name of a job; raise InvalidValue."""
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME_CHARS:
        raise InvalidValue(f"must be a text of 1 to {MAX_NAME_CHARS} characters", param="name")
    return one_line(name, "name")


def check_priority(priority: Any) -> Priority:
    """Return the priority class; None is normal. Raise InvalidValue for other values."""
    if priority is None:
        return Priority.NORMAL
    if not isinstance(priority, str) or priority not in set(Priority):
        raise InvalidValue(f"must be one of {', '.join(Priority)}, not {shown(priority)}", param="priority")
    return Priority(priority)


def check_max_concurrent(count: Any) -> int | None:
    """Return how many requests of a job may run at once; None: any number. Raise InvalidValue."""
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_CONCURRENT):
        raise InvalidValue(f"must be a whole number from 1 to {MAX_CONCURRENT}, or null", param="max_concurrent")
    return count


def _metadata_name(metadata: Mapping[str, str] | None) -> str | None:
    """Return the name that metadata gives, as batches and pushed jobs have no other: its `name`, as one short line."""
    words = storable((metadata or {}).get("name", "")).split()
    return "".join(letter for letter in " ".join(words) if letter.isprintable())[:MAX_NAME_CHARS] or None
