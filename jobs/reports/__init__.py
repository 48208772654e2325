"""Statistics for people: tables, plots and reports."""

from __future__ import annotations
