"""Triton kernels of the GPU path: norms, matrix products, rotary embeddings, attention.

A row's result does not depend on the other rows of the batch: every sum has an order that is fixed by the model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.engine.attention_options import AttentionOptions
from worker.engine.gpu.product_parts import ProductParts
from worker.engine.paged import work
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import TILE_QUERIES, PagedRows, Shape, tile_rows
from worker.engine.paged.work import ROW_SHIFT
from worker.engine.quantization.activations import LEAST, MAX, ActivationScheme
from worker.engine.quantization.weights import BLOCK as SCALE_BLOCK
from worker.engine.quantization.weights import QuantizedWeight
from worker.engine.shards.exchange import PeerSums

GpuWeight = Tensor | QuantizedWeight

_ENTRIES = 64  # KV entries of a chunk that are loaded at once
_MIN_TILE = 16  # minimum rows, columns or inputs of a tensor core instruction
_PROGRAMS = 1024  # of an attention kernel: about as many keep a GPU busy, and each takes items until none is left
_INPUTS = 128  # of a tile with FP8 rows
_SMALL = {"num_warps": 2, "num_stages": 2}  # launch options of the attention kernels
_WIDE = 256  # numbers of a head; wider ones, which are latents, are attended a few entries and query heads at a time
_LARGE = {"num_warps": 8, "num_stages": 2}
_LOG2_E = 1.4426950408889634
# Arguments that change from step to step: Triton must not specialise, and so recompile, kernels for their values.
_STEP = (
    "tables", "slots", "sequence", "starts", "seen", "own", "own_count", "positions", "first_part", "items", "bounds",
    "window", "width", "listed", "first_row",
)  # fmt: skip


@triton.jit
def _sum_parts(
    parts, peers, at, size, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Sum float32 elements `at` over COUNT parts from FIRST on, as the tree of `worker.engine.shards.shard`.

    Parts are `size` elements apart. With EACH, every rank has that number of parts, at its address in `peers`; else all
    are in `parts`.
    """
    if COUNT == 1:
        if EACH:
            address = tl.load(peers + FIRST // EACH).to(tl.pointer_type(tl.float32))
            source = tl.multiple_of(address, 16) + FIRST % EACH * size
        else:
            source = parts + FIRST * size
        total = tl.load(source + at, mask=inside, other=0.0)
    else:
        BRANCH: tl.constexpr = 1 if COUNT % 2 else COUNT // 2
        total = _sum_parts(parts, peers, at, size, inside, FIRST, BRANCH, EACH)
        for more in tl.static_range(BRANCH, COUNT, BRANCH):
            total += _sum_parts(parts, peers, at, size, inside, FIRST + more, BRANCH, EACH)
    return total


@triton.jit
def _meet(pads, slot, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell every other rank that this rank's sums are written, and wait until theirs are.

    `pads` has the address of each rank's flags [slots, ranks]. A rank raises its own flag at every other one, and each
    lowers what it has seen: so flags are ready for the next meeting, in a replayed graph as well.
    """
    for other in tl.static_range(RANKS):
        if other != RANK:
            theirs = tl.load(pads + other).to(tl.pointer_type(tl.int32)) + slot * RANKS + RANK
            while tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys") != 0:
                pass
    own = tl.load(pads + RANK).to(tl.pointer_type(tl.int32)) + slot * RANKS
    for other in tl.static_range(RANKS):
        if other != RANK:
            while tl.atomic_cas(own + other, 1, 0, sem="acquire", scope="sys") != 1:
                pass


@triton.jit(do_not_specialize=["rows"])
def _norm_rows(
    x, parts, peers, pads, bias, weight, total, out, rows, width, eps,
    PARTS: tl.constexpr, EACH: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a sum of parts and a bias to a row; write the result, rounded once, and its root mean square norm."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row + at, mask=inside, other=0.0)
    if FLAGS:
        _meet(pads, tl.program_id(0) % FLAGS, RANK, RANKS)
    if PARTS:
        more = _sum_parts(parts, peers, row + at, rows.to(tl.int64) * width, inside, 0, PARTS, EACH)
        if BIASED:
            more += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        value = (more + value.to(tl.float32)).to(value.dtype)
        tl.store(total + row + at, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row + at, scale * wide.to(scale.dtype), mask=inside)


@triton.jit
def _load_numbers(at, mask, dtype: tl.constexpr, FP8: tl.constexpr):
    """Load weights, keys or values; decode FP8 (e4m3) exactly, to 2^-8 times the value.

    Its bits are those of a float16 then. So every GPU gives the same bits, with or without instructions for FP8.
    """
    values = tl.load(at, mask=mask, other=0)
    if FP8:
        bits = values.to(tl.uint16)
        values = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(dtype)
    return values


@triton.jit
def _load_operand(at, mask, dtype: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Load a part of a product for `tl.dot`: with NATIVE, FP8 numbers as they are."""
    if NATIVE:
        values = tl.load(at, mask=mask, other=0).to(tl.float8e4nv, bitcast=True)
    else:
        values = _load_numbers(at, mask, dtype, FP8)
    return values


@triton.jit
def _sum_inputs(
    xs, ws, ups, k, row_scale, r, scale, c, x_mask, w_mask, rows, columns, inputs, start, end,
    GATED: tl.constexpr, EVEN: tl.constexpr, FP8: tl.constexpr, BLOCKS: tl.constexpr,
    FP8_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Sum a tile over the inputs from `start` to before `end`; of gated products, the tiles of gate and up."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    other = tl.zeros((ROWS, COLUMNS), tl.float32)
    all_columns = columns
    if GATED:
        all_columns = 2 * columns
    block_total, block_other = total, other
    for first in range(start, end, SPAN):
        for step in tl.static_range(0, SPAN, INPUTS):
            at = first + step
            x_some, w_some = x_mask, w_mask
            if not EVEN:
                x_some, w_some = x_mask & (k[None, :] < end - at), w_mask & (k[:, None] < end - at)
            if FP8_ROWS:
                some = _load_operand(xs + at, x_some, tl.float16, True, NATIVE)
            else:
                some = tl.load(xs + at, mask=x_some, other=0.0)
            weights = _load_operand(ws + at, w_some, some.dtype, FP8, NATIVE)
            total = tl.dot(some, weights, total, input_precision="ieee", max_num_imprecise_acc=INPUTS)
            if GATED:
                weights = _load_operand(ups + at, w_some, some.dtype, FP8, NATIVE)
                other = tl.dot(some, weights, other, input_precision="ieee", max_num_imprecise_acc=INPUTS)
        if BLOCKS:
            scales = scale + first // SPAN * all_columns + c
            if FP8_ROWS:
                of_rows = row_scale + r.to(tl.int64) * tl.cdiv(inputs, SPAN) + first // SPAN
                of_rows = tl.load(of_rows, mask=r < rows, other=0.0)[:, None]
                total, other = total * of_rows, other * of_rows
            block_total += total * tl.load(scales, mask=c < columns, other=0.0)[None, :]
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            if GATED:
                block_other += other * tl.load(scales + columns, mask=c < columns, other=0.0)[None, :]
                other = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BLOCKS:
        total, other = block_total, block_other
    return total, other


@triton.jit
def _sum_branch(
    xs, ws, ups, k, row_scale, r, scale, c, x_mask, w_mask, rows, columns, inputs, first, unit, share,
    COUNT: tl.constexpr, PIECES: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, FP8: tl.constexpr,
    BLOCKS: tl.constexpr, FP8_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Sum a tile over COUNT parts from `first` on, which are added as the tree of `_sum_parts`."""
    if COUNT == 1:
        begin = first // PIECES * unit
        start = begin + first % PIECES * share
        total, other = _sum_inputs(
            xs, ws, ups, k, row_scale, r, scale, c, x_mask, w_mask, rows, columns, inputs,
            start, tl.minimum(start + share, begin + unit),
            GATED, EVEN, FP8, BLOCKS, FP8_ROWS, NATIVE, SPAN, ROWS, COLUMNS, INPUTS,
        )  # fmt: skip
    else:
        BRANCH: tl.constexpr = 1 if COUNT % 2 else COUNT // 2
        total, other = _sum_branch(
            xs, ws, ups, k, row_scale, r, scale, c, x_mask, w_mask, rows, columns, inputs, first, unit, share,
            BRANCH, PIECES, GATED, EVEN, FP8, BLOCKS, FP8_ROWS, NATIVE, SPAN, ROWS, COLUMNS, INPUTS,
        )  # fmt: skip
        for at in tl.static_range(BRANCH, COUNT, BRANCH):
            more, _ = _sum_branch(
                xs, ws, ups, k, row_scale, r, scale, c, x_mask, w_mask, rows, columns, inputs, first + at, unit, share,
                BRANCH, PIECES, GATED, EVEN, FP8, BLOCKS, FP8_ROWS, NATIVE, SPAN, ROWS, COLUMNS, INPUTS,
            )  # fmt: skip
            total += more
    return total, other


@triton.jit(do_not_specialize=["rows"])
def _multiply_tile(
    x, row_scale, weight, scale, bias, out, rows, columns, inputs, unit, share,
    BRANCH: tl.constexpr, PIECES: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    FP8: tl.constexpr, BLOCKS: tl.constexpr, FP8_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write one tile of x @ weight.T, or of silu(x @ gate.T) * (x @ up.T), where `weight` stacks gate and up.

    A split product has parts of `share` inputs, PIECES in each `unit` of inputs, and a program sums BRANCH of them.
    FP8 weights have a `scale` for each column, or with BLOCKS for each SPAN inputs of a column: [inputs / SPAN,
    columns]. With FP8_ROWS rows are FP8 too, with a `row_scale` for each row, or with BLOCKS for each SPAN inputs of
    it: [rows, inputs / SPAN]. NATIVE multiplies them by instructions for FP8, whose sums are added in float32 after
    each INPUTS; else they are decoded, with exact products of float16.
    """
    # Tiles of the same columns run next to each other, so that their weights are read from memory once.
    row_tiles = tl.cdiv(rows, ROWS)
    r = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) // row_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INPUTS)
    part = tl.program_id(1)
    real_rows, real_columns = r < rows, c < columns
    xs = x + r.to(tl.int64)[:, None] * inputs + k[None, :]
    ws = weight + c.to(tl.int64)[None, :] * inputs + k[:, None]
    ups = ws + columns.to(tl.int64) * inputs
    total, other = _sum_branch(
        xs, ws, ups, k, row_scale, r, scale, c, real_rows[:, None], real_columns[None, :], rows, columns, inputs,
        part * BRANCH, unit, share,
        BRANCH, PIECES, GATED, EVEN, FP8, BLOCKS, FP8_ROWS, NATIVE, SPAN, ROWS, COLUMNS, INPUTS,
    )  # fmt: skip
    if FP8 and not BLOCKS:
        if FP8_ROWS:
            of_rows = tl.load(row_scale + r, mask=real_rows, other=0.0)[:, None]
            total, other = total * of_rows, other * of_rows
        total *= tl.load(scale + c, mask=real_columns, other=0.0)[None, :]
        if GATED:
            other *= tl.load(scale + columns + c, mask=real_columns, other=0.0)[None, :]
    if FP8 and not NATIVE:
        total, other = total * 256.0, other * 256.0
        if FP8_ROWS:
            total, other = total * 256.0, other * 256.0
    if BIASED and part == 0:
        total += tl.load(bias + c, mask=real_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = total * tl.sigmoid(total) * other
    at = out + (part.to(tl.int64) * rows + r)[:, None] * columns + c[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=real_rows[:, None] & real_columns[None, :])


@triton.jit
def _as_fp8(x):
    """Round float32 numbers to the bits of FP8; larger ones than 448 become 448, ties go to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below 2^-6 numbers are multiples of 2^-9, as those of a float32 from 2^14 on.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return (((bits >> 24) & 0x80) | tl.where(size < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def _fp8_bytes(x, exponent):
    """Round numbers to FP8 with this exponent, as `encoded` in kv/fp8.py does."""
    rounded = _as_fp8(x * ((261 - exponent) << 23).to(tl.float32, bitcast=True))
    return tl.where(exponent == 254, 0, rounded).to(tl.uint8)


@triton.jit
def _round_span(
    x, out, scales, inputs, static_scale, bound,
    STATIC: tl.constexpr, POWERS: tl.constexpr, LEAST: tl.constexpr, MAX: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round a span of a row to FP8 and write its scale, as `rounded_rows` in quantization/activations.py."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    at = span * SPAN + k
    inside = (k < SPAN) & (at < inputs)
    wide = tl.load(x + row * inputs + at, mask=inside, other=0.0).to(tl.float32)
    size = wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # the order of these bits is that of the numbers
    top = tl.max(size, axis=0)
    scale = tl.zeros_like(top).to(tl.float32)
    if STATIC:
        scale += static_scale
    else:
        largest = tl.minimum(tl.maximum(top.to(tl.float32, bitcast=True), LEAST), bound)
        scale = tl.div_rn(largest, scale + MAX)
    if POWERS:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(out + row * inputs + at, _as_fp8(wide * tl.div_rn(tl.zeros_like(scale) + 1.0, scale)), mask=inside)
    scale = tl.where(top < 0x7F800000, scale, float("nan"))
    tl.store(scales + row * tl.cdiv(inputs, SPAN) + span, scale)


@triton.jit
def _store_halves(store, exponents, head, low, high, at, inside, DIM: tl.constexpr, KV_FP8: tl.constexpr):
    """Store the halves of a row in a head of the KV store; in FP8 with the exponent of its largest number."""
    target = store + head * DIM + at
    if KV_FP8:
        low, high = low.to(tl.float32), high.to(tl.float32)
        tops = tl.maximum(low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        exponent = tl.minimum(tl.maximum(tl.max(tops, axis=0) >> 23, 32), 254)
        tl.store(exponents + head, exponent.to(tl.uint8))
        low, high = _fp8_bytes(low, exponent), _fp8_bytes(high, exponent)
    tl.store(target, low, mask=inside)
    tl.store(target + DIM // 2, high, mask=inside)


@triton.jit
def _fp8_scales(exponents, heads, mask):
    """Return the factors of numbers that `_load_numbers` has decoded: their exponents are those of `heads`."""
    return ((tl.load(exponents + heads, mask=mask, other=0).to(tl.int32) + 1) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["entries", "rows"])
def _rotate_and_store_heads(
    qkv, cos, sin, query_norm, key_norm, query, keys, values, key_exponents, value_exponents, entries, rows, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    PARTS: tl.constexpr, KV_FP8: tl.constexpr,
):  # fmt: skip
    """Rotate one head of a row to its position (rotate-half convention); write it as a query, or to the KV store."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    at = tl.arange(0, HALF)
    inside = at < half
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIM + at
    size = rows.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    low = _sum_parts(source, None, 0, size, inside, 0, PARTS, 0).to(query.dtype.element_ty)
    high = _sum_parts(source, None, half, size, inside, 0, PARTS, 0).to(query.dtype.element_ty)
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    entry = tl.load(entries + row) * KV_HEADS
    if is_value:
        _store_halves(values, value_exponents, entry + head - HEADS - KV_HEADS, low, high, at, inside, DIM, KV_FP8)
    else:
        a, b = low.to(tl.float32), high.to(tl.float32)
        if NORMED:
            scale = tl.rsqrt(tl.sum(a * a + b * b, axis=0) / DIM + eps)
            norm = query_norm + at
            if not is_query:
                norm = key_norm + at
            a = (a * scale).to(low.dtype).to(tl.float32) * tl.load(norm, mask=inside, other=0.0).to(tl.float32)
            b = (b * scale).to(low.dtype).to(tl.float32) * tl.load(norm + half, mask=inside, other=0.0).to(tl.float32)
        angle = row * DIM + at
        cos_a, sin_a = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        cos_b = tl.load(cos + angle + half, mask=inside, other=0.0)
        sin_b = tl.load(sin + angle + half, mask=inside, other=0.0)
        turned_a = (a * cos_a - b * sin_a).to(low.dtype)
        turned_b = (b * cos_b + a * sin_b).to(low.dtype)
        if is_query:
            _store_halves(query, None, row * HEADS + head, turned_a, turned_b, at, inside, DIM, False)
        else:
            _store_halves(keys, key_exponents, entry + head - HEADS, turned_a, turned_b, at, inside, DIM, KV_FP8)


@triton.jit
def _attend_entries(
    q, ks, vs, k_scales, v_scales, visible, scale, softcap, top, weight, total,
    CAPPED: tl.constexpr, KV_FP8: tl.constexpr,
):  # fmt: skip
    """Add entries to an online softmax (Milakov, Gimelshein 2018): largest score, sum of weights, weighted values.

    Scales of entries in FP8 are powers of two, so they change no bit where they are multiplied.
    """
    scores = tl.dot(q, ks, input_precision="ieee")
    if KV_FP8:
        scores *= k_scales[None, :]
    scores *= scale
    if CAPPED:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # for rows that have seen no entry so far
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    weight = weight * shrink + tl.sum(weights, axis=1)
    if KV_FP8:
        weights *= v_scales[None, :]
    total = tl.dot(weights.to(vs.dtype), vs, total * shrink[:, None], input_precision="ieee")
    return new_top, weight, total


@triton.jit
def _item(items, i, SHIFT: tl.constexpr):
    """Return the row and the chunk of an item."""
    item = tl.load(items + i)
    return item >> SHIFT, item & ((1 << SHIFT) - 1)


@triton.jit(do_not_specialize=_STEP)
def _attend_rows(
    query, keys, values, key_exponents, value_exponents,
    tables, slots, sequence, seen, own, own_count, positions, first_part, items, bounds,
    tops, weights, totals, scale, softcap, window, width, listed,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, LISTS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, KV_FP8: tl.constexpr, SPLIT: tl.constexpr,
    QUERIES: tl.constexpr, PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Attend the query heads of one row and one KV head, or one of SPLIT parts of them, over one chunk; item by item.

    Listed entries count as if they were stored behind the stretch, where they move once they are accepted.
    """
    kv_head = tl.program_id(1) // SPLIT
    group: tl.constexpr = HEADS // KV_HEADS // SPLIT
    m, d = tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM)
    in_group, in_dim = m < group, d < DIM
    head = tl.program_id(1) * group + m
    first, last, base = tl.load(bounds + 2), tl.load(bounds + 3), tl.load(bounds + 4)
    for i in range(first + tl.program_id(0), last, tl.num_programs(0)):
        row, chunk = _item(items, i, SHIFT)
        stretch = tl.load(seen + row)
        end = stretch
        if LISTS:
            end += tl.load(own_count + row)
        lowest = tl.zeros_like(stretch)
        if WINDOWED:
            lowest = tl.maximum(tl.load(positions + row) - window + 1, 0)
        if (chunk + 1) * CHUNK > lowest:
            blocks = tables + tl.load(slots + tl.load(sequence + row)) * width
            at = (row * HEADS + head)[:, None] * DIM + d[None, :]
            q = tl.load(query + at, mask=in_group[:, None] & in_dim[None, :], other=0.0)
            top = tl.full((QUERIES,), float("-inf"), tl.float32)
            weight = tl.zeros((QUERIES,), tl.float32)
            total = tl.zeros((QUERIES, PADDED_DIM), tl.float32)
            for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, end), ENTRIES):
                j = start + tl.arange(0, ENTRIES)
                here = j < end
                index = tl.load(blocks + j // BLOCK, mask=j < stretch, other=0) * BLOCK + j % BLOCK
                if LISTS:
                    behind = (j >= stretch) & here
                    index = tl.where(behind, tl.load(own + row * listed + j - stretch, mask=behind, other=0), index)
                heads = index * KV_HEADS + kv_head
                entry = heads * DIM
                k_mask, v_mask = here[None, :] & in_dim[:, None], here[:, None] & in_dim[None, :]
                ks = _load_numbers(keys + entry[None, :] + d[:, None], k_mask, q.dtype, KV_FP8)
                vs = _load_numbers(values + entry[:, None] + d[None, :], v_mask, q.dtype, KV_FP8)
                k_scales, v_scales = scale, scale
                if KV_FP8:
                    k_scales = _fp8_scales(key_exponents, heads, here)
                    v_scales = _fp8_scales(value_exponents, heads, here)
                visible = here & (j >= lowest)
                top, weight, total = _attend_entries(
                    q, ks, vs, k_scales, v_scales, visible[None, :], scale, softcap, top, weight, total, CAPPED, KV_FP8
                )
            part = (tl.load(first_part + row) + chunk - base) * HEADS + head
            tl.store(tops + part, top, mask=in_group)
            tl.store(weights + part, weight, mask=in_group)
            tl.store(totals + part[:, None] * DIM + d[None, :], total, mask=in_group[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=_STEP)
def _attend_tiles(
    query, keys, values, key_exponents, value_exponents,
    tables, slots, sequence, starts, seen, own_count, positions, first_part, items, bounds,
    tops, weights, totals, scale, softcap, window, width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, LISTS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, KV_FP8: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, PADDED_DIM: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Attend up to ROWS rows of a run over one of their common chunks; item by item. SPLIT is as in `_attend_rows`.

    For rows that list entries, these are the full chunks of their stretch; for others, all chunks.
    """
    kv_head = tl.program_id(1) // SPLIT
    group: tl.constexpr = HEADS // KV_HEADS // SPLIT
    m, d = tl.arange(0, TILE), tl.arange(0, PADDED_DIM)
    in_dim = d < DIM
    head = tl.program_id(1) * group + m % group
    first, last, base = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 4)
    for i in range(first + tl.program_id(0), last, tl.num_programs(0)):
        lead, chunk = _item(items, i, SHIFT)
        run = tl.load(sequence + lead)
        run_end = tl.minimum(tl.load(starts + run + 1), lead + ROWS)
        row = lead + m // group
        real = (row < run_end) & (m < ROWS * group)
        upto = tl.load(seen + row, mask=real, other=0)
        if LISTS:
            lists = tl.load(own_count + row, mask=real, other=0) > 0
            upto = tl.where(lists, upto // CHUNK * CHUNK, upto)
        lowest = tl.zeros_like(upto)
        if WINDOWED:
            lowest = tl.maximum(tl.load(positions + row, mask=real, other=0) - window + 1, 0)
        sees = real & (chunk * CHUNK < upto) & ((chunk + 1) * CHUNK > lowest)
        end = tl.max(tl.where(sees, upto, 0), axis=0)
        if end > 0:
            blocks = tables + tl.load(slots + run) * width
            at = (row * HEADS + head)[:, None] * DIM + d[None, :]
            q = tl.load(query + at, mask=real[:, None] & in_dim[None, :], other=0.0)
            top = tl.full((TILE,), float("-inf"), tl.float32)
            weight = tl.zeros((TILE,), tl.float32)
            total = tl.zeros((TILE, PADDED_DIM), tl.float32)
            for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, end), ENTRIES):
                j = start + tl.arange(0, ENTRIES)
                here = j < end
                index = tl.load(blocks + j // BLOCK, mask=here, other=0) * BLOCK + j % BLOCK
                heads = index * KV_HEADS + kv_head
                entry = heads * DIM
                k_mask, v_mask = here[None, :] & in_dim[:, None], here[:, None] & in_dim[None, :]
                ks = _load_numbers(keys + entry[None, :] + d[:, None], k_mask, q.dtype, KV_FP8)
                vs = _load_numbers(values + entry[:, None] + d[None, :], v_mask, q.dtype, KV_FP8)
                k_scales, v_scales = scale, scale
                if KV_FP8:
                    k_scales = _fp8_scales(key_exponents, heads, here)
                    v_scales = _fp8_scales(value_exponents, heads, here)
                visible = (j[None, :] < upto[:, None]) & (j[None, :] >= lowest[:, None])
                top, weight, total = _attend_entries(
                    q, ks, vs, k_scales, v_scales, visible, scale, softcap, top, weight, total, CAPPED, KV_FP8
                )
            part = (tl.load(first_part + row, mask=real, other=0) + chunk - base) * HEADS + head
            tl.store(tops + part, top, mask=sees)
            tl.store(weights + part, weight, mask=sees)
            tl.store(totals + part[:, None] * DIM + d[None, :], total, mask=sees[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=_STEP)
def _merge_chunks(
    tops, weights, totals, out, sinks, seen, own_count, positions, first_part, bounds, window, first_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, LISTS: tl.constexpr, WINDOWED: tl.constexpr, PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the attention of one head of a row over all chunks, first to last; a sink of the head comes before them."""
    row, head = first_row.to(tl.int64) + tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, PADDED_DIM)
    in_dim = d < DIM
    end = tl.load(seen + row)
    if LISTS:
        end += tl.load(own_count + row)
    first = 0
    if WINDOWED:
        first = tl.maximum(tl.load(positions + row) - window + 1, 0) // CHUNK
    top = tl.full((1,), float("-inf"), tl.float32)
    weight = tl.zeros((1,), tl.float32)
    if SINKS:
        top = tl.zeros((1,), tl.float32) + tl.load(sinks + head)
        weight += 1.0
    total = tl.zeros((PADDED_DIM,), tl.float32)
    start = tl.load(first_part + row) - tl.load(bounds + 4)
    for chunk in range(first, tl.cdiv(end, CHUNK)):
        at = (start + chunk) * HEADS + head
        part = at + tl.zeros((1,), tl.int64)
        part_top = tl.load(tops + part)
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, share = tl.exp2(top - base), tl.exp2(part_top - base)
        weight = weight * shrink + tl.load(weights + part) * share
        total = total * shrink + tl.load(totals + at * DIM + d, mask=in_dim, other=0.0) * share
        top = new_top
    total = total / tl.where(weight > 0.0, weight, 1.0)
    tl.store(out + (row * HEADS + head) * DIM + d, total.to(out.dtype.element_ty), mask=in_dim)


def norm(
    x: Tensor, parts: Tensor | PeerSums | None, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `x` [n, width] plus the sum of `parts` and `bias`, and its root mean square norm times `weight`.

    `parts` are float32 [parts, n, width], in memory of this device or on the ranks of a split model. They are added as
    one tree; then the bias, then `x`; then the result is rounded.
    """
    n, width = x.shape
    total, out = x if parts is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    sizes = {"EACH": 0, "RANK": 0, "RANKS": 1, "FLAGS": 0}
    own, addresses, pads = parts, None, None
    if isinstance(parts, PeerSums):
        own, addresses, pads = None, parts.addresses, parts.pads
        sizes = {"EACH": parts.each, "RANK": parts.rank, "RANKS": parts.ranks, "FLAGS": parts.slots}
        count = parts.each * parts.ranks
    else:
        count = 0 if parts is None else len(parts)
    _norm_rows[(n,)](
        x, own, addresses, pads, bias, weight, total, out, n, width, eps,
        PARTS=count, BIASED=bias is not None, BLOCK=block, num_warps=_warps(block), **sizes,
    )  # fmt: skip
    return total, out


def multiply(
    x: Tensor, weight: GpuWeight, bias: Tensor | None = None, *, gated: bool = False, floats: bool = False
) -> Tensor:
    """Return x @ weight.T + bias for `x` [n, in] and `weight` [out, in], which may be FP8; float32 if `floats`.

    With `gated` the first half of the weights is a gate: silu(x @ gate.T) * (x @ up.T) [n, out / 2].
    """
    columns = len(_values(weight)) // 2 if gated else len(_values(weight))
    out = torch.empty(len(x), columns, dtype=torch.float32 if floats else x.dtype, device=x.device)
    _multiply(x, weight, bias, out, ProductParts(x.shape[1], 1, 1, 1, 1), gated)
    return out


def multiply_apart(
    x: Tensor, weight: GpuWeight, parts: ProductParts, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return float32 sums [sums, n, out] of the parts of x @ weight.T + bias; write them to `out` if it is given.

    Few columns make few tiles. Splitting the inputs too keeps all of a GPU busy.
    """
    if out is None:
        shape = (parts.sums(len(x)), len(x), len(_values(weight)))
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _multiply(x, weight, bias, out, parts, gated=False)
    return out


def _values(weight: GpuWeight) -> Tensor:
    return weight.values if isinstance(weight, QuantizedWeight) else weight


def round_rows(x: Tensor, scheme: ActivationScheme, span: int) -> tuple[Tensor, Tensor]:
    """Round `x` [n, in] to FP8; return its bits [n, in] as uint8, and the scales [n, spans] of each `span` inputs."""
    n, inputs = x.shape
    spans, block = triton.cdiv(inputs, span), triton.next_power_of_2(span)
    out = torch.empty(n, inputs, dtype=torch.uint8, device=x.device)
    scales = torch.empty(n, spans, dtype=torch.float32, device=x.device)
    static = scheme.static_scale is not None
    _round_span[(n, spans)](
        x, out, scales, inputs, scheme.static_scale or 0.0, min(scheme.bound, torch.finfo(torch.float32).max),
        STATIC=static, POWERS=scheme.powers_of_two, LEAST=LEAST, MAX=MAX,
        SPAN=span, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, scales


def _multiply(x: Tensor, weight: GpuWeight, bias: Tensor | None, out: Tensor, parts: ProductParts, gated: bool) -> None:
    n, inputs = x.shape
    branch, columns = parts.branch(n), out.shape[-1]
    scheme = weight.activations if isinstance(weight, QuantizedWeight) else None
    tile = _tile(n, parts.unit, x.dtype, gated, branch, parts.ranks > 1) if scheme is None else _fp8_tile(n)
    fp8 = isinstance(weight, QuantizedWeight)
    blocks = isinstance(weight, QuantizedWeight) and weight.has_blocks
    span = SCALE_BLOCK if blocks else tile["INPUTS"]
    row_scale = None
    if scheme is not None:
        x, row_scale = round_rows(x, scheme, SCALE_BLOCK if blocks else inputs)
    grid = (triton.cdiv(n, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]), parts.count // branch)
    scale = weight.scale if isinstance(weight, QuantizedWeight) else None
    _multiply_tile[grid](
        x, row_scale, _values(weight).view(torch.uint8) if fp8 else weight, scale, bias, out,
        n, columns, inputs, parts.unit, parts.share,
        BRANCH=branch, PIECES=parts.pieces, BIASED=bias is not None, GATED=gated, EVEN=parts.unit % span == 0,
        FP8=fp8, BLOCKS=blocks, SPAN=span,
        FP8_ROWS=scheme is not None, NATIVE=scheme is not None and multiplies_fp8(x.device), **tile,
    )  # fmt: skip


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a GPU has instructions that multiply FP8: compute capability 8.9 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def rotate_and_store(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    kv: PagedKv,
    layer: int,
    entries: Tensor,
) -> Tensor:
    """Sum the parts of `qkv` [parts, n, (heads + 2 kv_heads) * dim], and rotate queries and keys to their positions.

    Store keys and values at `entries` [n]; return the queries [n, heads, dim]. `rotary` has cosines and sines [n, dim];
    `norms` are the weights of query and key norms, for models that have them.
    """
    kv_heads, dim = kv.keys.shape[3:]
    parts, n, width = qkv.shape
    heads = width // dim - 2 * kv_heads
    query = torch.empty(n, heads, dim, dtype=kv.dtype, device=qkv.device)
    cos, sin = rotary
    query_norm, key_norm = norms or (None, None)
    _rotate_and_store_heads[(n, heads + 2 * kv_heads)](
        qkv, cos, sin, query_norm, key_norm, query, *kv.layer(layer), entries, n, eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=triton.next_power_of_2(dim // 2), NORMED=norms is not None,
        PARTS=parts, KV_FP8=kv.in_fp8, num_warps=1,
    )  # fmt: skip
    return query


def attend(query: Tensor, rows: PagedRows, kv: PagedKv, layer: int, options: AttentionOptions) -> Tensor:
    """Return the attention [n, heads, dim] of `query` over what each row sees, itself included."""
    out, window = torch.empty_like(query), options.window
    sinks = None if options.sinks is None else options.sinks.float() * _LOG2_E  # scores are in units of exp2
    shape, heads, dim = rows.shape, query.shape[1], query.shape[2]
    tops, weights = (query.new_empty(shape.parts, heads, dtype=torch.float32) for _ in range(2))
    partial = (tops, weights, query.new_empty(shape.parts, heads, dim, dtype=torch.float32))
    for number, bounds in enumerate(rows.bounds):
        _attend_slice(query, rows, kv, layer, options, partial, bounds)
        first, end = shape.row_bounds[number : number + 2]
        _merge_chunks[(end - first, heads)](
            *partial, out, sinks, rows.seen, rows.own_count, rows.positions, rows.first_part, bounds,
            window or 0, first, num_warps=1, SINKS=sinks is not None, **_sizes(query, shape, window),
        )  # fmt: skip
    return out


def _attend_slice(
    query: Tensor,
    rows: PagedRows,
    kv: PagedKv,
    layer: int,
    options: AttentionOptions,
    partial: tuple[Tensor, Tensor, Tensor],
    bounds: Tensor,
) -> None:
    """Write the partial results of one slice of the rows."""
    shape, kv_heads, heads = rows.shape, kv.keys.shape[3], query.shape[1]
    group, wide = heads // kv_heads, query.shape[2] > _WIDE
    split = _split(group) if wide else 1
    stores = (query, *kv.layer(layer), kv.device_tables, rows.slots, rows.sequence)
    listed, items = rows.own_count, (rows.positions, rows.first_part, rows.items, bounds)
    scale, softcap, window = options.scaling * _LOG2_E, (options.softcap or 0.0) * _LOG2_E, options.window
    numbers = (*partial, scale, softcap, window or 0, kv.device_tables.shape[1])
    sizes = _sizes(query, shape, window) | {"CAPPED": options.softcap is not None, "KV_FP8": kv.in_fp8}
    sizes |= {"KV_HEADS": kv_heads, "SPLIT": split, "BLOCK": kv.block_size, "SHIFT": ROW_SHIFT}
    sizes |= {"ENTRIES": _MIN_TILE if wide else _ENTRIES} | (_LARGE if wide else _SMALL)
    grid = (max(1, min(shape.parts, _PROGRAMS // (kv_heads * split))), kv_heads * split)
    shares = shape.queries > 1
    if shares:
        together = tile_rows(kv)
        queries = together * group // split if wide else max(TILE_QUERIES, group)
        tile = max(_MIN_TILE, triton.next_power_of_2(queries))
        _attend_tiles[grid](
            *stores, rows.starts, rows.seen, listed, *items, *numbers, TILE=tile, ROWS=together, **sizes
        )
    if not shares or shape.listed:
        queries = max(_MIN_TILE, triton.next_power_of_2(group // split))
        _attend_rows[grid](
            *stores, rows.seen, rows.own, listed, *items, *numbers, shape.listed, QUERIES=queries, **sizes
        )


def _split(group: int) -> int:
    """Return into how many parts of at most _MIN_TILE query heads those of a KV head are split."""
    return next(parts for parts in range(-(-group // _MIN_TILE), group + 1) if group % parts == 0)


def _sizes(query: Tensor, shape: Shape, window: int | None) -> dict[str, int]:
    """Return the constants that all attention kernels have."""
    _, heads, dim = query.shape
    return {
        "HEADS": heads,
        "DIM": dim,
        "PADDED_DIM": max(_MIN_TILE, triton.next_power_of_2(dim)),
        "LISTS": shape.listed > 0,
        "WINDOWED": window is not None,
        "CHUNK": work.CHUNK,
    }


def _tile(rows: int, unit: int, dtype: torch.dtype, gated: bool, branch: int, narrow: bool) -> dict[str, int]:
    """Return the tile sizes and launch options of a product that were fastest on an H100.

    None may change the order of a row's sum. Tensor cores add inputs in order, 16 at a time, for every tile size that
    uses the same instruction; tiles of 64 rows and more do. A program that adds up a `branch` of parts holds several
    sums in registers, and has a smaller tile. Tiles are `narrow` where few programs write few sums.
    """
    if dtype == torch.float32:
        return _config(16, 32, 32, warps=4, stages=2)
    if rows <= 64:
        return _config(64, 32 if narrow else 64, 128 if unit % 128 == 0 else 64, warps=4, stages=4)
    if rows > 128 and triton.cdiv(rows, 64) % 2:  # tiles of 128 rows would compute 64 rows of padding
        return _config(64, 128, 64, warps=8 if branch > 2 else 4, stages=4)
    if gated:
        return _config(128, 128, 64, warps=8, stages=4)
    if rows <= 128:
        return _config(64, 128, 64, warps=8 if branch > 2 else 4, stages=4)
    return _config(128, 256 if branch == 1 else 128, 64, warps=8, stages=4)


def _fp8_tile(rows: int) -> dict[str, int]:
    """Return the tile sizes of a product with FP8 rows; not measured on a GPU.

    All have 64 rows or more, and INPUTS after which sums are added in float32: so a row's sum has one order.
    """
    if rows <= 64:
        return _config(64, 64, _INPUTS, warps=4, stages=4)
    return (
        _config(64, 128, _INPUTS, warps=4, stages=3) if rows <= 128 else _config(128, 128, _INPUTS, warps=8, stages=2)
    )


def _config(rows: int, columns: int, inputs: int, *, warps: int, stages: int) -> dict[str, int]:
    return {"ROWS": rows, "COLUMNS": columns, "INPUTS": inputs, "num_warps": warps, "num_stages": stages}


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
