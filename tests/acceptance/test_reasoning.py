"""SmolLM2 under a chat template that opens its reasoning: the answer in its parts, to every client."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from jobs import Client
from jobs.client.results import Choice
from worker.loading.model_store import resolve
from worker.settings import WorkerSettings

BASIC = Path(sys.executable).with_name("basic")
MODEL = "smollm2-thinks"
SHOWN = "".join(
    f"<|im_start|>user\nWhat is {a} plus 1?<|im_end|>\n"
    f"<|im_start|>assistant\n<think>\nI add 1 to {a}.\n</think>\n\n{a + 1}<|im_end|>\n"
    for a in (3, 5, 8)
)
TEMPLATE = (
    SHOWN + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}</think>\n\n{% endif %}"
)
ASKED: Any = {"model": MODEL, "messages": [{"role": "user", "content": "What is 6 plus 1?"}], "max_tokens": 30}
GREEDY: Any = ASKED | {"temperature": 0}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A `basic up` that serves SmolLM2 with another chat template and a generation config that recommends sampling."""
    packaged = Path(resolve("smollm2-135m-instruct", WorkerSettings().cache_dir))
    model = tmp_path_factory.mktemp("models") / MODEL
    model.mkdir()
    for file in packaged.iterdir():
        (model / file.name).symlink_to(file)
    for name, content in [("chat_template.jinja", TEMPLATE), ("generation_config.json", _recommending(packaged))]:
        (model / name).unlink()
        (model / name).write_text(content)
    data_dir = tmp_path_factory.mktemp("data")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
    own = {"BASIC_DATA_DIR": str(data_dir), "BASIC_API_PORT": "0", "BASIC_TARGET": str(model), "BASIC_DRAFT": "suffix"}
    own["BASIC_CACHE"] = "opt-in"  # the same is asked for in several ways, and decoded each time
    environment = inherited | own
    up = subprocess.run(
        [BASIC, "up", "--detach", "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert up.returncode == 0, up.stderr
    with Client(json.loads(up.stdout)["api_url"]) as client:
        yield client
    subprocess.run([BASIC, "down"], env=environment, check=True, capture_output=True)


def _recommending(packaged: Path) -> str:
    given = json.loads((packaged / "generation_config.json").read_text())
    return json.dumps(given | {"do_sample": True, "temperature": 0.6, "top_k": 20})


@pytest.fixture(scope="module")
def openai(service: Client) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.api_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def parts(answer: ChatCompletion) -> tuple[Any, Any]:
    message = ChatCompletion.model_validate(answer.to_dict()).choices[0].message.to_dict()
    assert message["reasoning"] == message["reasoning_content"]
    return message["reasoning_content"], message["content"]


def test_chats_streams_batches_and_jobs_give_the_same_parts(openai: OpenAI, service: Client) -> None:
    whole = openai.chat.completions.create(**GREEDY)
    reasoning, content = parts(whole)
    assert reasoning
    assert content
    assert "think>" not in reasoning + content
    assert (reasoning + content).strip("\n") == reasoning + content
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    counted = whole.usage.completion_tokens_details.reasoning_tokens or 0
    assert 0 < counted < whole.usage.completion_tokens
    cut = openai.chat.completions.create(**GREEDY | {"max_tokens": counted})
    assert parts(cut) == (reasoning, None), "that number of tokens is the reasoning and its end marker"
    assert parts(openai.chat.completions.create(**GREEDY | {"max_tokens": counted - 1}))[1] is None

    deltas = [
        ChatCompletionChunk.model_validate(chunk.to_dict()).choices[0].delta.to_dict()
        for chunk in openai.chat.completions.create(**GREEDY, stream=True)
    ]
    for name, expected in [("reasoning_content", reasoning), ("reasoning", reasoning), ("content", content)]:
        assert "".join(str(delta.get(name) or "") for delta in deltas) == expected

    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": GREEDY}
    file = openai.files.create(file=("batch.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    service.job(batch.id).wait(poll_s=0.1)
    ended = openai.batches.retrieve(batch.id)
    while ended.output_file_id is None:
        ended = openai.batches.retrieve(batch.id)
    (filed,) = openai.files.content(ended.output_file_id).text.splitlines()
    assert parts(ChatCompletion.model_validate(json.loads(filed)["response"]["body"])) == (reasoning, content)

    (output,) = service.job(batch.id).outputs()
    choice: Choice = output.choices[0]
    assert (choice.reasoning_content, choice.content, output.answer) == (reasoning, content, content)
    assert choice.text.startswith(reasoning)
    raw = openai.completions.create(model=MODEL, prompt="1 2 3", max_tokens=3, temperature=0)
    assert raw.usage is not None
    assert raw.usage.completion_tokens_details is None


def test_the_reasoning_is_switched_off_left_out_and_left_in_place(openai: OpenAI) -> None:
    reasoning, content = parts(openai.chat.completions.create(**GREEDY))
    for off in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert parts(openai.chat.completions.create(**GREEDY, extra_body=off))[0] is None
    silent = openai.chat.completions.create(**GREEDY, reasoning_effort="none")
    assert parts(silent)[0] is None
    left_out = openai.chat.completions.create(**GREEDY, extra_body={"include_reasoning": False}).choices[0].message
    assert left_out.content == content
    assert "reasoning_content" not in left_out.to_dict()
    in_place = openai.chat.completions.create(**GREEDY, extra_body={"separate_reasoning": False}).choices[0].message
    assert in_place.content is not None
    assert in_place.content.startswith(reasoning)
    assert "</think>" in in_place.content
    with pytest.raises(BadRequestError, match="set by the service"):
        openai.chat.completions.create(**GREEDY, extra_body={"chat_template_kwargs": {"add_generation_prompt": False}})


def test_a_grammar_binds_the_content_and_not_the_reasoning(openai: OpenAI) -> None:
    reasoning, _ = parts(openai.chat.completions.create(**GREEDY))
    bound = {"guided_regex": "x[0-9]{2}"}
    thought, content = parts(openai.chat.completions.create(**GREEDY, extra_body=bound))
    assert thought == reasoning
    assert re.fullmatch("x[0-9]{2}", content)
    at_once = openai.chat.completions.create(**GREEDY, extra_body=bound | {"enable_thinking": False})
    assert re.fullmatch("x[0-9]{2}", at_once.choices[0].message.content or "")


def test_the_model_s_own_sampling_is_used_where_a_request_sets_none(service: Client) -> None:
    unset = {**ASKED, "seed": 7}
    recommended = {"temperature": 0.6, "top_k": 20}
    job = service.submit([unset, unset | recommended, GREEDY | {"top_k": 0}])
    assert job.wait(poll_s=0.1).sampling_defaults == recommended
    filled, named, own = job.outputs()
    assert filled.sampling_defaults == recommended
    assert (named.sampling_defaults, own.sampling_defaults) == (None, None)
    assert filled.text == named.text
