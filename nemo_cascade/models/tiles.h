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

/* `rows` x (`blocks` * LANES) of out = keep out + A B: A[r * a_row + k * a_column], B and out by rows. */
INLINE void tile(const int rows, const int blocks, int64_t depth, const float *A, int64_t a_row, int64_t a_column,
                 const float *B, int64_t b_row, float keep, float *out, int64_t out_row) {
    const float *low = A, *high = A + 4 * a_row; /* few addresses */
    lanes made[8][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k++, low += a_column, high += a_column, B += b_row)
        for (int b = 0; b < blocks; b++)
            for (int r = 0; r < rows; r++) made[r][b] += load(B + b * LANES) * (r < 4 ? low : high)[r % 4 * a_row];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++) {
            float *to = out + r * out_row + b * LANES;
            store(to, keep == 0.0f ? made[r][b] : load(to) * keep + made[r][b]);
        }
}

/* out [rows][columns] = keep out + A B over `depth`; an even number of rows, whole vectors of columns. */
INLINE void product(int64_t rows, int64_t columns, int64_t depth, const float *A, int64_t a_row, int64_t a_column,
                    const float *B, int64_t b_row, float keep, float *out, int64_t out_row) {
    int64_t r = 0;
    for (int64_t size; r < rows; r += size) {
        size = rows - r >= 8 ? 8 : 2;
        const float *a = A + r * a_row;
        float *to = out + r * out_row;
        int64_t c = 0;
        for (; c + 2 * LANES <= columns; c += 2 * LANES) {
            if (size == 8) tile(8, 2, depth, a, a_row, a_column, B + c, b_row, keep, to + c, out_row);
            else tile(2, 2, depth, a, a_row, a_column, B + c, b_row, keep, to + c, out_row);
        }
        if (c < columns) {
            if (size == 8) tile(8, 1, depth, a, a_row, a_column, B + c, b_row, keep, to + c, out_row);
            else tile(2, 1, depth, a, a_row, a_column, B + c, b_row, keep, to + c, out_row);
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

/* LANES rows of LANES, their halves exchanged across the diagonal, then the quarters, ... */
INLINE void transpose_square(lanes v[LANES]) {
    EXCHANGE(v, 8)
    EXCHANGE(v, 4)
    EXCHANGE(v, 2)
    EXCHANGE(v, 1)
}

/* to [columns][rows] from [rows][columns]. */
static void transpose(int64_t rows, int64_t columns, const float *from, int64_t from_row, float *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            if (r + LANES <= rows && c + LANES <= columns) {
                lanes v[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) v[i] = load(from + (r + i) * from_row + c);
                transpose_square(v);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store(to + (c + i) * to_row + r, v[i]);
            } else
                for (int64_t i = r; i < rows && i < r + LANES; i++)
                    for (int64_t k = c; k < columns && k < c + LANES; k++) to[k * to_row + i] = from[i * from_row + k];
        }
}
