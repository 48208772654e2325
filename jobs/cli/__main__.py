"""`python -m jobs.cli`: the `basic` command."""

from __future__ import annotations

from jobs.cli import main

main()
