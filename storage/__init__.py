"""The database of bASIC: jobs, requests, outputs and step statistics in SQL. Imports neither jobs nor worker."""

from __future__ import annotations
