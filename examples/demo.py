"""A batch job on this machine: start the service, submit `prompts.jsonl`, follow the job, stop the service.

Run it with `make demo`. Every step is a `basic` command.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.jsonl")
COMMAND = Path(sys.executable).with_name("basic")


def main() -> int:
    """Run the demo and return the exit status of the job."""
    was_running = _is_running()
    try:
        if not was_running and basic("up", "--detach") != 0:
            return 1
        return basic("submit", str(PROMPTS), "--temperature", "0", "--follow")
    except KeyboardInterrupt:
        return 130
    finally:
        if not was_running:
            basic("down")


def basic(*arguments: str) -> int:
    """Print a command, run it and return its exit status."""
    print(f"\n$ basic {' '.join(arguments)}", flush=True)
    return subprocess.run([COMMAND, *arguments], check=False).returncode


def _is_running() -> bool:
    """Return whether a service is already running: the demo must not stop it then."""
    from jobs.local.service import running_service
    from jobs.settings import JobsSettings

    return running_service(JobsSettings().data_dir) is not None


if __name__ == "__main__":
    sys.exit(main())
