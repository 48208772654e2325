"""One script a revision, in the order of their `down_revision`."""

from __future__ import annotations
