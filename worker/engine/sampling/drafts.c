/* Ranking drafts on a CPU: top-k and approximate noise. It decides which tokens are proposed, never which one is drawn. */

#include <math.h>
#include <stdint.h>

#include "fast_math.h"
#include "hash.h"

#define BLOCK 64

static inline float highest_of_scores(const float *score, int64_t columns) {
    float highest = score[0];
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < columns; i++) highest = score[i] > highest ? score[i] : highest;
    return highest;
}

/* For each row of `scores` [rows, columns], the columns of the `count` highest scores, descending, and their softmax
 * probabilities. */
void topk_rows(const float *scores, int64_t *out, double *probabilities, int64_t rows, int64_t columns, int64_t count) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *score = scores + row * columns;
        float highest = highest_of_scores(score, columns), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < columns; i++) sum += exp_below_0(score[i] - highest);
        int64_t *best = out + row * count, found = 0;
        for (int64_t start = 0; start < columns; start += BLOCK) {
            int64_t size = columns - start < BLOCK ? columns - start : BLOCK;
            if (found == count && highest_of_scores(score + start, size) <= score[best[count - 1]]) continue;
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
