/* Causal attention with grouped queries inside each sequence of a packed row, and its gradients, in plain C.
 *
 * o_i = sum_{k <= i} p_ik v_k with p_ik = exp(scale q_i k_k - top_i) / sum_i. A tile of keys and values is brought into scratch
 * once for all heads that read it; blocks of queries pass over it, and each query carries its highest score `top`, the
 * sum of its weights and its output from tile to tile (the online softmax), so that nothing has the size of length x length.
 * Backward makes a tile's weights again from top and sum of each query. Everything is made of `tile`, a product of
 * small matrices with the sums in registers. Blocks and tiles are counted from the start of a sequence: its bits do not
 * depend on its neighbours. Built by native.py, called by attention_native.py.
 */
#include <string.h>

#include "lanes.h"

#define ROWS 16  /* queries of a block; keys begin a tile at multiples of it, so that only 16 x 16 corners are masked */
#ifndef KEYS
#define KEYS 256 /* keys of a tile */
#endif
#define WIDEST 256
#define PITCH (WIDEST + LANES) /* floats from row to row of a block; no power of two, which would share cache lines' sets */
#define KEY_PITCH (KEYS + LANES)
#ifdef __AVX512F__
#define TALL 8 /* sums of one product: TALL x WIDE lanes */
#define WIDE 2
#else
#define TALL 4
#define WIDE 1
#endif

/* The lower and upper halves of two vectors, element by element in turn. */
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LANE ((ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})

typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

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
    float *keys, *values;          /* [KEYS][pitch]: scale k and v; forward reads no keys, backward no values */
    float *dkeys, *dvalues;        /* [KEYS][pitch] */
    float *query, *weights, *product, *upstream, *dscores; /* [ROWS][PITCH] */
    float *per_query;                                      /* [longest][heads of a group] */
} Scratch;

static inline int64_t pitch_of(const Shape *m) { return m->width + LANES; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* Floats of scratch for sequences of at most `longest` tokens. */
int64_t attention_scratch(const Shape *m, int64_t longest) {
    return 2 * m->width * KEY_PITCH + 4 * KEYS * pitch_of(m) + 5 * ROWS * PITCH + rounded(longest, ROWS) * 2 * (m->heads / m->groups);
}

static Scratch cut(const Shape *m, float *scratch) {
    Scratch s;
    float **parts[] = {&s.turned, &s.turned_values, &s.keys,     &s.values,  &s.dkeys,    &s.dvalues,
                       &s.query,  &s.weights,       &s.product, &s.upstream, &s.dscores, &s.per_query};
    int64_t turned = m->width * KEY_PITCH, kept = KEYS * pitch_of(m), block = ROWS * PITCH;
    int64_t sizes[] = {turned, turned, kept, kept, kept, kept, block, block, block, block, block, 0};
    for (int i = 0; i < 12; i++, scratch += sizes[i - 1]) *parts[i] = scratch;
    return s;
}

/* c [tall][wide * LANES] = (or, with `add`, +=) a [tall][inner] b [inner][wide * LANES], with the sums in registers. */
static inline __attribute__((always_inline)) void tile(const int tall, const int wide, const int add, int64_t inner,
                                                       const float *a, const int64_t a_row, const int64_t a_inner,
                                                       const float *b, int64_t b_row, float *c, int64_t c_row) {
    lanes sums[TALL][WIDE];
    for (int r = 0; r < tall; r++)
        for (int v = 0; v < wide; v++) sums[r][v] = add ? *(lanes *)(c + r * c_row + v * LANES) : (lanes){0};
    for (int64_t i = 0; i < inner; i++, a += a_inner, b += b_row) {
        lanes row[WIDE];
        for (int v = 0; v < wide; v++) row[v] = *(const lanes *)(b + v * LANES);
        for (int r = 0; r < tall; r++)
            for (int v = 0; v < wide; v++) sums[r][v] += row[v] * a[r * a_row];
    }
    for (int r = 0; r < tall; r++)
        for (int v = 0; v < wide; v++) *(lanes *)(c + r * c_row + v * LANES) = sums[r][v];
}

/* c [rows][columns] = a [rows][inner] b [inner][columns]; a is a block. Rows are rounded up to TALL, all lie in scratch. */
static void product(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b, int64_t b_row, float *c,
                    int64_t c_row) {
    int64_t j = 0;
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, WIDE, 0, inner, a + r * PITCH, PITCH, 1, b + j, b_row, c + r * c_row + j, c_row);
    for (; j < columns; j += LANES)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, 1, 0, inner, a + r * PITCH, PITCH, 1, b + j, b_row, c + r * c_row + j, c_row);
}

/* c [rows][columns] += a^T b with a [inner][rows] and b [inner][columns], both blocks. */
static void add_turned_product(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b, float *c,
                               int64_t c_row) {
    int64_t j = 0;
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, WIDE, 1, inner, a + r, 1, PITCH, b + j, PITCH, c + r * c_row + j, c_row);
    for (; j < columns; j += LANES)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, 1, 1, inner, a + r, 1, PITCH, b + j, PITCH, c + r * c_row + j, c_row);
}

/* Copies `rows` tokens of a head, times a factor, and zeros up to `all` rows. */
static void gather(const float *from, int64_t stride, int64_t rows, int64_t all, int64_t width, float factor, float *to,
                   int64_t pitch) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += LANES)
            *(lanes *)(to + r * pitch + i) = *(const lanes *)(from + r * stride + i) * factor;
    for (int64_t r = rows; r < all; r++) memset(to + r * pitch, 0, sizeof(float) * width);
}

/* to [width][KEY_PITCH] = from [rows][width]^T times a factor; columns are rounded up to LANES, with zeros.
 * One round interleaves rows i and i + 8, which turns the bits of an element's place (row, column) by one; four swap them.
 */
static void turn(const float *from, int64_t stride, int64_t rows, int64_t width, float factor, float *to) {
    for (int64_t j = 0; j < rows; j += LANES)
        for (int64_t i = 0; i < width; i += LANES) {
            lanes now[LANES], next[LANES];
            for (int r = 0; r < LANES; r++)
                now[r] = j + r < rows ? *(const lanes *)(from + (j + r) * stride + i) * factor : (lanes){0};
            for (int round = 0; round < 4; round++) {
                for (int r = 0; r < LANES / 2; r++) {
                    lanes a = now[r], b = now[r + LANES / 2];
                    next[2 * r] = LOW(a, b);
                    next[2 * r + 1] = HIGH(a, b);
                }
                memcpy(now, next, sizeof now);
            }
            for (int r = 0; r < LANES; r++) *(lanes *)(to + (i + r) * KEY_PITCH + j) = now[r];
        }
}

static inline lanes pick(ints mask, lanes yes, lanes no) {
    return (lanes)(((ints)yes & mask) | ((ints)no & ~mask));
}

static inline lanes larger(lanes a, lanes b) { return pick(a > b, a, b); }

/* exp(x) for x of at most 88; exactly 0 below -87, where infinity is, too; NaN stays NaN. */
static inline lanes exp_lanes(lanes x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    lanes n = x * 1.44269504f + round;
    ints power = ((ints)n << 23) + (127 << 23);
    n -= round;
    lanes r = x - n * 0.693359375f + n * 2.12194440e-4f, p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (lanes)((ints)(p * (lanes)power) & ~(x < -87.0f));
}

/* Folds 16 rows of lanes into one: lane r is the sum, or with `top` the largest, of row r. */
static inline __attribute__((always_inline)) lanes across(lanes *rows, const int top) {
    for (int half = LANES / 2; half >= 1; half /= 2)
        for (int r = 0; r < half; r++) {
            lanes low = LOW(rows[r], rows[r + half]), high = HIGH(rows[r], rows[r + half]);
            rows[r] = top ? larger(low, high) : low + high;
        }
    return rows[0];
}

/* What goes from tile to tile with the queries of a block. */
typedef struct {
    float *top, *total; /* highest score and sum of the weights exp(score - top) so far */
    float kept[ROWS];   /* what output so far must be multiplied by */
} Running;

/* Makes weights of scores [rows][count]. Where the tile lies on the diagonal its last 16 columns are the queries. */
static void soften(int64_t rows, int64_t count, int diagonal, int first, float *scores, Running *to) {
    lanes part[ROWS] = {{0}}, before = first ? (lanes){0} - INFINITY : *(lanes *)to->top;
    for (int64_t r = 0; r < rows; r++) {
        lanes *row = (lanes *)(scores + r * PITCH), *last = row + count / LANES - 1;
        if (diagonal) *last = pick(LANE > (int)r, (lanes){0} - INFINITY, *last);
        lanes top = *row;
        while (row < last) top = larger(top, *++row);
        part[r] = top;
    }
    *(lanes *)to->top = larger(before, across(part, 1));
    for (int64_t r = 0; r < rows; r++) {
        lanes sum = {0};
        for (lanes *row = (lanes *)(scores + r * PITCH), *end = row + count / LANES; row < end; row++)
            sum += *row = exp_lanes(*row - to->top[r]);
        part[r] = sum;
    }
    lanes sums = across(part, 0), kept = exp_lanes(before - *(lanes *)to->top);
    *(lanes *)to->kept = kept;
    *(lanes *)to->total = first ? sums : *(lanes *)to->total * kept + sums;
}

/* out [T][heads][width]; of every query its highest score and the inverse of the sum of its weights [T][heads] are kept for
 * backward. `bounds` has sequences + 1 entries. */
void attention_forward(const Shape *m, const View *query, const View *key, const View *value, const int64_t *bounds,
                       int64_t sequences, float *out, float *tops, float *inverses, float *scratch) {
    int64_t H = m->heads, P = m->width, per = H / m->groups, pitch = pitch_of(m);
    Scratch s = cut(m, scratch);
    for (int64_t q = 0; q < sequences; q++)
        for (int64_t g = 0; g < m->groups; g++)
            for (int64_t at = bounds[q]; at < bounds[q + 1]; at += KEYS) {
                int64_t keys = least(KEYS, bounds[q + 1] - at), first = at == bounds[q];
                turn(key->data + at * key->token + g * key->head, key->token, keys, P, m->scale, s.turned);
                gather(value->data + at * value->token + g * value->head, value->token, keys, keys, P, 1.0f, s.values,
                       pitch);
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t i = at; i < bounds[q + 1]; i += ROWS) {
                        int64_t rows = least(ROWS, bounds[q + 1] - i), all = rounded(rows, TALL);
                        int64_t count = least(KEYS, i + ROWS - at), diagonal = i < at + KEYS;
                        float *top = s.per_query + (i - bounds[q]) * per * 2 + (h - g * per) * ROWS * 2;
                        Running to = {top, top + ROWS, {0}};
                        gather(query->data + i * query->token + h * query->head, query->token, rows, all, P, 1.0f, s.query,
                               PITCH);
                        product(rows, count, P, s.query, s.turned, KEY_PITCH, s.weights, PITCH);
                        soften(all, count, diagonal, first, s.weights, &to);
                        product(rows, P, least(count, keys), s.weights, s.values, pitch, s.product, PITCH);
                        for (int64_t r = 0; r < rows; r++) {
                            float *o = out + ((i + r) * H + h) * P, inverse = diagonal ? 1.0f / to.total[r] : 1.0f;
                            for (int64_t p = 0; p < P; p += LANES) {
                                lanes sum = *(lanes *)(s.product + r * PITCH + p);
                                if (!first) sum += *(lanes *)(o + p) * to.kept[r];
                                *(lanes *)(o + p) = sum * inverse;
                            }
                            tops[(i + r) * H + h] = to.top[r];
                            inverses[(i + r) * H + h] = inverse;
                        }
                    }
            }
}

/* From scores and the gradient of the weights [rows][count] to the weights and the gradient of the scores. */
static void harden(int64_t rows, int64_t count, int diagonal, float *scores, float *dscores, const float *tops,
                   int64_t step, const float *through, int64_t through_step) {
    for (int64_t r = 0; r < rows; r++) {
        lanes *s = (lanes *)(scores + r * PITCH), *d = (lanes *)(dscores + r * PITCH);
        float top = tops[r * step], mean = through[r * through_step];
        for (int64_t k = 0; k < count / LANES; k++) {
            s[k] = exp_lanes(s[k] - top);
            d[k] = s[k] * (d[k] - mean);
        }
        if (diagonal) {
            s += count / LANES - 1;
            d += count / LANES - 1;
            *s = pick(LANE > (int)r, (lanes){0}, *s);
            *d = pick(LANE > (int)r, (lanes){0}, *d);
        }
    }
}

/* One block of queries of one head against the tile in scratch: adds to dkeys and dvalues, writes or adds to dquery. */
static void block_back(const Shape *m, const Scratch *s, const float *query, int64_t stride, const float *dout,
                       const float *tops, const float *inverses, const float *through, int64_t rows, int64_t count,
                       int64_t keys, int diagonal, int first, float *dquery) {
    int64_t H = m->heads, P = m->width, per = H / m->groups, pitch = pitch_of(m), all = rounded(rows, TALL);
    gather(query, stride, rows, all, P, 1.0f, s->query, PITCH);
    gather(dout, H * P, rows, all, P, 1.0f, s->upstream, PITCH);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < P; p += LANES) *(lanes *)(s->upstream + r * PITCH + p) *= inverses[r * H];
    product(rows, count, P, s->query, s->turned, KEY_PITCH, s->weights, PITCH);
    product(rows, count, P, s->upstream, s->turned_values, KEY_PITCH, s->dscores, PITCH);
    harden(rows, count, diagonal, s->weights, s->dscores, tops, H, through, per);
    add_turned_product(least(count, keys), P, rows, s->weights, s->upstream, s->dvalues, pitch);
    add_turned_product(least(count, keys), P, rows, s->dscores, s->query, s->dkeys, pitch);
    product(rows, P, least(count, keys), s->dscores, s->keys, pitch, s->product, PITCH);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < P; p += LANES) {
            lanes sum = *(lanes *)(s->product + r * PITCH + p), *to = (lanes *)(dquery + r * H * P + p);
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
            for (int64_t t = bounds[q]; t < bounds[q + 1]; t++)
                for (int64_t h = g * per; h < (g + 1) * per; h++) {
                    const float *o = out + (t * H + h) * P, *d = dout + (t * H + h) * P;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t p = 0; p < P; p++) sum += o[p] * d[p];
                    s.per_query[(t - bounds[q]) * per + h - g * per] = sum * inverses[t * H + h];
                }
            for (int64_t at = bounds[q]; at < bounds[q + 1]; at += KEYS) {
                int64_t keys = least(KEYS, bounds[q + 1] - at);
                const float *k = key->data + at * key->token + g * key->head;
                const float *v = value->data + at * value->token + g * value->head;
                turn(k, key->token, keys, P, m->scale, s.turned);
                turn(v, value->token, keys, P, 1.0f, s.turned_values);
                gather(k, key->token, keys, keys, P, m->scale, s.keys, pitch);
                memset(s.dkeys, 0, sizeof(float) * KEYS * pitch);
                memset(s.dvalues, 0, sizeof(float) * KEYS * pitch);
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t i = at; i < bounds[q + 1]; i += ROWS)
                        block_back(m, &s, query->data + i * query->token + h * query->head, query->token,
                                   dout + (i * H + h) * P, tops + i * H + h, inverses + i * H + h,
                                   s.per_query + (i - bounds[q]) * per + h - g * per, least(ROWS, bounds[q + 1] - i),
                                   least(KEYS, i + ROWS - at), keys, i < at + KEYS, at == bounds[q],
                                   dquery + (i * H + h) * P);
                gather(s.dkeys, pitch, keys, keys, P, m->scale, dkey + (at * G + g) * P, G * P);
                gather(s.dvalues, pitch, keys, keys, P, 1.0f, dvalue + (at * G + g) * P, G * P);
            }
        }
}
