/* The host's part of a step: draft trees, their rows, what the target accepted of them; the twin is `numpy_kernels.py`. */

#include "trees.h"

/* ---- growth ---- */

/* Add the candidates [rows, width] below `frontier` whose value exceeds `min_value`; return the new number of nodes. */
i64 add_layer(const buffer_t *b, const i64 *frontier, i64 rows, i64 width, const i64 *tokens,
              const double *probabilities, double min_value) {
    nodes_t n = nodes_of(b);
    i64 size = n.size;
    for (i64 row = 0; row < rows; row++) {
        i64 parent = frontier[row];
        double above = worth_above(&n, parent);
        for (i64 i = row * width; i < (row + 1) * width; i++) {
            double value = above * probabilities[i];
            if (value > min_value) put(&n, size++, parent, tokens[i], value);
        }
    }
    return size;
}

/* Write the nodes whose children could be emitted to `out`; return their number. `keys` [count] is sorted. */
i64 expandable(const buffer_t *b, const i64 *some, i64 rows, const i64 *groups, const i64 *keys, i64 count,
               const i64 *remaining, i64 *out) {
    nodes_t n = nodes_of(b);
    i64 found = 0;
    for (i64 row = 0; row < rows; row++)
        if (can_have_children(&n, some[row], groups, keys, count, remaining)) out[found++] = some[row];
    return found;
}

/* ---- selection ---- */

/* Write the draft nodes to `out`, the best first: by value, depth, then most tokens left [trees] in its tree. */
void ranking(const buffer_t *b, const i64 *remaining, i64 *out) {
    nodes_t n = nodes_of(b);
    i64 count = n.size - n.trees;
    ranked_t *sorted = scratch(count * sizeof *sorted);
    for (i64 i = 0; i < count; i++) {
        i64 node = n.trees + i;
        ranked_t entry = {n.value[node], n.depth[node], remaining[n.tree[node]], node};
        sorted[i] = entry;
    }
    qsort(sorted, count, sizeof *sorted, before);
    for (i64 i = 0; i < count; i++) out[i] = sorted[i].node;
}

/* Mark the roots and the `per_tree` best draft nodes of each tree in `kept` [nodes]. */
void best(const buffer_t *b, i64 per_tree, u8 *kept) {
    mark_best(b, per_tree, kept);
}

/* Sum the values of the draft nodes of each tree, those in `kept` [nodes], or all if it is NULL. */
void expected(const buffer_t *b, const u8 *kept, double *sums) {
    sum_values(b, kept, sums);
}

/* Write the draft nodes, the depth and the sum of the values of each tree. */
void summary(const buffer_t *b, i64 *counts, i64 *depths, double *sums) {
    nodes_t n = nodes_of(b);
    sum_values(b, NULL, sums);
    memset(counts, 0, n.trees * sizeof *counts);
    memset(depths, 0, n.trees * sizeof *depths);
    for (i64 i = n.trees; i < n.size; i++) {
        counts[n.tree[i]]++;
        if (n.depth[i] > depths[n.tree[i]]) depths[n.tree[i]] = n.depth[i];
    }
}

/* Copy the nodes in `kept` [nodes] to `target`; return their number, -1 if one lost its parent. */
i64 prune(const buffer_t *b, const u8 *kept, const buffer_t *target) {
    return copy_kept(b, kept, target);
}

/* ---- rows for the target ---- */

typedef struct {
    i64 slot, tree;
} slot_t;

static int by_slot(const void *a, const void *b) {
    const slot_t *x = a, *y = b;
    return x->slot != y->slot ? (x->slot < y->slot ? -1 : 1) : (x->tree < y->tree ? -1 : 1);
}

/* Lay out the rows of the first `count` trees in order of their slots.
 *
 * Write per tree: its number, its prefix, its rows; the row of each node; per row: its token, position, number (`kept`),
 * and how many entries it sees behind the prefix; then these entries, row after row. Return {rows, entries}.
 * A root alone is a chain, and sees nothing but its prefix. */
void tree_rows(const buffer_t *b, i64 count, const i64 *slots, const i64 *lengths, i64 *out, i64 *totals) {
    nodes_t n = nodes_of(b);
    slot_t *sorted = scratch(count * sizeof *sorted + 2 * (n.trees + n.size) * sizeof(i64));
    i64 *counts = (i64 *)(sorted + count), *next = counts + n.trees, *row_nodes = next + n.trees;
    i64 *starts = row_nodes + n.size;
    i64 *order = out, *prefixes = order + count, *rows = prefixes + count, *places = rows + count;
    i64 *tokens = places + n.size, *positions = tokens + n.size, *kept = positions + n.size;
    i64 *seen_counts = kept + n.size, *seen = seen_counts + n.size;
    for (i64 tree = 0; tree < count; tree++) {
        slot_t entry = {slots[tree], tree};
        sorted[tree] = entry;
    }
    qsort(sorted, count, sizeof *sorted, by_slot);
    memset(counts, 0, n.trees * sizeof *counts);
    for (i64 i = 0; i < n.size; i++) counts[n.tree[i]]++;
    i64 total = 0;
    for (i64 i = 0; i < count; i++) {
        i64 tree = sorted[i].tree;
        order[i] = tree;
        prefixes[i] = lengths[tree] - 1;
        rows[i] = counts[tree];
        next[tree] = total;
        total += counts[tree];
    }
    for (i64 i = 0; i < n.size; i++) {
        places[i] = 0;
        if (n.tree[i] >= count) continue;
        places[i] = next[n.tree[i]]++;
        row_nodes[places[i]] = i;
    }
    i64 row = 0, at = 0;
    for (i64 i = 0; i < count; i++)
        for (i64 place = 0; place < rows[i]; place++, row++) {
            i64 node = row_nodes[row], sees = rows[i] > 1 ? n.depth[node] + 1 : 0;
            tokens[row] = n.token[node];
            positions[row] = prefixes[i] + n.depth[node];
            kept[row] = row;
            seen_counts[row] = sees;
            starts[row] = at;
            if (sees > 1) memcpy(seen + at, seen + starts[places[n.parent[node]]], (sees - 1) * sizeof *seen);
            if (sees) seen[at + sees - 1] = place;
            at += sees;
        }
    totals[0] = total;
    totals[1] = at;
}

/* ---- what the target accepted ---- */

/* Write the child of each node that has the token `drawn` there; -1: none. Of equal children the last one counts. */
void matching_children(const buffer_t *b, const i64 *drawn, i64 *child) {
    nodes_t n = nodes_of(b);
    for (i64 i = 0; i < n.size; i++) child[i] = -1;
    for (i64 i = n.trees; i < n.size; i++)
        if (drawn[n.parent[i]] == n.token[i]) child[n.parent[i]] = i;
}

/* Follow from each root the children that have the tokens `drawn` at their parents [nodes].
 *
 * Write per tree the number of accepted nodes; the visited nodes [nodes], tree after tree; the tokens drawn there.
 * Return how many are visited. */
i64 paths(const buffer_t *b, const i64 *drawn, i64 *out) {
    nodes_t n = nodes_of(b);
    i64 *child = scratch(n.size * sizeof *child), *visited = out + n.trees, *tokens = visited + n.size, at = 0;
    matching_children(b, drawn, child);
    for (i64 tree = 0; tree < n.trees; tree++) {
        i64 first = at;
        for (i64 node = tree; node >= 0; node = child[node]) {
            visited[at] = node;
            tokens[at++] = drawn[node];
        }
        out[tree] = at - first - 1;
    }
    return at;
}

/* Write the moves that bring accepted nodes behind their roots, of trees where one is elsewhere: slots [trees],
 * destinations [trees], numbers of nodes [trees], and the KV indices of all nodes. Return {moves, nodes}. */
void moves(const buffer_t *b, const i64 *counts, const i64 *visited, const i64 *slots, const i64 *lengths, i64 *out,
           i64 *totals) {
    nodes_t n = nodes_of(b);
    i64 *places = scratch((n.size + n.trees) * sizeof *places), *next = places + n.size;
    i64 *destinations = out + n.trees, *moved = destinations + n.trees, *sources = moved + n.trees;
    memset(next, 0, n.trees * sizeof *next);
    for (i64 i = 0; i < n.size; i++) places[i] = next[n.tree[i]]++;
    i64 found = 0, entries = 0;
    for (i64 tree = 0, at = 0; tree < n.trees; at += counts[tree++] + 1) {
        i64 in_place = 1;
        for (i64 i = 1; i <= counts[tree]; i++) in_place &= places[visited[at + i]] == i;
        if (in_place) continue;
        out[found] = slots[tree];
        destinations[found] = lengths[tree];
        moved[found++] = counts[tree];
        for (i64 i = 1; i <= counts[tree]; i++) sources[entries++] = lengths[tree] - 1 + places[visited[at + i]];
    }
    totals[0] = found;
    totals[1] = entries;
}

/* Write per tree how many pairs it has, then the pairs (number of children, rank of the drawn child, -1: none) of the
 * visited nodes with children, as far as they are `emitted`. Return how many pairs there are. */
i64 drawn_ranks(const buffer_t *b, const i64 *counts, const i64 *visited, const i64 *emitted, i64 *out) {
    nodes_t n = nodes_of(b);
    i64 *children = scratch(3 * n.size * sizeof *children), *chosen = children + n.size, *rank = chosen + n.size;
    i64 *pairs = out + n.trees, found = 0;
    for (i64 i = 0; i < n.size; i++) children[i] = rank[i] = 0, chosen[i] = -1;
    for (i64 tree = 0, at = 0; tree < n.trees; at += counts[tree++] + 1)
        for (i64 i = 0; i < counts[tree]; i++) chosen[visited[at + i]] = visited[at + i + 1];
    for (i64 i = n.trees; i < n.size; i++) {
        i64 parent = n.parent[i], other = chosen[parent];
        children[parent]++;
        if (other < 0 || other == i) continue;
        rank[parent] += n.value[i] > n.value[other] || (n.value[i] == n.value[other] && i < other);
    }
    for (i64 i = n.trees; i < n.size; i++)
        if (n.forced[i]) children[n.parent[i]] = 0; /* they were not drafted */
    for (i64 tree = 0, at = 0; tree < n.trees; at += counts[tree++] + 1) {
        i64 reached = emitted[tree] >= counts[tree] ? counts[tree] + 1 : emitted[tree], first = found;
        for (i64 i = 0; i < reached; i++) {
            i64 node = visited[at + i];
            if (!children[node]) continue;
            pairs[2 * found] = children[node];
            pairs[2 * found++ + 1] = chosen[node] < 0 ? -1 : rank[node];
        }
        out[tree] = found - first;
    }
    return found;
}

/* ---- acceptance ---- */

/* Write the candidates' probabilities [rows, width] corrected by the accepted over the expected tokens of their bins, at
 * most `limit`. `sampled` [trees]; `source` [rows, width] may be NULL. */
void corrected(const buffer_t *b, const bins_t *bins, const u8 *sampled, const i64 *frontier, i64 rows, i64 width,
               const double *probabilities, const i64 *source, double limit, double *out) {
    nodes_t n = nodes_of(b);
    for (i64 row = 0; row < rows; row++)
        for (i64 i = row * width; i < (row + 1) * width; i++) {
            i64 node = frontier[row], bin = bin_of(&n, bins, sampled[n.tree[node]], node, probabilities[i], source ? source[i] : 0);
            double value = probabilities[i] * (bins->accepted[bin] / bins->expected[bin]);
            out[i] = value > limit ? limit : value;
        }
}

/* Write the roots: their tokens [trees] and their common value. */
void plant(const buffer_t *b, const i64 *tokens, double value) {
    nodes_t n = nodes_of(b);
    for (i64 i = 0; i < n.trees; i++) {
        n.tree[i] = i;
        n.parent[i] = -1;
        n.token[i] = tokens[i];
        n.depth[i] = n.forced[i] = 0;
        n.value[i] = value;
    }
}

void drawn_at(const buffer_t *b, const i64 *kept, const i64 *visited, const i64 *tokens, i64 count, const i64 *frontier,
              i64 rows, i64 *out) {
    find_drawn(b, kept, visited, tokens, count, frontier, rows, out);
}

void count_accepted(const buffer_t *b, const bins_t *bins, const u8 *sampled, const i64 *frontier, i64 rows, i64 width,
                    const i64 *tokens, const double *probabilities, const i64 *source, const i64 *drawn) {
    count_draws(b, bins, sampled, frontier, rows, width, tokens, probabilities, source, drawn);
}

void decay(const bins_t *bins, double weight, double prior) {
    decay_counts(bins, weight, prior);
}
