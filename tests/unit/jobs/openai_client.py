"""The real `openai` client on the application in this process; its types validate every reply."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from fastapi.testclient import TestClient
from openai import OpenAI
from openai._models import BaseModel
from openai.types import Batch, FileObject

Model = TypeVar("Model", bound=BaseModel)

CHAT: Final = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"


def openai_on(api: TestClient) -> OpenAI:
    """A client of the application, without retries."""
    return OpenAI(base_url="http://testserver/v1", api_key="unused", http_client=api, max_retries=0)


def checked(reply: Model) -> Model:
    """Return a reply after validation by its type, which the client itself skips."""
    return type(reply).model_validate(reply.to_dict())


def a_line(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    """A line of a batch file; `body` adds to the body."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]} | fields.pop("body", {})
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | fields


def as_jsonl(lines: Iterable[Any]) -> bytes:
    """The lines as a file; strings are lines already."""
    return "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines).encode()


def uploaded(client: OpenAI, content: bytes, name: str = "input.jsonl") -> FileObject:
    return checked(client.files.create(file=(name, content), purpose="batch"))


def a_batch(client: OpenAI, lines: Iterable[Any], **fields: Any) -> Batch:
    """A new batch of these lines."""
    file = uploaded(client, as_jsonl(lines))
    order: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"} | fields
    return checked(client.batches.create(input_file_id=file.id, **order))


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file; none where there is no file."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.split("\n") if line]
