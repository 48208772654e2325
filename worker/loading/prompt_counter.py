"""Count the prompt tokens of a file of requests with the tokenizer of a model on this machine.

Loads no weights and downloads nothing. `basic submit --dry-run` finds `count_prompts` through the entry points
`basic.prompt_counter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from jobs.client.results import JobCheck, RefusedRequest
from jobs.errors import RequestRefused
from jobs.messages import GenerationRequest, model_name
from jobs.openai.paths import endpoint_of_url
from jobs.submission.checking import MAX_REFUSED
from jobs.submission.items import read_lines
from jobs.submission.models import ModelNames
from jobs.submission.parameters.sampling import parameter_fields, parse_parameters
from jobs.submission.request_parser import Rules, parse_item, refused_request
from jobs.submission.responses_api.chat_form import as_given
from worker.engine.errors import ModelRefused
from worker.loading.model_store import PACKAGED
from worker.settings import WorkerSettings

_NO_LIMIT: Final = 1 << 30


def count_prompts(lines: IO[bytes], parameters: Mapping[str, Any], check: JobCheck) -> JobCheck | None:
    """Return the check with counted prompt tokens, and with the prompts that don't fit into the context refused.

    `lines` are those of the submission, and `parameters` its own. None: the model's tokenizer is not on this machine.
    """
    folder = tokenizer_folder(check.model, WorkerSettings())
    if folder is None:
        return None
    try:
        return _counted(lines, parameters, check, folder)
    except ModelRefused:
        return None


def tokenizer_folder(model: str, settings: WorkerSettings) -> Path | None:
    """Return the directory of a model, by its public name; None if it is not on this machine."""
    target = next((target for target in settings.targets if model_name(target) == model), model)
    if target in PACKAGED:
        folder = settings.cache_dir.expanduser() / "models" / target
        return folder if folder.is_dir() else None
    if target.startswith(("/", ".", "~")):
        folder = Path(target).expanduser()
        return folder if folder.is_dir() else None
    from worker.engine.model.checkpoint import folder_of

    return folder_of(target)


def _counted(lines: IO[bytes], parameters: Mapping[str, Any], check: JobCheck, folder: Path) -> JobCheck:
    from worker.text.codec import Codec, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    codec = Codec(tokenizer, frozenset(), check.context_tokens or _NO_LIMIT, len(tokenizer))
    rules = _rules(parameters, check)
    tokens, refused = 0, []
    for item in read_lines(lines, _NO_LIMIT):
        request = parse_item(item, rules)
        if request.body is None:
            continue  # the check has refused it
        try:
            body = GenerationRequest.model_validate(request.body)
            tokens += sum(map(len, codec.encode_all(body, check.endpoint)))
        except RequestRefused as error:
            failure = refused_request(error, item).failure
            assert failure is not None
            place = {"index": item.index, "line": item.line, "custom_id": request.custom_id}
            refused.append(RefusedRequest(**place, code=failure.code, param=failure.param, message=failure.message))
    counts = check.request_counts
    return check.model_copy(
        update={
            "prompt_tokens": tokens,
            "prompt_tokens_source": "tokenizer",
            "request_counts": counts.model_copy(
                update={"accepted": counts.accepted - len(refused), "refused": counts.refused + len(refused)}
            ),
            "refused": tuple(sorted((*check.refused, *refused), key=lambda one: one.index)[:MAX_REFUSED]),
        }
    )


def _rules(parameters: Mapping[str, Any], check: JobCheck) -> Rules:
    """Return the rules of the job, without limits: the service has applied them, grammars and stored responses."""
    endpoint = endpoint_of_url(check.endpoint)
    assert endpoint is not None
    with as_given(parameters, endpoint):
        defaults = parse_parameters(parameter_fields(parameters, endpoint), endpoint)
    models = ModelNames({check.model: check.context_tokens})
    return Rules("check", check.model, endpoint, defaults, _NO_LIMIT, check.context_tokens, models)
