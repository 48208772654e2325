/* Draft trees as C sees them, and what several sources do with them.
 *
 * Nodes are columns of one buffer [5, capacity]: tree, parent, token, depth, value; a column of bytes says what grammars
 * force. The first `trees` are the roots, and parents precede their children. Sums run from the first element to the
 * last, as NumPy's bincount and cumsum do, and these files are compiled without reassociation: their twins in Python
 * compute the same, bit for bit. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef uint8_t u8;

typedef struct {
    i64 *tree, *parent, *token, *depth;
    double *value;
    u8 *forced; /* by a grammar */
    i64 trees, size;
    double discount; /* of drafts below nodes that are forced with certainty */
} nodes_t;

/* `Layout` of nodes.py */
typedef struct {
    char *buffer;
    u8 *forced;
    i64 capacity, trees, size;
    double discount;
} buffer_t;

static nodes_t nodes_of(const buffer_t *b) {
    i64 *columns = (i64 *)b->buffer;
    nodes_t nodes = {columns, columns + b->capacity, columns + 2 * b->capacity, columns + 3 * b->capacity,
                     (double *)(columns + 4 * b->capacity), b->forced, b->trees, b->size, b->discount};
    return nodes;
}

/* Return memory for intermediate results, one area for each `use`. The caller holds the interpreter's lock, so all calls
 * share it. */
static void *scratch_for(int use, size_t bytes) {
    static void *memory[4];
    static size_t held[4];
    if (bytes > held[use]) {
        free(memory[use]);
        held[use] = 2 * bytes;
        memory[use] = malloc(held[use]);
        if (!memory[use]) abort();
    }
    return memory[use];
}

static void *scratch(size_t bytes) {
    return scratch_for(0, bytes);
}

/* ---- growth ---- */

/* Return whether the children of a node could be emitted: not after an end, nor beyond the tokens left in its tree.
 *
 * `groups` [trees], `keys` [count], sorted, and `remaining` [trees]. */
static int can_have_children(const nodes_t *n, i64 node, const i64 *groups, const i64 *keys, i64 count,
                             const i64 *remaining) {
    i64 tree = n->tree[node], key = groups[tree] << 32 | n->token[node], at = 0;
    if (n->depth[node] + 2 > remaining[tree]) return 0;
    if (n->depth[node] == 0) return 1;
    while (at < count && keys[at] < key) at++;
    return at == count || keys[at] != key;
}

/* Return what drafts below a node are worth at most. */
static double worth_above(const nodes_t *n, i64 node) {
    return n->forced[node] && n->value[node] == 1.0 ? n->discount : n->value[node];
}

/* Add a node below `parent` behind the last one; the caller counts it. */
static void put(const nodes_t *n, i64 at, i64 parent, i64 token, double value) {
    n->tree[at] = n->tree[parent];
    n->parent[at] = parent;
    n->token[at] = token;
    n->depth[at] = n->depth[parent] + 1;
    n->forced[at] = 0;
    n->value[at] = value;
}

/* ---- selection ---- */

typedef struct {
    double value;
    i64 depth, left, node;
} ranked_t;

static int before(const void *a, const void *b) {
    const ranked_t *x = a, *y = b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    if (x->depth != y->depth) return x->depth < y->depth ? -1 : 1;
    if (x->left != y->left) return x->left > y->left ? -1 : 1;
    return x->node < y->node ? -1 : 1;
}

/* Mark the roots and the `per_tree` best draft nodes of each tree in `kept` [nodes]. */
static void mark_best(const buffer_t *b, i64 per_tree, u8 *kept) {
    nodes_t n = nodes_of(b);
    ranked_t *sorted = scratch(n.size * sizeof *sorted + n.trees * sizeof(i64));
    i64 *firsts = (i64 *)(sorted + n.size), most = 0;
    memset(firsts, 0, n.trees * sizeof *firsts);
    for (i64 i = n.trees; i < n.size; i++) {
        i64 count = ++firsts[n.tree[i]];
        if (count > most) most = count;
    }
    memset(kept, 1, n.size);
    if (most <= per_tree) return;
    for (i64 tree = 0, first = 0; tree < n.trees; tree++) {
        i64 count = firsts[tree];
        firsts[tree] = first;
        first += count;
    }
    for (i64 i = n.trees; i < n.size; i++) {
        ranked_t entry = {n.value[i], n.depth[i], 0, i};
        sorted[firsts[n.tree[i]]++] = entry;
    }
    for (i64 tree = 0, first = 0; tree < n.trees; first = firsts[tree++]) {
        if (firsts[tree] - first <= per_tree) continue;
        qsort(sorted + first, firsts[tree] - first, sizeof *sorted, before);
        for (i64 i = first + per_tree; i < firsts[tree]; i++) kept[sorted[i].node] = 0;
    }
}

/* Sum the values of the draft nodes of each tree, those in `kept` [nodes], or all if it is NULL. */
static void sum_values(const buffer_t *b, const u8 *kept, double *sums) {
    nodes_t n = nodes_of(b);
    memset(sums, 0, n.trees * sizeof *sums);
    for (i64 i = n.trees; i < n.size; i++)
        if (!kept || kept[i]) sums[n.tree[i]] += n.value[i];
}

/* Copy the nodes in `kept` [nodes] to `target`; return their number, -1 if one lost its parent. */
static i64 copy_kept(const buffer_t *b, const u8 *kept, const buffer_t *target) {
    nodes_t n = nodes_of(b), t = nodes_of(target);
    i64 size = 0, *moved = scratch(n.size * sizeof *moved);
    for (i64 i = 0; i < n.size; i++) {
        moved[i] = -1;
        if (!kept[i]) continue;
        i64 parent = n.parent[i] < 0 ? -1 : moved[n.parent[i]];
        if (parent < 0 && n.parent[i] >= 0) return -1;
        t.tree[size] = n.tree[i];
        t.parent[size] = parent;
        t.token[size] = n.token[i];
        t.depth[size] = n.depth[i];
        t.value[size] = n.value[i];
        t.forced[size] = n.forced[i];
        moved[i] = size++;
    }
    return size;
}

/* ---- acceptance ---- */

/* `BinLayout` of bins.py: statistics of candidates by sampling, source, depth and probability */
typedef struct {
    const double *edges;
    i64 edge_count, sources, depth_classes, count;
    double *accepted, *expected; /* [count] */
} bins_t;

static i64 bin_of(const nodes_t *n, const bins_t *bins, i64 sampled, i64 node, double probability, i64 source) {
    i64 depth = n->depth[node] < bins->depth_classes - 1 ? n->depth[node] : bins->depth_classes - 1;
    i64 row = (sampled * bins->sources + source) * bins->depth_classes + depth, bin = 0;
    while (bin < bins->edge_count && !(probability <= bins->edges[bin])) bin++;
    return row * (bins->edge_count + 1) + bin;
}

/* Write the token that was drawn at each node of the frontier [rows]; -1: at none. Nodes of the trees that were verified
 * have the numbers `kept` in those that were drafted, and `visited` [count] ones drew the `tokens`. */
static void find_drawn(const buffer_t *b, const i64 *kept, const i64 *visited, const i64 *tokens, i64 count,
                       const i64 *frontier, i64 rows, i64 *out) {
    i64 *drawn = scratch(b->size * sizeof *drawn);
    for (i64 i = 0; i < b->size; i++) drawn[i] = -1;
    for (i64 i = 0; i < count; i++) drawn[kept[visited[i]]] = tokens[i];
    for (i64 row = 0; row < rows; row++) out[row] = drawn[frontier[row]];
}

/* Add the candidates of the rows whose `drawn` token [rows] is known to their bins. */
static void count_draws(const buffer_t *b, const bins_t *bins, const u8 *sampled, const i64 *frontier, i64 rows,
                        i64 width, const i64 *tokens, const double *probabilities, const i64 *source,
                        const i64 *drawn) {
    nodes_t n = nodes_of(b);
    double *sums = scratch_for(1, 2 * bins->count * sizeof *sums);
    memset(sums, 0, 2 * bins->count * sizeof *sums);
    for (i64 row = 0; row < rows; row++)
        for (i64 i = row * width; drawn[row] >= 0 && i < (row + 1) * width; i++) {
            i64 node = frontier[row], label = source ? source[i] : 0;
            i64 bin = bin_of(&n, bins, sampled[n.tree[node]], node, probabilities[i], label);
            sums[bin] += tokens[i] == drawn[row] && probabilities[i] > 0.0;
            sums[bins->count + bin] += probabilities[i];
        }
    for (i64 i = 0; i < bins->count; i++) {
        bins->accepted[i] += sums[i];
        bins->expected[i] += sums[bins->count + i];
    }
}

/* Decay all counts towards `prior`. */
static void decay_counts(const bins_t *bins, double weight, double prior) {
    double more = prior * (1.0 - weight);
    for (i64 i = 0; i < bins->count; i++) {
        bins->accepted[i] = bins->accepted[i] * weight + more;
        bins->expected[i] = bins->expected[i] * weight + more;
    }
}
