/* Sampling on a CPU: argmax, draws with keyed Gumbel noise, top-k.
 *
 * A draw is the argmax of score + noise, as sampling.py computes it with torch. The leading zeros of a token's hash bound
 * its noise, which rules out almost all tokens of a row; only the others need the two logarithms of the noise. */

#include <math.h>
#include <stdint.h>

#include "fast_math.h"

#define GOLDEN 0x9E3779B97F4A7C15u
#define MIX_1 0xBF58476D1CE4E5B9u
#define MIX_2 0x94D049BB133111EBu
#define BLOCK 64
#define LN_2 0.6931472f

/* SplitMix64's finaliser (Steele, Lea, Flood 2014); the upper 53 bits count. */
static inline uint64_t bits_of(uint64_t key, uint64_t token) {
    uint64_t z = key + token * GOLDEN;
    z = (z ^ (z >> 30)) * MIX_1;
    z = (z ^ (z >> 27)) * MIX_2;
    return (z ^ (z >> 31)) >> 11;
}

static inline double noise_of(uint64_t bits) { return -log(-log((double)bits * 0x1p-53 + 0x1p-54)); }

/* Upper bound of the noise of `bits`: -log(-log(u)) <= -log(1 - u), which the leading zeros of 1 - u bound. */
static inline float max_noise(uint64_t bits) {
    uint64_t rest = ((uint64_t)1 << 53) - bits; /* 1 - u in units of 2^-53, rounded up: 1..2^53 */
    return LN_2 * (float)(__builtin_clzll(rest) - 9) + 0.001f;
}

static inline float highest_of(const float *row, int64_t columns) {
    float highest = row[0];
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < columns; i++) highest = row[i] > highest ? row[i] : highest;
    return highest;
}

static inline int has_nan(const float *row, int64_t columns) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < columns; i++) found |= row[i] != row[i];
    return found;
}

/* The first column that holds `value`; -1 if none does. */
static inline int64_t first_of(const float *row, int64_t columns, float value) {
    int64_t i = 0;
    for (int found = 0; i + BLOCK <= columns; i += BLOCK) { /* block by block, which compiles to vector code */
#pragma omp simd reduction(| : found)
        for (int j = 0; j < BLOCK; j++) found |= row[i + j] == value;
        if (found) break;
    }
    while (i < columns && row[i] != value) i++;
    return i < columns ? i : -1;
}

/* For each row of `scores` [rows, columns], the first column with the highest score; -1 if a score is NaN. */
void argmax_rows(const float *scores, int64_t *out, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *score = scores + row * columns;
        out[row] = has_nan(score, columns) ? -1 : first_of(score, columns, highest_of(score, columns));
    }
}

/* For each row of `scores` [rows, columns], the columns of the `count` highest scores, descending, and their softmax
 * probabilities. */
void topk_rows(const float *scores, int64_t *out, double *probabilities, int64_t rows, int64_t columns, int64_t count) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *score = scores + row * columns;
        float highest = highest_of(score, columns), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < columns; i++) sum += exp_below_0(score[i] - highest);
        int64_t *best = out + row * count, found = 0;
        for (int64_t start = 0; start < columns; start += BLOCK) {
            int64_t size = columns - start < BLOCK ? columns - start : BLOCK;
            if (found == count && highest_of(score + start, size) <= score[best[count - 1]]) continue;
            for (int64_t i = start; i < start + size; i++) {
                if (found == count && score[i] <= score[best[count - 1]]) continue;
                int64_t rank = found < count ? found++ : count - 1;
                for (; rank > 0 && score[best[rank - 1]] < score[i]; rank--) best[rank] = best[rank - 1];
                best[rank] = i;
            }
        }
        for (int64_t i = 0; i < count; i++)
            probabilities[row * count + i] = (double)(exp_below_0(score[best[i]] - highest) / sum);
    }
}

/* For each row of `logits` in `indices` (rows are `stride` apart), the column with the highest logit / temperature +
 * noise, among those whose logit / temperature is not below `min_scores`; -1 if a logit is NaN. */
void draw_rows(const float *logits, int64_t stride, const int64_t *indices, const float *temperatures,
               const int64_t *keys, const float *min_scores, int64_t *out, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *logit = logits + indices[row] * stride;
        uint64_t key = (uint64_t)keys[row];
        float min_score = min_scores[row], temperature = temperatures[row];
        int64_t best = has_nan(logit, columns) ? -1 : first_of(logit, columns, highest_of(logit, columns));
        if (best < 0) {
            out[row] = -1;
            continue;
        }
        double top = (double)(logit[best] / temperature) + noise_of(bits_of(key, (uint64_t)best));
        for (int64_t start = 0; start < columns; start += BLOCK) {
            float score[BLOCK], bound[BLOCK];
            int64_t count = columns - start < BLOCK ? columns - start : BLOCK;
            float highest = -INFINITY;
            for (int64_t i = 0; i < count; i++) {
                score[i] = logit[start + i] / temperature;
                bound[i] = score[i] + max_noise(bits_of(key, (uint64_t)(start + i)));
                highest = bound[i] > highest ? bound[i] : highest;
            }
            if ((double)highest < top) continue;
            for (int64_t i = 0; i < count; i++) {
                if ((double)bound[i] < top || score[i] < min_score) continue;
                double sum = (double)score[i] + noise_of(bits_of(key, (uint64_t)(start + i)));
                if (sum > top || (sum == top && start + i < best)) top = sum, best = start + i;
            }
        }
        out[row] = best;
    }
}

/* Add the noise of `tokens` [columns] to `scores` [rows, columns], accurate to about 0.001: enough to rank drafts. */
void add_noise(float *scores, const int64_t *keys, const int64_t *tokens, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < columns; i++) {
            uint64_t bits = bits_of((uint64_t)keys[row], (uint64_t)tokens[i]);
            float v = (float)(int64_t)(((uint64_t)1 << 53) - bits) * 0x1p-53f; /* 1 - u */
            float near_one = v * (1 + v * (0.5f + v * (0.33333f + v * (0.25f + v * (0.2f + v * 0.35f)))));
            float far = -rough_log((float)(int64_t)bits * 0x1p-53f + 0x1p-54f);
            scores[row * columns + i] -= rough_log(v < 0.5f ? near_one : far);
        }
}
