from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest

from jobs.client.results import CheckCounts, JobCheck
from tests.models import byte_tokenizer
from worker.loading.prompt_counter import count_prompts


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tokenizer with a token for each byte, as the target of this installation."""
    folder = tmp_path / "letters"
    byte_tokenizer(chat=False).save_pretrained(folder)
    monkeypatch.setenv("BASIC_TARGET", str(folder))
    return "letters"


def a_check(model: str, accepted: int = 0) -> JobCheck:
    return JobCheck(
        model=model,
        endpoint="/v1/completions",
        context_tokens=16,
        request_counts=CheckCounts(total=accepted, accepted=accepted, refused=0),
        prompt_tokens=0,
        prompt_tokens_source="bytes",
        max_output_tokens=0,
    )


def test_prompts_are_counted_as_the_worker_reads_them_and_those_beyond_the_context_are_refused(model: str) -> None:
    long = b'{"prompt": "' + b"x" * 40 + b'", "custom_id": "long"}'
    lines = b'{"prompt": "four"}\n{"prompt": ["one", [7, 8]]}\n' + long + b"\n"
    check = count_prompts(BytesIO(lines), {"max_tokens": 3}, a_check(model, accepted=3))
    assert check is not None
    assert (check.prompt_tokens, check.prompt_tokens_source) == (4 + 3 + 2, "tokenizer")
    assert (check.request_counts.accepted, check.request_counts.refused) == (2, 1)
    (refused,) = check.refused
    assert (refused.line, refused.custom_id, refused.param) == (3, "long", "prompt")
    assert refused.code == "context_length_exceeded"


def test_a_model_that_is_not_on_this_machine_is_not_counted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert count_prompts(BytesIO(b'"x"\n'), {}, a_check("nobody/no-such-model", accepted=1)) is None
