/* Growth of draft trees: layer after layer without a return to Python, as far as candidates come from compiled code.
 *
 * The twins are `grow` of drafting.py and the budgets of tree_budget.py: same trees, same statistics, bit for bit. */

#include "trees.h"

#define FULL -1 /* the memory is too small for another layer */

/* Offer [rows, width] candidates below the nodes `frontier` [rows]; probability 0 marks an empty entry. */
typedef void offer_t(void *context, const buffer_t *nodes, const i64 *frontier, i64 rows, i64 *tokens,
                     double *probabilities);

/* `SourceLayout` of sources.py */
typedef struct {
    offer_t *offer; /* NULL: the candidates of the next layer are at `tokens` and `probabilities` */
    void *context;
    i64 width;
    const i64 *tokens; /* [frontier, width] */
    const double *probabilities;
    const i64 *labels; /* NULL: all are `label` */
} source_t;

/* `GrowthLayout` of growth.py */
typedef struct {
    /* what may be emitted: see `can_have_children` */
    const i64 *groups, *keys, *remaining;
    i64 key_count;
    /* acceptance; `bins` NULL: trees are built on the candidates as offered */
    const bins_t *bins;
    const u8 *sampled;
    double limit;
    /* what was offered: layer after layer, `frontier` [capacity] and [capacity, width] */
    i64 capacity, width;
    i64 *frontier, *tokens, *sources;
    double *probabilities;
    i64 *layer_rows; /* nodes that each layer has expanded */
    i64 layers, first, rows; /* the next layer expands frontier[first], … */
    /* up to two sources; those of one alone are labelled `label`, of two 0, 1, and 2 for what both offer */
    source_t source[2];
    i64 source_count, label;
    /* budget */
    i64 priced, nodes;
    double threshold, *sums; /* fixed: E(A) of each tree before the newest layer [trees] */
    double price, rows_before, entries, drift, entry_ms, min_value, min_gain;
    const double *sizes, *points; /* the cost curve */
    i64 points_count, node_limit, prices_known;
    double *row_prices; /* [node_limit + 1] */
    double *best_child; /* [depth_classes, 2] value and samples */
    i64 depth_classes;
    double best_child_weight, best_child_recovery;
    const double *layer_ms; /* by load class; NaN: never seen */
} growth_t;

/* ---- candidates ---- */

/* `BigramSource` of sources.py: the candidates of a node depend on its token alone. */
typedef struct {
    i64 vocabulary, width;
    const i64 *tokens; /* [vocabulary, width] */
    const double *probabilities;
} bigrams_t;

void offer_bigrams(void *context, const buffer_t *b, const i64 *frontier, i64 rows, i64 *tokens, double *probabilities) {
    const bigrams_t *bigrams = context;
    nodes_t n = nodes_of(b);
    i64 width = bigrams->width;
    for (i64 row = 0; row < rows; row++) {
        i64 from = n.token[frontier[row]] * width;
        memcpy(tokens + row * width, bigrams->tokens + from, width * sizeof *tokens);
        memcpy(probabilities + row * width, bigrams->probabilities + from, width * sizeof *probabilities);
    }
}

/* `LookupSource` of sources.py: a function of another library that knows no `buffer_t` */
typedef void lookup_t(const void *index, const i64 *rows_of_trees, const i64 *tree, const i64 *parent, const i64 *token,
                      const i64 *frontier, i64 count, i64 width, i64 *tokens, double *probabilities);

typedef struct {
    lookup_t *lookup;
    const void *index;
    const i64 *rows; /* [trees] */
    i64 width;
} lookups_t;

void offer_lookups(void *context, const buffer_t *b, const i64 *frontier, i64 rows, i64 *tokens, double *probabilities) {
    const lookups_t *t = context;
    nodes_t n = nodes_of(b);
    t->lookup(t->index, t->rows, n.tree, n.parent, n.token, frontier, rows, t->width, tokens, probabilities);
}

/* `BeamLayout` of worker/drafters/block_beam.py: candidates of the nodes in a beam of each tree and depth */
typedef struct {
    i64 depth, beam, children;
    const i64 *block_of; /* [trees]; -1: it has none */
    const double *rows;  /* [blocks, depth, beam, 2 + 2 * children] parent's place (-1: no node), token; candidates */
} beam_t;

/* Return the row of a node in its beam; NULL: it has none. */
static const double *beam_row(const beam_t *t, const nodes_t *n, i64 node) {
    i64 size = 2 + 2 * t->children, block = t->block_of[n->tree[node]], depth = n->depth[node];
    if (block < 0 || depth >= t->depth) return NULL;
    const double *rows = t->rows + (block * t->depth + depth) * t->beam * size;
    if (!depth) return rows;
    const double *above = beam_row(t, n, n->parent[node]);
    if (!above) return NULL;
    double parent = (above - (rows - t->beam * size)) / size, token = n->token[node];
    for (i64 place = 0; place < t->beam; place++)
        if (rows[place * size] == parent && rows[place * size + 1] == token) return rows + place * size;
    return NULL;
}

void offer_beam(void *context, const buffer_t *b, const i64 *frontier, i64 rows, i64 *tokens, double *probabilities) {
    const beam_t *t = context;
    nodes_t n = nodes_of(b);
    i64 k = t->children;
    for (i64 row = 0; row < rows; row++) {
        const double *found = beam_row(t, &n, frontier[row]);
        for (i64 i = row * k, at = 2; i < (row + 1) * k; i++, at++) {
            tokens[i] = found ? (i64)found[at] : 0;
            probabilities[i] = found ? found[at + k] : 0.0;
        }
    }
}

/* Let a source write its candidates below the frontier. */
static void ask(const growth_t *g, const buffer_t *b, const source_t *source, i64 *tokens, double *probabilities) {
    i64 count = g->rows * source->width;
    if (source->offer) {
        source->offer(source->context, b, g->frontier + g->first, g->rows, tokens, probabilities);
        return;
    }
    memcpy(tokens, source->tokens, count * sizeof *tokens);
    memcpy(probabilities, source->probabilities, count * sizeof *probabilities);
}

static int any(const double *values, i64 count) {
    for (i64 i = 0; i < count; i++)
        if (values[i] != 0.0) return 1;
    return 0;
}

/* Merge the candidates of two sources at one node; a token that both offer keeps its position in the first.
 *
 * Noisy-or: right unless both are wrong. They are not independent; the acceptance model learns the difference.
 * The twin is `merged` of drafting.py. */
static void merge(i64 m, const i64 *a, const double *p, i64 k, const i64 *b, const double *q, i64 *tokens,
                  double *probabilities, i64 *labels) {
    for (i64 j = 0; j < k; j++) {
        tokens[m + j] = b[j];
        probabilities[m + j] = q[j];
        labels[m + j] = 1;
    }
    for (i64 i = 0; i < m; i++) {
        double other = 0.0;
        tokens[i] = a[i];
        labels[i] = 0;
        for (i64 j = 0; j < k; j++) {
            if (a[i] != b[j] || !(p[i] > 0.0) || !(q[j] > 0.0)) continue;
            if (q[j] > other) other = q[j];
            probabilities[m + j] = 0.0;
            labels[i] = 2;
        }
        probabilities[i] = 1.0 - (1.0 - p[i]) * (1.0 - other);
    }
}

/* Record what the sources offer below the frontier, padded to `width`; return whether any of it has a probability. */
static int offer(const growth_t *g, const buffer_t *b) {
    i64 m = g->source[0].width, k = g->source_count > 1 ? g->source[1].width : 0;
    i64 *one = scratch(g->rows * (m + k) * (sizeof(i64) + sizeof(double))), *other = one + g->rows * m;
    double *p = (double *)(other + g->rows * k), *q = p + g->rows * m;
    ask(g, b, g->source, one, p);
    if (k) ask(g, b, g->source + 1, other, q);
    int two = any(q, g->rows * k);
    for (i64 row = 0; row < g->rows; row++, one += m, p += m, other += k, q += k) {
        i64 at = (g->first + row) * g->width, *tokens = g->tokens + at, *labels = g->sources + at;
        double *probabilities = g->probabilities + at;
        for (i64 i = two ? m + k : m; i < g->width; i++) tokens[i] = labels[i] = 0, probabilities[i] = 0.0;
        if (two) {
            merge(m, one, p, k, other, q, tokens, probabilities, labels);
            continue;
        }
        memcpy(tokens, one, m * sizeof *tokens);
        memcpy(probabilities, p, m * sizeof *probabilities);
        const i64 *own = g->source[0].labels;
        for (i64 i = 0; i < m; i++) labels[i] = g->source_count > 1 ? 0 : own ? own[row * m + i] : g->label;
    }
    return any(g->probabilities + g->first * g->width, g->rows * g->width);
}

/* ---- prices ---- */

/* Write the price in tokens of 0, 1, 2, … nodes together: the twin is `CostAwareBudget.row_prices`. */
static void price_rows(growth_t *g) {
    double before = 0.0;
    for (i64 k = 0, at = 0; k <= g->node_limit; k++) {
        double rows = g->rows_before + k, ms;
        while (at + 1 < g->points_count && g->sizes[at + 1] <= rows) at++;
        ms = g->points[at];
        if (rows > g->sizes[at] && g->points_count > 1) {
            i64 from = at + 1 < g->points_count ? at : at - 1;
            double slope = (g->points[from + 1] - g->points[from]) / (g->sizes[from + 1] - g->sizes[from]);
            ms = slope * (rows - g->sizes[at]) + ms;
        }
        ms = g->drift * (ms + g->entry_ms * (g->entries * (1.0 + k / g->rows_before)));
        if (!k) before = ms;
        g->row_prices[k] = g->price * (ms - before);
        double each = g->row_prices[k] / k;
        if (k == 1 || (k && each < g->min_value)) g->min_value = each;
    }
    g->prices_known = 1;
}

/* Return the net tokens of the best cut of draft nodes with these values, which are descending. */
static double best_net(const growth_t *g, const double *values, i64 count) {
    double sum = 0.0, best = 0.0;
    for (i64 i = 0; i < count && i < g->node_limit; i++) {
        sum += values[i];
        if (sum - g->row_prices[i + 1] > best) best = sum - g->row_prices[i + 1];
    }
    return best;
}

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x > y ? -1 : x < y;
}

/* Write the `limit` highest of two descending lists to `out`; return their number. */
static i64 join(const double *a, i64 count, const double *b, i64 other, i64 limit, double *out) {
    i64 i = 0, j = 0;
    while (i + j < limit && (i < count || j < other)) {
        int first = j == other || (i < count && a[i] >= b[j]);
        out[i + j] = first ? a[i] : b[j];
        if (first) i++;
        else j++;
    }
    return i + j;
}

/* ---- budgets ---- */

/* Rank the draft nodes within the limits of nodes per tree and step, the best first; return how many there are. */
static i64 rank(const growth_t *g, const buffer_t *b, ranked_t *ranked) {
    nodes_t n = nodes_of(b);
    u8 *kept = scratch_for(2, n.size);
    i64 found = 0;
    if (n.size - n.trees > g->nodes) mark_best(b, g->nodes, kept);
    else memset(kept, 1, n.size);
    for (i64 i = n.trees; i < n.size; i++) {
        if (!kept[i]) continue;
        ranked_t entry = {n.value[i], n.depth[i], g->remaining[n.tree[i]], i};
        ranked[found++] = entry;
    }
    qsort(ranked, found, sizeof *ranked, before);
    return found < g->node_limit ? found : g->node_limit;
}

/* Learn the value of the best children at a depth over that of their parents: `DraftCosts.observe_best_children`. */
static void observe_best_children(const growth_t *g, i64 depth, double best_children, double parents) {
    i64 last = g->depth_classes - 1, at = depth < last ? depth : last;
    double *mean = g->best_child + 2 * at, weight = g->best_child_weight;
    mean[1] += 1.0;
    if (1.0 / mean[1] > weight) weight = 1.0 / mean[1];
    mean[0] += weight * (best_children / parents - mean[0]);
    for (i64 deeper = at + 1; deeper <= last; deeper++)
        g->best_child[2 * deeper] += g->best_child_recovery * (1.0 - g->best_child[2 * deeper]);
}

/* Sum the values of the newest layer's best children, and those of their parents, then learn from them. */
static void learn_ratio(const growth_t *g, const nodes_t *n, i64 added, const i64 *expanded, i64 rows) {
    i64 depth = n->depth[expanded[0]];
    double children = 0.0, parents = 0.0;
    for (i64 row = 0, child = added; row < rows; row++) {
        double best = 0.0;
        for (; child < n->size && n->parent[child] == expanded[row]; child++)
            if (n->value[child] > best) best = n->value[child];
        children += best;
        parents += n->value[expanded[row]];
    }
    if (added < n->size) observe_best_children(g, depth, children, parents);
    else if (depth) observe_best_children(g, depth, 0.0, parents);
}

static double layer_ms(const growth_t *g, i64 nodes) {
    i64 class = 0;
    while ((i64)1 << class < nodes) class++;
    while (class >= 0 && g->layer_ms[class] != g->layer_ms[class]) class--;
    return class < 0 ? 0.0 : g->layer_ms[class];
}

/* Keep those of the parents `layer` [rows] whose children can enter the cut, whose values are descending and net `now`. */
static i64 parents_of_more(const growth_t *g, const nodes_t *n, const double *values, i64 count, double now, i64 *layer,
                           i64 rows) {
    i64 capacity = g->node_limit, length = (count < capacity - 1 ? count : capacity - 1) + 1, kept = 0, alone = 0;
    double *net = scratch_for(3, (length + rows + capacity) * sizeof *net), *parents = net + length;
    double *everything = parents + rows, sum = 0.0, above = 0.0, lowest = 0.0;
    for (i64 i = 0; i < length; i++) {
        net[i] = sum - g->row_prices[i + 1];
        if (i < count) sum += values[i];
    }
    for (i64 i = length - 2; i >= 0; i--)
        if (net[i + 1] > net[i]) net[i] = net[i + 1];
    u8 *may = scratch_for(2, rows);
    for (i64 row = 0; row < rows; row++) {
        double value = parents[row] = n->value[layer[row]];
        i64 low = 0, high = count; /* a child ranks after its parent and all equals */
        while (low < high) {
            i64 middle = (low + high) / 2;
            if (values[middle] >= value) low = middle + 1;
            else high = middle;
        }
        may[row] = low < length && net[low] + value > now;
        alone += may[row];
    }
    if (alone < rows) {
        qsort(parents, rows, sizeof *parents, descending);
        i64 found = join(values, count, parents, rows, capacity, everything), best = -1;
        sum = 0.0;
        for (i64 i = 0; i < found; i++) {
            sum += everything[i];
            double net_here = sum - g->row_prices[i + 1];
            if (best >= 0 && !(net_here > above)) continue;
            above = net_here;
            best = i;
        }
        if (best >= 0 && above > now) {
            lowest = everything[best];
            for (i64 row = 0; row < rows; row++) may[row] |= n->value[layer[row]] >= lowest;
        }
    }
    for (i64 row = 0; row < rows; row++)
        if (may[row]) layer[kept++] = layer[row];
    return kept;
}

/* Keep the nodes of `layer` [rows] to expand next if that is expected to earn its time: `CostAwareBudget.frontier`. */
static i64 priced(const growth_t *g, const buffer_t *b, i64 depth, i64 *layer, i64 rows) {
    nodes_t n = nodes_of(b);
    i64 drafted = n.size - n.trees, least = g->nodes < g->node_limit ? g->nodes : g->node_limit, kept = 0;
    ranked_t *ranked = scratch_for(1, drafted * sizeof *ranked + (2 * drafted + n.size) * sizeof(double));
    double *values = (double *)(ranked + drafted), *children = values + drafted;
    i64 count = rank(g, b, ranked);
    for (i64 i = 0; i < count; i++) values[i] = ranked[i].value;
    if (drafted > least) {
        u8 *within = scratch_for(2, n.size);
        memset(within, 0, n.size);
        for (i64 i = 0; i < count; i++) within[ranked[i].node] = 1;
        for (i64 row = 0; row < rows; row++)
            if (within[layer[row]]) layer[kept++] = layer[row];
        rows = kept;
    }
    double now = best_net(g, values, count);
    rows = parents_of_more(g, &n, values, count, now, layer, rows);
    if (!rows) return 0;
    i64 deeper = depth + 1 < g->depth_classes ? depth + 1 : g->depth_classes - 1;
    for (i64 row = 0; row < rows; row++) children[row] = g->best_child[2 * deeper] * n.value[layer[row]];
    qsort(children, rows, sizeof *children, descending);
    double *everything = scratch_for(3, g->node_limit * sizeof *everything);
    i64 found = join(values, count, children, rows, g->node_limit, everything);
    return best_net(g, everything, found) - now > g->price * layer_ms(g, rows) ? rows : 0;
}

/* Keep the nodes of `layer` [rows] among the best of their trees, if these trees grew enough: `FixedBudget.frontier`. */
static i64 fixed(const growth_t *g, const buffer_t *b, i64 *layer, i64 rows) {
    nodes_t n = nodes_of(b);
    u8 *kept = scratch_for(2, n.size);
    double *sums = scratch_for(1, n.trees * sizeof *sums);
    i64 found = 0;
    mark_best(b, g->nodes, kept);
    sum_values(b, kept, sums);
    for (i64 row = 0; row < rows; row++) {
        i64 tree = n.tree[layer[row]];
        if (kept[layer[row]] && sums[tree] - g->sums[tree] > g->threshold) layer[found++] = layer[row];
    }
    memcpy(g->sums, sums, n.trees * sizeof *sums);
    return found;
}

/* ---- layers ---- */

static i64 emittable(const growth_t *g, const nodes_t *n, i64 *some, i64 rows) {
    i64 found = 0;
    for (i64 row = 0; row < rows; row++)
        if (can_have_children(n, some[row], g->groups, g->keys, g->key_count, g->remaining)) some[found++] = some[row];
    return found;
}

/* Add the recorded candidates of the frontier that are worth a row. */
static void add(const growth_t *g, buffer_t *b) {
    nodes_t n = nodes_of(b);
    double lowest = g->priced ? g->min_value : 0.0;
    for (i64 row = 0; row < g->rows; row++) {
        i64 parent = g->frontier[g->first + row], at = (g->first + row) * g->width;
        double above = worth_above(&n, parent);
        for (i64 i = at; i < at + g->width; i++) {
            double probability = g->probabilities[i];
            if (g->bins) {
                i64 bin = bin_of(&n, g->bins, g->sampled[n.tree[parent]], parent, probability, g->sources[i]);
                probability *= g->bins->accepted[bin] / g->bins->expected[bin];
                if (probability > g->limit) probability = g->limit;
            }
            double value = above * probability;
            if (value > lowest) put(&n, b->size++, parent, g->tokens[i], value);
        }
    }
}

/* Grow by one layer; the frontier becomes the next one. */
static void grow_layer(growth_t *g, buffer_t *b) {
    const i64 *expanded = g->frontier + g->first;
    i64 added = b->size, rows = g->rows, *next = g->frontier + g->first + rows, depth;
    if (offer(g, b)) {
        if (g->priced && !g->prices_known) price_rows(g);
        add(g, b);
    }
    nodes_t n = nodes_of(b);
    depth = n.depth[expanded[0]];
    g->layer_rows[g->layers++] = rows;
    g->first += rows;
    g->rows = b->size - added;
    for (i64 i = 0; i < g->rows; i++) next[i] = added + i;
    if (g->priced) learn_ratio(g, &n, added, expanded, rows);
    if (g->rows) g->rows = g->priced ? priced(g, b, depth, next, g->rows) : fixed(g, b, next, g->rows);
    g->rows = emittable(g, &n, next, g->rows);
}

/* Take those of the first frontier below which something can be emitted; return how many these are. */
i64 begin_growth(growth_t *g, const buffer_t *b) {
    nodes_t n = nodes_of(b);
    return g->rows = emittable(g, &n, g->frontier, g->rows);
}

/* Grow by up to `layers` layers; return the nodes to expand next, or FULL. */
i64 grow(growth_t *g, buffer_t *b, i64 layers) {
    for (; layers > 0 && g->rows > 0; layers--) {
        i64 most = g->rows * g->width;
        if (b->size + most > b->capacity || g->first + g->rows + most > g->capacity) return FULL;
        grow_layer(g, b);
    }
    return g->rows;
}

/* Copy the nodes that are worth their rows to `target`, and write which they are; return how many: `Budget.cut`. */
i64 cut(const growth_t *g, const buffer_t *b, const buffer_t *target, i64 *kept_nodes) {
    nodes_t n = nodes_of(b);
    u8 *kept;
    if (g->priced) {
        i64 drafted = n.size - n.trees, wanted = 0;
        ranked_t *ranked = scratch_for(1, drafted * sizeof *ranked);
        i64 count = rank(g, b, ranked);
        double sum = 0.0, best = g->min_gain;
        for (i64 i = 0; i < count; i++) {
            sum += ranked[i].value;
            if (!(sum - g->row_prices[i + 1] > best)) continue;
            best = sum - g->row_prices[i + 1];
            wanted = i + 1;
        }
        kept = scratch_for(2, n.size);
        memset(kept, 0, n.size);
        memset(kept, 1, n.trees);
        for (i64 i = 0; i < wanted; i++) kept[ranked[i].node] = 1;
    } else {
        kept = scratch_for(2, n.size);
        mark_best(b, g->nodes, kept);
    }
    for (i64 i = 0, at = 0; i < n.size; i++)
        if (kept[i]) kept_nodes[at++] = i;
    return copy_kept(b, kept, target);
}

/* Label all that was offered with the tokens that the target drew, then decay the counts: see `find_drawn`. */
void learn(const growth_t *g, const bins_t *bins, const u8 *sampled, const buffer_t *b, const i64 *kept,
           const i64 *visited, const i64 *tokens, i64 count, double weight, double prior) {
    i64 *drawn = scratch_for(2, g->first * sizeof *drawn);
    find_drawn(b, kept, visited, tokens, count, g->frontier, g->first, drawn);
    count_draws(b, bins, sampled, g->frontier, g->first, g->width, g->tokens, g->probabilities, g->sources, drawn);
    decay_counts(bins, weight, prior);
}
