"""Draws on a GPU: Triton kernels with the arithmetic of native.c and torch_draws.py.

Three launches read a row, each with a fixed split: the highest logit of each group of tokens, then masses and counts of
the tokens within some distances of the highest one, then one program a row that gathers the tokens above a distance,
bisects their scores for the end of the nucleus, and draws. Masses are integers, so no order of sums can change a bit.
Groups without a token of interest are not read again. A fourth kernel adds penalties and bias to copies of rows first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.sampling.parameters import PARAMETERS, Adjustments, ParameterArray
from worker.engine.segments import IntArray

GROUP = 512  # tokens with one stored maximum
TILE = 2048  # tokens that a program reads at once
GATHERED = 2048  # tokens of a row that are searched in registers; rows with more are read again for each bisection
_LISTED = 1024  # tokens of a list that penalties are applied to at once


def _word(name: str) -> tl.constexpr:
    """Return the place of a parameter among the 32-bit words of its record."""
    assert PARAMETERS.fields is not None
    return tl.constexpr(PARAMETERS.fields[name][1] // 4)


_WORDS = tl.constexpr(PARAMETERS.itemsize // 4)  # of a row's parameters
_TEMPERATURE = _word("temperature")
_TOP_P = _word("top_p")
_LOG_MIN_P = _word("log_min_p")
_REPETITION = _word("repetition_penalty")
_FREQUENCY = _word("frequency_penalty")
_PRESENCE = _word("presence_penalty")
_TOP_K = _word("top_k")

_LEVELS = tl.constexpr(4)  # distances from the highest score: 5, 10 and 20, and all tokens
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_NO_MASS = tl.constexpr(28.5)  # tokens this far below the highest score have mass 0: e^-28.5 < 2^-41
_MAX_NOISE = tl.constexpr(37.5)  # -log(2^-54), rounded up
_NONE = tl.constexpr(2**31 - 1)  # above every token id
# Arrays that arrive with a step: Triton must not compile kernels again where their addresses or sizes are odd.
_SENT = (
    "mask", "places", "slots", "noise_keys", "parameters",
    "adjusted", "bias_starts", "bias_tokens", "biases", "seen_starts", "seen_tokens", "seen_counts",
)  # fmt: skip
# Every operation rounds on its own, as on a CPU.
_EXACT: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _real(parameters, row, word: tl.constexpr):
    return tl.load(parameters + row * _WORDS + word).to(tl.float32, bitcast=True)


@triton.jit
def _read(
    logits, copies, mask, place, slot, row, at, wanted, columns, words, COPIED: tl.constexpr, MASKED: tl.constexpr
):
    """Return the float32 logits of a row at some tokens, -inf where they are not wanted or the mask excludes them."""
    if COPIED:
        if slot >= 0:
            logit = tl.load(copies + slot * columns + at, mask=wanted, other=float("-inf"))
        else:
            logit = tl.load(logits + place + at, mask=wanted, other=float("-inf")).to(tl.float32)
    else:
        logit = tl.load(logits + place + at, mask=wanted, other=float("-inf")).to(tl.float32)
    if MASKED:
        word = tl.load(mask + row * words + at // 32, mask=wanted, other=0)
        logit = tl.where((((word >> (at % 32)) & 1) == 1) | (logit != logit), logit, float("-inf"))
    return logit


@triton.jit
def _masses(x):
    """Return e^x of x <= 0 in units of 2^-40, rounded; 0 for -inf. The constants are those of Cephes' expf."""
    x = tl.where(x < -64.0, -64.0, x)
    n = tl.floor(x * 1.44269504 + 0.5)
    f = (x - n * 0.693359375) + n * 2.12194440e-4
    p = f * 1.9875691500e-4 + 1.3981999507e-3
    p = p * f + 8.3334519073e-3
    p = p * f + 4.1665795894e-2
    p = p * f + 1.6666665459e-1
    p = p * f + 5.0000001201e-1
    p = p * (f * f) + f + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    rounded = (p * power).to(tl.float64) * 1099511627776.0 + 4503599627370496.0  # 2^40; adding 2^52 rounds
    return rounded.to(tl.int64, bitcast=True) - 0x4330000000000000


@triton.jit
def _ordered(score):
    """Return integers in the order of the scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bits(key, token):
    """Return the 53 bits that a token's noise is made of (SplitMix64's finaliser)."""
    z = key + token.to(tl.uint64) * _GOLDEN
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    return (z ^ (z >> 31)) >> 11


@triton.jit
def _noise(bits):
    uniform = bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16 + 5.551115123125783e-17  # 2^-53, 2^-54
    return -tl.log(-tl.log(uniform))


@triton.jit
def _better(best, token, score, at, kept, key):
    """Return the best draw of those so far and of some kept tokens; `at` ascends, and the first of equal draws wins."""
    bits = _bits(key, at)
    rest = (9007199254740992 - bits.to(tl.int64)).to(tl.float32) * 1.1102230246251565e-16  # 1 - u; 2^53, 2^-53
    bound = tl.where(kept, score - tl.log(rest) + 0.001, float("-inf"))  # -log(-log(u)) <= -log(1 - u)
    if tl.max(bound, axis=0).to(tl.float64) >= best:
        drawn = tl.where(kept, score.to(tl.float64) + _noise(bits), float("-inf"))
        highest = tl.max(drawn, axis=0)
        first = tl.min(tl.where(kept & (drawn == highest), at, _NONE), axis=0).to(tl.int64)
        better = highest > best
        token = tl.where(better, first, token)
        best = tl.where(better, highest, best)
    return best, token


@triton.jit(do_not_specialize_on_alignment=_SENT)
def _adjust_rows(
    copies, parameters, adjusted, bias_starts, bias_tokens, biases, seen_starts, seen_tokens, seen_counts, columns,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Add bias, then penalties, to one copied row."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(adjusted + slot)
    logits = copies + slot * columns
    end = tl.load(bias_starts + row + 1)
    for start in range(tl.load(bias_starts + row), end, LISTED):
        at = start + tl.arange(0, LISTED)
        inside = at < end
        place = logits + tl.load(bias_tokens + at, mask=inside, other=0)
        tl.store(place, tl.load(place, mask=inside) + tl.load(biases + at, mask=inside), mask=inside)
    tl.debug_barrier()  # penalties read what other threads have stored
    end = tl.load(seen_starts + row + 1)
    repetition = _real(parameters, row, _REPETITION)
    frequency = _real(parameters, row, _FREQUENCY)
    presence = _real(parameters, row, _PRESENCE)
    for start in range(tl.load(seen_starts + row), end, LISTED):
        at = start + tl.arange(0, LISTED)
        inside = at < end
        place = logits + tl.load(seen_tokens + at, mask=inside, other=0)
        count = tl.load(seen_counts + at, mask=inside, other=0)
        old = tl.load(place, mask=inside, other=0.0)
        repeated = tl.where(old < 0, old * repetition, tl.div_rn(old, repetition))
        present = tl.where(count > 0, 1.0, 0.0)
        tl.store(place, repeated - frequency * count.to(tl.float32) - presence * present, mask=inside)


@triton.jit(do_not_specialize_on_alignment=_SENT)
def _find_maxima(
    logits, copies, mask, places, slots, maxima, columns, words, groups,
    GROUP: tl.constexpr, TILE: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the highest logit of each group of a tile; NaN if the group has one."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    members: tl.constexpr = TILE // GROUP
    at = tile * TILE + tl.arange(0, TILE)
    logit = _read(
        logits, copies, mask, tl.load(places + row), tl.load(slots + row), row, at, at < columns, columns, words,
        COPIED, MASKED,
    )  # fmt: skip
    broken = tl.max(tl.reshape((logit != logit).to(tl.int32), [members, GROUP]), axis=1)
    highest = tl.max(tl.reshape(tl.where(logit != logit, float("-inf"), logit), [members, GROUP]), axis=1)
    group = tile * members + tl.arange(0, members)
    tl.store(maxima + row * groups + group, tl.where(broken > 0, float("nan"), highest), mask=group < groups)


@triton.jit
def _highest(maxima, row, groups, GROUPS: tl.constexpr):
    """Return the highest logit of a row, and whether a logit is NaN."""
    at = tl.arange(0, GROUPS)
    some = tl.load(maxima + row * groups + at, mask=at < groups, other=float("-inf"))
    return tl.max(tl.where(some != some, float("-inf"), some), axis=0), tl.max((some != some).to(tl.int32), axis=0)


@triton.jit(do_not_specialize_on_alignment=_SENT)
def _sum_masses(
    logits, copies, mask, places, slots, parameters, maxima, sums, counts, columns, words, groups,
    GROUP: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write mass and number of a tile's tokens at each level, for a row with top_k or top_p."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = _real(parameters, row, _TEMPERATURE)
    by_count = tl.load(parameters + row * _WORDS + _TOP_K) > 0
    highest, broken = _highest(maxima, row, groups, GROUPS)
    top = tl.div_rn(highest, tl.where(temperature > 0, temperature, 1.0))
    finite = (broken == 0) & (top > float("-inf")) & (top < float("inf"))
    if finite & (temperature > 0) & (by_count | (_real(parameters, row, _TOP_P) < 1.0)):
        at = tile * TILE + tl.arange(0, TILE)
        inside = at < columns
        near = tl.load(maxima + row * groups + at // GROUP, mask=inside, other=float("-inf"))
        wanted = inside & (tl.div_rn(near, temperature) >= top - _NO_MASS)
        logit = _read(
            logits, copies, mask, tl.load(places + row), tl.load(slots + row), row, at, wanted, columns, words,
            COPIED, MASKED,
        )  # fmt: skip
        score = tl.div_rn(logit, temperature)
        mass = tl.where(wanted, _masses(score - top), 0)
        out = (row * tl.num_programs(1) + tile) * _LEVELS
        for level in tl.static_range(_LEVELS - 1):
            close = wanted & (score >= top - 5.0 * 2**level)
            tl.store(sums + out + level, tl.sum(tl.where(close, mass, 0), axis=0))
            tl.store(counts + out + level, tl.sum(close.to(tl.int32), axis=0))
        tl.store(sums + out + _LEVELS - 1, tl.sum(mass, axis=0))
        tl.store(counts + out + _LEVELS - 1, tl.sum(inside.to(tl.int32), axis=0))


@triton.jit
def _share(top_p, total):
    """Return the mass that the nucleus needs."""
    exact = top_p.to(tl.float64) * total.to(tl.float64)
    needed = exact.to(tl.int64)
    needed = tl.where(needed.to(tl.float64) < exact, needed + 1, needed)
    return tl.minimum(tl.maximum(needed, 1), total)


@triton.jit
def _search(keys, weights, low, high, limit):
    """Return the lowest key in low < key <= high with less than `limit` of the weights above it, by bisection."""
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0), axis=0) < limit:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _weight_above(
    logits, copies, mask, place, slot, row, middle, top, temperature, columns, words, counted,
    TILE: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the mass of a row's tokens above a key, or their number if `counted`."""
    total = tl.zeros((), tl.int64)
    for start in range(0, columns, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < columns
        logit = _read(logits, copies, mask, place, slot, row, at, inside, columns, words, COPIED, MASKED)
        score = tl.div_rn(logit, temperature)
        weight = tl.where(counted, 1, _masses(score - top))
        total += tl.sum(tl.where(inside & (_ordered(score) > middle.to(tl.int32)), weight, 0), axis=0)
    return total


@triton.jit
def _search_row(
    logits, copies, mask, place, slot, row, low, high, limit, top, temperature, columns, words, counted,
    TILE: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`_search` in a whole row, for rows with too many tokens to gather."""
    while high - low > 1:
        middle = (low + high) >> 1
        above = _weight_above(
            logits, copies, mask, place, slot, row, middle, top, temperature, columns, words, counted,
            TILE, COPIED, MASKED,
        )  # fmt: skip
        if above < limit:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _first_of(
    logits, copies, mask, place, slot, row, maxima, top, divisor, columns, words, groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the first token whose score is `top`, which the row has."""
    at = tl.arange(0, GROUPS)
    some = tl.load(maxima + row * groups + at, mask=at < groups, other=float("nan"))
    group = tl.min(tl.where(tl.div_rn(some, divisor) == top, at, groups), axis=0)
    at = group * GROUP + tl.arange(0, GROUP)
    inside = at < columns
    logit = _read(logits, copies, mask, place, slot, row, at, inside, columns, words, COPIED, MASKED)
    return tl.min(tl.where(inside & (tl.div_rn(logit, divisor) == top), at, columns), axis=0).to(tl.int64)


@triton.jit
def _first_allowed(mask, row, columns, words, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Return the first token that the mask allows; -1 if there is none."""
    first = tl.zeros((), tl.int32)
    if MASKED:
        first += columns
        for start in range(0, columns, TILE):
            at = start + tl.arange(0, TILE)
            word = tl.load(mask + row * words + at // 32, mask=at < columns, other=0)
            some = tl.min(tl.where(((word >> (at % 32)) & 1) == 1, at, columns), axis=0)
            first = tl.minimum(first, some)
    return tl.where(first < columns, first, -1).to(tl.int64)


@triton.jit
def _cut(sums, counts, row, top, top_k, top_p, by_count, tiles, TILES: tl.constexpr):
    """Return a score with all kept tokens above it, and the mass that the nucleus needs without top_k."""
    at = tl.arange(0, TILES)
    out = (row * tiles + at) * _LEVELS
    limit = _share(top_p, tl.sum(tl.load(sums + out + _LEVELS - 1, mask=at < tiles, other=0), axis=0))
    cut, enough = top, top != top
    for level in tl.static_range(_LEVELS):  # the nearest level that has enough
        mass = tl.sum(tl.load(sums + out + level, mask=at < tiles, other=0), axis=0)
        count = tl.sum(tl.load(counts + out + level, mask=at < tiles, other=0), axis=0)
        distance = float("inf") if level == _LEVELS - 1 else 5.0 * 2**level
        cut = tl.where(enough, cut, top - distance)
        enough = enough | tl.where(by_count, count >= top_k, mass >= limit)
    return cut, limit


@triton.jit
def _gather(
    logits, copies, mask, place, slot, row, maxima, keys, ids, cut, divisor, columns, words, groups,
    GROUP: tl.constexpr, TILE: tl.constexpr, GATHERED: tl.constexpr, COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the tokens whose scores are not below `cut`, ids ascending, as far as they fit; return their number."""
    found = tl.zeros((), tl.int32)
    for start in range(0, columns, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < columns
        near = tl.load(maxima + row * groups + at // GROUP, mask=inside, other=float("-inf"))
        wanted = inside & (tl.div_rn(near, divisor) >= cut)
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            logit = _read(logits, copies, mask, place, slot, row, at, wanted, columns, words, COPIED, MASKED)
            score = tl.div_rn(logit, divisor)
            kept = (wanted & (score >= cut)).to(tl.int32)
            position = found + tl.cumsum(kept, axis=0) - 1
            fits = (kept > 0) & (position < GATHERED)
            tl.store(keys + row * GATHERED + position, _ordered(score), mask=fits)
            tl.store(ids + row * GATHERED + position, at, mask=fits)
            found += tl.sum(kept, axis=0)
    tl.debug_barrier()  # other threads read what was stored
    return found


@triton.jit(do_not_specialize_on_alignment=_SENT)
def _draw_rows(
    logits, copies, mask, places, slots, noise_keys, parameters, maxima, sums, counts, keys, ids, tokens, lowest,
    columns, words, groups, tiles,
    GROUP: tl.constexpr, TILE: tl.constexpr, GATHERED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
    COPIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Draw one row; write its token, and the lowest score that its filters keep."""
    row = tl.program_id(0).to(tl.int64)
    place, slot = tl.load(places + row), tl.load(slots + row)
    temperature = _real(parameters, row, _TEMPERATURE)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    highest, broken = _highest(maxima, row, groups, GROUPS)
    top = tl.div_rn(highest, divisor)
    token = tl.full((), -1, tl.int64)
    least = top
    if broken == 0:
        if top == float("-inf"):
            token = _first_allowed(mask, row, columns, words, TILE, MASKED)
        else:
            if (temperature == 0.0) | (top == float("inf")):
                token = _first_of(
                    logits, copies, mask, place, slot, row, maxima, top, divisor, columns, words, groups,
                    GROUP, GROUPS, COPIED, MASKED,
                )  # fmt: skip
            else:
                top_k = tl.load(parameters + row * _WORDS + _TOP_K)
                top_p = _real(parameters, row, _TOP_P)
                by_count, by_mass = (top_k > 0) & (top_k < columns), top_p < 1.0
                least = top + _real(parameters, row, _LOG_MIN_P)
                key = tl.load(noise_keys + row).to(tl.uint64, bitcast=True)
                best = tl.full((), float("-inf"), tl.float64)
                gathered = by_count | by_mass | (least > float("-inf"))
                if gathered:
                    cut, limit = least, tl.full((), 1, tl.int64)
                    if by_count | by_mass:
                        cut, limit = _cut(sums, counts, row, top, top_k, top_p, by_count, tiles, TILES)
                    count = _gather(
                        logits, copies, mask, place, slot, row, maxima, keys, ids, cut, divisor, columns, words, groups,
                        GROUP, TILE, GATHERED, COPIED, MASKED,
                    )  # fmt: skip
                    low, high = _ordered(cut).to(tl.int64) - 1, _ordered(top).to(tl.int64)
                    gathered = count <= GATHERED
                    if gathered:
                        at = tl.arange(0, GATHERED)
                        inside = at < count
                        some = tl.load(keys + row * GATHERED + at, mask=inside, other=-(2**31))
                        score = _score_of(some)
                        mass = tl.where(inside, _masses(tl.where(inside, score, float("-inf")) - top), 0)
                        if by_count:
                            high = _search(some, inside.to(tl.int64), low, high, top_k)
                        if by_count & by_mass:
                            low = high - 1
                            limit = _share(top_p, tl.sum(tl.where(some > low.to(tl.int32), mass, 0), axis=0))
                            high = _ordered(top).to(tl.int64)
                        if by_mass:
                            high = _search(some, mass, low, high, limit)
                        if by_count | by_mass:
                            least = tl.maximum(least, _score_of(high.to(tl.int32)))
                        id = tl.load(ids + row * GATHERED + at, mask=inside, other=0)
                        best, token = _better(best, token, score, id, inside & (score >= least), key)
                    else:
                        if by_count:
                            high = _search_row(
                                logits, copies, mask, place, slot, row, low, high, top_k.to(tl.int64), top, divisor,
                                columns, words, by_count, TILE, COPIED, MASKED,
                            )  # fmt: skip
                        if by_count & by_mass:
                            low = high - 1
                            total = _weight_above(
                                logits, copies, mask, place, slot, row, low, top, divisor, columns, words, top_k < 0,
                                TILE, COPIED, MASKED,
                            )  # fmt: skip
                            limit = _share(top_p, total)
                            high = _ordered(top).to(tl.int64)
                        if by_mass:
                            high = _search_row(
                                logits, copies, mask, place, slot, row, low, high, limit, top, divisor, columns, words,
                                top_k < 0, TILE, COPIED, MASKED,
                            )  # fmt: skip
                        if by_count | by_mass:
                            least = tl.maximum(least, _score_of(high.to(tl.int32)))
                if not gathered:
                    for start in range(0, columns, TILE):
                        at = start + tl.arange(0, TILE)
                        inside = at < columns
                        near = tl.load(maxima + row * groups + at // GROUP, mask=inside, other=float("-inf"))
                        reach = tl.max(tl.div_rn(near, divisor), axis=0) + _MAX_NOISE
                        if reach.to(tl.float64) >= best:
                            logit = _read(
                                logits, copies, mask, place, slot, row, at, inside, columns, words, COPIED, MASKED
                            )
                            score = tl.div_rn(logit, divisor)
                            kept = inside & (score >= least) & (score > float("-inf"))
                            best, token = _better(best, token, score, at, kept, key)
    tl.store(tokens + row, token)
    tl.store(lowest + row, least)


def draw(
    logits: Tensor,
    parameters: ParameterArray,
    keys: NDArray[np.uint64],
    indices: IntArray | None = None,
    adjustments: Adjustments | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tokens int64 [rows] that `sampling.draw` describes, and the lowest scores [rows] that filters keep."""
    count, columns, device = len(parameters), logits.shape[1], logits.device
    groups, tiles = triton.cdiv(columns, GROUP), triton.cdiv(columns, TILE)
    rows = np.arange(count) if indices is None else indices
    adjusted = np.flatnonzero(parameters["adjusted"]) if adjustments is not None else np.empty(0, np.int64)
    slots = np.full(count, -1)
    slots[adjusted] = np.arange(len(adjusted))
    noise_keys, places, slots_there = _sent([keys.view(np.int64), rows * logits.stride(0), slots], device)
    (words,) = _sent([np.ascontiguousarray(parameters).view(np.int32)], device)
    copies = None
    if adjustments is not None and len(adjusted):
        copies = logits[_sent([rows[adjusted]], device)[0]].float()
        _add_adjustments(copies, words, adjusted, adjustments)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    maxima, lowest, (sums, counts), (found_keys, found_ids) = (
        torch.empty(count, groups, device=device),
        torch.empty(count, device=device),
        (torch.empty(count, tiles, 4, dtype=kind, device=device) for kind in (torch.int64, torch.int32)),
        (torch.empty(count, GATHERED, dtype=torch.int32, device=device) for _ in range(2)),
    )
    mask_words = 0 if mask is None else mask.shape[1]
    source = (logits, copies, mask, places, slots_there)
    how = {"GROUP": GROUP, "TILE": TILE, "COPIED": copies is not None, "MASKED": mask is not None} | _EXACT
    width = triton.next_power_of_2(groups)
    _find_maxima[(count, tiles)](*source, maxima, columns, mask_words, groups, **how)
    if ((parameters["top_k"] > 0) | (parameters["top_p"] < 1.0)).any():
        _sum_masses[(count, tiles)](
            *source, words, maxima, sums, counts, columns, mask_words, groups, GROUPS=width, **how
        )
    _draw_rows[(count,)](
        *source, noise_keys, words, maxima, sums, counts, found_keys, found_ids, tokens, lowest,
        columns, mask_words, groups, tiles,
        GATHERED=GATHERED, GROUPS=width, TILES=triton.next_power_of_2(tiles), **how,
    )  # fmt: skip
    return tokens, lowest


def _add_adjustments(copies: Tensor, words: Tensor, adjusted: IntArray, adjustments: Adjustments) -> None:
    a = adjustments
    lists = _sent([adjusted, a.bias_starts, a.bias_tokens, a.seen_starts, a.seen_tokens, a.seen_counts], copies.device)
    rows, bias_starts, bias_tokens, seen_starts, seen_tokens, seen_counts = lists
    (biases,) = _sent([a.biases], copies.device)
    _adjust_rows[(len(adjusted),)](
        copies, words, rows, bias_starts, bias_tokens, biases, seen_starts, seen_tokens, seen_counts, copies.shape[1],
        LISTED=_LISTED, **_EXACT,
    )  # fmt: skip


def _sent(arrays: list[NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Return arrays of one dtype on the device, sent in one transfer."""
    together = torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)
    return torch.split(together, [len(array) for array in arrays])
