"""The types of the client, as a type checker sees them in a user's own file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from jobs.client import parameters
from jobs.messages import RESPONSES_ENDPOINT
from jobs.submission.fields import FIELDS, Treatment
from tests.paths import ROOT

SCRIPT = """
from __future__ import annotations
from pathlib import Path
from jobs import AsyncClient, Client

def right() -> None:
    with Client("http://127.0.0.1:8000", patience_s=1.0) as client:
        job = client.submit(["a", {"prompt": "b"}], max_tokens=3, temperature=0, stop=["."], logit_bias={"7": 1})
        client.submit(Path("a.jsonl"), model="m", metadata={"a": "b"}, endpoint="/v1/completions")
        reveal_type(job)
        for event in job.follow():
            reveal_type(event.text)
        for output in job.outputs():
            reveal_type(output.choices[0].text)
        reveal_type(job.wait(progress=True).progress.time_left_s)

async def too() -> None:
    async with AsyncClient() as client:
        reveal_type(await client.submit("a", seed=1))

def wrong(client: Client, other: AsyncClient) -> None:
    client.submit(["a"], max_token=3)
    client.submit(["a"], temperature="hot")
    client.submit(["a"], modle="m")
    client.submit(["a"], model=3)
    client.submit(["a"], endpoint="/v1/embeddings")
    client.submit(5)
    client.submit([5])
    client.job("a").foo
    client.job("a").outputs(follow="yes")
    Client(patience=3)
    other.submit(["a"], max_token=3)
"""

REVEALED = [
    "jobs.client.client.Job",
    "str",
    "str",
    "float | None",
    "jobs.client.async_client.AsyncJob",
]


def test_the_type_checker_rejects_misspelt_names_and_wrong_types(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    told = checked(script)
    wrong = [number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.startswith("    client.")]
    wrong += [wrong[-1] + 1, wrong[-1] + 2]
    assert sorted({int(line) for line in re.findall(r"script\.py:(\d+): error", told)}) == wrong, told
    assert re.findall(r'Revealed type is "(?:builtins\.)?([^"]*)"', told) == REVEALED, told


def checked(script: Path) -> str:
    """Return mypy's output for a user's file, without our settings."""
    options = ["--config-file", "", "--cache-dir", str(ROOT / ".mypy_cache" / "user"), "--strict", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, str(script)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout


def test_the_typed_parameters_are_those_that_have_an_effect() -> None:
    asked_here = (field for field in FIELDS if field.same_as is None and field.endpoints != (RESPONSES_ENDPOINT,))
    effective = {field.name for field in asked_here if field.treatment is Treatment.HONOURED}
    assert set(parameters.Parameters.__annotations__) == effective - {"extra_body"}
