"""Name, labels, priority and concurrency limit of a job: check what a caller gives, and change them later.

Labels are the pairs of OpenAI's metadata: what either field holds is stored once, and found by both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.errors import InvalidValue, IsInteractive, JobEnded, NotFound
from jobs.messages import JobStatus, Priority
from jobs.submission.values import (
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_CHARS,
    check_metadata,
    clean_text,
    kind,
    refuse_unknown,
    shown,
)
from storage import job_changes
from storage.dialect import storable
from storage.queries import JobView
from storage.session import Database

MAX_NAME_CHARS: Final = 128
MAX_CONCURRENT: Final = 1_000_000
MANAGED_FIELDS: Final = frozenset({"name", "labels", "priority", "max_concurrent"})
_OF_OPEN_JOBS: Final = frozenset({"priority", "max_concurrent"})


@dataclass(frozen=True, slots=True)
class Managed:
    """The fields as the caller gives them, not validated yet; None: not given."""

    name: Any = None
    labels: Any = None
    priority: Any = None
    max_concurrent: Any = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Managed:
        """Return those of a body."""
        return cls(**{name: fields.get(name) for name in MANAGED_FIELDS})

    def columns(self, metadata: Any) -> dict[str, Any]:
        """Return the columns of a new job with this metadata; raise InvalidValue. Its `name` is the default name."""
        labels = _joined(check_metadata(metadata), self.labels)
        return {
            "name": _metadata_name(labels) if self.name is None else check_name(self.name),
            "metadata": labels,
            "priority_class": check_priority(self.priority).rank,
            "max_concurrent": check_max_concurrent(self.max_concurrent),
        }


NOTHING_MANAGED: Final = Managed()


def change_job(job: JobView, fields: Mapping[str, Any], database: Database) -> None:
    """Change the fields of a job that are given; null removes one. Labels that are not named stay.

    Raise RequestRefused for invalid values, IsInteractive, and JobEnded if an ended job would get a priority.
    """
    refuse_unknown(fields, MANAGED_FIELDS)
    if not fields:
        raise InvalidValue("Give at least one of name, labels, priority and max_concurrent.")
    ended_with = sorted(_OF_OPEN_JOBS & fields.keys())
    if ended_with and JobStatus(job.status).final:
        raise JobEnded(f"The job is {job.status}: {ended_with[0]} has no effect any more.", param=ended_with[0])
    columns: dict[str, Any] = {}
    if "name" in fields:
        columns["name"] = None if fields["name"] is None else check_name(fields["name"])
    if "priority" in fields:
        columns["priority_class"] = check_priority(fields["priority"]).rank
    if "max_concurrent" in fields:
        columns["max_concurrent"] = check_max_concurrent(fields["max_concurrent"])
    with database.write() as session:
        stored = job_changes.lock_job(session, job.id)
        if stored is None:
            raise NotFound(f"There is no job {job.id!r}.", param="id")
        if stored.interactive:
            raise IsInteractive
        if "labels" in fields:
            columns["metadata_"] = _changed(stored.metadata, fields["labels"])
        job_changes.change_job(session, stored, columns)


def check_name(name: Any) -> str:
    """Return the name of a job; raise InvalidValue."""
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME_CHARS:
        raise InvalidValue(f"must be a text of 1 to {MAX_NAME_CHARS} characters", param="name")
    return _one_line(name, "name")


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


def _joined(metadata: Mapping[str, str] | None, labels: Any) -> Mapping[str, str] | None:
    """Return the pairs of both fields; raise InvalidValue if they contradict each other."""
    if labels is None:
        return metadata
    checked = _check_labels(labels)
    for key, value in checked.items():
        if metadata is not None and metadata.get(key, value) != value:
            raise InvalidValue("has another value in `metadata`; give it once", param=f"labels.{key}")
    return _limited({**(metadata or {}), **checked})


def _changed(metadata: Mapping[str, str] | None, changes: Any) -> Mapping[str, str] | None:
    """Return the labels of a job after a change: null removes one; without `changes` none is left."""
    if changes is None:
        return None
    removed = [key for key, value in changes.items() if value is None] if isinstance(changes, dict) else []
    added = _check_labels({key: changes[key] for key in changes if key not in removed} if removed else changes)
    kept = {key: value for key, value in (metadata or {}).items() if key not in removed}
    return _limited({**kept, **added}) or None


def _check_labels(labels: Any) -> Mapping[str, str]:
    if not isinstance(labels, Mapping):
        raise InvalidValue(
            f'must be an object of texts, such as {{"team": "search"}}, not {kind(labels)}', param="labels"
        )
    return {_check_key(key): _check_value(key, value) for key, value in labels.items()}


def _check_key(key: Any) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_METADATA_KEY_CHARS or "=" in key:
        raise InvalidValue(
            f"A key must have 1 to {MAX_METADATA_KEY_CHARS} characters, none of them `=`; {shown(key)} does not.",
            param="labels",
        )
    return _one_line(key, "labels")


def _check_value(key: str, value: Any) -> str:
    param = f"labels.{key}"
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {kind(value)}", param=param)
    if len(value) > MAX_METADATA_VALUE_CHARS:
        raise InvalidValue(f"must have at most {MAX_METADATA_VALUE_CHARS} characters, not {len(value)}", param=param)
    return _one_line(value, param)


def _limited(labels: Mapping[str, str]) -> Mapping[str, str]:
    if len(labels) > MAX_METADATA_PAIRS:
        raise InvalidValue(
            f"A job has at most {MAX_METADATA_PAIRS} labels, those of `metadata` included; these are {len(labels)}.",
            param="labels",
        )
    return labels


def _one_line(text: str, param: str) -> str:
    if not clean_text(text, param).isprintable():
        raise InvalidValue("must be one line without control characters", param=param)
    return text


def _metadata_name(metadata: Mapping[str, str] | None) -> str | None:
    """Return the name that metadata gives, as batches and pushed jobs have no other: its `name`, as one short line."""
    words = storable((metadata or {}).get("name", "")).split()
    return "".join(letter for letter in " ".join(words) if letter.isprintable())[:MAX_NAME_CHARS] or None
