/* Decoder layers on a CPU, compiled at load for this processor and one dtype.
 *
 * A row's result depends on that row only: no sum changes its order with the other rows of the batch. So a sequence
 * gets the same bits alone, in any batch, in a draft tree and after a restart. `kernels.py` compiles and calls this
 * file. Sizes are elements, not bytes; matrices are row-major.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "fast_math.h"

#if defined(__AVX512F__)
enum { LANES = 16, BLOCK = 12 }; /* columns of a vector; rows multiplied together, in registers */
#else
enum { LANES = 8, BLOCK = 5 };
#endif
enum { PREFETCH_ROWS = 7, PREFETCH_BYTES = 12288 }; /* from this many rows on, prefetch weights; by this many bytes */
enum { PANEL = 2 * LANES }; /* columns multiplied together; weights are packed panel by panel */

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));

#ifdef BFLOAT16
typedef uint16_t scalar;
enum { STEP = 2 }; /* weights of this many inputs are adjacent */
static inline float to_float(scalar x) { return (float_bits){.bits = (uint32_t)x << 16}.value; }
static inline scalar from_float(float x) { /* round to nearest, ties to even */
    uint32_t bits = (float_bits){.value = x}.bits;
    return (scalar)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline __attribute__((always_inline)) floats multiply_add(floats sum, const scalar *weight, const scalar *x) {
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight),
                                    (__m512bh)_mm512_set1_epi32((int)pair));
#else
    words w;
    memcpy(&w, weight, sizeof w);
    sum += (floats)(w << 16) * (float_bits){.bits = pair << 16}.value;
    return sum + (floats)(w & 0xffff0000u) * (float_bits){.bits = pair & 0xffff0000u}.value;
#endif
}
#else
typedef float scalar;
enum { STEP = 1 };
static inline float to_float(scalar x) { return x; }
static inline scalar from_float(float x) { return x; }
static inline __attribute__((always_inline)) floats multiply_add(floats sum, const scalar *weight, const scalar *x) {
    floats w;
    memcpy(&w, weight, sizeof w);
    return sum + w * *x;
}
#endif

static inline float silu(float x) {
    float e = exp_below_0(x < 0.0f ? x : -x);
    return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* ---- matrix products ---------------------------------------------------------------------------------------------- */

typedef enum { STORE, ADD, GATE, STORE_FLOAT } finish_t;

/* One packed product: out = finish(x @ weight.T + bias). ADD adds to `out`. GATE takes panels with gate in the first
 * half and up in the second, and stores silu(gate) * up. */
typedef struct {
    const scalar *weight; /* packed */
    const scalar *bias;   /* [columns], or NULL */
    int64_t columns, inputs;
} product_t;

int64_t panel_columns(void) { return PANEL; }

int64_t packed_size(int64_t columns, int64_t inputs) { return (columns + PANEL - 1) / PANEL * PANEL * inputs; }

/* Pack `weight` [columns, inputs]; pad the last panel with zeros. `second`, if given, has as many columns: half panels
 * of both alternate, and `columns` counts both. */
void pack(const scalar *weight, const scalar *second, scalar *packed, int64_t columns, int64_t inputs) {
#pragma omp parallel for
    for (int64_t panel = 0; panel < (columns + PANEL - 1) / PANEL; panel++)
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t lane = 0; lane < PANEL; lane++) {
                int64_t column = second ? panel * LANES + lane % LANES : panel * PANEL + lane;
                int64_t last = second ? columns / 2 : columns;
                const scalar *from = second && lane >= LANES ? second : weight;
                packed[panel * PANEL * inputs + (k / STEP * PANEL + lane) * STEP + k % STEP] =
                    column < last ? from[column * inputs + k] : 0;
            }
}

static inline void finish_row(const float *sums, scalar *out, const product_t *p, int64_t row, int64_t panel,
                              finish_t finish) {
    if (finish == GATE) {
        int64_t width = p->columns / 2, first = panel * LANES, count = width - first < LANES ? width - first : LANES;
        scalar *to = out + row * width + first;
        for (int64_t i = 0; i < count; i++) to[i] = from_float(silu(sums[i]) * sums[LANES + i]);
        return;
    }
    int64_t first = panel * PANEL, count = p->columns - first < PANEL ? p->columns - first : PANEL;
    if (finish == STORE_FLOAT) {
        memcpy((float *)out + row * p->columns + first, sums, (size_t)count * sizeof(float));
        return;
    }
    scalar *to = out + row * p->columns + first;
    for (int64_t i = 0; i < count; i++) {
        float sum = sums[i] + (p->bias ? to_float(p->bias[first + i]) : 0.0f);
        to[i] = from_float(finish == ADD ? sum + to_float(to[i]) : sum);
    }
}

/* sums[r] += x[r] @ weight for `inputs` inputs and one panel of columns; inlined for each number of rows. */
static inline __attribute__((always_inline)) void tile(floats sums[][2], const scalar *weight, int64_t stride,
                                                       const scalar *x, int64_t x_stride, int64_t inputs,
                                                       const int rows) {
    floats own[BLOCK][2];
    for (int r = 0; r < rows; r++) own[r][0] = sums[r][0], own[r][1] = sums[r][1];
    for (int64_t k = 0; k < inputs; k += STEP, weight += stride) {
        /* With many rows, a core computes too long between reads to saturate memory. With few, prefetching is slower. */
        if (rows >= PREFETCH_ROWS) {
            __builtin_prefetch((const char *)weight + PREFETCH_BYTES, 0, 2);
            __builtin_prefetch((const char *)weight + PREFETCH_BYTES + 64, 0, 2);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            own[r][0] = multiply_add(own[r][0], weight, x + r * x_stride + k);
            own[r][1] = multiply_add(own[r][1], weight + LANES * STEP, x + r * x_stride + k);
        }
    }
    for (int r = 0; r < rows; r++) sums[r][0] = own[r][0], sums[r][1] = own[r][1];
}

/* `tile` for up to BLOCK rows. `stride` is the distance of the weights of one step of inputs from the next. */
static void multiply_tile(floats sums[][2], const scalar *weight, int64_t stride, const scalar *x, int64_t x_stride,
                          int64_t inputs, int64_t rows) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        tile(sums, weight, stride, x, x_stride, inputs, n);                                                            \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#if defined(__AVX512F__)
        CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* All rows of one panel, in blocks of equal height. */
static void multiply_panel(const product_t *p, const scalar *x, scalar *out, int64_t rows, int64_t panel,
                           finish_t finish) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t row = rows * b / blocks, height = rows * (b + 1) / blocks - row;
        floats sums[BLOCK][2] = {0};
        multiply_tile(sums, p->weight + panel * PANEL * p->inputs, PANEL * STEP, x + row * p->inputs, p->inputs,
                      p->inputs, height);
        for (int64_t r = 0; r < height; r++) finish_row((const float *)sums[r], out, p, row + r, panel, finish);
    }
}

/* Every thread of a parallel region must call it; it ends with a barrier. */
static inline void multiply_all(const product_t *p, const scalar *x, scalar *out, int64_t rows, finish_t finish) {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < (p->columns + PANEL - 1) / PANEL; panel++)
        multiply_panel(p, x, out, rows, panel, finish);
}

/* One product: `x` [rows, inputs] to `out` [rows, columns], which are floats if finish is STORE_FLOAT. */
void multiply(const product_t *p, const scalar *x, scalar *out, int64_t rows, int64_t finish) {
#pragma omp parallel
    multiply_all(p, x, out, rows, (finish_t)finish);
}

/* ---- norms and rotation -------------------------------------------------------------------------------------------- */

static inline void normalise(const scalar *x, const scalar *weight, scalar *out, int64_t width, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += to_float(x[i]) * to_float(x[i]);
    float scale = 1.0f / sqrtf(sum / (float)width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
        out[i] = from_float(to_float(weight[i]) * to_float(from_float(to_float(x[i]) * scale)));
}

static inline void normalise_all(const scalar *x, const scalar *weight, scalar *out, int64_t rows, int64_t width,
                                 float eps) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) normalise(x + row * width, weight, out + row * width, width, eps);
}

/* Root mean square norm of rows [rows, width]. */
void rms_norm(const scalar *x, const scalar *weight, scalar *out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel if (rows >= 16)
    normalise_all(x, weight, out, rows, width, eps);
}

/* Norm and rotate one head (rotate-half convention), with the rounding of the model's own code. Without `cos` it is
 * rotated already. */
static inline void prepare(const scalar *x, scalar *out, const scalar *norm, const scalar *cos, const scalar *sin,
                           int64_t dim, float eps) {
    scalar normed[dim];
    if (norm) {
        normalise(x, norm, normed, dim, eps);
        x = normed;
    }
    if (!cos) {
        memcpy(out, x, (size_t)dim * sizeof(scalar));
        return;
    }
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = to_float(x[i]), b = to_float(x[i + half]);
        out[i] = from_float(to_float(from_float(a * to_float(cos[i]))) - to_float(from_float(b * to_float(sin[i]))));
        out[i + half] = from_float(to_float(from_float(b * to_float(cos[i + half]))) +
                                   to_float(from_float(a * to_float(sin[i + half]))));
    }
}

/* ---- attention ------------------------------------------------------------------------------------------------------ */

/* What the rows of a step see: entries first..prefix-1 of their slot, then their range of `extra`, ascending. The index
 * of an entry in that list is its position in the sequence, counted from `first`. */
typedef struct {
    const int64_t *first, *prefix; /* [rows] */
    const int64_t *extra_start;    /* [rows + 1] */
    const int64_t *extra;
    int64_t end; /* one past the last entry that a row sees */
} view_t;

/* The rows of a step and their KV slots. Per slot and KV head, keys are a packed weight of `capacity` columns and `dim`
 * inputs, values one of `dim` columns and `capacity` inputs. `capacity` and `dim` are multiples of PANEL. */
typedef struct {
    int64_t rows, heads, kv_heads, dim, capacity;
    const int64_t *slot, *index; /* [rows] */
    float scale;
} plan_t;

/* Queries, keys and values of one layer: head h of row r starts at r * row + h * head. */
typedef struct {
    const scalar *query, *key, *value;
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    const scalar *cos, *sin;             /* [rows, dim], or NULL: rotated already */
    const scalar *query_norm, *key_norm; /* [dim], or NULL */
    float eps;
} heads_t;

/* Buffers of one thread, for the query heads of one KV head. */
typedef struct {
    int64_t length;   /* entries, a multiple of PANEL */
    scalar *queries;  /* [groups, dim] */
    float *scores;    /* [groups, length] */
    scalar *weights;  /* [groups, length] */
    scalar *gathered; /* [length, dim] */
} workspace_t;

static inline int64_t key_at(int64_t position, int64_t i, int64_t dim) {
    return position / PANEL * PANEL * dim + (i / STEP * PANEL + position % PANEL) * STEP + i % STEP;
}

static inline int64_t value_at(int64_t position, int64_t i, int64_t dim) {
    return (position / STEP * dim + i) * STEP + position % STEP;
}

static workspace_t make_workspace(int64_t end, int64_t groups, int64_t dim) {
    int64_t length = (end + 2 * PANEL - 1) / PANEL * PANEL;
    return (workspace_t){length, malloc(sizeof(scalar) * (size_t)(groups * dim)),
                    malloc(sizeof(float) * (size_t)(groups * length)),
                    malloc(sizeof(scalar) * (size_t)(groups * length)),
                    malloc(sizeof(scalar) * (size_t)(length * dim))};
}

static void free_workspace(workspace_t workspace) {
    free(workspace.queries), free(workspace.scores), free(workspace.weights), free(workspace.gathered);
}

/* Turn scores into softmax weights that are not yet divided by their sum; return the sum. */
static inline float softmax_weights(const float *scores, scalar *weights, int64_t count, float scale) {
    float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        weights[j] = from_float(exp_below_0((scores[j] - top) * scale));
        sum += to_float(weights[j]);
    }
    return sum;
}

/* Attend `groups` query heads of one KV head of one row over its `keys` and `values`. */
static void attend_group(const plan_t *plan, const view_t *view, const workspace_t *workspace, const scalar *keys,
                         const scalar *values, int64_t row, int64_t groups, scalar *out) {
    const int64_t dim = plan->dim, length = workspace->length;
    const int64_t first = view->first[row], prefix = view->prefix[row];
    const int64_t *extra = view->extra + view->extra_start[row];
    const int64_t extras = view->extra_start[row + 1] - view->extra_start[row], count = prefix + extras;
    const int64_t end = extras ? extra[extras - 1] + 1 : prefix;
    const int64_t from = first / STEP * STEP, whole = prefix / STEP * STEP; /* values read in place: from..whole-1 */
    float sums[groups];
    for (int64_t panel = first / PANEL; panel * PANEL < end; panel++) {
        floats scores[BLOCK][2] = {0};
        multiply_tile(scores, keys + panel * PANEL * dim, PANEL * STEP, workspace->queries, dim, dim, groups);
        for (int64_t g = 0; g < groups; g++)
            memcpy(workspace->scores + g * length + panel * PANEL, scores[g], PANEL * sizeof(float));
    }
    for (int64_t g = 0; g < groups; g++) {
        float *scores = workspace->scores + g * length;
        scalar *weights = workspace->weights + g * length;
        /* extra[i] >= prefix + i: no score is overwritten before it is read */
        for (int64_t i = 0; i < extras; i++) scores[prefix + i] = scores[extra[i]];
        sums[g] = softmax_weights(scores + first, weights + first, count - first, plan->scale);
        for (int64_t j = from; j < first; j++) weights[j] = 0;
        for (int64_t j = count; j % STEP; j++) weights[j] = 0;
    }
    /* The last entries may be scattered, or packed with entries that the row does not see: gather them first. */
    for (int64_t j = whole; j < count || j % STEP; j++)
        for (int64_t i = 0; i < dim; i++)
            workspace->gathered[value_at(j - whole, i, dim)] =
                j < count ? values[value_at(j < prefix ? j : extra[j - prefix], i, dim)] : 0;
    for (int64_t column = 0; column < dim; column += PANEL) {
        floats mixed[BLOCK][2] = {0};
        if (whole > from)
            multiply_tile(mixed, values + (from * dim + column * STEP), dim * STEP, workspace->weights + from, length,
                          whole - from, groups);
        if (count > whole)
            multiply_tile(mixed, workspace->gathered + column * STEP, dim * STEP, workspace->weights + whole, length,
                          count - whole, groups);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t i = 0; i < PANEL; i++)
                out[g * dim + column + i] = from_float(((float *)mixed[g])[i] / sums[g]);
    }
}

/* Store the rows' keys and values, then attend into `out` [rows, heads, dim]. Every thread must call it; it ends with a
 * barrier. */
static inline void attend_all(const plan_t *plan, const view_t *view, const heads_t *of, scalar *keys, scalar *values,
                              const workspace_t *workspace, scalar *out) {
    const int64_t dim = plan->dim, kv_heads = plan->kv_heads, groups = plan->heads / kv_heads;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < plan->rows * kv_heads; item++) {
        int64_t row = item / kv_heads, head = item % kv_heads, position = plan->index[row];
        int64_t base = (plan->slot[row] * kv_heads + head) * plan->capacity * dim;
        const scalar *value = of->value + row * of->value_row + head * of->value_head;
        scalar key[dim];
        prepare(of->key + row * of->key_row + head * of->key_head, key, of->key_norm,
                of->cos ? of->cos + row * dim : NULL, of->cos ? of->sin + row * dim : NULL, dim, of->eps);
        for (int64_t i = 0; i < dim; i++) keys[base + key_at(position, i, dim)] = key[i];
        for (int64_t i = 0; i < dim; i++) values[base + value_at(position, i, dim)] = value[i];
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < plan->rows * kv_heads; item++) {
        int64_t row = item / kv_heads, kv_head = item % kv_heads;
        int64_t base = (plan->slot[row] * kv_heads + kv_head) * plan->capacity * dim;
        for (int64_t g = 0; g < groups; g += BLOCK) {
            int64_t some = groups - g < BLOCK ? groups - g : BLOCK, head = kv_head * groups + g;
            for (int64_t i = 0; i < some; i++)
                prepare(of->query + row * of->query_row + (head + i) * of->query_head, workspace->queries + i * dim,
                        of->query_norm, of->cos ? of->cos + row * dim : NULL, of->cos ? of->sin + row * dim : NULL, dim,
                        of->eps);
            attend_group(plan, view, workspace, keys + base, values + base, row, some,
                         out + (row * plan->heads + head) * dim);
        }
    }
}

/* The attention of one layer. */
void attend(const plan_t *plan, const view_t *view, const heads_t *of, scalar *keys, scalar *values, scalar *out) {
#pragma omp parallel
    {
        workspace_t workspace = make_workspace(view->end, BLOCK, plan->dim);
        attend_all(plan, view, of, keys, values, &workspace, out);
        free_workspace(workspace);
    }
}

/* Move `count` entries of one slot, in all layers and heads, from `sources` (ascending) down to destination,
 * destination + 1, … */
void move_entries(scalar *keys, scalar *values, const plan_t *plan, int64_t layers, int64_t layer_size, int64_t slot,
                  int64_t destination, const int64_t *sources, int64_t count) {
    const int64_t dim = plan->dim;
#pragma omp parallel for
    for (int64_t item = 0; item < layers * plan->kv_heads; item++) {
        int64_t base = item / plan->kv_heads * layer_size +
                       (slot * plan->kv_heads + item % plan->kv_heads) * plan->capacity * dim;
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < dim; i++) {
                keys[base + key_at(destination + j, i, dim)] = keys[base + key_at(sources[j], i, dim)];
                values[base + value_at(destination + j, i, dim)] = values[base + value_at(sources[j], i, dim)];
            }
    }
}

/* ---- a stack of layers ----------------------------------------------------------------------------------------------- */

/* Norm, attention, add; norm, gated SiLU, add. */
typedef struct {
    const scalar *norm_1, *norm_2, *query_norm, *key_norm; /* head norms may be NULL */
    product_t qkv, o, gate_up, down;
    int64_t view; /* index of the view for its window */
    int64_t tap;  /* index of its output in a row of tapped states; -1: not tapped */
} layer_t;

/* Buffers for the intermediate rows of a step. */
typedef struct {
    scalar *normed;  /* [rows, width] */
    scalar *stacked; /* [rows, (heads + 2 kv_heads) * dim] */
    scalar *mixed;   /* [rows, heads * dim] */
    scalar *gated;   /* [rows, inner] */
} scratch_t;

/* Run `layers` over `x` [rows, width] in place. `keys` and `values` have `layer_size` elements per layer. The outputs of
 * tapped layers go to `tapped` [rows, taps, width], or with `by_entry` to their entries [slots, capacity, taps, width].
 * Every thread of a parallel region must call it; it ends with a barrier. */
static void layers_all(const layer_t *layers, int64_t count, const plan_t *plan, const view_t *views,
                       const scratch_t *scratch, scalar *x, const scalar *cos, const scalar *sin, scalar *keys,
                       scalar *values, int64_t layer_size, int64_t width, float eps, scalar *tapped, int64_t taps,
                       int64_t by_entry) {
    int64_t rows = plan->rows, dim = plan->dim, row = (plan->heads + 2 * plan->kv_heads) * dim;
    workspace_t workspace = make_workspace(views[0].end, BLOCK, dim); /* all views have the same end */
    for (int64_t i = 0; i < count; i++) {
        const layer_t *layer = layers + i;
        heads_t heads = {scratch->stacked, scratch->stacked + plan->heads * dim,
                         scratch->stacked + (plan->heads + plan->kv_heads) * dim,
                         row, dim, row, dim, row, dim, cos, sin, layer->query_norm, layer->key_norm, eps};
        normalise_all(x, layer->norm_1, scratch->normed, rows, width, eps);
        multiply_all(&layer->qkv, scratch->normed, scratch->stacked, rows, STORE);
        attend_all(plan, views + layer->view, &heads, keys + i * layer_size, values + i * layer_size, &workspace,
                   scratch->mixed);
        multiply_all(&layer->o, scratch->mixed, x, rows, ADD);
        normalise_all(x, layer->norm_2, scratch->normed, rows, width, eps);
        multiply_all(&layer->gate_up, scratch->normed, scratch->gated, rows, GATE);
        multiply_all(&layer->down, scratch->gated, x, rows, ADD);
        if (layer->tap < 0) continue;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            int64_t entry = by_entry ? plan->slot[r] * plan->capacity + plan->index[r] : r;
            memcpy(tapped + (entry * taps + layer->tap) * width, x + r * width, (size_t)width * sizeof(scalar));
        }
    }
    free_workspace(workspace);
}

/* The layers of a model, without embeddings and logits. */
void run_layers(const layer_t *layers, int64_t count, const plan_t *plan, const view_t *views, const scratch_t *scratch,
                scalar *x, const scalar *cos, const scalar *sin, scalar *keys, scalar *values, int64_t layer_size,
                int64_t width, float eps, scalar *tapped, int64_t taps) {
#pragma omp parallel
    layers_all(layers, count, plan, views, scratch, x, cos, sin, keys, values, layer_size, width, eps, tapped, taps, 0);
}

/* ---- a whole model: embeddings, layers, norm, logits ------------------------------------------------------------------ */

typedef struct {
    const scalar *embedding; /* [vocabulary, width] */
    const scalar *cos, *sin; /* [positions, dim] */
    const layer_t *layers;
    int64_t count, width, layer_size, taps;
    float eps;
    const scalar *norm;
    product_t output;
    const scalar *unit; /* draft head: norm of a token's embedding and of the state before it; NULL for a model */
    product_t join;     /* [width, 2 * width], draft head only */
} network_t;

/* Inputs and outputs of one forward. */
typedef struct {
    const int64_t *ids, *positions; /* [rows] */
    const int64_t *kept;            /* [count] rows whose states and logits are returned */
    int64_t count;
    const scalar *states;     /* [rows, width] before the rows; draft head only */
    scalar *x, *cos, *sin;    /* buffers: [rows, width], [rows, dim], [rows, dim] */
    scalar *joined;           /* buffer of a draft head: [rows, 2 * width] */
    scalar *last;             /* [count, width] states of the kept rows, normed */
    scalar *tapped;           /* [slots, capacity, taps, width] */
    float *logits;            /* [count, vocabulary] */
} forward_t;

void run_network(const network_t *net, const plan_t *plan, const view_t *views, const scratch_t *scratch,
                 const forward_t *f, scalar *keys, scalar *values) {
    const int64_t rows = plan->rows, dim = plan->dim, width = net->width;
    const size_t row_size = (size_t)width * sizeof(scalar), head_size = (size_t)dim * sizeof(scalar);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const scalar *embedding = net->embedding + f->ids[r] * width;
            memcpy(f->cos + r * dim, net->cos + f->positions[r] * dim, head_size);
            memcpy(f->sin + r * dim, net->sin + f->positions[r] * dim, head_size);
            if (net->unit) {
                normalise(embedding, net->unit, f->joined + 2 * r * width, width, net->eps);
                normalise(f->states + r * width, net->unit, f->joined + (2 * r + 1) * width, width, net->eps);
            } else {
                memcpy(f->x + r * width, embedding, row_size);
            }
        }
        if (net->unit) multiply_all(&net->join, f->joined, f->x, rows, STORE);
        layers_all(net->layers, net->count, plan, views, scratch, f->x, f->cos, f->sin, keys, values, net->layer_size,
                   width, net->eps, f->tapped, net->taps, 1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < f->count; i++)
            normalise(f->x + f->kept[i] * width, net->norm, f->last + i * width, width, net->eps);
        multiply_all(&net->output, f->last, (scalar *)f->logits, f->count, STORE_FLOAT);
    }
}
