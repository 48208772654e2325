"""Laws of the comparison of suffix indexes: what it counts is what the known texts allow."""

from __future__ import annotations

from typing import Any

import pytest

from worker.bench import suffix_index
from worker.bench.suffix_index import compare, main
from worker.training.self_generated import Text

PHRASE = list(range(10, 18))


def texts(count: int, new: int) -> list[Text]:
    """Return texts with the same words, or with `new` words of their own."""
    own = [[100 * (n + 1) + place for place in range(new)] for n in range(count)]
    return [Text((1, 2, 3, *(words or PHRASE * 3)), 3, True) for words in own]


def test_a_repeated_text_is_drafted_and_a_new_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix_index, "arctic_cache", lambda: None)
    (repeated,) = compare(texts(4, 0), 8, 2)
    (new,) = compare(texts(4, 24), 8, 2)
    assert repeated.tokens_per_step > 3
    assert repeated.hit_rate > 0.5
    assert (new.tokens_per_step, new.hit_rate) == (1.0, 0.0)


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setattr(suffix_index, "arctic_cache", lambda: None)
    monkeypatch.setattr(suffix_index, "write", lambda *_: texts(2, 0))
    main(
        limit=1,
        texts=tmp_path / "none",
        prompts=None,
        template=None,
        choices=2,
        temperature=0.0,
        max_tokens=8,
        nodes=8,
        batch=2,
        as_json=False,
    )
    written = capfd.readouterr()
    assert "arctic-inference is not installed" in written.out + written.err
