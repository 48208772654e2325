/* Rows of logits with their sampling parameters. */
#ifndef ROWS_H
#define ROWS_H

#include <stdint.h>

/* `PARAMETERS` of parameters.py */
typedef struct {
    uint64_t key;
    float temperature, top_p, log_min_p, repetition, frequency, presence;
    int32_t top_k, adjusted;
} parameters_t;

/* The rows to draw from: row i reads logits[indices[i]], and what belongs to row i of all other arrays. */
typedef struct {
    const void *logits; /* float32, or bfloat16 if `halves` */
    int64_t stride, halves, rows, columns;
    const int64_t *indices;
    const parameters_t *parameters;
    const int64_t *positions;                       /* of the tokens to draw in their sequences */
    const int64_t *bias_starts, *bias_tokens;       /* [rows + 1], [biases]; NULL: no row is adjusted */
    const float *biases;                            /* [biases] */
    const int64_t *seen_starts, *seen_tokens, *seen_counts; /* [rows + 1], [tokens] twice */
    const uint32_t *mask;                           /* [rows, ceil(columns / 32)], bit 1 allows a token; NULL: all */
    char *scratch;                                  /* `scratch_size` bytes a thread */
    int64_t threads;
} rows_t;

#endif
