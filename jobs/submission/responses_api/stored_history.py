"""Read previous responses from the database: their conversations, and the items of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import InvalidValue, UnknownResponse
from jobs.messages import RESPONSES_ENDPOINT, ChatMessage, GenerationRequest, ToolCall
from jobs.openai.answers import split_answer
from jobs.openai.completions import answer_format
from jobs.openai.response_items import call_id_of, request_of, response_of_item
from jobs.openai.response_object import StoredResponse, output_items
from jobs.submission.responses_api.chat_form import History, no_response
from storage import queries
from storage.queries import OutputView, RequestView
from storage.session import Database


@dataclass(frozen=True, slots=True)
class StoredHistory(History):
    """The stored responses of an owner; None: of all.

    Each response is stored with its whole conversation, so that a chain of any length is one read.
    """

    database: Database
    owner: str | None

    def conversation(self, response_id: str, param: str) -> Sequence[ChatMessage]:
        """Return the messages that a response has read, without its instructions, and its answer."""
        request, output = self._completed(response_id, param)
        instructions = request.response is not None and request.response.instructions
        return (*(request.messages or ())[1 if instructions else 0 :], _answer(response_id, output))

    def item(self, identity: str, param: str) -> dict[str, Any]:
        """Return an item of an answer."""
        response_id = response_of_item(identity)
        if response_id is not None:
            _, output = self._completed(response_id, param)
            for item in output_items(response_id, output):
                if item["id"] == identity:
                    return item
        return super(StoredHistory, self).item(identity, param)

    def _completed(self, response_id: str, param: str) -> tuple[GenerationRequest, OutputView]:
        found = self._find(response_id)
        if found is None or found.body is None:
            raise no_response(response_id, param)
        request = GenerationRequest.model_validate(found.body)
        if not StoredResponse(response_id, request.model, 0, request).options.store:
            raise UnknownResponse(f"The response {response_id[:80]!r} was created with store: false.", param=param)
        if found.status != "completed" or found.output is None:
            state = "has not ended yet" if found.output is None else f"has no answer: it is {found.status}"
            raise InvalidValue(f"The response {response_id[:80]!r} {state}.", param=param)
        return request, found.output

    def _find(self, response_id: str) -> RequestView | None:
        job_id, index = request_of(response_id)
        with self.database.read() as session:
            job = queries.job(session, job_id, self.owner)
            if job is None or job.endpoint != RESPONSES_ENDPOINT:
                return None
            return queries.request(session, job_id, index)


def _answer(response_id: str, output: OutputView) -> ChatMessage:
    answer = split_answer(answer_format(output), output.choices[0].text)
    calls = (
        ToolCall(id=call_id_of(response_id, n), name=name, arguments=text)
        for n, (name, text) in enumerate(answer.calls)
    )
    return ChatMessage(
        role="assistant", content=answer.content or "", tool_calls=tuple(calls), reasoning_content=answer.reasoning
    )
