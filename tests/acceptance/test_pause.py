"""A job is paused while it decodes and continues later, through the command, with real processes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from jobs.client import Client, Job
from jobs.messages import JobStatus
from tests.acceptance.conftest import Service


def texts(job: Job) -> list[str]:
    return [output.text for output in job.outputs()]


def test_the_texts_of_a_paused_job_are_those_without_the_pause(service: Service, tmp_path: Path) -> None:
    lines = tmp_path / "stories.jsonl"
    # One at a time, and enough of them that no machine has written all before the pause.
    about = [{"prompt": f"Tell a story about {count} rivers.", "seed": 3} for count in range(2, 10)]
    lines.write_text("".join(json.dumps(request | {"max_tokens": 96, "min_tokens": 96}) + "\n" for request in about))
    options = ("--temperature", "0.8", "--label", "team=stories", "--max-concurrent", "1", "--json")
    submitted = service.basic("submit", str(lines), *options)
    assert submitted.returncode == 0, submitted.stderr
    with Client(service.api_url) as client:
        job = client.job(json.loads(submitted.stdout)["id"])
        next(event for event in job.follow() if event.type == "tokens")
        assert job.pause().status is JobStatus.PAUSED
        listed = service.basic("jobs", "--label", "team=stories", "--status", "paused", "--json")
        assert [found["id"] for found in json.loads(listed.stdout)] == [job.id]
        running = "SELECT count(*) FROM requests WHERE job_id = ? AND status = 'running'"
        while service.rows(running, job.id) != [(0,)]:  # its worker returns it with the next flush
            time.sleep(0.05)
        written = job.info().progress.completion_tokens
        assert 0 < written < 8 * 96

        resumed = service.basic("resume", job.id[:14])
        assert "is in progress" in resumed.stdout
        assert job.wait(poll_s=0.1).status is JobStatus.COMPLETED
        plain = client.submit(lines, temperature=0.8)
        plain.wait(poll_s=0.1)
        assert texts(job) == texts(plain)
