/* Sampling on a CPU: draws with penalties, filters and keyed Gumbel noise.
 *
 * A draw is the argmax of score + noise over the tokens that the filters keep. The result of a row depends on the row
 * alone: threads split by rows, masses are sums of integers, and this file is compiled without contraction and
 * reassociation, so that every float operation rounds as IEEE 754 says. torch_draws.py and gpu_kernels.py have the same
 * arithmetic.
 *
 * Few tokens are read more than once. The highest logit of each block rules out blocks without mass, and blocks below
 * the nucleus. The leading zeros of a token's hash bound its noise: only tokens that may win need its two logarithms. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "fast_math.h"
#include "hash.h"
#include "rows.h"

#define BLOCK 64
#define LANES 8
#define SHORT 2048 /* tokens that are not worth copying */
#define LN_2 0.6931472f
#define MAX_NOISE 37.5f   /* -log(2^-54), rounded up */
#define NO_MASS 28.5f     /* tokens this far below the highest score have mass 0: e^-28.5 < 2^-41 */
#define FIRST_REACH 5.0f  /* tokens this close to the highest score are searched first for the end of the nucleus */

/* One row while it is drawn. */
typedef struct {
    const float *wide;     /* float32 logits, or NULL */
    const uint16_t *half;  /* bfloat16 logits, or NULL */
    const uint32_t *mask;  /* or NULL */
    int64_t columns;
    float temperature;
    float *maxima;         /* [blocks] highest logit of each block */
    float *copy;           /* [columns] adjusted logits */
    uint64_t *masses;      /* [columns] of the gathered tokens */
    int32_t *keys, *ids;   /* [columns] of the gathered tokens: scores as ordered integers, token ids ascending */
    uint64_t *some_masses; /* [columns] of the tokens that a search has left */
    int32_t *some_keys;
} row_t;

static inline int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

int64_t scratch_size(int64_t columns) { return blocks_of(columns) * (BLOCK * 32 + 64); }

/* The noise key of a draw, as `noise_keys` of parameters.py. */
static inline uint64_t noise_key(uint64_t key, int64_t position) {
    return mixed((key ^ mixed((uint64_t)position + GOLDEN)) + GOLDEN);
}

static inline double noise_of(uint64_t bits) { return -log(-log((double)bits * 0x1p-53 + 0x1p-54)); }

/* Upper bound of the noise of `bits`: -log(-log(u)) <= -log(1 - u), which the leading zeros of 1 - u bound. */
static inline float max_noise(uint64_t bits) {
    uint64_t rest = ((uint64_t)1 << 53) - bits; /* 1 - u in units of 2^-53, rounded up: 1..2^53 */
    return LN_2 * (float)(__builtin_clzll(rest) - 9) + 0.001f;
}

/* Mass of a token whose score is x <= 0 below the highest: e^x in units of 2^-40, rounded. The constants are those of
 * Cephes' expf. */
static inline uint64_t mass_of(float x) {
    x = x < -64.0f ? -64.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    float power = (float_bits){.bits = (uint32_t)((int32_t)n + 127) << 23}.value;
    union {
        double value;
        uint64_t bits;
    } rounded = {.value = (double)(p * power) * 0x1p40 + 0x1p52};
    return rounded.bits - 0x4330000000000000u;
}

/* Integers in the order of the scores. */
static inline int32_t ordered(float score) {
    int32_t bits = (int32_t)(float_bits){.value = score}.bits;
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

static inline float score_of(int32_t key) {
    return (float_bits){.bits = (uint32_t)(key ^ ((key >> 31) & 0x7FFFFFFF))}.value;
}

/* Read a block of logits, divided by `divisor`; -inf beyond the row. */
static inline void read_block(const row_t *row, int64_t start, float divisor, float *score) {
    int64_t count = row->columns - start < BLOCK ? row->columns - start : BLOCK;
    if (count < BLOCK) {
        for (int64_t i = 0; i < BLOCK; i++) score[i] = -INFINITY;
        for (int64_t i = 0; i < count; i++)
            score[i] = (row->wide ? row->wide[start + i]
                                  : (float_bits){.bits = (uint32_t)row->half[start + i] << 16}.value) / divisor;
    } else if (row->wide) {
        for (int64_t i = 0; i < BLOCK; i++) score[i] = row->wide[start + i] / divisor;
    } else {
        for (int64_t i = 0; i < BLOCK; i++)
            score[i] = (float_bits){.bits = (uint32_t)row->half[start + i] << 16}.value / divisor;
    }
}

/* Fill `maxima` and return the highest logit; NaN if there is one. */
static float highest_of(row_t *row) {
    float highest = -INFINITY;
    int found = 0;
    for (int64_t start = 0; start < row->columns; start += BLOCK) {
        float logit[BLOCK], most = -INFINITY;
        int nan = 0;
        read_block(row, start, 1.0f, logit);
#pragma omp simd reduction(max : most) reduction(| : nan)
        for (int i = 0; i < BLOCK; i++) most = logit[i] > most ? logit[i] : most, nan |= logit[i] != logit[i];
        row->maxima[start / BLOCK] = most;
        highest = most > highest ? most : highest;
        found |= nan;
    }
    return found ? NAN : highest;
}

/* The first token whose score is `score`, which the row has. */
static int64_t first_of(const row_t *row, float divisor, float score) {
    int64_t block = 0;
    while (row->maxima[block] / divisor != score) block++;
    float some[BLOCK];
    read_block(row, block * BLOCK, divisor, some);
    int64_t i = 0;
    while (some[i] != score) i++;
    return block * BLOCK + i;
}

static inline int allowed(const uint32_t *mask, int64_t token) { return !mask || mask[token / 32] >> (token % 32) & 1; }

/* The first token that the mask allows; -1 if there is none. */
static int64_t first_allowed(const row_t *row) {
    for (int64_t token = 0; token < row->columns; token++)
        if (allowed(row->mask, token)) return token;
    return -1;
}

/* The mass of all tokens. */
static uint64_t total_mass(const row_t *row, float top) {
    uint64_t total = 0;
    for (int64_t start = 0; start < row->columns; start += BLOCK) {
        if (row->maxima[start / BLOCK] / row->temperature < top - NO_MASS) continue;
        float score[BLOCK];
        read_block(row, start, row->temperature, score);
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < BLOCK; i++) total += mass_of(score[i] - top);
    }
    return total;
}

/* Gather the tokens whose scores are not below `cut`; return their number. */
static int64_t gather(row_t *row, float cut) {
    int64_t found = 0;
    for (int64_t start = 0; start < row->columns; start += BLOCK) {
        if (row->maxima[start / BLOCK] / row->temperature < cut) continue;
        int64_t count = row->columns - start < BLOCK ? row->columns - start : BLOCK;
        float score[BLOCK];
        read_block(row, start, row->temperature, score);
        for (int64_t i = 0; i < count; i++) {
            row->keys[found] = ordered(score[i]);
            row->ids[found] = (int32_t)(start + i);
            found += score[i] >= cut;
        }
    }
    return found;
}

/* The mass of the gathered tokens. */
static uint64_t gathered_mass(row_t *row, int64_t count, float top) {
    uint64_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += row->masses[i] = mass_of(score_of(row->keys[i]) - top);
    return total;
}

/* The mass of some tokens above `key`, or their number. */
static inline uint64_t sum_above(const int32_t *keys, const uint64_t *masses, int64_t count, int32_t key) {
    uint64_t total = 0;
    if (masses) {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; i++) total += keys[i] > key ? masses[i] : 0;
    } else {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; i++) total += keys[i] > key;
    }
    return total;
}

/* The lowest key in low < key <= high above which there is less than `limit` of `masses`, or of the number of tokens if
 * that is NULL; above `low` there is more. Bisection, which copies what is left to `some` while it is long. */
static int32_t search(const int32_t *keys, const uint64_t *masses, int64_t count, int32_t low, int32_t high,
                      uint64_t limit, int32_t *some_keys, uint64_t *some_masses) {
    while ((int64_t)high - low > 1) {
        int32_t middle = (int32_t)(((int64_t)low + high) >> 1);
        uint64_t above = sum_above(keys, masses, count, middle);
        if (above < limit)
            high = middle;
        else
            low = middle;
        if (count <= SHORT) continue;
        if (above < limit) limit -= above;
        int64_t left = 0; /* of the tokens that are not counted yet: low < key <= high */
        for (int64_t i = 0; i < count; i++) {
            int32_t key = keys[i];
            if (masses) some_masses[left] = masses[i];
            some_keys[left] = key;
            left += key > low && key <= high;
        }
        keys = some_keys, masses = masses ? some_masses : NULL, count = left;
    }
    return high;
}

/* The mass that the nucleus needs. */
static inline uint64_t share_of(float top_p, uint64_t total) {
    uint64_t needed = (uint64_t)ceil((double)top_p * (double)total);
    return needed < 1 ? 1 : needed > total ? total : needed;
}

/* Return the lowest score that the filters keep, and the number of gathered tokens, among which are all kept ones; -1 if
 * nothing was gathered, since all tokens are kept. `top` is the highest score, and finite. */
static float lowest_kept(row_t *row, const parameters_t *p, float top, int64_t *gathered) {
    int by_count = p->top_k > 0 && p->top_k < row->columns, by_mass = p->top_p < 1.0f;
    float least = top + p->log_min_p;
    *gathered = -1;
    if (!by_count && !by_mass) {
        if (least > -INFINITY) *gathered = gather(row, least);
        return least;
    }
    uint64_t limit = by_mass && !by_count ? share_of(p->top_p, total_mass(row, top)) : 0;
    float cut = top - FIRST_REACH;
    int64_t count;
    for (float reach = FIRST_REACH;; reach *= 2) {
        cut = reach > NO_MASS * 2 ? -INFINITY : top - reach;
        count = gather(row, cut);
        uint64_t mass = by_mass ? gathered_mass(row, count, top) : 0;
        if (cut == -INFINITY || (by_count ? count >= p->top_k : mass >= limit)) break;
    }
    int32_t low = ordered(cut) - 1, high = ordered(top);
    if (by_count) {
        int32_t first = search(row->keys, NULL, count, low, high, (uint64_t)p->top_k, row->some_keys, NULL);
        low = first - 1;
        if (by_mass)
            limit = share_of(p->top_p, sum_above(row->keys, row->masses, count, low));
        else
            high = first;
    }
    if (by_mass) high = search(row->keys, row->masses, count, low, high, limit, row->some_keys, row->some_masses);
    float lowest = score_of(high);
    *gathered = count;
    return lowest > least ? lowest : least;
}

typedef struct {
    double sum;
    int64_t token;
} best_t;

/* Compare a block of scores with the best draw so far; `ids` are in any order. */
static inline void draw_block(best_t *best, const float *score, const int32_t *ids, uint64_t key) {
    float bound[BLOCK], highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int i = 0; i < BLOCK; i++) {
        bound[i] = score[i] + max_noise(bits_of(key, (uint64_t)ids[i]));
        highest = bound[i] > highest ? bound[i] : highest;
    }
    if ((double)highest < best->sum) return;
    for (int i = 0; i < BLOCK; i++) {
        if ((double)bound[i] < best->sum || score[i] == -INFINITY) continue;
        double sum = (double)score[i] + noise_of(bits_of(key, (uint64_t)ids[i]));
        if (sum > best->sum || (sum == best->sum && ids[i] < best->token)) *best = (best_t){sum, ids[i]};
    }
}

/* Draw from the gathered tokens whose scores are not below `least`. */
static int64_t draw_gathered(const row_t *row, int64_t count, float least, uint64_t key) {
    best_t best = {-INFINITY, -1};
    for (int64_t start = 0; start < count; start += BLOCK) {
        float score[BLOCK];
        int32_t ids[BLOCK];
        for (int i = 0; i < BLOCK; i++) {
            int64_t at = start + i < count ? start + i : count - 1;
            float some = score_of(row->keys[at]);
            ids[i] = row->ids[at];
            score[i] = some < least ? -INFINITY : some;
        }
        draw_block(&best, score, ids, key);
    }
    return best.token;
}

/* Draw from all tokens. */
static int64_t draw_any(const row_t *row, float top, uint64_t key) {
    int64_t first = first_of(row, row->temperature, top);
    best_t best = {(double)top + noise_of(bits_of(key, (uint64_t)first)), first};
    for (int64_t start = 0; start < row->columns; start += BLOCK) {
        if ((double)(row->maxima[start / BLOCK] / row->temperature + MAX_NOISE) < best.sum) continue;
        float score[BLOCK];
        int32_t ids[BLOCK];
        for (int i = 0; i < BLOCK; i++) ids[i] = (int32_t)(start + i);
        read_block(row, start, row->temperature, score);
        draw_block(&best, score, ids, key);
    }
    return best.token;
}

static int64_t draw_row(row_t *row, const parameters_t *p, uint64_t key) {
    float highest = highest_of(row);
    if (highest != highest) return -1;
    if (highest == -INFINITY) return first_allowed(row);
    if (p->temperature == 0.0f) return first_of(row, 1.0f, highest);
    row->temperature = p->temperature;
    float top = highest / p->temperature;
    if (top == -INFINITY) return first_allowed(row);
    if (top == INFINITY) return first_of(row, p->temperature, top);
    int64_t gathered;
    float least = lowest_kept(row, p, top, &gathered);
    return gathered < 0 ? draw_any(row, top, key) : draw_gathered(row, gathered, least, key);
}

/* Add bias and penalties of row `i` to its logits. */
static void adjust(float *logit, const rows_t *r, int64_t i) {
    const parameters_t *p = r->parameters + i;
    for (int64_t at = r->bias_starts[i]; at < r->bias_starts[i + 1]; at++) logit[r->bias_tokens[at]] += r->biases[at];
    for (int64_t at = r->seen_starts[i]; at < r->seen_starts[i + 1]; at++) {
        float *one = logit + r->seen_tokens[at];
        float repeated = *one < 0.0f ? *one * p->repetition : *one / p->repetition;
        float present = r->seen_counts[at] > 0 ? 1.0f : 0.0f;
        *one = repeated - p->frequency * (float)r->seen_counts[at] - p->presence * present;
    }
}

/* Exclude the tokens that the mask does not allow. A NaN stays: its row draws nothing. */
static void exclude(float *logit, const uint32_t *mask, int64_t columns) {
    for (int64_t first = 0; first < columns; first += 32) {
        float *restrict some = logit + first;
        uint32_t bits = mask[first / 32];
        if (bits == UINT32_MAX) continue;
        if (first + 32 > columns) /* the last, shorter one */
            for (int64_t j = 0; first + j < columns; j++) some[j] = bits >> j & 1 || some[j] != some[j] ? some[j] : -INFINITY;
        else if (bits == 0)
            for (int j = 0; j < 32; j++) some[j] = some[j] != some[j] ? some[j] : -INFINITY;
        else
            for (int j = 0; j < 32; j++) some[j] = (bits & 1u << j) != 0 || some[j] != some[j] ? some[j] : -INFINITY;
    }
}

/* Open row `i` for the calling thread; copy it if it is adjusted or masked. */
static row_t opened(const rows_t *r, int64_t i) {
    int64_t columns = r->columns, room = blocks_of(columns) * BLOCK, at = r->indices[i] * r->stride;
    char *scratch = r->scratch + omp_get_thread_num() * scratch_size(columns);
    row_t row = {.columns = columns, .temperature = 1.0f};
    row.masses = (uint64_t *)scratch;
    row.some_masses = row.masses + room;
    row.keys = (int32_t *)(row.some_masses + room);
    row.some_keys = row.keys + room;
    row.ids = row.some_keys + room;
    row.copy = (float *)(row.ids + room);
    row.maxima = row.copy + room;
    if (r->halves)
        row.half = (const uint16_t *)r->logits + at;
    else
        row.wide = (const float *)r->logits + at;
    row.mask = r->mask ? r->mask + i * ((columns + 31) / 32) : NULL;
    int adjusted = r->bias_starts && r->parameters[i].adjusted;
    if (!adjusted && !row.mask) return row;
    for (int64_t start = 0; start < columns; start += BLOCK) read_block(&row, start, 1.0f, row.copy + start);
    if (adjusted) adjust(row.copy, r, i);
    if (row.mask) exclude(row.copy, row.mask, columns);
    row.wide = row.copy, row.half = NULL;
    return row;
}

/* Draw a token from each row; -1 if a logit is NaN, or if the mask allows no token. */
void draw_rows(const rows_t *r, int64_t *out) {
#pragma omp parallel for schedule(dynamic) num_threads(r->threads) if (r->rows > 1)
    for (int64_t i = 0; i < r->rows; i++) {
        row_t row = opened(r, i);
        out[i] = draw_row(&row, r->parameters + i, noise_key(r->parameters[i].key, r->positions[i]));
    }
}

/* Write each row's scores [rows, columns], -inf for tokens that the filters exclude; no row is greedy. */
void process_rows(const rows_t *r, float *out) {
#pragma omp parallel for schedule(dynamic) num_threads(r->threads) if (r->rows > 1)
    for (int64_t i = 0; i < r->rows; i++) {
        row_t row = opened(r, i);
        float *score = out + i * r->columns, highest = highest_of(&row), top = highest / r->parameters[i].temperature;
        row.temperature = r->parameters[i].temperature;
        int64_t gathered;
        float least = isfinite(top) ? lowest_kept(&row, r->parameters + i, top, &gathered) : top;
        for (int64_t start = 0; start < r->columns; start += BLOCK) {
            int64_t count = r->columns - start < BLOCK ? r->columns - start : BLOCK;
            float some[BLOCK];
            read_block(&row, start, row.temperature, some);
            for (int64_t j = 0; j < count; j++) score[start + j] = some[j] < least ? -INFINITY : some[j];
        }
    }
}

/* Write each row's logits [rows, columns] under penalties and bias. */
void adjust_rows(const rows_t *r, float *out) {
#pragma omp parallel for schedule(dynamic) num_threads(r->threads) if (r->rows > 1)
    for (int64_t i = 0; i < r->rows; i++) {
        row_t row = opened(r, i);
        for (int64_t start = 0; start < r->columns; start += BLOCK) {
            float some[BLOCK];
            read_block(&row, start, 1.0f, some);
            int64_t count = r->columns - start < BLOCK ? r->columns - start : BLOCK;
            memcpy(out + i * r->columns + start, some, (size_t)count * sizeof(float));
        }
    }
}

/* e^x for -745 < x <= 0; relative error below 2e-16. */
static inline double exact_exp(double x) {
    double n = floor(x * 1.4426950408889634 + 0.5);
    double f = (x - n * 0.693145751953125) - n * 1.4286068203094173e-6; /* ln 2, in two parts */
    double p = 1.0;
    for (int k = 13; k > 0; k--) p = p * f * (1.0 / k) + 1.0; /* the Taylor polynomial: |f| < 0.35 */
    union {
        uint64_t bits;
        double value;
    } power = {.bits = (uint64_t)((int64_t)n + 1023) << 52};
    return p * power.value;
}

/* Write the logarithm of each row's sum of e^logit. Each of LANES sums has its tokens in order, and so has the last. */
void log_total_rows(const rows_t *r, double *out) {
#pragma omp parallel for schedule(dynamic) num_threads(r->threads) if (r->rows > 1)
    for (int64_t i = 0; i < r->rows; i++) {
        row_t row = opened(r, i);
        double highest = highest_of(&row), lanes[LANES] = {0.0}, total = 0.0;
        out[i] = highest;
        if (!isfinite(highest)) continue;
        for (int64_t start = 0; start < r->columns; start += BLOCK) {
            if (row.maxima[start / BLOCK] - highest < -700.0) continue;
            float logit[BLOCK];
            double share[BLOCK];
            read_block(&row, start, 1.0f, logit);
            for (int j = 0; j < BLOCK; j++) share[j] = exact_exp(logit[j] - highest < -700.0 ? -700.0 : logit[j] - highest);
            for (int j = 0; j < BLOCK; j++) lanes[j % LANES] += share[j];
        }
        for (int j = 0; j < LANES; j++) total += lanes[j];
        out[i] += log(total);
    }
}
