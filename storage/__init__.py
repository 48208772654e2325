"""The record of bASIC: jobs, requests, outputs and the numbers of every step, in SQL. Imports nothing of ours."""

from __future__ import annotations
