"""Triton's interpreter with less repetition: it patches its language, and builds every type and shape, at each use."""

from __future__ import annotations

import importlib.util
import inspect
import math
from functools import cache
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is not None:
    from triton import language
    from triton.language.core import block_type, constexpr, is_builtin, tensor
    from triton.language.core import tuple as Values  # Triton's own, which holds constants too
    from triton.runtime import interpreter

    _scalar_dtype = cache(interpreter._get_np_dtype)  # it lists all types at each call
    _new_block_type = block_type.__init__


def _np_dtype(kind: Any) -> Any:
    """Return the NumPy dtype of a type or of a block of it."""
    element = kind.element_ty if isinstance(kind, language.block_type) else kind
    return np.dtype(np.uint64) if isinstance(element, language.pointer_type) else _scalar_dtype(element)


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    """Return the functions of a module or class that Triton patches; the first launch finds them unpatched."""
    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}


def _init_block(self: Any, element_ty: Any, shape: Any) -> None:
    """Initialize a block type with the attributes of the first one of its elements and shape."""
    values = shape.values if isinstance(shape, Values) else shape
    extents = tuple(extent.value if isinstance(extent, constexpr) else extent for extent in values)
    known = _blocks.get((element_ty.name, extents))
    if known is None:
        _new_block_type(self, element_ty, shape)
        _blocks[element_ty.name, extents] = dict(vars(self))
    else:
        vars(self).update(known)


@cache
def _extents(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the shape of a tensor and the number of its elements, as constants."""
    return Values([constexpr(extent) for extent in shape]), constexpr(math.prod(shape))


def _init_tensor(self: Any, handle: Any, kind: Any) -> None:
    """Initialize a tensor; all of one extent share their shape, which nothing changes."""
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = _extents(tuple(kind.shape.values) if kind.is_block() else ())


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
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    monkeypatch.setattr(interpreter._LangPatchScope, "restore", restore_all)
    monkeypatch.setattr(block_type, "__init__", _init_block)
    monkeypatch.setattr(tensor, "__init__", _init_tensor)
