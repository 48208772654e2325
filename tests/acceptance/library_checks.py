"""Run the checks of client libraries and print their outcomes, in an environment that has only the libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version


def run_checks(packages: Iterable[str], checks: Mapping[str, Callable[[], object]]) -> None:
    """Print a line of JSON with the versions of the packages, then one for each check: its name and error, if any."""
    print(json.dumps({"versions": {package: version(package) for package in packages}}))
    for name, check in checks.items():
        try:
            check()
            error = None
        except Exception as failed:  # of any library
            error = f"{type(failed).__name__}: {failed}"[:500]
        print(json.dumps({"check": name, "error": error}), flush=True)
