"""Prefills, raw prompts and what answers return of them, by OpenAI's client against a real server and SmolLM2."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types import Completion, CompletionChoice

from tests.acceptance.test_openai import CHAT, COMPLETIONS, MODEL, ended, lines_of, submitted

ROUNDING = 0.35  # of a log-probability in bfloat16
USER = {"role": "user", "content": "Name two rivers."}
PREFIX = {"role": "assistant", "content": "The two rivers are the ", "prefix": True}
CONTEXT = "The capital of France is"
ENDINGS = [" Paris", " Rome", " a dog that never sleeps"]


@cache
def reference() -> tuple[Any, Any]:
    """SmolLM2 as transformers runs it: tokenizer and float32 model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from worker.loading.model_store import resolve
    from worker.settings import WorkerSettings

    path = resolve(MODEL, WorkerSettings().cache_dir)
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def loglikelihood(ids: list[int], start: int) -> list[float]:
    """Return the log-softmax of transformers' logits for the ids from `start` on."""
    import torch

    with torch.no_grad():
        law = reference()[1](torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(law[at - 1, ids[at]]) for at in range(start, len(ids))]


def scored(client: OpenAI, prompts: Any, **options: Any) -> list[CompletionChoice]:
    asked = {"model": MODEL, "prompt": prompts, "echo": True, "logprobs": 1, "temperature": 0}
    answer: Completion = client.completions.create(**asked | options)
    return answer.choices


def logprobs(choice: CompletionChoice) -> list[Any]:
    assert choice.logprobs is not None
    return choice.logprobs.token_logprobs or []


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_likelihoods_of_continuations_are_those_of_transformers(client: OpenAI, max_tokens: int) -> None:
    """As lm-eval asks for them: token ids of context and continuation, an echo, and the last token left out."""
    tokenizer, _ = reference()
    context, prompts = tokenizer(CONTEXT).input_ids, [tokenizer(CONTEXT + ending).input_ids for ending in ENDINGS]
    choices = scored(client, prompts, max_tokens=max_tokens)
    sums = []
    for choice, ids in zip(choices, prompts, strict=True):
        assert logprobs(choice)[0] is None
        found, expected = logprobs(choice)[len(context) : len(ids)], loglikelihood(ids, len(context))
        assert found == pytest.approx(expected, abs=ROUNDING)
        assert len(logprobs(choice)) == len(ids) + max_tokens
        sums.append(sum(found))
    assert sums == sorted(sums, reverse=True), "Paris is likelier than Rome"
    texts = scored(client, [CONTEXT + ending for ending in ENDINGS], max_tokens=max_tokens)
    assert [logprobs(choice) for choice in texts] == [logprobs(choice) for choice in choices]
    assert [choice.text for choice in texts] == [choice.text for choice in choices]


def test_a_prompt_that_is_cached_or_shared_is_scored_in_the_same_way(client: OpenAI) -> None:
    long = CONTEXT + ", as every child in every school of the country learns in its first years there, Paris."
    (alone,) = scored(client, long, max_tokens=0)
    together = scored(client, [long, long + " Indeed", long], max_tokens=3)
    for choice in (together[0], together[2]):
        assert logprobs(choice)[: len(logprobs(alone))] == logprobs(alone)


def test_an_answer_continues_a_prefix_whole_and_streamed(client: OpenAI) -> None:
    messages: Any = [USER, PREFIX]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    plain: Any = [USER, {"role": "assistant", "content": PREFIX["content"]}]
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    assert (
        client.chat.completions.create(messages=plain, **options, extra_body=continued).choices[0].message.content
        == whole
    )
    chunks = client.chat.completions.create(messages=messages, **options, stream=True, extra_body={"echo": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == f"{PREFIX['content']}{whole}"
    contradiction = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(BadRequestError, match="contradicts add_generation_prompt"):
        client.chat.completions.create(messages=plain, **options, extra_body=contradiction)


def test_batch_lines_return_token_ids_and_prompt_logprobs(client: OpenAI) -> None:
    asked = {"model": MODEL, "max_tokens": 4, "temperature": 0, "prompt_logprobs": 1, "return_token_ids": True}
    bodies: dict[str, dict[str, Any]] = {
        "chat": {"messages": [USER, PREFIX]},
        "none": {"messages": [USER], "max_tokens": 0},
    }
    lines = [{"custom_id": name, "method": "POST", "url": CHAT, "body": asked | body} for name, body in bodies.items()]
    found = lines_of(client, ended(client, submitted(client, lines)).output_file_id)
    for name, tokens in (("chat", 4), ("none", 0)):
        body = found[name]["response"]["body"]
        assert len(body["choices"][0]["token_ids"]) == tokens
        scored_tokens = zip(body["prompt_token_ids"][1:], body["prompt_logprobs"][1:], strict=True)
        assert all(str(token) in entry for token, entry in scored_tokens)
        assert body["prompt_logprobs"][0] is None
        assert reference()[0].decode(body["prompt_token_ids"]).endswith(PREFIX["content"] if tokens else "assistant\n")
    raw = {"prompt": "a b c d", "max_tokens": 12, "min_tokens": 12, "stop": ["e"], "include_stop_str_in_output": True}
    line = {"custom_id": "raw", "method": "POST", "url": COMPLETIONS, "body": {"model": MODEL, "temperature": 0} | raw}
    body = lines_of(client, ended(client, submitted(client, [line], COMPLETIONS)).output_file_id)["raw"]["response"][
        "body"
    ]
    assert body["usage"]["completion_tokens"] == 12
