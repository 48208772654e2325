from __future__ import annotations

from typing import Any

import pytest

from jobs.openai.paths import endpoint_of_line, endpoint_of_url, public_path

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/v1/files/", ("/v1/files", None)),
        ("/openai/files", ("/v1/files", None)),
        ("/openai/v1/batches/batch_1/cancel", ("/v1/batches/batch_1/cancel", None)),
        ("/openai/v1/chat/completions/", (CHAT, None)),
        ("/openai/deployments/tiny/chat/completions", (CHAT, "tiny")),
        ("/openai/deployments/org/tiny/completions", ("/v1/completions", "org/tiny")),
        ("/openai/deployments/tiny/embeddings", ("/v1/deployments/tiny/embeddings", None)),
        ("/", ("/", None)),
    ],
)
def test_azure_paths_mean_those_below_v1(path: str, wanted: tuple[str, str | None]) -> None:
    assert public_path(path) == wanted


@pytest.mark.parametrize(
    "url",
    [
        CHAT,
        f"{CHAT}/",
        "/chat/completions",
        f"https://api.openai.com{CHAT}",
        "/openai/v1/chat/completions",
        "https://x.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
    ],
)
def test_every_spelling_of_a_url_names_its_endpoint(url: str) -> None:
    assert endpoint_of_url(url) == CHAT


@pytest.mark.parametrize("url", ["", "/v1/embeddings", "http://[", None, 7, "/openai/deployments/gpt/embeddings"])
def test_another_url_names_no_endpoint(url: Any) -> None:
    assert endpoint_of_url(url) is None


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({"body": {"messages": []}}, CHAT),
        ({"body": {"prompt": "a"}}, "/v1/completions"),
        ({"body": {"prompt": "a"}, "url": CHAT}, CHAT),
        ({"body": {"input": "a"}}, "/v1/responses"),
        ({"body": {}}, None),
        ({"messages": []}, None),
        ("text", None),
    ],
)
def test_a_line_without_a_url_is_of_the_endpoint_of_its_body(line: Any, wanted: str | None) -> None:
    assert endpoint_of_line(line) == wanted
