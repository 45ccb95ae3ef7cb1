/* Causal attention with grouped queries inside each sequence of a packed row, and its gradients, in plain C.
 *
 * o_i = sum_{k <= i} p_ik v_k with p_ik = exp(scale q_i k_k - top_i) / total_i. A tile of keys and values is brought
 * into scratch once for all heads that read it; blocks of queries pass over it, and each query carries its highest
 * score `top`, the sum `total` of its weights and its output from tile to tile (the online softmax), so that nothing
 * has the size of length x length. Backward makes a tile's weights again from top and total. Products (tiles.h) keep
 * their sums in registers. Blocks and tiles are counted from the start of a sequence: its bits do not
 * depend on its neighbours. Built by native.py, called by attention_native.py.
 */
#include <string.h>

#include "tiles.h"

#define QUERIES 16 /* queries of a block; widths are multiples of it */
#define KEYS 64 /* keys of a tile: a multiple of QUERIES, so that a block meets the diagonal in its last columns */
#define WIDEST 256
#define PITCH (WIDEST + QUERIES) /* floats from row to row of a block; a power of two would use few sets of the cache */
#define KEY_PITCH (KEYS + QUERIES)

#if PART < 8
#error "measured with vectors of 8 and 16 floats only"
#endif
/* The lower and the upper halves of two vectors, element by element in turn, and the numbers of a vector's elements. */
#if PART == 16
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define PLACES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define PLACES {0, 1, 2, 3, 4, 5, 6, 7}
#endif
typedef int32_t ints __attribute__((vector_size(4 * PART), aligned(4)));

typedef struct {
    int64_t heads, groups, width;
    float scale;
} Shape;

typedef struct {
    float *data;
    int64_t token, head; /* floats from one to the next */
} View;

typedef struct {
    float *turned, *turned_values; /* [width][KEY_PITCH]: scale k^T and, backward, v^T */
    float *keys, *values;          /* [KEYS][pitch]: scale k and v */
    float *dkeys, *dvalues;        /* [KEYS][pitch] */
    float *query, *weights, *product, *upstream, *dscores; /* [QUERIES][PITCH] */
    float *per_query;                                      /* [blocks][heads of a group][2][QUERIES], or less */
} Scratch;

static inline int64_t pitch_of(const Shape *m) { return m->width + QUERIES; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
INLINE part all(float x) { return (part){0} + x; }

/* Floats of scratch for sequences of at most `longest` tokens. */
int64_t attention_scratch(const Shape *m, int64_t longest) {
    int64_t per_query = rounded(longest, QUERIES) * 2 * (m->heads / m->groups);
    return 2 * m->width * KEY_PITCH + 4 * KEYS * pitch_of(m) + 5 * QUERIES * PITCH + per_query;
}

static Scratch cut(const Shape *m, float *scratch) {
    Scratch s;
    float **parts[] = {&s.turned, &s.turned_values, &s.keys,    &s.values,   &s.dkeys,   &s.dvalues,
                       &s.query,  &s.weights,       &s.product, &s.upstream, &s.dscores, &s.per_query};
    int64_t turned = m->width * KEY_PITCH, kept = KEYS * pitch_of(m), block = QUERIES * PITCH;
    int64_t sizes[] = {turned, turned, kept, kept, kept, kept, block, block, block, block, block, 0};
    for (int i = 0; i < 12; scratch += sizes[i++]) *parts[i] = scratch;
    return s;
}

/* c [rows][columns] = a b, or with `keep` of 1 added to c; a is a block, as it is or turned (a step of 1 from row to
 * row). Rows are rounded up to what a tile has: c is scratch. */
INLINE void block_product(int64_t rows, int64_t columns, int64_t inner, const float *a, int64_t a_row, const float *b,
                          int64_t b_row, float keep, float *c, int64_t c_row) {
    product(rounded(rows, ROWS), columns, inner, a, a_row, a_row == 1 ? PITCH : 1, b, b_row, keep, c, c_row);
}

/* Copies `rows` tokens of a head, times a factor for each or, without, for all of them. */
static void gather(const float *from, int64_t stride, int64_t rows, int64_t width, float factor, const float *factors,
                   int64_t step, float *to, int64_t pitch) {
    for (int64_t r = 0; r < rows; r++) {
        float times = factors ? factors[r * step] : factor;
        for (int64_t i = 0; i < width; i += PART)
            *(part *)(to + r * pitch + i) = *(const part *)(from + r * stride + i) * times;
    }
}

/* A block of queries or of their gradients: zeros where the sequence has ended. */
static void gather_block(const float *from, int64_t stride, int64_t rows, int64_t width, const float *factors,
                         int64_t step, float *to) {
    gather(from, stride, rows, width, 1.0f, factors, step, to, PITCH);
    for (int64_t r = rows; r < rounded(rows, ROWS); r++) memset(to + r * PITCH, 0, sizeof(float) * width);
}

/* to [width][KEY_PITCH] = the tile's keys or values [KEYS][pitch]^T, of which those beyond `rows` are made zeros. */
static void turn(const Shape *m, int64_t rows, float *from, float *to) {
    memset(from + rows * pitch_of(m), 0, sizeof(float) * (rounded(rows, QUERIES) - rows) * pitch_of(m));
    transpose(rounded(rows, QUERIES), m->width, from, pitch_of(m), to, KEY_PITCH);
}

INLINE part pick(ints mask, part yes, part no) { return (part)(((ints)yes & mask) | ((ints)no & ~mask)); }
INLINE part larger(part a, part b) { return pick(a > b, a, b); }

/* exp(x) for x of at most 88; exactly 0 below -87, where -infinity is, too; NaN stays NaN. */
INLINE part exp_part(part x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    part n = x * 1.44269504f + round;
    ints power = ((ints)n << 23) + (127 << 23);
    n -= round;
    part r = x - n * 0.693359375f + n * 2.12194440e-4f, p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (part)((ints)(p * (part)power) & ~(x < -87.0f));
}

/* Folds PART rows into one: lane r is the sum, or with `top` the largest, of row r. */
INLINE part across(part *rows, const int top) {
    for (int half = PART / 2; half >= 1; half /= 2)
        for (int r = 0; r < half; r++) {
            part low = ZIP_LOW(rows[r], rows[r + half]), high = ZIP_HIGH(rows[r], rows[r + half]);
            rows[r] = top ? larger(low, high) : low + high;
        }
    return rows[0];
}

/* Puts `fill` where the key of a column comes after the query: `corner` is row r of the QUERIES last columns. */
static inline void mask(float *corner, int64_t r, float fill) {
    for (int v = 0; v < QUERIES; v += PART)
        *(part *)(corner + v) = pick((ints)PLACES + v > (int)r, all(fill), *(part *)(corner + v));
}

/* What goes from tile to tile with the queries of a block. */
typedef struct {
    float *top, *total; /* [QUERIES]: highest score and sum of the weights exp(score - top) so far */
    float kept[QUERIES];   /* what output so far must be multiplied by */
} Running;

/* Makes weights of scores [rows][count]. */
static void soften(int64_t rows, int64_t count, int diagonal, int first, float *scores, Running *to) {
    part folded[QUERIES];
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * PITCH;
        if (diagonal) mask(row + count - QUERIES, r, -INFINITY);
        folded[r] = *(part *)row;
        for (int64_t k = PART; k < count; k += PART) folded[r] = larger(folded[r], *(part *)(row + k));
    }
    for (int64_t r = rows; r < QUERIES; r++) folded[r] = all(0.0f);
    for (int v = 0; v < QUERIES; v += PART) {
        part before = first ? all(-INFINITY) : *(part *)(to->top + v), top = larger(before, across(folded + v, 1));
        *(part *)(to->top + v) = top;
        *(part *)(to->kept + v) = exp_part(before - top);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * PITCH, top = to->top[r];
        part sum = all(0.0f);
        for (int64_t k = 0; k < count; k += PART) sum += *(part *)(row + k) = exp_part(*(part *)(row + k) - top);
        folded[r] = sum;
    }
    for (int64_t r = rows; r < QUERIES; r++) folded[r] = all(0.0f);
    for (int v = 0; v < QUERIES; v += PART) {
        part sums = across(folded + v, 0), *total = (part *)(to->total + v);
        *total = first ? sums : *total * *(part *)(to->kept + v) + sums;
    }
}

/* out [T][heads][width]; of every query top and 1 / total [T][heads] are kept for backward. `bounds` has sequences + 1
 * entries. */
void attention_forward(const Shape *m, const View *query, const View *key, const View *value, const int64_t *bounds,
                       int64_t sequences, float *out, float *tops, float *inverses, float *scratch) {
    int64_t H = m->heads, P = m->width, per = H / m->groups, pitch = pitch_of(m);
    Scratch s = cut(m, scratch);
    for (int64_t q = 0; q < sequences; q++)
        for (int64_t g = 0; g < m->groups; g++)
            for (int64_t begin = bounds[q], end = bounds[q + 1], at = begin; at < end; at += KEYS) {
                int64_t keys = least(KEYS, end - at), first = at == begin;
                const float *k = key->data + at * key->token + g * key->head;
                const float *v = value->data + at * value->token + g * value->head;
                gather(k, key->token, keys, P, m->scale, 0, 0, s.keys, pitch);
                gather(v, value->token, keys, P, 1.0f, 0, 0, s.values, pitch);
                turn(m, keys, s.keys, s.turned);
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t i = at; i < end; i += QUERIES) {
                        int64_t rows = least(QUERIES, end - i), count = least(KEYS, i + QUERIES - at);
                        int64_t diagonal = i < at + KEYS;
                        const float *from = query->data + i * query->token + h * query->head;
                        float *top = s.per_query + ((i - begin) / QUERIES * per + h - g * per) * 2 * QUERIES;
                        Running to = {top, top + QUERIES, {0}};
                        gather_block(from, query->token, rows, P, 0, 0, s.query);
                        block_product(rows, count, P, s.query, PITCH, s.turned, KEY_PITCH, 0.0f, s.weights, PITCH);
                        soften(rounded(rows, ROWS), count, diagonal, first, s.weights, &to);
                        block_product(rows, P, least(count, keys), s.weights, PITCH, s.values, pitch, 0.0f, s.product,
                                      PITCH);
                        for (int64_t r = 0; r < rows; r++) {
                            float *o = out + ((i + r) * H + h) * P, inverse = diagonal ? 1.0f / to.total[r] : 1.0f;
                            for (int64_t p = 0; p < P; p += PART) {
                                part sum = *(part *)(s.product + r * PITCH + p);
                                if (!first) sum += *(part *)(o + p) * to.kept[r];
                                *(part *)(o + p) = sum * inverse;
                            }
                            tops[(i + r) * H + h] = to.top[r];
                            inverses[(i + r) * H + h] = inverse;
                        }
                    }
            }
}

/* What backward knows of the queries of a block; from one to the next it is `step` floats, in `through` one. */
typedef struct {
    const float *query, *dout, *tops, *inverses;
    const float *through; /* sum of out times its gradient, over the sum of the weights */
    float *dquery;
    int64_t stride, step;
} Queries;

/* One block of queries of one head against the tile in scratch: adds to dkeys and dvalues, writes or adds to dquery.
 * The gradient of the output is divided by the sum of the weights, so that these need not be. */
static void block_back(const Shape *m, const Scratch *s, const Queries *b, int64_t rows, int64_t count, int64_t keys,
                       int diagonal, int first) {
    int64_t P = m->width, wide = m->heads * P, pitch = pitch_of(m);
    gather_block(b->query, b->stride, rows, P, 0, 0, s->query);
    gather_block(b->dout, wide, rows, P, b->inverses, b->step, s->upstream);
    block_product(rows, count, P, s->query, PITCH, s->turned, KEY_PITCH, 0.0f, s->weights, PITCH);
    block_product(rows, count, P, s->upstream, PITCH, s->turned_values, KEY_PITCH, 0.0f, s->dscores, PITCH);
    for (int64_t r = 0; r < rows; r++) {
        float *w = s->weights + r * PITCH, *d = s->dscores + r * PITCH, top = b->tops[r * b->step];
        for (int64_t k = 0; k < count; k += PART) {
            part weight = exp_part(*(part *)(w + k) - top);
            *(part *)(w + k) = weight;
            *(part *)(d + k) = weight * (*(part *)(d + k) - b->through[r]);
        }
        if (diagonal) {
            mask(w + count - QUERIES, r, 0.0f);
            mask(d + count - QUERIES, r, 0.0f);
        }
    }
    block_product(least(count, keys), P, rows, s->weights, 1, s->upstream, PITCH, 1.0f, s->dvalues, pitch);
    block_product(least(count, keys), P, rows, s->dscores, 1, s->query, PITCH, 1.0f, s->dkeys, pitch);
    block_product(rows, P, least(count, keys), s->dscores, PITCH, s->keys, pitch, 0.0f, s->product, PITCH);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < P; p += PART) {
            part sum = *(part *)(s->product + r * PITCH + p), *to = (part *)(b->dquery + r * wide + p);
            *to = first ? sum : *to + sum;
        }
}

/* Gradients of query, key and value, [T][heads or groups][width]; every entry is written. */
void attention_backward(const Shape *m, const View *query, const View *key, const View *value, const int64_t *bounds,
                        int64_t sequences, const float *out, const float *tops, const float *inverses,
                        const float *dout, float *dquery, float *dkey, float *dvalue, float *scratch) {
    int64_t H = m->heads, G = m->groups, P = m->width, per = H / G, pitch = pitch_of(m);
    Scratch s = cut(m, scratch);
    for (int64_t q = 0; q < sequences; q++)
        for (int64_t g = 0; g < G; g++) {
            int64_t begin = bounds[q], end = bounds[q + 1], length = end - begin;
            for (int64_t h = 0; h < per; h++)
                for (int64_t t = 0; t < length; t++) {
                    int64_t place = (begin + t) * H + g * per + h;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t p = place * P; p < (place + 1) * P; p++) sum += out[p] * dout[p];
                    s.per_query[h * length + t] = sum * inverses[place];
                }
            for (int64_t at = begin; at < end; at += KEYS) {
                int64_t keys = least(KEYS, end - at);
                const float *k = key->data + at * key->token + g * key->head;
                const float *v = value->data + at * value->token + g * value->head;
                gather(k, key->token, keys, P, m->scale, 0, 0, s.keys, pitch);
                gather(v, value->token, keys, P, 1.0f, 0, 0, s.values, pitch);
                turn(m, keys, s.keys, s.turned);
                turn(m, keys, s.values, s.turned_values);
                memset(s.dkeys, 0, sizeof(float) * rounded(keys, ROWS) * pitch);
                memset(s.dvalues, 0, sizeof(float) * rounded(keys, ROWS) * pitch);
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t i = at; i < end; i += QUERIES) {
                        int64_t place = i * H + h;
                        const float *from = query->data + i * query->token + h * query->head;
                        const float *through = s.per_query + (h - g * per) * length + i - begin;
                        Queries block = {from, dout + place * P, tops + place, inverses + place, through,
                                         dquery + place * P, query->token, H};
                        block_back(m, &s, &block, least(QUERIES, end - i), least(KEYS, i + QUERIES - at), keys,
                                   i < at + KEYS, at == begin);
                    }
                gather(s.dkeys, pitch, keys, P, m->scale, 0, 0, dkey + (at * G + g) * P, G * P);
                gather(s.dvalues, pitch, keys, P, 1.0f, 0, 0, dvalue + (at * G + g) * P, G * P);
            }
        }
}
