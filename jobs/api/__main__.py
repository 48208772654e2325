"""`python -m jobs.api [--ready-file FILE]`: run the API server; settings come from BASIC_* variables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.api.server import serve
from jobs.errors import BasicError
from jobs.schema_check import exit_status
from jobs.settings import JobsSettings, read_settings


def main() -> int:
    """Serve until a signal. Exit status: 78 for a bad configuration, 75 for an error that may pass."""
    parser = argparse.ArgumentParser(prog="python -m jobs.api", description=__doc__)
    parser.add_argument("--ready-file", type=Path, help="write the URL to this file once connections are accepted")
    arguments = parser.parse_args()
    try:
        serve(read_settings(JobsSettings), arguments.ready_file)
    except BasicError as exc:
        print(exc, file=sys.stderr)
        return exit_status(exc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
