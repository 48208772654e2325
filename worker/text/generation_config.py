"""Sampling parameters that a model's own generation_config.json recommends, for requests that do not set them.

The names are those that vLLM takes from the file (`--generation-config auto`). What a request sets wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError
from transformers import GenerationConfig

from jobs.messages import GenerationRequest, SamplingParameters

AUTO: Final = "auto"
_NAMES: Final = {  # in the file: in a request
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(generation: GenerationConfig | None, source: str = AUTO) -> tuple[dict[str, Any], list[str]]:
    """Return the recommended sampling parameters of a model, and sentences about values that can't be used.

    Those that equal the API's defaults are left out. `source` is BASIC_GENERATION_CONFIG.
    """
    defaults: dict[str, Any] = {}
    findings: list[str] = []
    for name, ours in _NAMES.items() if source == AUTO else ():
        value = getattr(generation, name, None)
        if value is None:
            continue
        try:
            read = _validated(ours, 0 if (ours, value) == ("top_k", -1) else value)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            findings.append(f"The model's generation config has a {name} that is ignored: {reason}, not {value!r}")
            continue
        if read != SamplingParameters.model_fields[ours].default:
            defaults[ours] = read
    return defaults, findings


def with_defaults(
    request: GenerationRequest, defaults: Mapping[str, Any]
) -> tuple[GenerationRequest, dict[str, Any] | None]:
    """Return a request with the defaults that it does not set, and those that were used; None: none."""
    used = {name: value for name, value in defaults.items() if name not in request.sampling.model_fields_set}
    if not used:
        return request, None
    return request.model_copy(update={"sampling": request.sampling.model_copy(update=used)}), used


def _validated(name: str, value: Any) -> Any:
    return getattr(SamplingParameters.model_validate({"seed": 0, name: value}, strict=True), name)
