"""Triton's interpreter with less repetition: it patches its whole language again at each call inside a kernel."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is not None:
    from triton import language
    from triton.runtime import interpreter

    _scalar_dtype = cache(interpreter._get_np_dtype)  # it lists all types at each call


def _np_dtype(kind: Any) -> Any:
    """Return the NumPy dtype of a type or of a block of it."""
    element = kind.element_ty if isinstance(kind, language.block_type) else kind
    return np.dtype(np.uint64) if isinstance(element, language.pointer_type) else _scalar_dtype(element)


@pytest.fixture(autouse=True)
def _language_is_patched_once_per_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the patches of a function that a kernel calls, if this launch has made them."""
    patched: set[frozenset[int]] = set()
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore

    def patch_lang(function: Any) -> Any:
        languages = (language, language.core)
        modules = filter(inspect.ismodule, function.__globals__.values())
        used = frozenset(id(module) for module in modules if module in languages)
        if used in patched:
            return interpreter._LangPatchScope()
        patched.add(used)
        return patch(function)

    def restore_all(scope: Any) -> None:  # at the end of a launch
        restore(scope)
        patched.clear()

    monkeypatch.setattr(interpreter, "_get_np_dtype", _np_dtype)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    monkeypatch.setattr(interpreter._LangPatchScope, "restore", restore_all)
