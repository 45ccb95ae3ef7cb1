/* Small matrices in vectors: sums, products and transposes of what fits in the first-level cache. */
#include "lanes.h"

#define INLINE static inline __attribute__((always_inline))

INLINE float sum(lanes v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

INLINE lanes load(const float *from) { return *(const lanes *)from; }
INLINE void store(float *to, lanes v) { *(lanes *)to = v; }

/* Rows lie too far apart for the processor to see the next one coming. */
INLINE void prefetch(const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) __builtin_prefetch(from + i);
}

/* 1 in the first k lanes, 0 in the others. */
INLINE lanes first(int64_t k) {
    static const float steps[2 * LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return load(steps + LANES - k);
}

/* Accumulators of a tile: vectors as wide as the machine's, ROWS times two of them, so that all stay in registers. */
#if defined(__AVX512F__)
#define PART 16
#define ROWS 8
#elif defined(__AVX__)
#define PART 8
#define ROWS 4
#else
#define PART 4
#define ROWS 4
#endif
typedef float part __attribute__((vector_size(4 * PART), aligned(4)));

/* `rows` x (`parts` * PART) of out = keep out + A B: A[r * a_row + k * a_column], B and out by rows. */
INLINE void tile(const int rows, const int parts, int64_t depth, const float *A, int64_t a_row, int64_t a_column,
                 const float *B, int64_t b_row, float keep, float *out, int64_t out_row) {
    const float *low = A, *high = A + 4 * a_row; /* two pointers and three distances reach eight rows */
    part made[ROWS][2] = {{{0}}};
    for (int r = 0; r < rows && keep == 1.0f; r++)
        for (int p = 0; p < parts; p++) made[r][p] = ((part *)(out + r * out_row))[p];
    for (int64_t k = 0; k < depth; k++, low += a_column, high += a_column, B += b_row)
        for (int p = 0; p < parts; p++)
            for (int r = 0; r < rows; r++) made[r][p] += ((const part *)B)[p] * (r < 4 ? low : high)[r % 4 * a_row];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < parts; p++) {
            part *to = (part *)(out + r * out_row) + p;
            *to = keep == 0.0f || keep == 1.0f ? made[r][p] : *to * keep + made[r][p];
        }
}

/* out [rows][columns] = keep out + A B over `depth`; an even number of rows, columns by LANES. */
INLINE void product(int64_t rows, int64_t columns, int64_t depth, const float *A, int64_t a_row, int64_t a_column,
                    const float *B, int64_t b_row, float keep, float *out, int64_t out_row) {
    int64_t parts = columns / PART;
    for (int64_t r = 0, size; r < rows; r += size, A += size * a_row, out += size * out_row) {
        size = rows - r >= ROWS ? ROWS : 2;
        for (int64_t p = 0; p < parts; p += 2) {
            const float *b = B + p * PART;
            float *to = out + p * PART;
            if (size == ROWS && p + 1 < parts) tile(ROWS, 2, depth, A, a_row, a_column, b, b_row, keep, to, out_row);
            else if (size == ROWS) tile(ROWS, 1, depth, A, a_row, a_column, b, b_row, keep, to, out_row);
            else if (p + 1 < parts) tile(2, 2, depth, A, a_row, a_column, b, b_row, keep, to, out_row);
            else tile(2, 1, depth, A, a_row, a_column, b, b_row, keep, to, out_row);
        }
    }
}

#define LOW(l, w) ((l) & (w) ? LANES + (l) - (w) : (l))
#define HIGH(l, w) ((l) & (w) ? LANES + (l) : (l) + (w))
#define EACH(f, w) f(0, w), f(1, w), f(2, w), f(3, w), f(4, w), f(5, w), f(6, w), f(7, w), f(8, w), f(9, w), f(10, w), \
                   f(11, w), f(12, w), f(13, w), f(14, w), f(15, w)
#define EXCHANGE(v, w)                                                           \
    _Pragma("GCC unroll 16") for (int r = 0; r < LANES; r++) if (!(r & (w))) {   \
        lanes low = v[r], high = v[r + (w)];                                     \
        v[r] = __builtin_shufflevector(low, high, EACH(LOW, w));                 \
        v[r + (w)] = __builtin_shufflevector(low, high, EACH(HIGH, w));          \
    }

/* to [columns][rows] from [rows][columns]. */
static void transpose(int64_t rows, int64_t columns, const float *from, int64_t from_row, float *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
#if PART == LANES /* whole squares: halves change places across the diagonal, then the quarters in each, ... */
            if (r + LANES <= rows && c + LANES <= columns) {
                lanes v[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) v[i] = load(from + (r + i) * from_row + c);
                EXCHANGE(v, 8)
                EXCHANGE(v, 4)
                EXCHANGE(v, 2)
                EXCHANGE(v, 1)
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store(to + (c + i) * to_row + r, v[i]);
                continue;
            }
#endif
            for (int64_t i = r; i < rows && i < r + LANES; i++)
                for (int64_t k = c; k < columns && k < c + LANES; k++) to[k * to_row + i] = from[i * from_row + k];
        }
}
