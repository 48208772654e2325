"""Our own client: submit, follow, fetch, and try again what failed.

Run it with `basic up` running: python examples/our_client.py. With a key, set BASIC_API_KEY.
"""

from __future__ import annotations

from jobs import Client

PROMPTS = [
    "What is the capital of Portugal?",
    {"custom_id": "rivers", "prompt": "Name two rivers.", "temperature": 0.7, "seed": 1},
    {"custom_id": "broken", "prompt": "This line fails alone.", "temperature": -1},
]


def main() -> None:
    """Run the example."""
    with Client() as client:
        # Also: a path, an iterator, a pandas column or data frame. What no prompt names holds for all of them.
        job = client.submit(PROMPTS, max_tokens=24, temperature=0)
        print(f"job {job.id}")
        for event in job.follow():  # text as it is written; a lost connection is taken up where it was
            print(event.request or "", event.type, event.text or event.status or "")
        job.wait(progress=True)

    with Client() as client:  # another process would do the same: a job is known by its id
        job = client.job(job.id)
        for row in job.results():  # job.dataframe() gives the same rows as a pandas DataFrame
            print(row["custom_id"], row["text"] if row["error"] is None else row["error"])
        print("failed:", [row["custom_id"] for row in job.results(failed=True)])  # job.retry() runs them again


if __name__ == "__main__":
    main()
