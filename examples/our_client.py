"""Use the client of bASIC: submit a job, follow it, fetch its outputs.

Start `basic up`, then: python examples/our_client.py. If the service requires a key, set BASIC_API_KEY.
"""

from __future__ import annotations

from typing import Any

from jobs import Client

PROMPTS: list[str | dict[str, Any]] = [
    "What is the capital of Portugal?",
    {"custom_id": "rivers", "prompt": "Name two rivers.", "temperature": 0.7, "seed": 1},
    {"custom_id": "broken", "prompt": "This line fails alone.", "temperature": -1},
]


def main() -> None:
    """Run the example."""
    with Client() as client:
        # Prompts may also be a Path, an iterator, or a data frame. The parameters apply to prompts that set none.
        job = client.submit(PROMPTS, max_tokens=24, temperature=0)
        print(f"job {job.id}")
        for event in job.follow():  # reconnects after a lost connection and continues where it stopped
            print(event.request or "", event.type, event.text or event.status or "")
        job.wait(progress=True)

    with Client() as client:  # works in another process too: a job is identified by its id
        job = client.job(job.id)
        for row in job.results():  # job.dataframe() returns the same rows as a pandas DataFrame
            print(row["custom_id"], row["text"] if row["error"] is None else row["error"])
        print("failed:", [row["custom_id"] for row in job.results(failed=True)])  # job.retry() submits them again


if __name__ == "__main__":
    main()
