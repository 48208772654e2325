from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from jobs.errors import InvalidValue
from jobs.prompts import Lines, Prompts, body_of

BATCH_LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'


@pytest.mark.parametrize(
    ("prompts", "requests"),
    [
        ("Hello", ["Hello"]),
        (["a", {"prompt": "b"}], ["a", {"prompt": "b"}]),
        ((name for name in "ab"), ["a", "b"]),
        (pandas.Series(["a", "b"], index=[7, 9]), ["a", "b"]),
        (
            pandas.DataFrame({"prompt": ["a", "b"], "seed": [1, None], "custom_id": ["x", None]}),
            [{"prompt": "a", "seed": 1, "custom_id": "x"}, {"prompt": "b"}],
        ),
    ],
)
def test_whatever_holds_prompts_becomes_requests(prompts: Prompts, requests: list[object]) -> None:
    assert body_of(prompts).requests == requests


@pytest.mark.parametrize("prompts", [["a", None], ["a", 7], pandas.Series(["a", float("nan")])])
def test_what_is_no_prompt_is_refused_with_its_place(prompts: Prompts) -> None:
    with pytest.raises(InvalidValue, match="Prompt 1 is"):
        body_of(prompts)


@pytest.mark.parametrize(
    ("content", "suffix", "lines"),
    [
        (b'"Hello"\n{broken\n', "", b'"Hello"\n{broken\n'),
        (b"{broken\n", ".jsonl", b"{broken\n"),
        (BATCH_LINE, "", BATCH_LINE),
        (b"One river?\r\n\nTwo \xe2\x80\xa8lines?", "", '"One river?"\n"Two \u2028lines?"\n'.encode()),
        (b'"Quoted"', ".txt", b'"\\"Quoted\\""\n'),
        (b"7\n8\n", "", b'"7"\n"8"\n'),
        (b"", "", b""),
    ],
)
def test_a_file_is_json_lines_or_lines_of_text(content: bytes, suffix: str, lines: bytes) -> None:
    assert body_of(Lines(content, suffix)).lines == lines


def test_the_lines_of_a_batch_file_name_the_endpoint(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(BATCH_LINE)
    assert body_of(path).endpoint == "/v1/completions"
    assert body_of(b'{"prompt": "x"}').endpoint is None


def test_a_file_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidValue, match="neither JSON lines nor text"):
        body_of(b"\xff\xfe\x00")
