"""What libraries do with /v1/responses, unchanged: `python -m tests.acceptance.response_libraries URL`.

It runs in an environment of its own and prints lines of JSON, like client_libraries.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from autobatcher import BatchOpenAI
from chatlas import ChatOpenAI
from openai import OpenAI
from openbatch import BatchCollector
from pydantic import BaseModel, Field

from tests.acceptance.library_checks import run_checks

MODEL = "smollm2-135m-instruct"
PACKAGES = ("chatlas", "autobatcher", "openbatch", "openai")
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city and its country."""

    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


class ResponseChecks:
    def __init__(self, url: str) -> None:
        self.service: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "unused"}

    def chat(self) -> Any:
        chat = ChatOpenAI(model=MODEL, **self.service)
        chat.set_model_params(temperature=0, max_tokens=60)
        return chat

    def chatlas_turns(self) -> None:
        chat = self.chat()
        assert "Paris" in str(chat.chat(QUESTION, echo="none"))
        assert str(chat.chat("And of Italy?", echo="none"))

    def chatlas_stream(self) -> None:
        assert "Paris" in "".join(map(str, self.chat().stream(QUESTION)))

    def chatlas_structured(self) -> None:
        assert isinstance(self.chat().chat_structured("Paris, France", data_model=City, echo="none"), City)

    def autobatcher_flex(self) -> None:
        async def answers() -> list[Any]:
            async with BatchOpenAI(poll_interval_seconds=0.2, **self.service) as client:
                messages: Any = [{"role": "user", "content": QUESTION}]
                chats = (client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6) for _ in range(3))
                response = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=6)
                return await asyncio.gather(*chats, response)

        *chats, response = asyncio.run(answers())
        assert all(chat.choices[0].message.content for chat in chats)
        assert response.output_text

    def openbatch_responses(self) -> None:
        path = Path(tempfile.mkdtemp()) / "batch.jsonl"
        collector = BatchCollector(path)
        asked: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 80}
        collector.responses.create(custom_id="text", **asked)
        collector.responses.parse(custom_id="class", text_format=City, **asked)
        with OpenAI(**self.service) as client:
            file = client.files.create(file=path, purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
            while batch.status not in ("completed", "failed", "expired", "cancelled"):
                time.sleep(0.2)
                batch = client.batches.retrieve(batch.id)
            assert batch.output_file_id, batch.errors
            lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        texts = {line["custom_id"]: line["response"]["body"]["output"][0]["content"][0]["text"] for line in lines}
        assert "Paris" in texts["text"]
        assert City.model_validate_json(texts["class"])


if __name__ == "__main__":
    some = ResponseChecks(sys.argv[1])
    names = ("chatlas_turns", "chatlas_stream", "chatlas_structured", "autobatcher_flex", "openbatch_responses")
    run_checks(PACKAGES, {name: getattr(some, name) for name in names})
