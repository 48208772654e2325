"""Sampling: filters, penalties and compiled draws."""

from __future__ import annotations
