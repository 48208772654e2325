"""The scope in which answers may be copied: it has all that decides them beside the requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from storage.cached_answers import CacheScope
from storage.numerics import Numerics
from tests.models import byte_tokenizer
from worker.serving.cache_scope import cache_scope
from worker.text.codec import Codec


def scope(
    *,
    fingerprint: str = "fp_1",
    depends_on_batch: bool = False,
    template: Any = None,
    context_tokens: int = 200,
    **defaults: Any,
) -> CacheScope | None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    codec = Codec(tokenizer, frozenset({256}), context_tokens, 258, sampling_defaults=defaults)
    numerics = Numerics(fingerprint, {"depends_on_batch": depends_on_batch})
    loaded: Any = SimpleNamespace(numerics=numerics, codec=codec)
    return cache_scope(loaded)


def test_workers_with_other_numerics_context_or_defaults_share_no_answers() -> None:
    found = [scope(), scope(fingerprint="fp_2"), scope(context_tokens=100), scope(top_k=7), scope(top_k=8)]
    assert scope() == found[0]
    assert None not in found
    assert len({one.name for one in found if one is not None}) == len(found)


@pytest.mark.parametrize(
    "told",
    [
        {"depends_on_batch": True},
        {"template": "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.content }}{% endfor %}"},
    ],
)
def test_a_model_whose_answers_depend_on_more_than_the_request_has_none(told: dict[str, Any]) -> None:
    assert scope(**told) is None
