"""What decides the answers of a worker beside the requests: the scope in which answers may be copied."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from storage.cached_answers import CacheScope
from worker.loading.loader import LoadedModel
from worker.text.codec import Codec

_NAME_CHARS: Final = 16
_LIBRARIES: Final = ("basic-batch", "tokenizers", "jinja2", "llguidance")  # read prompts and write texts
_CLOCKS: Final = ("strftime_now", "now()")  # in chat templates: prompts differ from day to day


def cache_scope(loaded: LoadedModel) -> CacheScope | None:
    """Return the scope of a loaded model; None if its answers depend on more than the request.

    Beside the numerics: the context, which can end a text; the sampling parameters of the model; and the libraries.
    """
    if loaded.numerics.parts.get("depends_on_batch") or reads_clock(loaded.codec):
        return None
    options = loaded.codec.options
    defaults = sorted(options.sampling_defaults.items())
    parts = (loaded.numerics.fingerprint, options.context_tokens, defaults, [_version(name) for name in _LIBRARIES])
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return CacheScope(digest[:_NAME_CHARS], loaded.numerics.fingerprint)


def reads_clock(codec: Codec) -> bool:
    """Return whether a chat template of the model may show the date."""
    template = codec.tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template or ""]
    return any(clock in text for text in templates for clock in _CLOCKS)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
