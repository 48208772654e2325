"""One script per revision, chained by `down_revision`."""

from __future__ import annotations
