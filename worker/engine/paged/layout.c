/* Lay out the rows of a forward over paged KV: rows.py has the same in NumPy, and says what the parts mean. */

#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef uint8_t u8;

#define ROW_SHIFT 32 /* of work.py */
#define SCRATCH 0    /* of kv.py */

/* `SegmentArrays` of compiled_layout.py */
typedef struct {
    i64 segments, rows, kept_rows;
    const i64 *slots, *prefixes, *starts, *counts;
    const u8 *chains;
    const i64 *ids, *positions, *kept, *visible_counts, *visible;
} segments_t;

/* `BlockTables` of compiled_layout.py */
typedef struct {
    const i64 *tables, *held, *references;
    i64 width, slots, block_size;
} tables_t;

/* `ShapeSizes` of compiled_layout.py */
typedef struct {
    i64 rows, kept, sequences, listed, causal, shares, tile, chunk, max_listed;
} shape_t;

static i64 entry_of(const tables_t *kv, i64 slot, i64 index) {
    return kv->tables[slot * kv->width + index / kv->block_size] * kv->block_size + index % kv->block_size;
}

static i64 chunks_of(i64 entries, i64 chunk) { return (entries + chunk - 1) / chunk; }

static i64 larger(i64 a, i64 b) { return a > b ? a : b; }

/* Return how many slots are not ready for their rows: blocks are missing, shared, or held beyond a chain. */
i64 unprepared(const segments_t *s, const tables_t *kv) {
    i64 found = 0;
    for (i64 i = 0; i < s->segments; i++) {
        i64 slot = s->slots[i], first = s->starts[i] / kv->block_size;
        i64 needed = (s->starts[i] + s->counts[i] + kv->block_size - 1) / kv->block_size;
        i64 ready = needed <= kv->held[slot] && !(s->chains[i] && needed < kv->held[slot]);
        for (i64 at = first; ready && at < needed; at++)
            ready = kv->references[kv->tables[slot * kv->width + at]] == 1;
        found += !ready;
    }
    return found;
}

/* Write whether every segment is a chain of one row, the most entries that a row would list, and the partial results if
 * rows list none, or up to `max_listed`. */
void measure(const segments_t *s, i64 chunk, i64 max_listed, i64 *out) {
    memset(out, 0, 4 * sizeof *out);
    out[0] = s->rows == s->segments;
    for (i64 i = 0; i < s->segments; i++) {
        i64 end = s->starts[i] + s->counts[i], prefix = s->prefixes[i];
        out[0] &= s->chains[i];
        if (s->chains[i]) out[1] = larger(out[1], s->counts[i]);
        out[2] += s->counts[i] * chunks_of(end < prefix + 1 ? end : prefix + 1, chunk);
        out[3] += s->counts[i] * chunks_of(end < prefix + max_listed ? end : prefix + max_listed, chunk);
    }
    for (i64 row = 0; row < s->rows; row++) out[1] = larger(out[1], s->visible_counts[row]);
}

/* Write the rows of the segments, and where their runs start; return the number of runs. */
static i64 lay_out_rows(const segments_t *s, const tables_t *kv, const shape_t *shape, i64 *entries, i64 *seen,
                        i64 *starts, i64 *slots, i64 *own, i64 *own_count) {
    const i64 *visible = s->visible;
    i64 runs = 0, row = 0;
    for (i64 i = 0; i < s->segments; i++) {
        i64 slot = s->slots[i], prefix = s->prefixes[i], is_long = s->chains[i] && s->counts[i] > shape->max_listed;
        i64 causal = !shape->listed || (is_long && shape->causal);
        i64 alone = shape->listed && shape->causal && !is_long; /* each row is a run */
        for (i64 at = 0; at < s->counts[i]; at++, row++) {
            if (!at || alone) {
                slots[runs] = slot;
                starts[runs++] = row;
            }
            entries[row] = entry_of(kv, slot, s->starts[i] + at);
            seen[row] = causal ? s->starts[i] + at + 1 : prefix;
            if (!shape->listed) continue;
            i64 chained = s->chains[i] && !causal;
            own_count[row] = chained ? at + 1 : s->visible_counts[row];
            for (i64 rank = 0; rank < own_count[row]; rank++)
                own[row * shape->listed + rank] = entry_of(kv, slot, prefix + (chained ? rank : *visible++));
        }
    }
    return runs;
}

/* Write the padding rows: they see only themselves, in the scratch block. */
static void pad(const segments_t *s, const tables_t *kv, const shape_t *shape, i64 runs, i64 *entries, i64 *seen,
                i64 *starts, i64 *slots, i64 *own, i64 *own_count) {
    for (i64 row = s->rows; row < shape->rows; row++) {
        entries[row] = SCRATCH * kv->block_size + (row - s->rows) % kv->block_size;
        seen[row] = !shape->listed;
        if (!shape->listed) continue;
        own[row * shape->listed] = entries[row];
        own_count[row] = 1;
    }
    for (i64 run = runs; run < shape->sequences; run++) { /* single runs in plain shapes, else the last run */
        starts[run] = s->rows + (shape->listed ? 0 : run - runs);
        slots[run] = kv->slots;
    }
    starts[shape->sequences] = shape->rows;
}

/* Write the items of the chunks first..end-1 of a row; return where the next ones go. */
static i64 *items_of(i64 *items, i64 row, i64 first, i64 end) {
    for (; first < end; first++) *items++ = (row << ROW_SHIFT) + first;
    return items;
}

/* Write the items of the tiles of a run's rows first..end-1. */
static i64 *tiles_of(i64 *items, i64 first, i64 end, const shape_t *shape, const i64 *seen, const i64 *own_count) {
    i64 tile = shape->tile, chunk = shape->chunk;
    for (i64 lead = first; lead < end; lead += tile) {
        i64 last = lead + tile < end ? lead + tile : end, most = 0;
        for (i64 row = lead; row < last; row++)
            most = larger(most, own_count[row] ? seen[row] / chunk * chunk : seen[row]);
        items = items_of(items, lead, 0, chunks_of(most, chunk));
    }
    return items;
}

/* Write the flat parts of a shape with one slice to `out`; return their number: the items may be fewer than its own. */
i64 lay_out(const segments_t *s, const tables_t *kv, const shape_t *shape, i64 *out) {
    i64 rows = shape->rows, *ids = out, *positions = ids + rows, *entries = positions + rows;
    i64 *sequence = entries + rows, *seen = sequence + rows, *kept = seen + rows, *starts = kept + shape->kept;
    i64 *slots = starts + shape->sequences + 1, *own = slots + shape->sequences, *own_count = own + rows * shape->listed;
    i64 *first_part = own_count + rows, *bounds = first_part + rows + 1, *first_item = bounds + 5, *items = first_item;
    memset(out, 0, (bounds - out) * sizeof *out);
    memcpy(ids, s->ids, s->rows * sizeof *ids);
    memcpy(positions, s->positions, s->rows * sizeof *positions);
    memcpy(kept, s->kept, s->kept_rows * sizeof *kept);
    i64 runs = lay_out_rows(s, kv, shape, entries, seen, starts, slots, own, own_count);
    pad(s, kv, shape, runs, entries, seen, starts, slots, own, own_count);
    for (i64 run = 0; run < shape->sequences; run++) {
        for (i64 row = starts[run]; row < starts[run + 1]; row++) sequence[row] = run;
        if (shape->shares) items = tiles_of(items, starts[run], starts[run + 1], shape, seen, own_count);
    }
    i64 tiles = items - first_item;
    for (i64 row = 0; row < rows; row++) {
        i64 chunks = chunks_of(seen[row] + own_count[row], shape->chunk);
        first_part[row + 1] = first_part[row] + chunks;
        if (!shape->shares) items = items_of(items, row, 0, chunks);
        else if (own_count[row]) items = items_of(items, row, seen[row] / shape->chunk, chunks);
    }
    bounds[0] = bounds[4] = 0;
    bounds[1] = bounds[2] = tiles;
    bounds[3] = items - first_item;
    return items - out;
}

/* Write the pool's entries that moves come from and go to [2, entries]; return whether the slots own the blocks there. */
i64 moved_entries(const tables_t *kv, i64 moves, i64 entries, const i64 *slots, const i64 *destinations,
                  const i64 *counts, const i64 *sources, i64 *out) {
    i64 owned = 1;
    for (i64 i = 0, at = 0; i < moves; i++)
        for (i64 k = 0; k < counts[i]; k++, at++) {
            i64 target = entry_of(kv, slots[i], destinations[i] + k);
            owned &= kv->references[target / kv->block_size] == 1;
            out[at] = entry_of(kv, slots[i], sources[at]);
            out[entries + at] = target;
        }
    return owned;
}
