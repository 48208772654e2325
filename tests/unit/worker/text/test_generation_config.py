"""Sampling parameters of a model's generation config: those that a request does not set, as the file has them."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from jobs.messages import GenerationRequest, SamplingParameters
from worker.text.generation_config import sampling_defaults, with_defaults


def config(**values: Any) -> GenerationConfig:
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


def test_the_model_gives_what_vllm_takes_from_it() -> None:
    recommending = config(
        temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=2048, do_sample=True, eos_token_id=2, num_beams=1
    )
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 2048}
    assert sampling_defaults(recommending) == (recommended, [])
    assert sampling_defaults(recommending, "off") == ({}, [])


def test_values_of_the_api_say_nothing_and_invalid_ones_are_named() -> None:
    same = config(temperature=1.0, top_p=1, top_k=0, min_p=None, repetition_penalty=1.0)
    assert sampling_defaults(same) == sampling_defaults(config()) == sampling_defaults(None) == ({}, [])
    defaults, findings = sampling_defaults(config(temperature=7.0, repetition_penalty=3.0, min_p=0.1))
    assert defaults == {"min_p": 0.1}
    assert [finding.split()[6] for finding in findings] == ["temperature", "repetition_penalty"]


def test_what_a_request_sets_wins_even_if_it_is_the_default_of_the_api() -> None:
    sampling = SamplingParameters(seed=1, temperature=1.0)
    request = GenerationRequest(model="m", prompt="x", sampling=sampling)
    filled, used = with_defaults(request, {"temperature": 0.6, "top_k": 20})
    assert used == {"top_k": 20}
    assert (filled.sampling.temperature, filled.sampling.top_k, filled.sampling.seed) == (1.0, 20, 1)
    assert with_defaults(request, {"temperature": 0.6}) == (request, None)
    stored = GenerationRequest.model_validate(request.stored())
    assert with_defaults(stored, {"temperature": 0.6, "top_k": 20}) == (filled, used)
    whole = GenerationRequest.model_validate(request.model_dump(mode="json"))
    assert with_defaults(whole, {"top_k": 20}) == (request, None), "bodies of older versions set every field"
