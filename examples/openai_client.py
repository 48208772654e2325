"""Use the openai client: upload a file, create a batch, poll it, download its output.

Only `base_url` and `api_key` differ from a program for OpenAI.

Start `basic up`, then: pip install openai; python examples/openai_client.py
"""

from __future__ import annotations

import io
import json
import os
import time

from openai import OpenAI

PROMPTS = {"capital": "What is the capital of Portugal?", "rivers": "Name two rivers."}


def main() -> None:
    """Run the example."""
    client = OpenAI(
        base_url=os.environ.get("BASIC_API_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("BASIC_API_KEY") or "none",
    )
    model = client.models.list().data[0].id
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 24,
                "temperature": 0,
            },
        }
        for name, prompt in PROMPTS.items()
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    upload = client.files.create(file=("prompts.jsonl", io.BytesIO(content)), purpose="batch")
    batch = client.batches.create(
        input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"from": "example"}
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
        print(batch.status, batch.request_counts)
    if batch.output_file_id is None:
        raise SystemExit(f"no request completed: {batch.errors}")
    for line in client.files.content(batch.output_file_id).text.splitlines():
        answer = json.loads(line)
        print(answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])
    print("batches:", [listed.id for listed in client.batches.list(limit=3)])


if __name__ == "__main__":
    main()
