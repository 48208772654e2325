/* Elementary functions that compile to vector code. */
#ifndef FAST_MATH_H
#define FAST_MATH_H

#include <math.h>
#include <stdint.h>

typedef union {
    uint32_t bits;
    float value;
} float_bits;

/* e^x for x <= 0: 2^n * p(f) with n + f = x / ln 2 and |f| <= 1/2; relative error below 2e-7. */
static inline float exp_below_0(float x) {
    float y = x * 1.44269504f;
    y = y < -126.0f ? -126.0f : y;
    float n = floorf(y + 0.5f), f = y - n;
    float p = 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    return p * (float_bits){.bits = (uint32_t)((int32_t)n + 127) << 23}.value;
}

/* log(x) for normal x > 0; absolute error below 0.0002. */
static inline float rough_log(float x) {
    float_bits split = {.value = x};
    float exponent = (float)((int32_t)(split.bits >> 23) - 127);
    float m = (float_bits){.bits = (split.bits & 0x7FFFFF) | 0x3F800000}.value;
    return 0.6931472f * (exponent - 2.49681f + m * (4.02845f + m * (-2.08113f + m * (0.62884f - m * 0.07915f))));
}

#endif
