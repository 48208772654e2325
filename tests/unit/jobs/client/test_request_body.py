from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pandas
import pytest

from jobs.client.request_body import ALL_COLUMNS, PromptFile, Prompts, SubmissionBody, build_body
from jobs.errors import InvalidValue
from jobs.tables.columns import Columns


def lines_of(prompts: Prompts, columns: Columns = ALL_COLUMNS) -> bytes:
    """Return the lines that are sent for prompts."""
    with as_file(build_body(prompts, columns)) as lines:
        return lines.read()


def as_file(body: SubmissionBody) -> IO[bytes]:
    assert body.lines is not None
    body.lines.seek(0)
    return body.lines


def requests_in(prompts: Prompts, columns: Columns = ALL_COLUMNS) -> list[Any]:
    """Return the requests of a table."""
    return [json.loads(line) for line in lines_of(prompts, columns).splitlines()]


BATCH_LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'


@pytest.mark.parametrize(
    ("prompts", "requests"),
    [
        ("Hello", ["Hello"]),
        ({"prompt": "Hello", "n": 2}, [{"prompt": "Hello", "n": 2}]),
        (["a", {"prompt": "b"}], ["a", {"prompt": "b"}]),
        ((name for name in "ab"), ["a", "b"]),
        (pandas.Series(["a", "b"], index=[7, 9]), ["a", "b"]),
    ],
)
def test_prompts_of_every_kind_become_requests(prompts: Prompts, requests: list[object]) -> None:
    assert build_body(prompts).requests == requests


@pytest.mark.parametrize("prompts", [["a", None], ["a", 7], pandas.Series(["a", float("nan")])])
def test_an_invalid_prompt_is_refused_with_its_index(prompts: Prompts) -> None:
    with pytest.raises(InvalidValue, match="Prompt 1 is"):
        build_body(prompts)


@pytest.mark.parametrize(
    ("content", "suffix", "lines"),
    [
        (b'"Hello"\n{broken\n', "", b'"Hello"\n{broken\n'),
        (b"{broken\n", ".jsonl", b"{broken\n"),
        (BATCH_LINE, "", BATCH_LINE),
        (b"One river?\r\n\nTwo \xe2\x80\xa8lines?", "", '"One river?"\n"Two \u2028lines?"\n'.encode()),
        (b'"Quoted"', ".txt", b'"\\"Quoted\\""\n'),
        (b"7\n8\n", "", b'"7"\n"8"\n'),
        (b"One river?\rTwo lines?\r", "", b'"One river?"\n"Two lines?"\n'),
        (b'"Hello"\r{broken\r', ".jsonl", b'"Hello"\n{broken\n'),
        (b'{broken\n{"prompt": "x"}\n', "", b'{broken\n{"prompt": "x"}\n'),
        (b"Hello, who are you?\nWell, who are you?\n\x1a", "", b'"Hello, who are you?"\n"Well, who are you?"\n'),
        (b"[INST] Hello\n[INST] Bye\n", "", b'"[INST] Hello"\n"[INST] Bye"\n'),
        (b"a,b\nc,d\n<html>\n", ".txt", b'"a,b"\n"c,d"\n"<html>"\n'),
        (b'[1,2]\n{"prompt": "x"}\n', ".jsonl", b'[1,2]\n{"prompt": "x"}\n'),
    ],
)
def test_a_file_is_json_lines_or_lines_of_text(content: bytes, suffix: str, lines: bytes) -> None:
    assert lines_of(PromptFile(content, suffix)) == lines


def test_the_lines_of_a_batch_file_name_the_endpoint(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(BATCH_LINE)
    assert build_body(path).endpoint == "/v1/completions"
    assert build_body(b'{"prompt": "x"}').endpoint is None
    assert build_body(PromptFile(b"{broken\n" + BATCH_LINE, ".jsonl")).endpoint == "/v1/completions"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "Wie hei\xdft du?".encode("latin-1")])
def test_a_file_that_is_not_utf_8_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidValue, match="neither JSON lines nor text in UTF-8"):
        build_body(content)


ROWS = [{"prompt": "a"}, {"prompt": "b"}]
WORKBOOK = io.BytesIO()
with zipfile.ZipFile(WORKBOOK, "w") as workbook:
    workbook.writestr("xl/workbook.xml", "<workbook/>")


@pytest.mark.parametrize(
    ("content", "name", "what"),
    [
        (b"question,answer\nWhat is 2+2?,4\n", "a.csv", "has no column prompt or messages, but question, answer"),
        (b"prompt,label\nHello,1\n", "a.csv", "the column 'label' is no parameter"),
        (b"prompt,label\nHello\n", "a.tsv", "has no column prompt"),
        (b"prompt,seed\nHello\n", "a.csv", "line 2: 1 cells, but the header has 2"),
        (b'prompt,seed\n"Hello,1\n', "a.csv", "line 2: unexpected end"),
        (b"prompt,prompt\na,b\n", "a.csv", "has the column 'prompt' twice"),
        (b"prompt\n\xe9\n", "a.csv", "not text in UTF-8"),
        (b"prompt\n", "a.csv", "has no rows"),
        (b"PAR1\x15\x04", "a.csv", "is named as CSV and holds Parquet"),
        (b"prompt\nHello\n", "a.parquet", "is named as Parquet and holds CSV"),
        (b'{"prompt": "a"}\n', "a.arrow", "is named as Arrow and holds JSON lines"),
        (b"[1]", "a.json", "element 0 is neither an object nor a text"),
        (gzip.compress(b"prompt\nHello\n", mtime=0)[:-9], "a.csv.gz", "ended before"),
        (b'question,answer\n"What is 2+2?",4\n"Name a river, please",x\n', "a", "a table"),
        (b"id\tprompt\n1\thi\n2\tyo\n", "a", "a table"),
        (b",question,answer\n0,What is 2+2?,4\n", "a", "a table"),
        (b"id;prompt text\n1;hi\n2;yo\n", "a", "a table"),
        (json.dumps(ROWS).encode(), "a", "one JSON array"),
        (json.dumps(ROWS, indent=1).encode(), "a", "one value on several lines"),
        (b"\xef\xbb\xbf" + json.dumps(ROWS[0], indent=1).encode(), "a.jsonl", "one value on several lines"),
        ((json.dumps(ROWS[0], indent=1) + "\n").encode() * 2, "a.jsonl", "one value on several lines"),
        (json.dumps(ROWS, indent=1).encode()[:-3], "a.json", "not a JSON array"),
        (b'[{"prompt": "a"},\n{"prompt": "b"},\n]', "a.json", "not a JSON array"),
        (b'{"prompt": "a"},\n{"prompt": "b"}\n', "a.jsonl", "a comma after each line"),
        (gzip.compress(b'"Hello"\n', mtime=0)[:-1], "a.jsonl.gz", "gzip data ends early"),
        (gzip.compress(gzip.compress(b'"Hello"\n', mtime=0), mtime=0), "a.gz", "packed"),
        (bz2.compress(b'"Hello"\n'), "a", "packed"),
        (lzma.compress(b'"Hello"\n'), "a", "packed"),
        (WORKBOOK.getvalue(), "a.xlsx", "spreadsheets"),
        (WORKBOOK.getvalue(), "a.txt", "spreadsheets"),
        (b"%PDF-1.7\n", "a.pdf", "PDF"),
        (b"%PDF-1.7\n", "a", "PDF"),
        (b"PAR1\x15\x04", "a.parquet", "Parquet"),
        ("Hello\nyou".encode("utf-16"), "a.txt", "UTF-16"),
        ('"Hello"\n'.encode("utf-16-le"), "a.jsonl", "UTF-16"),
        ('"Hello"\n'.encode("utf-32"), "a.jsonl", "UTF-32"),
        (b"<!DOCTYPE html><title>404</title>", "a", "HTML"),
        (b"# Title\n\nWords.\n", "a.md", "a document"),
        (b"", "a.jsonl", "empty"),
        (b"", "a", "empty"),
        (b"\xef\xbb\xbf\n \r\n", "a.txt", "empty"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path, content: bytes, name: str, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidValue, match=what) as refused:
        build_body(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.gz", "a.jsonl"])
def test_a_gzip_file_is_read_as_what_it_holds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(BATCH_LINE))
    assert (lines_of(path), build_body(path).endpoint) == (BATCH_LINE, "/v1/completions")
    path.with_name("b.txt.gz").write_bytes(gzip.compress(b'"Quoted"'))
    assert lines_of(path.with_name("b.txt.gz")) == b'"\\"Quoted\\""\n'


def test_a_line_without_a_url_is_of_the_endpoint_of_its_body() -> None:
    line = b'{"custom_id": "a", "body": {"%s": "x"}}\n'
    assert build_body(line % b"prompt").endpoint == "/v1/completions"
    assert build_body(line % b"messages").endpoint == "/v1/chat/completions"
    assert build_body(b'{"prompt": "x"}\n').endpoint is None


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="is a directory"):
        build_body(tmp_path)


def test_an_open_file_is_read_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"Hello"\n')
    with path.open() as text, path.open("rb") as binary:
        assert lines_of(text) == lines_of(binary) == b'"Hello"\n'


def test_the_name_of_an_existing_file_is_refused_as_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_body("prompts.jsonl").requests == ["prompts.jsonl"]
    Path("prompts.jsonl").touch()
    with pytest.raises(InvalidValue, match=r"Path\('prompts.jsonl'\)"):
        build_body("prompts.jsonl")
    assert build_body(["prompts.jsonl"]).requests == ["prompts.jsonl"]


def test_ids_of_a_data_frame_become_text_and_whole_numbers_stay_whole() -> None:
    table = pandas.DataFrame(
        {"prompt": ["a", "b"], "custom_id": [7, 8], "max_tokens": [3, None], "temperature": [0.5, 1.0]}
    )
    assert json.dumps(requests_in(table)) == json.dumps(
        [
            {"prompt": "a", "max_tokens": 3, "temperature": 0.5, "custom_id": "7"},
            {"prompt": "b", "temperature": 1, "custom_id": "8"},
        ]
    )
    with_a_gap = pandas.DataFrame({"prompt": ["a", "b"], "custom_id": [7, None]})
    assert requests_in(with_a_gap) == [{"prompt": "a", "custom_id": "7"}, {"prompt": "b"}]


def test_cells_that_are_arrays_become_lists() -> None:
    table = pandas.DataFrame({"messages": [np.array([{"role": "user", "content": "a"}])], "seed": [np.int64(3)]})
    assert requests_in(table) == [{"messages": [{"role": "user", "content": "a"}], "seed": 3}]


def test_a_data_frame_without_prompts_is_refused_with_its_columns() -> None:
    with pytest.raises(InvalidValue, match="question, answer"):
        build_body(pandas.DataFrame({"question": ["a"], "answer": ["b"]}))


@pytest.mark.parametrize("way", ["to_dicts", "to_pylist"])
def test_data_frames_of_other_packages_are_read_too(way: str) -> None:
    table = SimpleNamespace(columns=["custom_id", "prompt"])
    setattr(table, way, lambda: [{"custom_id": 7, "prompt": "a"}])
    assert requests_in(table) == [{"prompt": "a", "custom_id": "7"}]


@pytest.mark.parametrize(
    ("prompt", "why"),
    [("\ud800", "surrogate"), ({"prompt": "a", "seed": 1j}, "complex"), ({"prompt": "a", "top_p": math.nan}, "JSON")],
)
def test_a_prompt_that_is_not_json_is_refused_with_its_index(prompt: Any, why: str) -> None:
    with pytest.raises(InvalidValue, match=f"Prompt 1 .*{why}"):
        build_body(["a", prompt])


def test_a_value_without_prompts_is_refused() -> None:
    with pytest.raises(InvalidValue, match="int holds no prompts"):
        build_body(5)  # type: ignore[arg-type]
