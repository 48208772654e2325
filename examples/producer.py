"""A producer inside the cluster: push a prompt batch onto Redis, without HTTP, and print the id of its job.

examples/redis.sh runs it and follows the job with redis-cli.
"""

from __future__ import annotations

import os
import uuid

from jobs.messages import PromptBatch
from jobs.producer import batch_job_id, push


def main() -> None:
    """Run the example."""
    batch = PromptBatch(
        id=f"example-{uuid.uuid4()}",  # your id of the batch: pushing the same id again adds nothing
        requests=("What is the capital of Portugal?", {"custom_id": "rivers", "prompt": "Name two rivers."}),
        parameters={"max_tokens": 24, "temperature": 0},
    )
    push(batch, os.environ["BASIC_REDIS_URL"])
    print(batch_job_id(batch.id))


if __name__ == "__main__":
    main()
