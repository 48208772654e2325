from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.api.routes.completions import _line as completion_event
from jobs.api.routes.job_outputs import OutputSource
from jobs.batch_files.output_lines import result_line
from jobs.client.results import Output
from jobs.json_lines import json_line
from jobs.messages import CHAT_ENDPOINT, AnswerFormat, CallAnswer, PartialEvent
from jobs.openai.call_formats import HERMES
from jobs.streaming.sse import encode_event
from storage.batches import BatchClaim
from storage.queries import ChoiceView, OutputView

# All characters at which `str.splitlines` ends a line, and others around them.
TEXT = "a\nb\rc\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\u2028j\u2029k\x00\x1f\x7f\ufeff\U0001f600é"


def an_output(custom_id: str = "a", error: str | None = None) -> OutputView:
    choice = ChoiceView(0, TEXT, "stop", 3, 3, 0, "w", 1.0, 2.0, None, first_of_prompt=True)
    if error is None:
        return OutputView(custom_id, 0, "completed", None, None, None, None, (choice,))
    return OutputView(custom_id, 0, "failed", "invalid_value", error, TEXT, 400, ())


BATCH = BatchClaim("batch_1", 1, CHAT_ENDPOINT, "", "file-1", None, "tiny", 1.0, None)
SOURCE = OutputSource(cast(Any, None), cast(Any, SimpleNamespace(id=BATCH.job_id, endpoint=CHAT_ENDPOINT)))
EVENT = PartialEvent(job_id="batch_1", type="tokens", request=TEXT, text=TEXT)


@pytest.mark.parametrize(
    "text",
    [
        json_line({TEXT: [TEXT]}),
        json_line(EVENT),
        json_line(Output(custom_id=TEXT, index=0, status="failed")),
        result_line(BATCH, an_output()).decode().removesuffix("\n"),
        result_line(BATCH, an_output(TEXT, TEXT)).decode().removesuffix("\n"),
        SOURCE._line(an_output(TEXT)).removesuffix("\n"),
        SOURCE._line(an_output(TEXT, TEXT), cursor="1.2").removesuffix("\n"),
        completion_event({"choices": [{"delta": {"content": TEXT}}]}).removeprefix("data: ").removesuffix("\n\n"),
        encode_event(EVENT).decode().partition("data: ")[2].removesuffix("\n\n"),
    ],
)
def test_readers_that_split_at_any_line_break_see_one_line_with_the_same_value(text: str) -> None:
    assert text.splitlines() == [text]
    assert TEXT in said(json.loads(text))


def said(value: Any) -> list[Any]:
    """All keys and values in a JSON value."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *said(inner))]
    return [text for inner in value for text in said(inner)] if isinstance(value, list) else [value]


def test_a_line_of_a_batch_and_one_of_the_job_have_the_same_calls() -> None:
    form = AnswerFormat(calls=CallAnswer(form="hermes")).model_dump(mode="json")
    choice = replace(an_output().choices[0], text=HERMES.calls([("f", "{}"), ("g", '{"a": 1}')]))
    output = replace(an_output(), choices=(choice,), answer_format=form)
    (answered,) = json.loads(result_line(BATCH, output))["response"]["body"]["choices"]
    (listed,) = json.loads(SOURCE._line(output))["choices"]
    assert [call["function"]["name"] for call in answered["message"]["tool_calls"]] == ["f", "g"]
    assert answered["message"]["tool_calls"] == listed["tool_calls"]
    assert answered["finish_reason"] == listed["finish_reason"] == "tool_calls"
