"""Triton's interpreter with less repetition: it patches its language, and builds every type and shape, at each use."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") is not None:
    from triton import language
    from triton.language.core import block_type, builtin, constexpr, dtype, is_builtin, tensor
    from triton.language.core import tuple as Values  # Triton's own, which holds constants too
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _scalar_dtype = cache(interpreter._get_np_dtype)  # it lists all types at each call
    _new_block_type = block_type.__init__
    _equal_types = dtype.__eq__
    _broadcast, _cast = TritonSemantic.broadcast_impl_value, TritonSemantic.cast
    _operands, _constant = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.scalar_constant
    _type_of = TritonSemantic.to_tensor_type
    _unwrap = language.core._unwrap_if_constexpr
    _check_size = interpreter.TensorHandle.__post_init__
    _builtin_code = builtin(lambda: None).__code__  # of every function that `builtin` wraps


def _np_dtype(kind: Any) -> Any:
    """Return the NumPy dtype of a type or of a block of it."""
    element = kind.element_ty if isinstance(kind, language.block_type) else kind
    return np.dtype(np.uint64) if isinstance(element, language.pointer_type) else _scalar_dtype(element)


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    """Return the functions of a module or class that Triton patches; the first launch finds them unpatched."""
    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


@cache
def _patched(member: Any) -> Callable[..., Any]:
    """Return what a function of the language becomes in the interpreter: one call, without a check of its builder."""
    function = member.__wrapped__ if member.__code__ is _builtin_code else member
    semantic = interpreter.interpreter_semantic

    def called(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs, _semantic=semantic)

    return called


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        scope.set_attr(package, name, _patched(member))


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


def _are_equal(self: Any, other: Any) -> bool:
    """Compare types; most are one object, whose name need not be compared."""
    return self is other or _equal_types(self, other)


def _unwrapped(value: Any) -> Any:
    """Return the value of a constant; most arguments are tensors, which are their own."""
    return value if type(value) is tensor else _unwrap(value)


_typed: dict[tuple[str, str], Any] = {}


def _with_element(self: Any, element: Any) -> Any:
    """Return the type of a block with other elements."""
    key = self.name, element.name
    found = _typed.get(key)
    if found is None:
        found = _typed[key] = block_type(element, self.shape)
    return found


_sizes: dict[str, float] = {}


def _init_handle(self: Any, data: Any, kind: Any, attr: Any = None) -> None:
    """Initialize a handle; the sizes of its numbers are those of the type, or smaller."""
    self.data, self.dtype, self.attr = data, kind, {}
    size = _sizes.get(kind.name)
    if size is None:
        pointer = isinstance(kind, language.pointer_type)
        size = _sizes[kind.name] = math.inf if pointer else max(1, kind.primitive_bitwidth // 8)
    if data.itemsize > size:
        _check_size(self)


_constants: dict[tuple[type, Any, str], Any] = {}


def _scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
    """Return a constant; nothing changes one."""
    key = type(value), value, dtype.name
    found = _constants.get(key)
    if found is None:
        found = _constants[key] = _constant(self, value, dtype)
    return found


_checked: dict[Any, tuple[Any, Any]] = {}  # types that the operands of a binary operation are cast to, by their own


def _kind_of(operand: Any) -> Any:
    """Return what Triton's check of an operand depends on."""
    if type(operand) is tensor:
        return operand.dtype.name
    if isinstance(operand, int):
        return type(operand), operand.bit_length(), operand < 0
    return type(operand), _type_of(None, operand).name


def _checked_operands(self: Any, lhs: Any, rhs: Any, *given: Any, **named: Any) -> Any:
    """Return the operands of a binary operation, cast to one type; check those of the same kinds once."""
    key = _kind_of(lhs), _kind_of(rhs), given, *named.items()
    kinds = _checked.get(key)
    if kinds is None:
        lhs, rhs = _operands(self, lhs, rhs, *given, **named)
        _checked[key] = lhs.dtype, rhs.dtype
        return lhs, rhs
    return _broadcast_pair(self, _operand(self, lhs, kinds[0]), _operand(self, rhs, kinds[1]))


def _operand(self: Any, operand: Any, kind: Any) -> Any:
    return _cast_to(self, operand, kind) if type(operand) is tensor else _scalar_constant(self, operand, kind)


def _broadcast_pair(self: Any, lhs: Any, rhs: Any) -> Any:
    """Broadcast two operands; those of one shape, as most are, stay as they are, and a scalar fills a block."""
    one, other = lhs.type, rhs.type
    if one.is_block():
        if not other.is_block():
            return lhs, _filled(one, rhs)
        return (lhs, rhs) if one.shape.values == other.shape.values else _broadcast(self, lhs, rhs)
    return (_filled(other, lhs) if other.is_block() else lhs), rhs


def _filled(kind: Any, scalar: Any) -> Any:
    """Return a block whose elements are a scalar."""
    data = np.full(kind.shape.values, scalar.handle.data, scalar.handle.data.dtype)
    return tensor(interpreter.TensorHandle(data, scalar.dtype), _with_element(kind, scalar.dtype))


def _cast_to(self: Any, operand: Any, kind: Any, rounding: str | None = None) -> Any:
    """Cast an operand, unless it has the type."""
    return operand if operand.dtype.name == kind.scalar.name else _cast(self, operand, kind, rounding)


@cache
def _languages(function: Any) -> frozenset[int]:
    """Return the modules of Triton's language that a kernel sees."""
    modules = filter(inspect.ismodule, function.__globals__.values())
    return frozenset(id(module) for module in modules if module in (language, language.core))


@pytest.fixture(autouse=True)
def _language_is_patched_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patch the language once per test, and not in every launch and every function that a kernel calls.

    Overflows of integers are not computed: without `debug`, Triton computes them and looks at none.
    """
    patched: dict[frozenset[int], Any] = {}
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    assert not interpreter.interpreter_builder.options.debug

    def patch_lang(function: Any) -> Any:
        used = _languages(function)
        if used not in patched:
            patched[used] = patch(function)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_get_np_dtype", _np_dtype)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    monkeypatch.setattr(language.core, "_unwrap_if_constexpr", _unwrapped)
    monkeypatch.setattr(block_type, "__init__", _init_block)
    monkeypatch.setattr(tensor, "__init__", _init_tensor)
    monkeypatch.setattr(dtype, "__eq__", _are_equal)
    monkeypatch.setattr(block_type, "with_element_ty", _with_element)
    monkeypatch.setattr(block_type, "to_ir", lambda self, _: self)
    monkeypatch.setattr(interpreter.TensorHandle, "__init__", _init_handle)
    monkeypatch.setattr(TritonSemantic, "scalar_constant", _scalar_constant)
    monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", _checked_operands)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", _broadcast_pair)
    monkeypatch.setattr(TritonSemantic, "cast", _cast_to)
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)
    yield
    for scope in reversed(patched.values()):
        restore(scope)
