"""Tables of every format give the same requests, and come back as they were."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from jobs.errors import InvalidValue, SetupError
from jobs.tables import packages
from jobs.tables.columns import Columns, requests_of
from jobs.tables.formats import TableFormat
from jobs.tables.frames import columns_of_frame, is_frame, rows_of_frame
from jobs.tables.locations import reading, writing
from jobs.tables.readers import open_table, table_of
from jobs.tables.templates import read_template
from jobs.tables.writers import write_table

ROWS = [{"text": 'Grüße, "you"\nand me', "n": 1}, {"text": "b", "n": 2}]


def arrow_stream(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


class Dataset:
    """Has what this code needs of `datasets.Dataset`."""

    column_names = ("text", "n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


TABLE = pyarrow.Table.from_pylist(ROWS)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda path: pandas.DataFrame(ROWS).to_csv(path, index=False),
    "a.tsv": lambda path: pandas.DataFrame(ROWS).to_csv(path, index=False, sep="\t"),
    "b.csv": lambda path: pandas.DataFrame(ROWS).to_csv(path, index=False, sep=";", encoding="utf-8-sig"),
    "a.jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "a.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "a.arrow": lambda path: pyarrow.feather.write_feather(TABLE, path),
    "b.arrow": lambda path: arrow_stream(TABLE, path),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(pandas.DataFrame(ROWS).to_csv(index=False).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_has_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    with open_table(str(tmp_path / name)) as table:
        assert [(row["text"], int(row["n"])) for row in table.rows] == [(row["text"], row["n"]) for row in ROWS]


@pytest.mark.parametrize(
    "frame",
    [
        pandas.DataFrame(ROWS),
        TABLE,
        type("Dataset", (), {"column_names": ["text", "n"], "__iter__": lambda _: iter(ROWS)})(),
    ],
    ids=["pandas", "pyarrow", "dataset"],
)
def test_frames_have_the_same_rows(frame: Any) -> None:
    assert is_frame(frame)
    assert columns_of_frame(frame) == ["text", "n"]
    assert [dict(row) for row in rows_of_frame(frame)] == ROWS


def test_a_frame_that_is_only_planned_is_refused() -> None:
    lazy = type("LazyFrame", (), {"collect_schema": None, "columns": []})()
    with pytest.raises(InvalidValue, match=r"frame\.collect\(\)"):
        is_frame(lazy)


def requests(rows: list[dict[str, Any]], columns: Columns) -> list[Any]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    read = columns.reader(names, {"seed", "stop", "top_p"}, "t.csv")
    return [json.loads(line) for line in requests_of(rows, read, "t.csv")]


def test_columns_make_the_requests() -> None:
    row = {"q": "Why?", "key": 7, "label": np.int64(3), "at": datetime.date(2026, 1, 2), "cost": Decimal("1.5")}
    columns = Columns(prompt="q", id="key", keep=("label", "at", "cost"))
    assert requests([row], columns) == [
        {"prompt": "Why?", "custom_id": "7", "keep": {"label": 3, "at": "2026-01-02", "cost": 1.5}}
    ]
    chat = '[{"role": "user", "content": "Why?"}]'
    assert requests([{"m": chat}], Columns(messages="m")) == [{"messages": json.loads(chat)}]
    assert requests([{"q": "a {brace}", "l": "fr"}], Columns(template="{{{l}}} {q}")) == [{"prompt": "{fr} a {brace}"}]
    assert requests([{"prompt": "a", "seed": "7", "stop": "end", "top_p": "0.5"}], Columns()) == [
        {"prompt": "a", "seed": 7, "stop": "end", "top_p": 0.5}
    ], "the texts of a CSV file are read as parameters"


def test_a_row_without_its_prompt_is_left_to_the_service_to_refuse() -> None:
    assert requests([{"q": None, "key": "a"}, {"q": float("nan"), "key": "b"}], Columns(prompt="q", id="key")) == [
        {"custom_id": "a"},
        {"custom_id": "b"},
    ]
    assert requests([{"q": None}], Columns(template="Say {q}")) == [{}]


def test_a_template_of_jinja_fills_in_rows_and_reaches_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "prompt.jinja"
    path.write_text("{% for word in words %}{{ word }} {% endfor %}{{ n or 'none' }}")
    template = read_template(str(path))
    assert set(template.columns) == {"words", "n"}
    assert template.render({"words": ["a", "b"], "n": None}) == "a b none"
    path.write_text("{{ words.__class__.__mro__ }}")
    with pytest.raises(InvalidValue, match=r"prompt\.jinja fails: access to attribute '__class__'"):
        read_template(str(path)).render({"words": []})
    path.write_text("{% if %}")
    with pytest.raises(InvalidValue, match="line 1"):
        read_template(str(path))


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        (Columns(prompt="x"), "no column 'x', but q, z"),
        (Columns(prompt="q", keep=("y",)), "no column 'y'"),
        (Columns(template="{w}"), "no column 'w'"),
        (Columns(template="no column"), "names no column"),
        (Columns(template="{q!r}"), "plain column name"),
        (Columns(template="{q"), "is invalid"),
        (Columns(template="nowhere.jinja"), "can't be read"),
        (Columns(prompt="q", messages="z"), "not several"),
        (Columns(), "no column prompt or messages"),
    ],
)
def test_columns_that_a_table_lacks_are_refused(columns: Columns, why: str) -> None:
    with pytest.raises(InvalidValue, match=why):
        requests([{"q": "a", "z": 1}], columns)


def test_a_cell_that_can_t_be_sent_is_refused_with_its_row() -> None:
    for value in (b"bytes", float("inf"), "\ud800"):
        with pytest.raises(InvalidValue, match=r"t.csv, row 2"):
            requests([{"q": "a", "k": 1}, {"q": "b", "k": value}], Columns(prompt="q", keep=("k",)))
    with pytest.raises(InvalidValue, match="row 1: The cell of column 'm' is not JSON"):
        requests([{"m": "[{"}], Columns(messages="m"))


@pytest.mark.parametrize("form", [TableFormat.CSV, TableFormat.TSV, TableFormat.PARQUET])
def test_outputs_come_back_as_they_were(form: TableFormat) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": 'Grüße, "you"\nand me\u2028', "n": 1, "score": 1, "more": None},
        {"id": "b", "text": None, "n": 2, "score": 0.5, "more": {"x": [1]}, "late": "=1+1"},
    ]
    file = io.BytesIO()
    assert write_table(rows, ["id", "empty"], form, file) == 2
    file.seek(0)
    with table_of(file, f"a.{form.lower()}") as table:
        assert table.columns == ["id", "empty", "text", "n", "score", "more", "late"]
        back = [{name: value for name, value in row.items() if value is not None} for row in table.rows]
    texts = form is not TableFormat.PARQUET
    assert back == [
        {"id": "a", "text": rows[0]["text"], "n": "1" if texts else 1, "score": "1" if texts else 1.0},
        {
            **{"id": "b", "n": "2" if texts else 2, "score": "0.5" if texts else 0.5},
            **{"more": '{"x": [1]}', "late": "=1+1"},
        },
    ]


def write_half(location: str) -> None:
    with writing(location) as file:
        file.write(b"half")
        raise ZeroDivisionError


def test_a_url_is_read_and_written_and_a_failed_write_leaves_nothing() -> None:
    with writing("memory://bucket/a.csv") as file:
        file.write(b"prompt\nHello\n")
    with open_table("memory://bucket/a.csv") as table:
        assert list(table.rows) == [{"prompt": "Hello"}]
    with pytest.raises(ZeroDivisionError):
        write_half("memory://bucket/b.csv")
    assert not fsspec.filesystem("memory").exists("/bucket/b.csv")
    for url, why in {
        "memory://bucket/none": "does not exist",
        "nowhere://a/b": "can't be read",
    }.items():
        with pytest.raises(InvalidValue, match=why), reading(url):
            pass


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError):
        write_half(str(path))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_read_in_memory_that_does_not_grow_with_the_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w") as file:
        file.write("prompt\n")
        file.writelines(f"{'word ' * 100}{n}\n" for n in range(8_000))
    with open_table(str(path)) as table:
        next(table.rows)
        tracemalloc.start()
        assert sum(1 for _ in table.rows) == 7_999
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < path.stat().st_size / 10


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(packages, "import_module", missing)
    with pytest.raises(SetupError, match=r"URLs need fsspec; .* 'basic-batch\[data\]'"), reading("s3://a/b"):
        pass
