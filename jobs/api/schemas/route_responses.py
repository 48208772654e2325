"""What each route returns, for the OpenAPI document: the `responses` of its decorator."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jobs.api.schemas.replies import (
    BatchReply,
    ChatChunk,
    ChatReply,
    ErrorReply,
    FileDeleted,
    FileReply,
    HealthReply,
    JobCheckReply,
    JobEstimateReply,
    JobPage,
    JobReply,
    JobRowList,
    ModelList,
    ModelReply,
    NumericsReply,
    OutputLine,
    ReadyReply,
    SigningKeyReply,
    TextChunk,
    TextReply,
    VerificationReply,
    VerificationReport,
    WorkerList,
)
from jobs.api.schemas.responses import InputItemPage, ResponseEvent, ResponseReply
from jobs.messages import PartialEvent
from storage.queries import JobStats

Json = dict[str, Any]

_REFERENCE: Final = "#/components/schemas/{model}"


def _replied(model: type, description: str) -> dict[int | str, Json]:
    """Return the `responses` of a route that returns one model."""
    return {200: {"model": model, "description": description}}


def _streamed(content_type: str, part: str, model: type[BaseModel], description: str) -> dict[int | str, Json]:
    """Return the `responses` of a route that streams values; extension `part` names their type: OpenAPI 3.1 can't."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {
        200: {"content": {content_type: {"schema": {"type": "string"}, part: reference}}, "description": description}
    }


JOB: Final = _replied(JobReply, "The job.")
JOB_ESTIMATE: Final = _replied(JobEstimateReply, "The estimate.")
JOB_CHECK: Final = _replied(JobCheckReply, "The check.")
JOBS: Final = _replied(JobPage, "A page of the list.")
NUMERICS: Final = _replied(NumericsReply, "The parts of the fingerprint.")
VERIFICATION: Final = _replied(VerificationReply, "The verification.")
VERIFICATION_REPORT: Final = _replied(VerificationReport, "The signed report.")
SIGNING_KEY: Final = _replied(SigningKeyReply, "The public key.")
STATISTICS: Final = _replied(JobStats, "The statistics.")
LINES: Final = _streamed("application/x-ndjson", "x-line", OutputLine, "JSON lines, one request per line.")
EVENTS: Final = _streamed("text/event-stream", "x-event", PartialEvent, "Server-sent events with JSON data.")


def _answered(whole: type[BaseModel], piece: type[BaseModel]) -> dict[int | str, Json]:
    """Return the `responses` of a route that answers whole, or streamed as server-sent events."""
    content = {
        "text/event-stream": {
            "schema": {"type": "string"},
            "x-event": {"$ref": _REFERENCE.format(model=piece.__name__)},
        }
    }
    return {200: {"model": whole, "description": "The answer; server-sent events with `stream`.", "content": content}}


CHAT: Final = _answered(ChatReply, ChatChunk)
TEXT: Final = _answered(TextReply, TextChunk)
STREAMED_RESPONSE: Final = _answered(ResponseReply, ResponseEvent)
RESPONSE: Final = _replied(ResponseReply, "The response.")
INPUT_ITEMS: Final = _replied(InputItemPage, "A page of the list.")
MODEL: Final = _replied(ModelReply, "The model.")
MODELS: Final = _replied(ModelList, "The models.")
WORKERS: Final = _replied(WorkerList, "The workers.")
JOB_ROWS: Final = _replied(JobRowList, "The jobs.")
HEALTH: Final = _replied(HealthReply, "The process is alive.")
READY: Final = _replied(ReadyReply, "The service accepts jobs.")


BYTES: Final[dict[int | str, Json]] = {
    200: {
        "description": "The bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    404: {"model": ErrorReply, "description": "Unknown file id."},
}
_ERRORS: Final[dict[int, str]] = {
    400: "Invalid request; `param` names the field.",
    404: "Unknown id.",
    409: "Its state does not allow this.",
    413: "The file is too large.",
}


def responses(model: type[BaseModel], *errors: int) -> dict[int | str, Json]:
    """Return the `responses` of a route that returns a model or one of these error statuses."""
    return _replied(model, "Done.") | {
        status: {"model": ErrorReply, "description": _ERRORS[status]} for status in errors
    }


def examples() -> Json:
    """Return the examples of the models, by model name."""
    models = (ErrorReply, FileReply, FileDeleted, BatchReply)
    return {model.__name__: model.model_json_schema()["example"] for model in models}


def streamed_schemas() -> Json:
    """Return the schemas of the models that only streamed responses use."""
    _, found = models_json_schema(
        [(model, "serialization") for model in (OutputLine, PartialEvent, ChatChunk, TextChunk, ResponseEvent)],
        ref_template=_REFERENCE,
    )
    return dict(found["$defs"])
