"""A process whose database is away or whose URL is wrong ends with one sentence and its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.jobs.cli.test_database_errors import AWAY

# Runs modules as `python -m` does, each in a process of its own: forks share what is imported.
FORKS = """
import os, runpy, sys
import jobs.api.app

for command in sys.argv[1:]:
    url, module, *arguments = command.split()
    print("$", command, file=sys.stderr, flush=True)
    child = os.fork()
    if child == 0:
        os.environ["BASIC_DATABASE_URL"] = url
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("=", status, file=sys.stderr, flush=True)
"""


def test_a_process_ends_with_the_sentence_alone(tmp_path: Path) -> None:
    statuses = {f"{AWAY} jobs.api": 75, "nonsense jobs.ingest": 78, f"{AWAY} jobs.cli api --port 0": 1}
    own = {"BASIC_DATA_DIR": str(tmp_path)}
    started = [sys.executable, "-c", FORKS, *statuses]
    done = subprocess.run(started, env=os.environ | own, capture_output=True, text=True, check=False)
    for command, status in statuses.items():
        _, _, said = done.stderr.partition(f"$ {command}\n")
        sentence, end = said.splitlines()[:2]
        assert end == f"= {status}", done.stderr
        assert not sentence.startswith("Traceback")
