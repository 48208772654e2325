"""What OpenAI's routes would have answered to a request: bodies of completions, lines of output and error files.

jobs.clerk, jobs.api -> [answers] -> storage.queries.  Rows in, JSON objects out; the same rows give the same bytes, so
that a file may be written twice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from jobs.api.envelope import error_body
from jobs.messages import CHAT_ENDPOINT
from storage.queries import ChoiceView, OutputView

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """Writes the answers to the requests of one job."""

    job_id: str
    endpoint: str
    model: str

    def line(self, view: OutputView) -> bytes:
        """Return the line of a request that has ended, for the output file if it is completed, else the error file."""
        identity = {"id": f"batch_req_{self._name(view)}", "custom_id": view.custom_id}
        line = json.dumps(identity | self._result(view), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return line.encode() + b"\n"

    def body(self, view: OutputView) -> Json:
        """Return the body of the answer to a completed request: a ChatCompletion, or a Completion."""
        chat = self.endpoint == CHAT_ENDPOINT
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._name(view)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(max(choice.finished_at for choice in view.choices)),
            "model": self.model,
            "choices": [_chat_choice(choice) if chat else _text_choice(choice) for choice in view.choices],
            "usage": usage(view),
        }

    def _result(self, view: OutputView) -> Json:
        """Return what became of a request: an answer of some HTTP status, or none because it was never run."""
        if view.status == "completed":
            return {"response": self._response(view, 200, self.body(view)), "error": None}
        message = view.error_message or "The request has no result."
        if view.status != "failed":
            return {"response": None, "error": {"code": view.error_code, "message": message}}
        status_code = view.error_status_code or 500
        body = error_body(status_code, message, view.error_param, view.error_code)
        return {"response": self._response(view, status_code, body), "error": None}

    def _response(self, view: OutputView, status_code: int, body: Json) -> Json:
        return {"status_code": status_code, "request_id": f"req_{self._name(view)}", "body": body}

    def _name(self, view: OutputView) -> str:
        """Return the part of all ids of one request that is its own."""
        return hashlib.sha256(f"{self.job_id}:{view.request_index}".encode()).hexdigest()[:24]


def usage(view: OutputView) -> Json:
    """Return the tokens of a request in the words of the completion routes."""
    prompt, completion = view.prompt_tokens, view.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _chat_choice(choice: ChoiceView) -> Json:
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return {**_choice(choice), "message": message}


def _text_choice(choice: ChoiceView) -> Json:
    return {**_choice(choice), "text": choice.text}


def _choice(choice: ChoiceView) -> Json:
    return {"index": choice.choice_index, "finish_reason": choice.finish_reason, "logprobs": None}
