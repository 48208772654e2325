"""Sampling parameters as arrays: one record a row of logits, and the noise keys of its draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.segments import IntArray

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

# One row's parameters; `parameters_t` of native.c. `log_min_p` is -inf, and `top_k` 0, where they exclude nothing.
PARAMETERS = np.dtype(
    [
        ("key", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("top_k", np.int32),
        ("adjusted", np.int32),
    ]
)
ParameterArray = NDArray[Any]  # of PARAMETERS
Bias = tuple[IntArray, NDArray[np.float32]]  # distinct tokens, and what is added to their logits


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one sequence."""

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    key: int = 0  # 64 bits, from `noise_key`
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, bias); each token once
    logprobs: int | None = None  # most likely tokens to report beside each emitted one; None: report neither
    min_tokens: int = 0  # no end-of-sequence token is drawn before as many
    record: ParameterArray = field(init=False, repr=False, compare=False)  # [1]
    bias: Bias = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the arrays that every draw needs."""
        with np.errstate(divide="ignore"):
            log_min_p = np.log(np.float32(self.min_p))
        row = (
            self.key & _MASK,
            self.temperature,
            self.top_p,
            log_min_p,
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
            self.top_k,
            self.adjusted,
        )
        object.__setattr__(self, "record", np.array([row], PARAMETERS))
        object.__setattr__(self, "bias", bias_of(dict(self.logit_bias)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments and the bytes of the record, which is not computed again."""
        return _received, (tuple(getattr(self, name) for name in _ARGUMENTS), self.record.tobytes())

    @property
    def greedy(self) -> bool:
        """True for argmax decoding: no noise is drawn."""
        return self.temperature == 0.0

    @property
    def adjusted(self) -> bool:
        """True if penalties, a bias or `min_tokens` change the logits; they also apply to argmax decoding."""
        return self.penalized or bool(self.logit_bias) or self.min_tokens > 0

    @property
    def penalized(self) -> bool:
        """True if penalties change the logits."""
        return any((self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0))


_ARGUMENTS = tuple(field.name for field in fields(Sampling) if field.init)
_STORES = [getattr(Sampling, field.name).__set__ for field in fields(Sampling)]  # the arguments first


def _received(arguments: tuple[Any, ...], record: bytes) -> Sampling:
    """Return the parameters that were pickled."""
    sampling = Sampling.__new__(Sampling)
    biases = dict(arguments[_ARGUMENTS.index("logit_bias")])
    arrays = np.frombuffer(record, PARAMETERS), bias_of(biases) if biases else _NO_BIAS
    for store, value in zip(_STORES, (*arguments, *arrays), strict=True):
        store(sampling, value)
    return sampling


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes the logits of some rows: biases, and the tokens that penalties apply to.

    The biases of row i begin at `bias_starts[i]` and end before `bias_starts[i + 1]`; its seen tokens likewise. The
    tokens of a row are distinct.
    """

    bias_starts: IntArray  # [rows + 1]
    bias_tokens: IntArray
    biases: NDArray[np.float32]
    seen_starts: IntArray  # [rows + 1]
    seen_tokens: IntArray  # of prompt and output
    seen_counts: IntArray  # in the output


def bias_of(biases: Mapping[int, float]) -> Bias:
    """Return biases by token as arrays."""
    return np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)


_NO_BIAS = bias_of({})


def noise_keys(parameters: ParameterArray, positions: IntArray) -> NDArray[np.uint64]:
    """Return the noise key [rows] of each row: a hash of its sequence's key and the position of the token to draw."""
    return mix(parameters["key"] ^ mix(np.asarray(positions).astype(np.uint64)))


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    z = z + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def noise_key(seed: int, choice: int) -> int:
    """Return the 64-bit noise key of one choice: it differs between the choices of a request, and is reproducible."""
    return int(mix(mix(np.array([seed & _MASK], np.uint64)) + np.uint64(choice))[0])
