"""The events of a streamed response depend on the answer alone."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from jobs.api.schemas.responses import ResponseEvent
from jobs.messages import AnswerFormat, CallAnswer, GenerationRequest, ReasoningFormat
from jobs.openai.answer_words import WordParser
from jobs.openai.call_formats import HERMES
from jobs.openai.response_events import ResponseEvents
from jobs.openai.response_items import request_of, response_id
from jobs.openai.response_object import StoredResponse, response_object
from storage.queries import ChoiceView, OutputView

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
REQUEST = GenerationRequest.model_validate(
    {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "sampling": {"seed": 1}, "response": {}}
)
STORED = StoredResponse("resp_1", "tiny", 1.0, REQUEST)


FORM = AnswerFormat(
    reasoning=ReasoningFormat(start="<think>", end="</think>", opened=True), calls=CallAnswer(form="hermes")
)
CALL = HERMES.calls([("f", '{"a": [1, 2]}'), ("g", "{}")])


def ended(text: str) -> dict[str, Any]:
    """The Response object of an answer."""
    choice = ChoiceView(0, text, "stop", 5, 2, 0, "w", 1.0, 2.0, None, first_of_prompt=True)
    form = FORM.model_dump(mode="json")
    output = OutputView("a", 0, "completed", None, None, None, None, (choice,), answer_format=form)
    return response_object(STORED, "completed", output)


def told(*pieces: str) -> list[dict[str, Any]]:
    """The events of an answer whose text arrives in these pieces."""
    stream, parser = ResponseEvents(response_object(STORED, "queued")), WordParser(FORM)
    events = stream.start()
    for piece in pieces:
        events += stream.add(parser.push(piece))
    return events + stream.add(parser.finish()) + stream.end(ended("".join(pieces)))


TEXT = st.text(st.sampled_from("ab \n\té語"), max_size=60)


@given(TEXT, TEXT, st.booleans(), TEXT, st.lists(st.integers(1, 20), min_size=1, max_size=8))
@settings(max_examples=40)
def test_the_events_of_an_answer_do_not_depend_on_how_its_text_arrived(
    reasoning: str, content: str, called: bool, after: str, sizes: list[int]
) -> None:
    text = f"{reasoning}</think>{content}{CALL if called else ''}{after}"
    pieces, at = [], 0
    for size in cycle(sizes):
        if at >= len(text):
            break
        pieces.append(text[at : at + size])
        at += size
    events = told(*pieces)
    assert events == told(text)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"], "the last event has the items as they were streamed"


def test_deltas_are_the_text_and_every_event_is_of_the_client_s_types() -> None:
    events = told("Hm, ", "yes.</thi", "nk>\n\nPar", "is is  a ", "x" * 40)
    for event in events:
        EVENT.validate_python(event)
        ResponseEvent.model_validate(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = {
        kind: "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text")
    }
    assert deltas == {"reasoning_text": "Hm, yes.", "output_text": f"Paris is  a {'x' * 40}"}


def test_an_empty_answer_is_an_empty_message() -> None:
    assert [event["type"].removeprefix("response.") for event in told()[2:]] == [
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_the_id_of_a_response_names_its_request() -> None:
    for job_id, index in (("resp_a1", 0), ("batch_a1", 0), ("batch_a1", 12), ("my_job_7", 3)):
        assert request_of(response_id(job_id, index)) == (job_id, index)
