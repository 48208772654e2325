/* What a block drafter offers below the nodes of a tree, from the tables of a step: the twin is `TorchPaths` of
 * worker/drafters/block_paths.py. */

#include <math.h>

#include "rows.h"
#include "trees.h"

#define PANEL 32 /* columns that are multiplied together */
#define ROWS 8   /* nodes that share a reading of the weights */

/* Functions of native.c and drafts.c */
typedef void topk_t(const float *scores, i64 *out, double *probabilities, i64 rows, i64 columns, i64 count);
typedef void process_t(const rows_t *rows, float *scores);
typedef void add_noise_t(float *scores, const i64 *keys, const i64 *tokens, i64 rows, i64 columns);

/* `BlockLayout` of block_paths.py */
typedef struct {
    /* weights */
    i64 depth, columns, rank, width, halves; /* halves: `embedding` and `out` are bfloat16, else float */
    float eps;
    const i64 *row_of_id;  /* [vocabulary] row of `tokens`; -1: the token is none of them */
    const float *tokens;   /* [columns, 2 * rank] what the path head reads of a token */
    const float *token;    /* [width, 2 * rank] weights by which it reads others */
    const void *embedding; /* [vocabulary, width] */
    const float *before;   /* [rank, 2 * rank] */
    const void *out;       /* [panels, rank, PANEL], zeros behind the last column */
    const i64 *ids;        /* [columns] */
    topk_t *topk;
    process_t *process;
    add_noise_t *add_noise;
    i64 children;
    /* tables of a step */
    const float *base;    /* [blocks * depth, columns] */
    const float *gates;   /* [blocks * depth, 2 * rank] */
    const i64 *block_of;  /* [trees]; -1: it has no tables */
    /* draws of a step above temperature 0 */
    const u8 *sampled;              /* [trees]; NULL: all are at temperature 0 */
    const parameters_t *parameters; /* [trees] */
    const i64 *keys;                /* [trees, depth] of the noise */
    float *noise;                   /* [blocks * depth, columns]: a row is made when the first node needs it */
    u8 *noise_made;                 /* [blocks * depth] */
    char *scratch;                  /* of `process`, for one thread */
    /* paths of the newest layer, in the order of its nodes: memory of this file */
    i64 rows, capacity;
    i64 *parents;
    float *paths, *older;
} block_t;

static inline float of_half(uint16_t half) {
    union { uint32_t bits; float value; } x = {(uint32_t)half << 16};
    return x.value;
}

/* Write what the path head reads of a token [2 * rank]. */
static void read_token(const block_t *t, i64 id, float *entry) {
    i64 size = 2 * t->rank, row = t->row_of_id[id];
    if (row >= 0) {
        memcpy(entry, t->tokens + row * size, size * sizeof *entry);
        return;
    }
    float x[t->width], squares = 0.0f;
    for (i64 i = 0; i < t->width; i++) {
        i64 at = id * t->width + i;
        x[i] = t->halves ? of_half(((const uint16_t *)t->embedding)[at]) : ((const float *)t->embedding)[at];
        squares += x[i] * x[i];
    }
    float scale = 1.0f / sqrtf(squares / t->width + t->eps);
    memset(entry, 0, size * sizeof *entry);
    for (i64 i = 0; i < t->width; i++) {
        float factor = scale * x[i];
        for (i64 j = 0; j < size; j++) entry[j] += factor * t->token[i * size + j];
    }
}

static i64 index_of(const block_t *t, i64 node) {
    i64 low = 0, high = t->rows - 1;
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (t->parents[middle] < node) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Write the path that ends in a node: zeros for a root. */
static void advance(const block_t *t, const nodes_t *n, i64 node, const float *gates, float *path) {
    i64 rank = t->rank, size = 2 * rank;
    if (!n->depth[node]) {
        memset(path, 0, rank * sizeof *path);
        return;
    }
    float x[size];
    const float *before = t->older + index_of(t, n->parent[node]) * rank;
    read_token(t, n->token[node], x);
    for (i64 j = 0; j < size; j++) x[j] += gates[j];
    for (i64 i = 0; i < rank; i++)
        for (i64 j = 0; j < size; j++) x[j] += before[i] * t->before[i * size + j];
    for (i64 j = 0; j < rank; j++) path[j] = x[j] / (1.0f + expf(-x[j])) * x[rank + j];
}

/* Add paths [rows, rank] times one panel of `out` to `some` columns of `logits`. */
#define ADD_PANEL(NAME, TYPE, READ)                                                                                    \
    static inline __attribute__((always_inline)) void NAME(const TYPE *out, const float *paths, i64 rank,              \
                                                           const i64 rows, i64 some, float *logits, i64 columns) {     \
        float sums[ROWS][PANEL] = {{0}};                                                                               \
        for (i64 k = 0; k < rank; k++) {                                                                               \
            float weights[PANEL];                                                                                      \
            for (i64 j = 0; j < PANEL; j++) weights[j] = READ(out[k * PANEL + j]);                                     \
            for (i64 r = 0; r < rows; r++)                                                                             \
                for (i64 j = 0; j < PANEL; j++) sums[r][j] += paths[r * rank + k] * weights[j];                        \
        }                                                                                                              \
        for (i64 r = 0; r < rows; r++)                                                                                 \
            for (i64 j = 0; j < some; j++) logits[r * columns + j] += sums[r][j];                                      \
    }                                                                                                                  \
    static void NAME##_of(const block_t *t, const float *paths, i64 rows, i64 panel, float *logits) {                  \
        const TYPE *out = (const TYPE *)t->out + panel * t->rank * PANEL;                                              \
        i64 rest = t->columns - panel * PANEL, some = rest < PANEL ? rest : PANEL;                                     \
        logits += panel * PANEL;                                                                                       \
        switch (rows) { /* sums of a constant number of rows stay in registers */                                      \
        case 1: NAME(out, paths, t->rank, 1, some, logits, t->columns); break;                                         \
        case 2: NAME(out, paths, t->rank, 2, some, logits, t->columns); break;                                         \
        case 3: NAME(out, paths, t->rank, 3, some, logits, t->columns); break;                                         \
        case 4: NAME(out, paths, t->rank, 4, some, logits, t->columns); break;                                         \
        case 5: NAME(out, paths, t->rank, 5, some, logits, t->columns); break;                                         \
        case 6: NAME(out, paths, t->rank, 6, some, logits, t->columns); break;                                         \
        case 7: NAME(out, paths, t->rank, 7, some, logits, t->columns); break;                                         \
        default: NAME(out, paths, t->rank, 8, some, logits, t->columns);                                               \
        }                                                                                                              \
    }
#define AS_IT_IS(x) (x)
ADD_PANEL(add_halves, uint16_t, of_half)
ADD_PANEL(add_floats, float, AS_IT_IS)

static void add_products(const block_t *t, const float *paths, i64 rows, float *logits) {
    i64 panels = (t->columns + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) if (rows * t->columns > 8192)
    for (i64 panel = 0; panel < panels; panel++)
        for (i64 row = 0; row < rows; row += ROWS) {
            i64 some = rows - row < ROWS ? rows - row : ROWS;
            (t->halves ? add_halves_of : add_floats_of)(t, paths + row * t->rank, some, panel,
                                                        logits + row * t->columns);
        }
}

/* Write the logits [rows, columns] below the nodes of a layer, ascending, and keep their paths for the next layer. */
void block_logits(block_t *t, const buffer_t *b, const i64 *frontier, i64 rows, float *logits) {
    nodes_t n = nodes_of(b);
    if (rows > t->capacity) {
        t->capacity = 2 * rows;
        t->parents = realloc(t->parents, t->capacity * sizeof *t->parents);
        t->paths = realloc(t->paths, t->capacity * t->rank * sizeof *t->paths);
        t->older = realloc(t->older, t->capacity * t->rank * sizeof *t->older);
        if (!t->parents || !t->paths || !t->older) abort();
    }
    float *newest = t->older;
    t->older = t->paths;
    t->paths = newest;
    int below = 0;
    for (i64 row = 0; row < rows; row++) {
        i64 node = frontier[row], at = t->block_of[n.tree[node]] * t->depth + n.depth[node];
        memcpy(logits + row * t->columns, t->base + at * t->columns, t->columns * sizeof *logits);
        advance(t, &n, node, t->gates + at * 2 * t->rank, newest + row * t->rank);
        below |= n.depth[node] > 0;
    }
    if (below) add_products(t, newest, rows, logits);
    memcpy(t->parents, frontier, rows * sizeof *frontier);
    t->rows = rows;
}

/* Replace a node's logits by the scores of its draw: filtered, and with the noise of its depth. */
static void draw_scores(const block_t *t, const nodes_t *n, i64 node, float *logits) {
    i64 tree = n->tree[node], at = t->block_of[tree] * t->depth + n->depth[node];
    const i64 first = 0;
    const rows_t row = {.logits = logits, .stride = t->columns, .rows = 1, .columns = t->columns, .indices = &first,
                        .parameters = t->parameters + tree, .scratch = t->scratch, .threads = 1};
    t->process(&row, logits);
    float *noise = t->noise + at * t->columns;
    if (!t->noise_made[at]) {
        memset(noise, 0, t->columns * sizeof *noise);
        t->add_noise(noise, t->keys + tree * t->depth + n->depth[node], t->ids, 1, t->columns);
        t->noise_made[at] = 1;
    }
    for (i64 i = 0; i < t->columns; i++) logits[i] += noise[i];
}

/* An `offer_t` of growth.c: no children below the last depth of the tables. */
void offer_block(void *context, const buffer_t *b, const i64 *frontier, i64 rows, i64 *tokens, double *probabilities) {
    block_t *t = context;
    nodes_t n = nodes_of(b);
    i64 count = rows * t->children, known = rows;
    if (n.depth[frontier[0]] >= t->depth) known = 0; /* all nodes of a layer have one depth */
    memset(tokens, 0, count * sizeof *tokens);
    memset(probabilities, 0, count * sizeof *probabilities);
    if (!known) return;
    float *logits = scratch_for(3, rows * t->columns * sizeof *logits);
    block_logits(t, b, frontier, rows, logits);
    if (t->sampled)
        for (i64 row = 0; row < rows; row++)
            if (t->sampled[n.tree[frontier[row]]]) draw_scores(t, &n, frontier[row], logits + row * t->columns);
    t->topk(logits, tokens, probabilities, rows, t->columns, t->children);
    for (i64 i = 0; i < count; i++) {
        tokens[i] = t->ids[tokens[i]];
        if (!(probabilities[i] > 0.0)) probabilities[i] = 0.0; /* NaN: a broken draft */
    }
}

void release_block(block_t *t) {
    free(t->parents);
    free(t->paths);
    free(t->older);
}
