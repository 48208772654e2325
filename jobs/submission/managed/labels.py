"""Check labels, the pairs of OpenAI's metadata: what either field holds is stored once, and found by both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.errors import InvalidValue
from jobs.submission.values import (
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE_CHARS,
    clean_text,
    kind,
    shown,
)


def joined_labels(metadata: Mapping[str, str] | None, labels: Any) -> Mapping[str, str] | None:
    """Return the pairs of both fields; raise InvalidValue if they contradict each other."""
    if labels is None:
        return metadata
    checked = _check_labels(labels)
    for key, value in checked.items():
        if metadata is not None and metadata.get(key, value) != value:
            raise InvalidValue("has another value in `metadata`; give it once", param=f"labels.{key}")
    return _limited({**(metadata or {}), **checked})


def changed_labels(metadata: Mapping[str, str] | None, changes: Any) -> Mapping[str, str] | None:
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
    return one_line(key, "labels")


def _check_value(key: str, value: Any) -> str:
    param = f"labels.{key}"
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {kind(value)}", param=param)
    if len(value) > MAX_METADATA_VALUE_CHARS:
        raise InvalidValue(f"must have at most {MAX_METADATA_VALUE_CHARS} characters, not {len(value)}", param=param)
    return one_line(value, param)


def _limited(labels: Mapping[str, str]) -> Mapping[str, str]:
    if len(labels) > MAX_METADATA_PAIRS:
        raise InvalidValue(
            f"A job has at most {MAX_METADATA_PAIRS} labels, those of `metadata` included; these are {len(labels)}.",
            param="labels",
        )
    return labels


def one_line(text: str, param: str) -> str:
    """Return a text that fits on one line; raise InvalidValue for others."""
    if not clean_text(text, param).isprintable():
        raise InvalidValue("must be one line without control characters", param=param)
    return text
