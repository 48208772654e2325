/* Decoder layers on a CPU, compiled at load for this processor and one dtype.
 *
 * A row's result depends on that row only: no sum changes its order with the other rows of the batch. So a sequence
 * gets the same bits alone, in any batch, in a draft tree and after a restart. `kernels.py` compiles and calls this
 * file. Sizes are elements, not bytes; matrices are row-major.
 */
#include <math.h>
#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fast_math.h"

#if defined(__AVX512F__)
enum { LANES = 16, BLOCK = 12 }; /* columns of a vector; rows multiplied together, in registers */
#else
enum { LANES = 8, BLOCK = 5 };
#endif
enum { PREFETCH_ROWS = 7, PREFETCH_BYTES = 12288 }; /* from this many rows on, prefetch weights; by this many bytes */
enum { LINE = 64, L2_BYTES = 300000 }; /* bytes of a cache line, and of the weights that stay in L2 for all rows */
enum { PANEL = 2 * LANES }; /* columns multiplied together; weights are packed panel by panel */
enum { GROUP = 64 };  /* inputs of a row that are rounded to int8 with one scale */
enum { CHUNK = 128 }; /* inputs that share a scale in weights with block scales */

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));

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

/* x * y + z with one rounding where the processor has it. The compiler may reorder sums that it sees, and would do so
 * for some numbers of rows only. */
static inline __attribute__((always_inline)) floats fused(floats x, floats y, floats z) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
    return x * y + z;
#endif
}

/* int8: weights of INT8_STEP inputs are adjacent. Sums are exact int32, so their order does not matter. With VNNI the
 * weights are stored as w + 128, and a group's sum starts at -128 times the sum of its inputs. */
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
enum { INT8_STEP = 4, INT8_OFFSET = 128 };
static inline __attribute__((always_inline)) ints multiply_add_int8(ints sum, const uint8_t *weight, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(weight), _mm512_set1_epi32(four));
#else
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_loadu_si256((const __m256i *)weight),
                                         _mm256_set1_epi32(four));
#endif
}
#else
enum { INT8_STEP = 2, INT8_OFFSET = 0 };
static inline __attribute__((always_inline)) ints multiply_add_int8(ints sum, const uint8_t *weight, const int8_t *x) {
#if defined(__AVX512BW__)
    int32_t pair = (int32_t)((uint16_t)(int16_t)x[0] | (uint32_t)(uint16_t)(int16_t)x[1] << 16);
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)weight));
    return sum + (ints)_mm512_madd_epi16(wide, _mm512_set1_epi32(pair));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    int32_t pair = (int32_t)((uint16_t)(int16_t)x[0] | (uint32_t)(uint16_t)(int16_t)x[1] << 16);
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weight));
    return sum + (ints)_mm256_madd_epi16(wide, _mm256_set1_epi32(pair));
#else
    for (int lane = 0; lane < LANES; lane++)
        sum[lane] += (int8_t)weight[2 * lane] * x[0] + (int8_t)weight[2 * lane + 1] * x[1];
    return sum;
#endif
}
#endif

/* FP8 (e4m3): the bits of a float16 that is 2^-8 times the number; every number is exact in bfloat16, too. */
static inline uint16_t fp8_as_half(uint8_t x) { return (uint16_t)((x & 0x80) << 8 | (x & 0x7f) << 7); }

static inline scalar fp8_as_scalar(uint8_t x) {
    uint32_t bits = fp8_as_half(x), rest = bits & 0x7fff;
    float size = rest >= 0x400 ? (float_bits){.bits = (rest << 13) + (112u << 23)}.value : (float)rest * 0x1p-24f;
    return from_float(bits & 0x8000 ? -size : size);
}

#if defined(__AVX512VBMI__) && defined(BFLOAT16)
/* The upper and lower bytes of the bfloat16 of each positive number. Packed weights are in the order in which
 * interleaving these bytes, 16 of each at a time, gives the weights' own: see `shuffle_fp8`. */
static uint8_t fp8_upper[128], fp8_lower[128];
static __attribute__((constructor)) void fill_tables(void) {
    for (int x = 0; x < 128; x++) {
        fp8_upper[x] = (uint8_t)(fp8_as_scalar((uint8_t)x) >> 8);
        fp8_lower[x] = (uint8_t)(fp8_as_scalar((uint8_t)x) & 0xff);
    }
}

static void shuffle_fp8(char *packed, int64_t count) {
    for (char *at = packed; at < packed + count; at += 64) {
        char own[64];
        memcpy(own, at, sizeof own);
        for (int i = 0; i < 8; i++) memcpy(at + 8 * i, own + 8 * (i / 2 + i % 2 * 4), 8);
    }
}

/* Where `shuffle_fp8` puts the number at `place`. */
static inline int64_t shuffled_fp8(int64_t place) {
    return (place & ~(int64_t)63) | (place >> 3 & 3) << 4 | (place >> 5 & 1) << 3 | (place & 7);
}
#else
static void shuffle_fp8(char *packed, int64_t count) { (void)packed, (void)count; }
static inline int64_t shuffled_fp8(int64_t place) { return place; }
#endif

/* The factor of decoded FP8 numbers that have this exponent, as `scale_of` in kv/fp8.py; SPOILT gives infinity, which
 * times any number is not finite. */
enum { LEAST = 32, SPOILT = 254 };
static inline float fp8_scale(uint8_t exponent) { return (float_bits){.bits = (uint32_t)(exponent + 1) << 23}.value; }

/* Round a row to FP8 by the exponent of its largest number, which is returned: as `encoded` in kv/fp8.py. */
static inline uint8_t encode_fp8(const scalar *x, uint8_t *to, int64_t count) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; i++) {
        uint32_t size = (float_bits){.value = to_float(x[i])}.bits & 0x7fffffff;
        top = size > top ? size : top;
    }
    const uint32_t own = top >> 23, exponent = own < LEAST ? LEAST : own > SPOILT ? SPOILT : own;
    const float inverse = (float_bits){.bits = (261 - exponent) << 23}.value;
    const uint32_t kept = exponent == SPOILT ? 0 : 0xff;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float_bits number = {.value = to_float(x[i]) * inverse};
        uint32_t sign = number.bits >> 24 & 0x80, bits = number.bits & 0x7fffffff;
        /* Ties go to even. Below 2^-6 numbers are multiples of 2^-9, as those of a float from 2^14 on. */
        uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960;
        uint32_t small = (float_bits){.value = (float_bits){.bits = bits}.value + 16384.0f}.bits & 0xf;
        to[i] = (uint8_t)((sign | (bits < 0x3c800000 ? small : normal)) & kept);
    }
    return (uint8_t)exponent;
}

/* Decode the weights of a panel for one step of inputs to 2^-8 times their value. */
static inline __attribute__((always_inline)) void decode_fp8(const uint8_t *from, scalar *to) {
#if defined(__AVX512VBMI__) && defined(BFLOAT16)
    __m512i x = _mm512_loadu_si512(from);
    __m512i lower = _mm512_permutex2var_epi8(_mm512_loadu_si512(fp8_lower), x, _mm512_loadu_si512(fp8_lower + 64));
    __m512i upper = _mm512_permutex2var_epi8(_mm512_loadu_si512(fp8_upper), x, _mm512_loadu_si512(fp8_upper + 64));
    upper = _mm512_ternarylogic_epi32(upper, x, _mm512_set1_epi8((char)0x80), 0xf8); /* upper | (x & 0x80) */
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(lower, upper));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi8(lower, upper));
#elif defined(__AVX512BW__)
    for (int i = 0; i < PANEL * STEP; i += 32) {
        __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(from + i)));
        __m512i sign = _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0x80)), 8);
        __m512i half = _mm512_or_si512(sign, _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0x7f)), 7));
        __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#ifdef BFLOAT16
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)low, 16)));
        _mm256_storeu_si256((__m256i *)(to + i + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)high, 16)));
#else
        _mm512_storeu_ps(to + i, low);
        _mm512_storeu_ps(to + i + 16, high);
#endif
    }
#else
    for (int i = 0; i < PANEL * STEP; i++) to[i] = fp8_as_scalar(from[i]);
#endif
}

/* ---- threads -------------------------------------------------------------------------------------------------------- */

/* The threads of one parallel region, and what each can ask without a call of OpenMP's. A thread that waits for another
 * one spins briefly, then sleeps: where other programs share the processors, the thread that it waits for may not run,
 * and OpenMP's own barriers would spin for milliseconds and take the processor from it. */
typedef struct {
    atomic_int arrived;
    atomic_uint phase; /* number of barriers passed */
    atomic_int sleeping;
} team_t;

enum { SPINS = 4000 }; /* about 50 microseconds: more than threads of a quiet machine are apart */

static void barrier(team_t *team) {
    const int threads = omp_get_num_threads();
    if (threads == 1) return;
    const unsigned phase = atomic_load(&team->phase);
    if (atomic_fetch_add(&team->arrived, 1) == threads - 1) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->phase, 1);
#ifdef __linux__
        if (atomic_load(&team->sleeping)) syscall(SYS_futex, &team->phase, FUTEX_WAKE_PRIVATE, threads);
#endif
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&team->phase, memory_order_acquire) != phase) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    atomic_fetch_add(&team->sleeping, 1);
    while (atomic_load(&team->phase) == phase)
#ifdef __linux__
        syscall(SYS_futex, &team->phase, FUTEX_WAIT_PRIVATE, phase, NULL);
#else
        sched_yield();
#endif
    atomic_fetch_sub(&team->sleeping, 1);
}

static inline float silu(float x) {
    float e = exp_below_0(x < 0.0f ? x : -x);
    return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* ---- matrix products ---------------------------------------------------------------------------------------------- */

typedef enum { STORE, ADD, GATE, STORE_FLOAT } finish_t;

typedef enum { SCALARS, INT8, FP8 } kind_t; /* of weights */

/* How rows are rounded to FP8 before FP8 weights multiply them. */
typedef enum { AS_THEY_ARE, DYNAMIC, POWERS_OF_TWO, STATIC } rows_t;

/* One packed product: out = finish(x @ weight.T + bias). ADD adds to `out`. GATE takes panels with gate in the first
 * half and up in the second, and stores silu(gate) * up. */
typedef struct {
    const void *weight; /* packed */
    const scalar *bias; /* [columns], or NULL */
    const float *scale; /* packed: [panels * PANEL], or for each chunk of inputs if `blocks`; NULL for scalars */
    const int64_t *bounds; /* [parts + 1] first inputs of the parts, whose sums are added as a tree; NULL: one part */
    int64_t columns, inputs, kind, blocks, parts;
    int64_t rows;     /* rows_t; AS_THEY_ARE unless the weights are FP8 */
    float row_scale;  /* of STATIC rows */
    float row_bound;  /* what larger numbers of DYNAMIC rows are clamped to */
} product_t;

int64_t panel_columns(void) { return PANEL; }

int64_t block_rows(void) { return BLOCK; }

/* Weights of this many inputs are adjacent. */
static int64_t step_of(int64_t kind) { return kind == INT8 ? INT8_STEP : STEP; }

static int64_t padded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

static int64_t packed_inputs(const product_t *p) { return padded(p->inputs, step_of(p->kind)); }

static int64_t size_of(int64_t kind) { return kind == SCALARS ? (int64_t)sizeof(scalar) : 1; }

/* Elements of a packed weight. */
int64_t packed_size(int64_t columns, int64_t inputs, int64_t kind) {
    return padded(columns, PANEL) * padded(inputs, step_of(kind));
}

static inline __attribute__((always_inline)) void pack_elements(const char *weight, const char *second, char *packed,
                                                                int64_t columns, int64_t inputs, int64_t step,
                                                                const size_t size) {
    const int64_t depth = padded(inputs, step), last = second ? columns / 2 : columns;
#pragma omp parallel for
    for (int64_t panel = 0; panel < (columns + PANEL - 1) / PANEL; panel++)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t lane = 0; lane < PANEL; lane++) {
                int64_t column = second ? panel * LANES + lane % LANES : panel * PANEL + lane;
                const char *from = second && lane >= LANES ? second : weight;
                char *to = packed + (size_t)(panel * PANEL * depth + (k / step * PANEL + lane) * step + k % step) * size;
                if (column < last && k < inputs)
                    memcpy(to, from + (size_t)(column * inputs + k) * size, size);
                else
                    memset(to, 0, size);
            }
}

/* Pack `weight` [columns, inputs]; pad the last panel with zeros. `second`, if given, has as many columns: half panels
 * of both alternate, and `columns` counts both. */
void pack(const char *weight, const char *second, char *packed, int64_t columns, int64_t inputs, int64_t kind) {
    if (kind == SCALARS)
        pack_elements(weight, second, packed, columns, inputs, STEP, sizeof(scalar));
    else
        pack_elements(weight, second, packed, columns, inputs, step_of(kind), 1);
    if (kind == FP8) shuffle_fp8(packed, packed_size(columns, inputs, kind));
    if (kind == INT8)
        for (int64_t i = 0; i < packed_size(columns, inputs, kind); i++) packed[i] = (char)(packed[i] ^ INT8_OFFSET);
}

/* sums += bias, in a call of its own: the compiler may reorder sums that it sees. */
static __attribute__((noinline)) void add_bias(float *sums, const scalar *bias, int64_t count) {
    for (int64_t i = 0; i < count; i++) sums[i] += to_float(bias[i]);
}

/* Finish `count` columns of a row: a constant. */
static inline __attribute__((always_inline)) void finish_columns(const float *sums, scalar *to, int64_t count,
                                                                 finish_t finish) {
    if (finish == GATE) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = from_float(silu(sums[i]) * sums[LANES + i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = from_float(finish == ADD ? sums[i] + to_float(to[i]) : sums[i]);
    }
}

/* Finish `count` columns of a panel that ends a row, or that has a bias. A whole panel is computed: the bits of a column
 * do not depend on where in a panel it lies. */
static __attribute__((noinline)) void finish_rest(const float *sums, scalar *to, const scalar *bias, int64_t count,
                                                  finish_t finish) {
    scalar whole[PANEL] = {0};
    float biased[PANEL];
    memcpy(biased, sums, sizeof biased);
    if (bias) add_bias(biased, bias, count);
    if (finish == ADD) memcpy(whole, to, (size_t)count * sizeof(scalar));
    if (finish == GATE)
        finish_columns(biased, whole, LANES, GATE);
    else
        finish_columns(biased, whole, PANEL, finish);
    memcpy(to, whole, (size_t)count * sizeof(scalar));
}

static inline __attribute__((always_inline)) void finish_row(const float *sums, scalar *out, const product_t *p,
                                                             int64_t row, int64_t panel, finish_t finish) {
    const int64_t size = finish == GATE ? LANES : PANEL, width = finish == GATE ? p->columns / 2 : p->columns;
    const int64_t first = panel * size, count = width - first < size ? width - first : size;
    if (finish == STORE_FLOAT) {
        float *to = (float *)out + row * width + first;
        if (count == size)
            memcpy(to, sums, (size_t)size * sizeof(float));
        else
            memcpy(to, sums, (size_t)count * sizeof(float));
    } else if (p->bias || count < size) {
        finish_rest(sums, out + row * width + first, p->bias ? p->bias + first : NULL, count, finish);
    } else {
        finish_columns(sums, out + row * width + first, size, finish);
    }
}

/* sums[r] += x[r] @ weight for `inputs` inputs and one panel of columns; inlined for each number of rows, for weights
 * that are scalars or FP8. For each step of inputs, as many bytes as it reads of the weight are prefetched from `ahead`
 * on, if given. */
static inline __attribute__((always_inline)) void tile(floats sums[][2], const void *weight, int64_t stride,
                                                       const scalar *x, int64_t x_stride, int64_t inputs,
                                                       const char *ahead, const int rows, const kind_t kind) {
    const int step_bytes = PANEL * STEP * (kind == FP8 ? 1 : (int)sizeof(scalar));
    const char *next = weight;
    floats own[BLOCK][2]; /* in registers, if each loop over it is unrolled */
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) own[r][0] = sums[r][0], own[r][1] = sums[r][1];
    for (int64_t k = 0; k < inputs; k += STEP) {
        scalar decoded[PANEL * STEP];
        const scalar *now = (const scalar *)next;
        if (kind == FP8) {
            decode_fp8((const uint8_t *)next, decoded);
            now = decoded;
        }
        next += kind == FP8 ? step_bytes : stride * (int64_t)sizeof(scalar);
        if (ahead) {
            for (int at = 0; at < step_bytes; at += LINE) __builtin_prefetch(ahead + at, 0, 2);
            ahead += step_bytes;
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            own[r][0] = multiply_add(own[r][0], now, x + r * x_stride + k);
            own[r][1] = multiply_add(own[r][1], now + LANES * STEP, x + r * x_stride + k);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) sums[r][0] = own[r][0], sums[r][1] = own[r][1];
}

#define FEW_ROWS CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#if defined(__AVX512F__)
#define ALL_ROWS FEW_ROWS CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define ALL_ROWS FEW_ROWS
#endif

/* `tile` for up to BLOCK rows and scalars. `stride` is the distance of the weights of one step of inputs from the next. */
static void multiply_tile(floats sums[][2], const scalar *weight, int64_t stride, const scalar *x, int64_t x_stride,
                          int64_t inputs, const void *ahead, int64_t rows) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        if (ahead)                                                                                                     \
            tile(sums, weight, stride, x, x_stride, inputs, ahead, n, SCALARS);                                        \
        else                                                                                                           \
            tile(sums, weight, stride, x, x_stride, inputs, NULL, n, SCALARS);                                         \
        break;
    switch (rows) { ALL_ROWS }
#undef CASE
}

/* `tile` for up to BLOCK rows and one panel of FP8 weights, which are decoded in registers. */
static void multiply_fp8(floats sums[][2], const char *weight, const scalar *x, int64_t x_stride, int64_t inputs,
                         const char *ahead, int64_t rows) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        if (ahead)                                                                                                     \
            tile(sums, weight, 0, x, x_stride, inputs, ahead, n, FP8);                                                 \
        else                                                                                                           \
            tile(sums, weight, 0, x, x_stride, inputs, NULL, n, FP8);                                                  \
        break;
    switch (rows) { ALL_ROWS }
#undef CASE
}

/* A row rounded to int8, group by group: its numbers are value * scale. */
typedef struct {
    const int8_t *values;   /* [depth] */
    const float *scales;    /* [groups] */
    const int32_t *offsets; /* [groups] where a group's sums start */
} int8_row_t;

static inline int64_t row_bytes(int64_t inputs) {
    return padded(padded(inputs, GROUP) + padded(inputs, GROUP) / GROUP * 8, LINE);
}

/* A row rounded to FP8: its values as scalars, then the scale of each span of inputs that have one. */
static inline int64_t row_span(const product_t *p) { return p->blocks ? CHUNK : p->inputs; }

static inline int64_t fp8_row_bytes(const product_t *p) {
    const int64_t spans = (p->inputs + row_span(p) - 1) / row_span(p);
    return padded(packed_inputs(p) * (int64_t)sizeof(scalar) + spans * (int64_t)sizeof(float), LINE);
}

static inline const float *fp8_row_scales(const product_t *p, const char *row) {
    return (const float *)(row + packed_inputs(p) * (int64_t)sizeof(scalar));
}

static inline int rounds_rows(const product_t *p) { return p->kind == INT8 || p->rows != AS_THEY_ARE; }

/* Bytes of a row once it is rounded; 0 for a product that takes rows as they are. */
int64_t rounded_row_bytes(const product_t *p) {
    if (!rounds_rows(p)) return 0;
    return p->kind == INT8 ? row_bytes(p->inputs) : fp8_row_bytes(p);
}

static inline __attribute__((always_inline)) int8_row_t int8_row(const char *rows, int64_t row, int64_t inputs) {
    const int64_t depth = padded(inputs, GROUP), groups = depth / GROUP;
    const char *at = rows + row * row_bytes(inputs);
    return (int8_row_t){(const int8_t *)at, (const float *)(at + depth), (const int32_t *)(at + depth + 4 * groups)};
}

/* The largest size of some numbers; NaN if one is not finite. By their bits, whose order is that of the sizes: the
 * compiler drops products with zero that would be NaN. */
static inline float top_of(const scalar *x, int64_t count) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; i++) {
        uint32_t size = (float_bits){.value = to_float(x[i])}.bits & 0x7fffffff;
        top = size > top ? size : top;
    }
    return (float_bits){.bits = top < 0x7f800000 ? top : 0x7fc00000}.value;
}

/* Round a row to int8. What is not finite makes its group NaN. */
static void round_row(const scalar *x, char *to, int64_t inputs) {
    const int64_t depth = padded(inputs, GROUP), groups = depth / GROUP;
    int8_t *values = (int8_t *)to;
    float *scales = (float *)(to + depth);
    int32_t *offsets = (int32_t *)(to + depth + 4 * groups);
    for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * GROUP, count = inputs - first < GROUP ? inputs - first : GROUP;
        float wide[GROUP] = {0};
        int32_t sum = 0;
        for (int64_t i = 0; i < count; i++) wide[i] = to_float(x[first + i]);
        const float top = top_of(x + first, count);
        const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < GROUP; i++) {
            int32_t value = (int32_t)rintf(wide[i] * inverse);
            values[first + i] = (int8_t)value;
            sum += value;
        }
        scales[group] = top / 127.0f;
        offsets[group] = -INT8_OFFSET * sum;
    }
}

/* The scale of numbers of which `top` is the largest: as `rounded_rows` in quantization/activations.py. */
static inline float fp8_row_scale(const product_t *p, float top) {
    if (top != top) return top;
    if (p->rows == STATIC) return p->row_scale;
    const float bounded = top > p->row_bound ? p->row_bound : top < 1e-10f ? 1e-10f : top;
    const float_bits scale = {.value = bounded / 448.0f};
    return p->rows == DYNAMIC ? scale.value : (float_bits){.bits = (scale.bits + 0x7fffff) & 0x7f800000}.value;
}

/* Round a row to FP8. What is not finite makes its scale NaN. */
static void round_row_fp8(const product_t *p, const scalar *x, char *to) {
    const int64_t span = row_span(p);
    scalar *values = (scalar *)to;
    float *scales = (float *)fp8_row_scales(p, to);
    for (int64_t first = 0; first < p->inputs; first += span) {
        const int64_t end = p->inputs - first < span ? p->inputs : first + span;
        const float scale = fp8_row_scale(p, top_of(x + first, end - first)), inverse = 1.0f / scale;
#pragma omp simd
        for (int64_t i = first; i < end; i++) {
            float_bits number = {.value = to_float(x[i]) * inverse};
            uint32_t sign = number.bits & 0x80000000u, bits = number.bits & 0x7fffffff;
            bits = bits > 0x43e00000 ? 0x43e00000 : bits; /* 448 */
            /* Ties go to even. Below 2^-6 numbers are multiples of 2^-9, as those of a float from 2^14 on. */
            uint32_t normal = (bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000;
            uint32_t count = (float_bits){.value = (float_bits){.bits = bits}.value + 16384.0f}.bits & 0xf;
            uint32_t small = (float_bits){.value = (float)(int32_t)count * 0x1p-9f}.bits;
            values[i] = from_float((float_bits){.bits = sign | (bits < 0x3c800000 ? small : normal)}.value);
        }
        scales[first / span] = scale;
    }
}

/* `tile` for weights and rows in int8, from row `first` of `x` on. */
static inline __attribute__((always_inline)) void int8_tile(floats sums[][2], const uint8_t *weight, const char *x,
                                                            int64_t first, int64_t inputs, const char *ahead,
                                                            const int rows) {
    const int64_t depth = padded(inputs, INT8_STEP), stride = row_bytes(inputs);
    for (int64_t start = 0; start < depth; start += GROUP) {
        const int64_t count = depth - start < GROUP ? depth - start : GROUP;
        const char *from = x + first * stride + start;
        ints own[BLOCK][2];
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
            own[r][0] = own[r][1] = (ints){0} + int8_row(x, first + r, inputs).offsets[start / GROUP];
        for (int64_t k = 0; k < count; k += INT8_STEP, weight += PANEL * INT8_STEP) {
            if (ahead) {
                for (int at = 0; at < PANEL * INT8_STEP; at += LINE) __builtin_prefetch(ahead + at, 0, 2);
                ahead += PANEL * INT8_STEP;
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                const int8_t *values = (const int8_t *)from + r * stride + k;
                own[r][0] = multiply_add_int8(own[r][0], weight, values);
                own[r][1] = multiply_add_int8(own[r][1], weight + LANES * INT8_STEP, values);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const float scale = int8_row(x, first + r, inputs).scales[start / GROUP];
            sums[r][0] = fused(__builtin_convertvector(own[r][0], floats), (floats){0} + scale, sums[r][0]);
            sums[r][1] = fused(__builtin_convertvector(own[r][1], floats), (floats){0} + scale, sums[r][1]);
        }
    }
}

/* `int8_tile` for up to BLOCK rows. */
static void multiply_int8(floats sums[][2], const uint8_t *weight, const char *x, int64_t first, int64_t inputs,
                          const char *ahead, int64_t rows) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        if (ahead)                                                                                                     \
            int8_tile(sums, weight, x, first, inputs, ahead, n);                                                       \
        else                                                                                                           \
            int8_tile(sums, weight, x, first, inputs, NULL, n);                                                        \
        break;
    switch (rows) { ALL_ROWS }
#undef CASE
}

/* to += sums * scale, for one panel. */
static inline void add_scaled(floats to[2], const floats sums[2], const float *scale) {
    for (int half = 0; half < 2; half++) {
        floats factor;
        memcpy(&factor, scale + half * LANES, sizeof factor);
        to[half] = fused(sums[half], factor, to[half]);
    }
}

/* sums[r] *= the scale of row `first + r`, for a span of inputs. */
static __attribute__((noinline)) void scale_rows(floats sums[][2], const product_t *p, const char *x, int64_t first,
                                                 int64_t span, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        const float scale = fp8_row_scales(p, x + (first + r) * fp8_row_bytes(p))[span];
        sums[r][0] *= scale, sums[r][1] *= scale;
    }
}

/* sums = scale * (x[row..] @ weight) for one panel of weights in int8 or FP8. */
static void multiply_quantized(floats sums[][2], const product_t *p, const void *x, int64_t row, int64_t panel,
                               const char *weight, const char *ahead, int64_t height) {
    const float *scale = p->scale + panel * PANEL;
    const int64_t length = row_span(p); /* inputs that share a scale */
    const int64_t stride = p->rows == AS_THEY_ARE ? p->inputs : fp8_row_bytes(p) / (int64_t)sizeof(scalar);
    for (int64_t start = 0; start < p->inputs; start += length, scale += padded(p->columns, PANEL)) {
        const int64_t count = p->inputs - start < length ? p->inputs - start : length;
        floats own[BLOCK][2] = {0};
        if (p->kind == INT8)
            multiply_int8(own, (const uint8_t *)weight, x, row, count, ahead, height);
        else
            multiply_fp8(own, weight + start * PANEL, (const scalar *)x + row * stride + start, stride, count,
                         ahead ? ahead + start * PANEL : NULL, height);
        if (p->rows != AS_THEY_ARE) scale_rows(own, p, x, row, start / length, height);
        for (int64_t r = 0; r < height; r++) add_scaled(sums[r], own[r], scale);
    }
}

/* to += more, in a call of its own: the compiler may reorder sums that it sees. */
static __attribute__((noinline)) void add_sums(floats to[][2], floats more[][2], int64_t rows) {
    for (int64_t r = 0; r < rows; r++) to[r][0] += more[r][0], to[r][1] += more[r][1];
}

/* How many of `count` parts the branches of their tree have: half of an even number, one of an odd number. A branch
 * of several parts is a tree of its own. */
static inline int64_t branch_of(int64_t count) { return count % 2 ? 1 : count / 2; }

/* sums = x @ weight for one panel of scalars, over the parts first..first+count-1 of the inputs. */
static void multiply_parts(floats sums[][2], const product_t *p, const scalar *weight, const scalar *x,
                           const char *ahead, int64_t height, int64_t first, int64_t count) {
    if (count == 1) {
        const int64_t start = p->bounds[first];
        for (int64_t r = 0; r < height; r++) sums[r][0] = sums[r][1] = (floats){0};
        multiply_tile(sums, weight + start * PANEL, PANEL * STEP, x + start, p->inputs, p->bounds[first + 1] - start,
                      ahead ? ahead + start * PANEL * (int64_t)sizeof(scalar) : NULL, height);
        return;
    }
    const int64_t branch = branch_of(count);
    multiply_parts(sums, p, weight, x, ahead, height, first, branch);
    for (int64_t at = branch; at < count; at += branch) {
        floats more[BLOCK][2];
        multiply_parts(more, p, weight, x, ahead, height, first + at, branch);
        add_sums(sums, more, height);
    }
}

/* Multiply all rows, in blocks of equal height, with panels first..end-1, which stay in L2. `x` are scalars, or int8
 * rows for weights in int8, or rows rounded to FP8. */
static void multiply_panels(const product_t *p, const void *x, scalar *out, int64_t rows, int64_t first, int64_t end,
                            finish_t finish) {
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK, size = PANEL * packed_inputs(p) * size_of(p->kind);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t row = rows * b / blocks, height = rows * (b + 1) / blocks - row;
        for (int64_t panel = first; panel < end; panel++) {
            const char *weight = (const char *)p->weight + panel * size;
            /* Only the first rows read the panels from memory. With many rows, a core computes too long between reads
             * to saturate it; with few, prefetching is slower. */
            const char *ahead = b || height < PREFETCH_ROWS ? NULL : weight + PREFETCH_BYTES;
            floats sums[BLOCK][2] = {0};
            if (p->kind == SCALARS && p->bounds)
                multiply_parts(sums, p, (const scalar *)weight, (const scalar *)x + row * p->inputs, ahead, height, 0,
                               p->parts);
            else if (p->kind == SCALARS)
                multiply_tile(sums, (const scalar *)weight, PANEL * STEP, (const scalar *)x + row * p->inputs,
                              p->inputs, p->inputs, ahead, height);
            else
                multiply_quantized(sums, p, x, row, panel, weight, ahead, height);
            for (int64_t r = 0; r < height; r++) finish_row((const float *)sums[r], out, p, row + r, panel, finish);
        }
    }
}

/* Every thread of a parallel region must call it; it ends with a barrier. `rounded` has room for the rows of a product
 * that rounds them. */
static inline void multiply_all(team_t *team, const product_t *p, const scalar *x, scalar *out, int64_t rows,
                                finish_t finish, char *rounded) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t panels = (p->columns + PANEL - 1) / PANEL, begin = panels * thread / threads,
                  end = panels * (thread + 1) / threads;
    if (rounds_rows(p)) {
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows; row++)
            if (p->kind == INT8)
                round_row(x + row * p->inputs, rounded + row * row_bytes(p->inputs), p->inputs);
            else
                round_row_fp8(p, x + row * p->inputs, rounded + row * fp8_row_bytes(p));
        barrier(team);
    }
    const void *from = rounds_rows(p) ? (const void *)rounded : x;
    const int64_t size = PANEL * packed_inputs(p) * size_of(p->kind);
    const int64_t some = size < L2_BYTES ? L2_BYTES / size : 1;
    for (int64_t first = begin; first < end; first += some)
        multiply_panels(p, from, out, rows, first, end - first < some ? end : first + some, finish);
    barrier(team);
}

/* One product: `x` [rows, inputs] to `out` [rows, columns], which are floats if finish is STORE_FLOAT. */
void multiply(const product_t *p, const scalar *x, scalar *out, int64_t rows, int64_t finish, char *rounded) {
    team_t team = {0};
#pragma omp parallel
    multiply_all(&team, p, x, out, rows, (finish_t)finish, rounded);
}

/* Each of `count` products with weights that are scalars: its rows of `x` [count, rows, inputs] to its rows of `out`
 * [count, rows, columns]. */
void multiply_each(const product_t *products, int64_t count, const scalar *x, scalar *out, int64_t rows) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const product_t *p = products + i;
        multiply_panels(p, x + i * rows * p->inputs, out + i * rows * p->columns, rows, 0,
                        (p->columns + PANEL - 1) / PANEL, STORE);
    }
}

/* ---- products that are split over ranks -------------------------------------------------------------------------------- */

/* How the ranks of a replica add up a product whose inputs they share. */
typedef struct {
    float *sums;                       /* [ranks, each, rows, columns] of all ranks, once they are exchanged */
    int64_t rank, ranks;
    int64_t each;                      /* sums of a rank: one, or one for each of its parts */
    void (*exchange)(int64_t numbers); /* fills `sums`, to which each rank has written this many numbers of its own */
} split_t;

enum { SOME = 8 * PANEL }; /* columns that are added up together */

/* to += more, in a call of its own: the compiler may reorder sums that it sees. */
static __attribute__((noinline)) void add_floats(float *to, const float *more, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += more[i];
}

/* to = the sum of `count` parts of up to SOME numbers, `size` numbers apart, added as the tree of `multiply_parts`. */
static void add_parts(float *to, const float *parts, int64_t size, int64_t count, int64_t numbers) {
    if (count == 1) {
        memcpy(to, parts, (size_t)numbers * sizeof(float));
        return;
    }
    const int64_t branch = branch_of(count);
    add_parts(to, parts, size, branch, numbers);
    for (int64_t at = branch; at < count; at += branch) {
        float more[SOME];
        add_parts(more, parts + at * size, size, branch, numbers);
        add_floats(to, more, numbers);
    }
}

/* Add x @ weight.T + bias to `out` [rows, columns], where each rank has a share of the inputs. Every thread of a parallel
 * region must call it; it ends with a barrier. */
static void add_split(team_t *team, const split_t *split, const product_t *p, const scalar *x, scalar *out, int64_t rows,
                      char *rounded) {
    const int64_t size = rows * p->columns, own = split->rank * split->each;
    for (int64_t i = 0; i < split->each; i++) {
        product_t part = *p;
        if (split->each > 1) part.bounds += i, part.parts = 1;
        multiply_all(team, &part, x, (scalar *)(split->sums + (own + i) * size), rows, STORE_FLOAT, rounded);
    }
#pragma omp master
    split->exchange(split->each * size);
    barrier(team);
    const int64_t pieces = (p->columns + SOME - 1) / SOME;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows * pieces; i++) {
        const int64_t row = i / pieces, first = i % pieces * SOME;
        float sums[SOME] = {0};
        add_parts(sums, split->sums + row * p->columns + first, size, split->ranks * split->each,
                  p->columns - first < SOME ? p->columns - first : SOME);
        for (int64_t at = 0; at < SOME && first + at < p->columns; at += PANEL)
            finish_row(sums + at, out, p, row, (first + at) / PANEL, ADD);
    }
    barrier(team);
}

static inline void add_product(team_t *team, const split_t *split, const product_t *p, const scalar *x, scalar *out,
                               int64_t rows, char *rounded) {
    if (split)
        add_split(team, split, p, x, out, rows, rounded);
    else
        multiply_all(team, p, x, out, rows, ADD, rounded);
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

static inline void normalise_all(team_t *team, const scalar *x, const scalar *weight, scalar *out, int64_t rows, int64_t width,
                                 float eps) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) normalise(x + row * width, weight, out + row * width, width, eps);
    barrier(team);
}

/* Root mean square norm of rows [rows, width]. */
void rms_norm(const scalar *x, const scalar *weight, scalar *out, int64_t rows, int64_t width, float eps) {
    team_t team = {0};
#pragma omp parallel if (rows >= 16)
    normalise_all(&team, x, weight, out, rows, width, eps);
}

/* Norm and rotate one head (rotate-half convention), with the rounding of the model's own code. Without `cos` it is
 * rotated already. */
static inline void prepare(const scalar *x, scalar *restrict out, const scalar *norm, const scalar *restrict cos,
                           const scalar *restrict sin, int64_t dim, float eps) {
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
#pragma omp simd
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
    const int64_t *group_start; /* [groups + 1] rows that attend together: of one slot, with one `first` */
    int64_t groups;
    int64_t end; /* one past the last entry that a row sees */
} view_t;

/* The rows of a step and their KV slots. Per slot and KV head, keys are a packed weight of `capacity` columns and `dim`
 * inputs, values one of `dim` columns and `capacity` inputs. `capacity` and `dim` are multiples of PANEL. With `fp8`,
 * both are FP8, and behind each panel of entries are the exponents of their scales. With `latent`, the values of an
 * entry are its first `latent` keys, and only keys are stored. */
typedef struct {
    int64_t rows, heads, kv_heads, dim, capacity, fp8, latent;
    const int64_t *slot, *index; /* [rows] */
    float scale;
    float softcap;      /* scores become softcap * tanh(score / softcap); 0: none */
    const float *sinks; /* [heads] scores that join the softmax without a value, or NULL */
} plan_t;

/* Queries, keys and values of one layer: head h of row r starts at r * row + h * head. */
typedef struct {
    const scalar *query, *key, *value;
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    const scalar *cos, *sin;             /* [rows, dim], or NULL: rotated already */
    const scalar *query_norm, *key_norm; /* [dim], or NULL */
    float eps;
} heads_t;

/* Decoded panels of the keys or the values of one slot and KV head. */
typedef struct {
    scalar *numbers;
    const void *of;     /* the entries; NULL: none are kept */
    int64_t first, end; /* panels that are decoded; panel p is at p * PANEL * dim, or at 0 if none are kept */
} decoded_t;

/* Buffers of one thread, for at most BLOCK queries of one slot and KV head. */
typedef struct {
    int64_t length;   /* entries, a multiple of PANEL */
    scalar *queries;  /* [BLOCK, dim] */
    float *scores;    /* [BLOCK, length] */
    scalar *weights;  /* [BLOCK, length] */
    scalar *gathered; /* [length, dim] */
    floats (*mixed)[BLOCK][2]; /* [dim / PANEL] */
    decoded_t keys;   /* [length, dim], with FP8 only */
    decoded_t values; /* [length, dim], with FP8 or latents */
    float *scales;    /* [length] of values */
} workspace_t;

static inline int64_t key_at(int64_t position, int64_t i, int64_t dim) {
    return position / PANEL * PANEL * dim + (i / STEP * PANEL + position % PANEL) * STEP + i % STEP;
}

static inline int64_t value_at(int64_t position, int64_t i, int64_t dim) {
    return (position / STEP * dim + i) * STEP + position % STEP;
}

/* Elements of `count` entries of a KV head, in whole panels: scalars, or bytes. */
static inline int64_t entry_elements(const plan_t *plan, int64_t count) { return count * (plan->dim + (plan->fp8 ? 1 : 0)); }

static inline int64_t element_size(const plan_t *plan) { return plan->fp8 ? 1 : (int64_t)sizeof(scalar); }

/* Places of the numbers and the exponent of an entry in FP8. */
static inline int64_t fp8_panel_at(const plan_t *plan, int64_t position) {
    return entry_elements(plan, position / PANEL * PANEL);
}

static inline int64_t fp8_key_at(const plan_t *plan, int64_t position, int64_t i) {
    return fp8_panel_at(plan, position) + shuffled_fp8(key_at(position % PANEL, i, plan->dim));
}

static inline int64_t fp8_value_at(const plan_t *plan, int64_t position, int64_t i) {
    return fp8_panel_at(plan, position) + shuffled_fp8(value_at(position % PANEL, i, plan->dim));
}

static inline int64_t exponent_at(const plan_t *plan, int64_t position) {
    return fp8_panel_at(plan, position) + PANEL * plan->dim + position % PANEL;
}

static scalar *make_panels(int64_t needed, int64_t count) {
    return needed ? aligned_alloc(LINE, sizeof(scalar) * (size_t)count) : NULL;
}

/* Whether the values of entries are decoded, or taken from their keys, before they are mixed. */
static inline int decodes_values(const plan_t *plan) { return plan->fp8 || plan->latent; }

/* Columns of the values, in whole panels. */
static inline int64_t value_columns(const plan_t *plan) {
    return plan->latent ? (plan->latent + PANEL - 1) / PANEL * PANEL : plan->dim;
}

static workspace_t make_workspace(int64_t end, const plan_t *plan) {
    const int64_t dim = plan->dim;
    int64_t length = (end + 2 * PANEL - 1) / PANEL * PANEL;
    return (workspace_t){length,
                         malloc(sizeof(scalar) * (size_t)(BLOCK * dim)),
                         malloc(sizeof(float) * (size_t)(BLOCK * length)),
                         malloc(sizeof(scalar) * (size_t)(BLOCK * length)),
                         malloc(sizeof(scalar) * (size_t)(length * dim)),
                         aligned_alloc(sizeof(floats), sizeof(floats[BLOCK][2]) * (size_t)(dim / PANEL)),
                         {make_panels(plan->fp8, length * dim), NULL, 0, 0},
                         {make_panels(decodes_values(plan), length * dim), NULL, 0, 0},
                         malloc(sizeof(float) * (size_t)length)};
}

static void free_workspace(workspace_t workspace) {
    free(workspace.queries), free(workspace.scores), free(workspace.weights), free(workspace.gathered);
    free(workspace.mixed), free(workspace.keys.numbers), free(workspace.values.numbers), free(workspace.scales);
}

/* Scale scores, and bend them towards +-softcap. */
static inline void cap_scores(float *scores, int64_t count, float scale, float softcap) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
        float x = scores[j] * scale / softcap, e = exp_below_0(x < 0.0f ? 2.0f * x : -2.0f * x);
        float bent = softcap * (1.0f - e) / (1.0f + e);
        scores[j] = x < 0.0f ? -bent : bent;
    }
}

/* Turn scores into softmax weights that are not yet divided by their sum; return the sum. A sink joins the sum. */
static inline float softmax_weights(const float *scores, scalar *weights, int64_t count, float scale,
                                    const float *sink) {
    float top = sink ? *sink / scale : -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        weights[j] = from_float(exp_below_0((scores[j] - top) * scale));
        sum += to_float(weights[j]);
    }
    return sink ? sum + exp_below_0(*sink - top * scale) : sum;
}

/* What one row sees. */
typedef struct {
    int64_t first, prefix, extras, count, end; /* count: entries that it sees, plus `first`; end: one past the last */
    const int64_t *extra;
    int64_t whole; /* values before it are read in place */
} seen_t;

static inline seen_t seen_by(const view_t *view, int64_t row) {
    int64_t start = view->extra_start[row], extras = view->extra_start[row + 1] - start, prefix = view->prefix[row];
    const int64_t *extra = view->extra + start;
    int64_t end = extras ? extra[extras - 1] + 1 : prefix;
    return (seen_t){view->first[row], prefix, extras, prefix + extras, end, extra, prefix / STEP * STEP};
}

/* The entry with this index in what a row sees. */
static inline int64_t entry_of(const seen_t *seen, int64_t j) {
    return j < seen->prefix ? j : seen->extra[j - seen->prefix];
}

/* One past the last entry that the rows of a group see. */
static inline int64_t group_end(const view_t *view, int64_t group) {
    int64_t end = 0;
    for (int64_t row = view->group_start[group]; row < view->group_start[group + 1]; row++) {
        int64_t own = seen_by(view, row).end;
        end = own > end ? own : end;
    }
    return end;
}

/* Copy the values of the entries from `seen->whole` on, which may be scattered, or packed with entries that the row
 * does not see. Pad with zeros. */
static void gather(const plan_t *plan, const workspace_t *workspace, const seen_t *seen, const void *values) {
    const int64_t dim = plan->dim;
    for (int64_t j = seen->whole; j < seen->count || j % STEP; j++) {
        scalar *to = workspace->gathered + value_at(j - seen->whole, 0, dim);
        int64_t entry = j < seen->count ? entry_of(seen, j) : 0;
        const scalar *from = (const scalar *)values + value_at(entry, 0, dim), *keys = values;
        const uint8_t *bytes = values;
        if (j >= seen->count)
            for (int64_t i = 0; i < dim; i++) to[i * STEP] = 0;
        else if (plan->fp8 && plan->latent)
            for (int64_t i = 0; i < dim; i++) to[i * STEP] = fp8_as_scalar(bytes[fp8_key_at(plan, entry, i)]);
        else if (plan->fp8)
            for (int64_t i = 0; i < dim; i++) to[i * STEP] = fp8_as_scalar(bytes[fp8_value_at(plan, entry, i)]);
        else if (plan->latent)
            for (int64_t i = 0; i < dim; i++) to[i * STEP] = keys[key_at(entry, i, dim)];
        else
            for (int64_t i = 0; i < dim; i++) to[i * STEP] = from[i * STEP];
    }
}

/* The entries of one slot and KV head that a group sees. */
typedef struct {
    const void *keys, *values; /* scalars, or FP8; the same with latents */
    int64_t end;               /* one past the last */
    int shared;                /* other groups see them, too */
} entries_t;

/* Where a decoded panel lies; with `kept`, panels stay decoded for the next group of the slot. */
static inline scalar *panel_of(const plan_t *plan, const decoded_t *decoded, int64_t panel, int kept) {
    return decoded->numbers + (kept ? panel * PANEL * plan->dim : 0);
}

/* Return whether a panel of these entries must be decoded; it counts as decoded then. */
static inline int must_decode(decoded_t *decoded, const void *entries, int64_t panel, int kept) {
    if (!kept || decoded->of != entries || panel < decoded->first || panel > decoded->end)
        decoded->of = kept ? entries : NULL, decoded->first = decoded->end = panel;
    if (panel < decoded->end) return 0;
    decoded->end = panel + 1;
    return 1;
}

/* Return a panel of keys or values in FP8, decoded; prefetch the panel `ahead` meanwhile. */
static const scalar *decode_panel(const plan_t *plan, decoded_t *decoded, const void *entries, int64_t panel,
                                  const void *ahead, int kept) {
    scalar *to = panel_of(plan, decoded, panel, kept);
    if (!must_decode(decoded, entries, panel, kept)) return to;
    const uint8_t *from = (const uint8_t *)entries + entry_elements(plan, panel * PANEL);
    const char *next = (const char *)ahead + entry_elements(plan, panel * PANEL);
    for (int64_t at = 0; at < PANEL * plan->dim; at += PANEL * STEP) {
        __builtin_prefetch(next + at, 0, 2);
        decode_fp8(from + at, to + at);
    }
    return to;
}

/* Return a panel of values that are the first columns of keys: the same numbers in the layout of values. */
static const scalar *latent_panel(const plan_t *plan, workspace_t *workspace, entries_t now, int64_t panel) {
    const int64_t dim = plan->dim, columns = value_columns(plan);
    scalar *to = panel_of(plan, &workspace->values, panel, now.shared);
    if (!must_decode(&workspace->values, now.values, panel, now.shared)) return to;
    const scalar *keys = plan->fp8 ? decode_panel(plan, &workspace->keys, now.keys, panel, now.keys, now.shared)
                                   : (const scalar *)now.keys + panel * PANEL * dim;
    for (int64_t first = 0; first < columns; first += STEP)
        for (int64_t position = 0; position < PANEL; position += STEP)
            for (int64_t i = 0; i < STEP; i++)
                for (int64_t j = 0; j < STEP; j++)
                    to[value_at(position + j, first + i, dim)] = keys[key_at(position + j, first + i, dim)];
    return to;
}

/* Multiply `rows` queries with a panel of keys in FP8. */
static void score_fp8(const plan_t *plan, workspace_t *workspace, floats scores[][2], entries_t now, entries_t next,
                      int64_t panel, int64_t rows) {
    const void *ahead = panel * PANEL < next.end ? next.keys : now.keys;
    const scalar *keys = decode_panel(plan, &workspace->keys, now.keys, panel, ahead, now.shared);
    const uint8_t *exponents = (const uint8_t *)now.keys + exponent_at(plan, panel * PANEL);
    float scales[PANEL];
    for (int64_t i = 0; i < PANEL; i++) scales[i] = fp8_scale(exponents[i]);
    multiply_tile(scores, keys, PANEL * STEP, workspace->queries, plan->dim, plan->dim, NULL, rows);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < PANEL; i++) ((float *)scores[r])[i] *= scales[i];
}

/* Add the values from..end-1, in FP8 or of latents, to what `rows` rows from `first` on mix. In FP8 their weights have
 * the scales. */
static void mix_decoded(const plan_t *plan, workspace_t *workspace, entries_t now, entries_t next, int64_t from, int64_t end,
                    int64_t first, int64_t rows) {
    const int64_t dim = plan->dim, length = workspace->length;
    while (from < end) {
        const int64_t panel = from / PANEL, stop = (panel + 1) * PANEL < end ? (panel + 1) * PANEL : end;
        const scalar *decoded =
            plan->latent ? latent_panel(plan, workspace, now, panel)
                         : decode_panel(plan, &workspace->values, now.values, panel, next.values, now.shared);
        decoded += from % PANEL * dim;
        for (int64_t part = 0; part < value_columns(plan) / PANEL; part++)
            multiply_tile(workspace->mixed[part] + first, decoded + part * PANEL * STEP, dim * STEP,
                          workspace->weights + first * length + from, length, stop - from, NULL, rows);
        from = stop;
    }
}

/* Fill the scales of the values of the entries first..end-1 in FP8. */
static void fill_scales(const plan_t *plan, const workspace_t *workspace, const void *values, int64_t first, int64_t end) {
    for (int64_t at = first / PANEL * PANEL; at < end; at += PANEL) {
        const uint8_t *exponents = (const uint8_t *)values + exponent_at(plan, at);
#pragma omp simd
        for (int64_t i = 0; i < PANEL; i++) workspace->scales[at + i] = fp8_scale(exponents[i]);
    }
}

/* Multiply the weights first..count-1 of a row with the scales of their values in FP8, which are powers of two. */
static void scale_weights(const seen_t *seen, const float *scales, scalar *weights) {
#pragma omp simd
    for (int64_t j = seen->first; j < seen->prefix; j++) weights[j] = from_float(to_float(weights[j]) * scales[j]);
    for (int64_t j = seen->prefix; j < seen->count; j++)
        weights[j] = from_float(to_float(weights[j]) * scales[entry_of(seen, j)]);
}

/* Attend `heads` prepared queries of each of the rows from `row` on, of one group. The products of the rows share what
 * they read; each keeps the order of its own sum. Prefetch the entries `next` meanwhile. `sinks` are those of
 * the heads, or NULL. Head h of row r goes to out[(r * plan->heads + h) * dim]. */
static void attend_block(const plan_t *plan, const view_t *view, workspace_t *workspace, entries_t now,
                         entries_t next, int64_t row, int64_t rows, int64_t heads, const float *sinks, scalar *out) {
    const int64_t dim = plan->dim, length = workspace->length, first = view->first[row], parts = value_columns(plan) / PANEL;
    const int64_t from = first / STEP * STEP;
    int64_t common = now.end; /* values from..common-1 are read in place by all rows */
    float sums[BLOCK];
    if (plan->fp8) fill_scales(plan, workspace, now.values, first, now.end);
    for (int64_t panel = first / PANEL; panel * PANEL < now.end; panel++) {
        floats scores[BLOCK][2] = {0};
        if (plan->fp8) {
            score_fp8(plan, workspace, scores, now, next, panel, rows * heads);
        } else {
            const scalar *keys = now.keys, *ahead = next.keys;
            ahead += (panel * PANEL < next.end ? panel : 0) * PANEL * dim;
            multiply_tile(scores, keys + panel * PANEL * dim, PANEL * STEP, workspace->queries, dim, dim, ahead,
                          rows * heads);
        }
        for (int64_t i = 0; i < rows * heads; i++)
            memcpy(workspace->scores + i * length + panel * PANEL, scores[i], PANEL * sizeof(float));
    }
    for (int64_t r = 0; r < rows; r++) {
        seen_t seen = seen_by(view, row + r);
        common = seen.whole < common ? seen.whole : common;
        for (int64_t i = r * heads; i < (r + 1) * heads; i++) {
            float *scores = workspace->scores + i * length;
            scalar *weights = workspace->weights + i * length;
            /* extra[j] >= prefix + j: no score is overwritten before it is read */
            for (int64_t j = 0; j < seen.extras; j++) scores[seen.prefix + j] = scores[seen.extra[j]];
            if (plan->softcap > 0.0f) cap_scores(scores + first, seen.count - first, plan->scale, plan->softcap);
            sums[i] = softmax_weights(scores + first, weights + first, seen.count - first,
                                      plan->softcap > 0.0f ? 1.0f : plan->scale, sinks ? sinks + i - r * heads : NULL);
            if (plan->fp8) scale_weights(&seen, workspace->scales, weights);
            for (int64_t j = from; j < first; j++) weights[j] = 0;
            for (int64_t j = seen.count; j % STEP; j++) weights[j] = 0;
        }
    }
    common = common > from ? common : from;
    for (int64_t part = 0; part < parts; part++) {
        memset(workspace->mixed[part], 0, sizeof workspace->mixed[part]);
        if (decodes_values(plan)) continue;
        const scalar *value = (const scalar *)now.values + (from * dim + part * PANEL * STEP);
        /* the parts of the next values lie beside each other: each call prefetches its share of the entries */
        const scalar *ahead = (const scalar *)next.values + (from + (next.end - from) * part * PANEL / dim) * dim;
        multiply_tile(workspace->mixed[part], value, dim * STEP, workspace->weights + from, length, common - from,
                      ahead, rows * heads);
    }
    if (decodes_values(plan)) mix_decoded(plan, workspace, now, next, from, common, 0, rows * heads);
    for (int64_t r = 0; r < rows; r++) {
        seen_t seen = seen_by(view, row + r);
        const scalar *weights = workspace->weights + r * heads * length;
        if (seen.count > seen.whole) gather(plan, workspace, &seen, now.values);
        if (decodes_values(plan)) mix_decoded(plan, workspace, now, now, common, seen.whole, r * heads, heads);
        for (int64_t part = 0; part < parts; part++) {
            floats(*mixed)[2] = workspace->mixed[part] + r * heads;
            const scalar *value = (const scalar *)now.values + (common * dim + part * PANEL * STEP);
            if (seen.whole > common && !decodes_values(plan))
                multiply_tile(mixed, value, dim * STEP, weights + common, length, seen.whole - common, NULL, heads);
            if (seen.count > seen.whole)
                multiply_tile(mixed, workspace->gathered + part * PANEL * STEP, dim * STEP, weights + seen.whole,
                              length, seen.count - seen.whole, NULL, heads);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < PANEL; i++)
                    out[(r * plan->heads + h) * dim + part * PANEL + i] =
                        from_float(((float *)mixed[h])[i] / sums[r * heads + h]);
        }
    }
}

/* The share of the groups' KV heads that a thread attends: items first..end-1, of about equal cost. */
typedef struct {
    int64_t first, end;
} share_t;

/* The group and the KV head of an item. The groups first..end-1 of a slot follow each other head by head: they read the
 * same. */
typedef struct {
    int64_t group, head, first, end;
} item_t;

static int64_t end_of_slot(const plan_t *plan, const view_t *view, int64_t first) {
    int64_t end = first + 1;
    while (end < view->groups && plan->slot[view->group_start[end]] == plan->slot[view->group_start[first]]) end++;
    return end;
}

static item_t item_at(const plan_t *plan, const view_t *view, int64_t number) {
    int64_t first = 0, end = end_of_slot(plan, view, 0);
    while (end * plan->kv_heads <= number && end < view->groups) first = end, end = end_of_slot(plan, view, first);
    const int64_t at = number - first * plan->kv_heads;
    return (item_t){first + at % (end - first), at / (end - first), first, end};
}

/* The item after this one, which is not the last. */
static item_t item_after(const plan_t *plan, const view_t *view, item_t item) {
    if (++item.group < item.end) return item;
    item.group = item.first;
    if (++item.head < plan->kv_heads) return item;
    return (item_t){item.end, 0, item.end, end_of_slot(plan, view, item.end)};
}

static share_t share_of(const view_t *view, int64_t kv_heads) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t total = 0, before = 0;
    share_t share = {0, 0};
    for (int64_t pass = 0; pass < 2; pass++)
        for (int64_t group = 0; group < view->groups; group++) {
            /* a row costs about as much as these entries, besides those that it sees */
            int64_t rows = view->group_start[group + 1] - view->group_start[group];
            int64_t cost = 32 * rows + group_end(view, group) - view->first[view->group_start[group]];
            for (int64_t head = 0; head < kv_heads; head++) {
                if (!pass) {
                    total += cost;
                    continue;
                }
                share.first += before * threads < thread * total;
                share.end += before * threads < (thread + 1) * total;
                before += cost;
            }
        }
    return share;
}

/* Store the keys and values of a row and KV head in their slot. */
static inline void store_row(const plan_t *plan, const heads_t *of, void *keys, void *values, int64_t row, int64_t head) {
    const int64_t dim = plan->dim, position = plan->index[row];
    const scalar *value = of->value + row * of->value_row + head * of->value_head;
    scalar key[dim];
    prepare(of->key + row * of->key_row + head * of->key_head, key, of->key_norm,
            of->cos ? of->cos + row * dim : NULL, of->cos ? of->sin + row * dim : NULL, dim, of->eps);
    if (plan->fp8) {
        uint8_t bytes[dim];
        ((uint8_t *)keys)[exponent_at(plan, position)] = encode_fp8(key, bytes, dim);
        for (int64_t i = 0; i < dim; i++) ((uint8_t *)keys)[fp8_key_at(plan, position, i)] = bytes[i];
        if (plan->latent) return;
        ((uint8_t *)values)[exponent_at(plan, position)] = encode_fp8(value, bytes, dim);
        for (int64_t i = 0; i < dim; i++) ((uint8_t *)values)[fp8_value_at(plan, position, i)] = bytes[i];
        return;
    }
    for (int64_t i = 0; i < dim; i += STEP)
        memcpy((scalar *)keys + key_at(position, i, dim), key + i, STEP * sizeof(scalar));
    if (plan->latent) return;
    for (int64_t i = 0; i < dim; i++) ((scalar *)values)[value_at(position, i, dim)] = value[i];
}

/* Bring the lines to the cache that `store_row` will write. */
static inline void prefetch_row(const plan_t *plan, const void *keys_of, const void *values_of, int64_t row) {
    const int64_t dim = plan->dim, position = plan->index[row];
    const scalar *keys = keys_of, *values = values_of;
    if (plan->fp8) return;
    for (int64_t i = 0; i < dim; i += STEP) __builtin_prefetch(keys + key_at(position, i, dim), 1, 2);
    if (plan->latent) return;
    for (int64_t i = 0; i < dim; i += LINE / (STEP * (int64_t)sizeof(scalar)))
        __builtin_prefetch(values + value_at(position, i, dim), 1, 2);
}

/* Where the keys and values of a slot and a KV head start, in bytes. */
static inline int64_t head_at(const plan_t *plan, int64_t slot, int64_t head) {
    return (slot * plan->kv_heads + head) * entry_elements(plan, plan->capacity) * element_size(plan);
}

static inline int64_t start_of(const plan_t *plan, int64_t row, int64_t head) {
    return head_at(plan, plan->slot[row], head);
}

/* Prepare the queries of `heads` heads from `head` on, of each of the rows from `row` on. */
static inline void prepare_queries(const plan_t *plan, const heads_t *of, const workspace_t *workspace, int64_t row,
                                   int64_t rows, int64_t head, int64_t heads) {
    const int64_t dim = plan->dim;
    for (int64_t i = 0; i < rows * heads; i++) {
        int64_t at = row + i / heads;
        prepare(of->query + at * of->query_row + (head + i % heads) * of->query_head, workspace->queries + i * dim,
                of->query_norm, of->cos ? of->cos + at * dim : NULL, of->cos ? of->sin + at * dim : NULL, dim, of->eps);
    }
}

/* Store the rows' keys and values, then attend into `out` [rows, heads, dim]. Every thread must call it; it ends with a
 * barrier. */
static inline void attend_all(team_t *team, const plan_t *plan, const view_t *view, const heads_t *of, char *keys, char *values,
                              workspace_t *workspace, scalar *out) {
    const int64_t dim = plan->dim, kv_heads = plan->kv_heads, heads = plan->heads / kv_heads;
    const share_t share = share_of(view, kv_heads);
    const item_t start_item = item_at(plan, view, share.first);
    item_t item = start_item;
    for (int64_t i = share.first; i < share.end; i++) {
        const item_t next = i + 1 < share.end ? item_after(plan, view, item) : item;
        int64_t next_row = view->group_start[next.group], ahead = start_of(plan, next_row, next.head);
        prefetch_row(plan, keys + ahead, values + ahead, next_row);
        for (int64_t row = view->group_start[item.group]; row < view->group_start[item.group + 1]; row++) {
            int64_t start = start_of(plan, row, item.head);
            store_row(plan, of, keys + start, values + start, row, item.head);
        }
        item = next;
    }
    barrier(team);
    item = start_item;
    for (int64_t i = share.first; i < share.end; i++) {
        const item_t next = i + 1 < share.end ? item_after(plan, view, item) : item;
        const int shared = item.end - item.first > 1 || heads > BLOCK;
        int64_t row = view->group_start[item.group], rows = view->group_start[item.group + 1] - row;
        int64_t start = start_of(plan, row, item.head);
        int64_t ahead = start_of(plan, view->group_start[next.group], next.head);
        entries_t entries = {keys + start, values + start, group_end(view, item.group), shared};
        entries_t after = {keys + ahead, values + ahead, group_end(view, next.group), 0};
        for (int64_t h = 0; h < heads; h += BLOCK) {
            int64_t some = heads - h < BLOCK ? heads - h : BLOCK, head = item.head * heads + h;
            prepare_queries(plan, of, workspace, row, rows, head, some);
            attend_block(plan, view, workspace, entries, after, row, rows, some, plan->sinks ? plan->sinks + head : NULL,
                         out + (row * plan->heads + head) * dim);
        }
        item = next;
    }
    barrier(team);
}

/* The attention of one layer. */
void attend(const plan_t *plan, const view_t *view, const heads_t *of, char *keys, char *values, scalar *out) {
    team_t team = {0};
#pragma omp parallel
    {
        workspace_t workspace = make_workspace(view->end, plan);
        attend_all(&team, plan, view, of, keys, values, &workspace, out);
        free_workspace(workspace);
    }
}

/* Move `count` entries of one slot, in all layers and heads, from `sources` (ascending) down to destination,
 * destination + 1, … */
void move_entries(char *keys, char *values, const plan_t *plan, int64_t layers, int64_t layer_size, int64_t slot,
                  int64_t destination, const int64_t *sources, int64_t count) {
    const int64_t dim = plan->dim;
#pragma omp parallel for
    for (int64_t item = 0; item < layers * plan->kv_heads; item++) {
        const int64_t base = item / plan->kv_heads * layer_size * element_size(plan) +
                             head_at(plan, slot, item % plan->kv_heads);
        char *key = keys + base, *value = values + base;
        scalar *wide_key = (scalar *)key, *wide_value = (scalar *)value;
        for (int64_t j = 0; j < count; j++) {
            const int64_t to = destination + j, from = sources[j];
            for (int64_t i = 0; i < dim && !plan->fp8; i++) {
                wide_key[key_at(to, i, dim)] = wide_key[key_at(from, i, dim)];
                if (plan->latent) continue;
                wide_value[value_at(to, i, dim)] = wide_value[value_at(from, i, dim)];
            }
            if (!plan->fp8) continue;
            for (int64_t i = 0; i < dim; i++) {
                key[fp8_key_at(plan, to, i)] = key[fp8_key_at(plan, from, i)];
                if (plan->latent) continue;
                value[fp8_value_at(plan, to, i)] = value[fp8_value_at(plan, from, i)];
            }
            key[exponent_at(plan, to)] = key[exponent_at(plan, from)];
            if (plan->latent) continue;
            value[exponent_at(plan, to)] = value[exponent_at(plan, from)];
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
    char *rounded;   /* [rows, bytes] rounded rows of the widest product; only read with quantised weights */
} scratch_t;

/* Move the rows `kept`, ascending, to the first `keep` rows. */
static void keep_rows(scalar *x, int64_t width, const int64_t *kept, int64_t keep) {
    for (int64_t i = 0; i < keep; i++)
        if (kept[i] != i) memcpy(x + i * width, x + kept[i] * width, (size_t)width * sizeof(scalar));
}

/* Run `layers` over `x` [rows, width] in place. `keys` and `values` have `layer_size` elements per layer. The outputs
 * of tapped layers go to `tapped` [rows, taps, width], or with `by_entry` to their entries
 * [slots, capacity, taps, width]. With `kept`, ascending, only these `keep` rows have outputs, which go to the first rows
 * of `x`: others need no more than their keys and values of the last layer. With `split`, this rank has a share of the
 * heads and of the inner columns. Every thread of a parallel region must call
 * it; it ends with a barrier. */
static void layers_all(team_t *team, const layer_t *layers, int64_t count, const plan_t *plan, const view_t *views,
                       const scratch_t *scratch, scalar *x, const scalar *cos, const scalar *sin, char *keys,
                       char *values, int64_t layer_size, int64_t width, float eps, scalar *tapped, int64_t taps,
                       int64_t by_entry, const int64_t *kept, int64_t keep, const split_t *split) {
    int64_t rows = plan->rows, dim = plan->dim, row = (plan->heads + 2 * plan->kv_heads) * dim;
    workspace_t workspace = make_workspace(views[0].end, plan); /* all views have the same end */
    for (int64_t i = 0; i < count; i++) {
        const layer_t *layer = layers + i;
        heads_t heads = {scratch->stacked, scratch->stacked + plan->heads * dim,
                         scratch->stacked + (plan->heads + plan->kv_heads) * dim,
                         row, dim, row, dim, row, dim, cos, sin, layer->query_norm, layer->key_norm, eps};
        normalise_all(team, x, layer->norm_1, scratch->normed, rows, width, eps);
        multiply_all(team, &layer->qkv, scratch->normed, scratch->stacked, rows, STORE, scratch->rounded);
        attend_all(team, plan, views + layer->view, &heads, keys + i * layer_size * element_size(plan),
                   values + i * layer_size * element_size(plan), &workspace, scratch->mixed);
        if (kept && !split && i == count - 1 && layer->tap < 0) { /* ranks exchange equal rows; one of them taps layers */
#pragma omp single nowait
            {
                keep_rows(x, width, kept, keep);
                keep_rows(scratch->mixed, plan->heads * dim, kept, keep);
            }
            barrier(team);
            rows = keep;
        }
        add_product(team, split, &layer->o, scratch->mixed, x, rows, scratch->rounded);
        normalise_all(team, x, layer->norm_2, scratch->normed, rows, width, eps);
        multiply_all(team, &layer->gate_up, scratch->normed, scratch->gated, rows, GATE, scratch->rounded);
        add_product(team, split, &layer->down, scratch->gated, x, rows, scratch->rounded);
        if (layer->tap < 0) continue;
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < rows; r++) {
            int64_t entry = by_entry ? plan->slot[r] * plan->capacity + plan->index[r] : r;
            memcpy(tapped + (entry * taps + layer->tap) * width, x + r * width, (size_t)width * sizeof(scalar));
        }
        barrier(team);
    }
    if (kept && rows != keep) {
#pragma omp single nowait
        keep_rows(x, width, kept, keep);
        barrier(team);
    }
    free_workspace(workspace);
}

/* The layers of a model, without embeddings and logits. */
void run_layers(const layer_t *layers, int64_t count, const plan_t *plan, const view_t *views, const scratch_t *scratch,
                scalar *x, const scalar *cos, const scalar *sin, char *keys, char *values, int64_t layer_size,
                int64_t width, float eps, scalar *tapped, int64_t taps) {
    team_t team = {0};
#pragma omp parallel
    layers_all(&team, layers, count, plan, views, scratch, x, cos, sin, keys, values, layer_size, width, eps, tapped, taps, 0,
               NULL, 0, NULL);
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
    const split_t *split; /* NULL: no other rank has a share */
} network_t;

/* Inputs and outputs of one forward. */
typedef struct {
    const int64_t *ids, *positions; /* [rows] */
    const int64_t *kept;            /* [count] rows whose states and logits are returned, ascending */
    int64_t count;
    const scalar *states;     /* [rows, width] before the rows; draft head only */
    scalar *x, *cos, *sin;    /* buffers: [rows, width], [rows, dim], [rows, dim] */
    scalar *joined;           /* buffer of a draft head: [rows, 2 * width] */
    scalar *last;             /* [count, width] states of the kept rows, normed */
    scalar *tapped;           /* [slots, capacity, taps, width] */
    float *logits;            /* [count, vocabulary] */
} forward_t;

void run_network(const network_t *net, const plan_t *plan, const view_t *views, const scratch_t *scratch,
                 const forward_t *f, char *keys, char *values) {
    const int64_t rows = plan->rows, dim = plan->dim, width = net->width;
    const size_t row_size = (size_t)width * sizeof(scalar), head_size = (size_t)dim * sizeof(scalar);
    team_t shared = {0}, *team = &shared;
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
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
        barrier(team);
        if (net->unit) multiply_all(team, &net->join, f->joined, f->x, rows, STORE, scratch->rounded);
        layers_all(team, net->layers, net->count, plan, views, scratch, f->x, f->cos, f->sin, keys, values, net->layer_size,
                   width, net->eps, f->tapped, net->taps, 1, f->kept, f->count, net->split);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < f->count; i++)
            normalise(f->x + i * width, net->norm, f->last + i * width, width, net->eps);
        barrier(team);
        multiply_all(team, &net->output, f->last, (scalar *)f->logits, f->count, STORE_FLOAT, scratch->rounded);
    }
}
