/* Causal attention with grouped queries inside each sequence of a packed row, and its gradients, in plain C.
 *
 * o_i = sum_{k <= i} p_ik v_k with p_ik = exp(scale q_i k_k - top_i) / total_i. A tile of keys and values is brought
 * into scratch once for all heads that read it; blocks of queries pass over it, and each query carries its highest
 * score `top`, the sum `total` of its weights and its output from tile to tile (the online softmax), so that nothing
 * has the size of length x length. Backward makes a tile's weights again from top and total. Products are made of
 * `tile`, whose sums stay in registers. Blocks and tiles are counted from the start of a sequence: its bits do not
 * depend on its neighbours. Built by native.py, called by attention_native.py.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ROWS 16 /* queries of a block; widths are multiples of it */
#define KEYS 64 /* keys of a tile: a multiple of ROWS, so that a block meets the diagonal in its last ROWS columns */
#define WIDEST 256
#define PITCH (WIDEST + ROWS) /* floats from row to row of a block; a power of two would use few sets of the cache */
#define KEY_PITCH (KEYS + ROWS)

/* vec is the processor's vector (AVX-512 or AVX2): gcc keeps longer ones in memory. The sums of a tile are
 * TALL x WIDE of them. LOW and HIGH: the lower and the upper halves of two vectors, element by element in turn. */
#if defined(__AVX512F__)
#define VEC 16
#define TALL 8
#define LANE {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define VEC 8
#define TALL 4
#define LANE {0, 1, 2, 3, 4, 5, 6, 7}
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
#define WIDE 2

typedef float vec __attribute__((vector_size(4 * VEC), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * VEC), aligned(4)));

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
    float *per_query;                                      /* [blocks][heads of a group][2][ROWS], or less */
} Scratch;

static inline int64_t pitch_of(const Shape *m) { return m->width + ROWS; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
static inline vec all(float x) { return (vec){0} + x; }

/* Floats of scratch for sequences of at most `longest` tokens. */
int64_t attention_scratch(const Shape *m, int64_t longest) {
    int64_t per_query = rounded(longest, ROWS) * 2 * (m->heads / m->groups);
    return 2 * m->width * KEY_PITCH + 4 * KEYS * pitch_of(m) + 5 * ROWS * PITCH + per_query;
}

static Scratch cut(const Shape *m, float *scratch) {
    Scratch s;
    float **parts[] = {&s.turned, &s.turned_values, &s.keys,    &s.values,   &s.dkeys,   &s.dvalues,
                       &s.query,  &s.weights,       &s.product, &s.upstream, &s.dscores, &s.per_query};
    int64_t turned = m->width * KEY_PITCH, kept = KEYS * pitch_of(m), block = ROWS * PITCH;
    int64_t sizes[] = {turned, turned, kept, kept, kept, kept, block, block, block, block, block, 0};
    for (int i = 0; i < 12; scratch += sizes[i++]) *parts[i] = scratch;
    return s;
}

/* c [tall][wide * VEC] = (or, with `add`, +=) a [tall][inner] b [inner][wide * VEC]. */
static inline __attribute__((always_inline)) void tile(const int tall, const int wide, const int add, int64_t inner,
                                                       const float *a, const int64_t a_row, const int64_t a_inner,
                                                       const float *b, int64_t b_row, float *c, int64_t c_row) {
    vec sums[TALL][WIDE];
    for (int r = 0; r < tall; r++)
        for (int v = 0; v < wide; v++) sums[r][v] = add ? *(vec *)(c + r * c_row + v * VEC) : all(0.0f);
    for (int64_t i = 0; i < inner; i++, a += a_inner, b += b_row) {
        vec row[WIDE];
        for (int v = 0; v < wide; v++) row[v] = *(const vec *)(b + v * VEC);
        for (int r = 0; r < tall; r++)
            for (int v = 0; v < wide; v++) sums[r][v] += row[v] * a[r * a_row];
    }
    for (int r = 0; r < tall; r++)
        for (int v = 0; v < wide; v++) *(vec *)(c + r * c_row + v * VEC) = sums[r][v];
}

/* c [rows][columns] = a [rows][inner] b [inner][columns]; a is a block. Rows are rounded up to TALL: c is scratch. */
static void product(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b, int64_t b_row,
                    float *c, int64_t c_row) {
    int64_t j = 0;
    for (; j + WIDE * VEC <= columns; j += WIDE * VEC)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, WIDE, 0, inner, a + r * PITCH, PITCH, 1, b + j, b_row, c + r * c_row + j, c_row);
    for (; j < columns; j += VEC)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, 1, 0, inner, a + r * PITCH, PITCH, 1, b + j, b_row, c + r * c_row + j, c_row);
}

/* c [rows][columns] += a^T b with a [inner][rows] and b [inner][columns], both blocks. */
static void add_turned_product(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b, float *c,
                               int64_t c_row) {
    int64_t j = 0;
    for (; j + WIDE * VEC <= columns; j += WIDE * VEC)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, WIDE, 1, inner, a + r, 1, PITCH, b + j, PITCH, c + r * c_row + j, c_row);
    for (; j < columns; j += VEC)
        for (int64_t r = 0; r < rows; r += TALL)
            tile(TALL, 1, 1, inner, a + r, 1, PITCH, b + j, PITCH, c + r * c_row + j, c_row);
}

/* Copies `rows` tokens of a head, times a factor for each or, without, for all of them. */
static void gather(const float *from, int64_t stride, int64_t rows, int64_t width, float factor, const float *factors,
                   int64_t step, float *to, int64_t pitch) {
    for (int64_t r = 0; r < rows; r++) {
        float times = factors ? factors[r * step] : factor;
        for (int64_t i = 0; i < width; i += VEC)
            *(vec *)(to + r * pitch + i) = *(const vec *)(from + r * stride + i) * times;
    }
}

/* A block of queries or of their gradients: zeros where the sequence has ended. */
static void gather_block(const float *from, int64_t stride, int64_t rows, int64_t width, const float *factors,
                         int64_t step, float *to) {
    gather(from, stride, rows, width, 1.0f, factors, step, to, PITCH);
    for (int64_t r = rows; r < rounded(rows, TALL); r++) memset(to + r * PITCH, 0, sizeof(float) * width);
}

/* to [width][KEY_PITCH] = from [rows][width]^T times a factor; columns are rounded up to ROWS, with zeros. A round
 * interleaves rows r and r + VEC / 2: the bits of an element's place, (row, column), move up by one and the highest
 * comes last. After as many rounds as a row has bits, rows and columns have changed places. */
static void turn(const float *from, int64_t stride, int64_t rows, int64_t width, float factor, float *to) {
    for (int64_t j = 0; j < rounded(rows, ROWS); j += VEC)
        for (int64_t i = 0; i < width; i += VEC) {
            vec now[VEC], next[VEC];
            for (int r = 0; r < VEC; r++)
                now[r] = j + r < rows ? *(const vec *)(from + (j + r) * stride + i) * factor : all(0.0f);
            for (int bits = 1; bits < VEC; bits *= 2) {
                for (int r = 0; r < VEC / 2; r++) {
                    next[2 * r] = LOW(now[r], now[r + VEC / 2]);
                    next[2 * r + 1] = HIGH(now[r], now[r + VEC / 2]);
                }
                memcpy(now, next, sizeof now);
            }
            for (int r = 0; r < VEC; r++) *(vec *)(to + (i + r) * KEY_PITCH + j) = now[r];
        }
}

static inline vec pick(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }
static inline vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* exp(x) for x of at most 88; exactly 0 below -87, where -infinity is, too; NaN stays NaN. */
static inline vec exp_vec(vec x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    vec n = x * 1.44269504f + round;
    ints power = ((ints)n << 23) + (127 << 23);
    n -= round;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f, p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((ints)(p * (vec)power) & ~(x < -87.0f));
}

/* Folds VEC rows into one: lane r is the sum, or with `top` the largest, of row r. */
static inline __attribute__((always_inline)) vec across(vec *rows, const int top) {
    for (int half = VEC / 2; half >= 1; half /= 2)
        for (int r = 0; r < half; r++) {
            vec low = LOW(rows[r], rows[r + half]), high = HIGH(rows[r], rows[r + half]);
            rows[r] = top ? larger(low, high) : low + high;
        }
    return rows[0];
}

/* Puts `fill` where the key of a column comes after the query: `corner` is row r of the ROWS last columns. */
static inline void mask(float *corner, int64_t r, float fill) {
    for (int v = 0; v < ROWS; v += VEC)
        *(vec *)(corner + v) = pick((ints)LANE + v > (int)r, all(fill), *(vec *)(corner + v));
}

/* What goes from tile to tile with the queries of a block. */
typedef struct {
    float *top, *total; /* [ROWS]: highest score and sum of the weights exp(score - top) so far */
    float kept[ROWS];   /* what output so far must be multiplied by */
} Running;

/* Makes weights of scores [rows][count]. */
static void soften(int64_t rows, int64_t count, int diagonal, int first, float *scores, Running *to) {
    vec part[ROWS];
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * PITCH;
        if (diagonal) mask(row + count - ROWS, r, -INFINITY);
        part[r] = *(vec *)row;
        for (int64_t k = VEC; k < count; k += VEC) part[r] = larger(part[r], *(vec *)(row + k));
    }
    for (int64_t r = rows; r < ROWS; r++) part[r] = all(0.0f);
    for (int v = 0; v < ROWS; v += VEC) {
        vec before = first ? all(-INFINITY) : *(vec *)(to->top + v), top = larger(before, across(part + v, 1));
        *(vec *)(to->top + v) = top;
        *(vec *)(to->kept + v) = exp_vec(before - top);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * PITCH, top = to->top[r];
        vec sum = all(0.0f);
        for (int64_t k = 0; k < count; k += VEC) sum += *(vec *)(row + k) = exp_vec(*(vec *)(row + k) - top);
        part[r] = sum;
    }
    for (int64_t r = rows; r < ROWS; r++) part[r] = all(0.0f);
    for (int v = 0; v < ROWS; v += VEC) {
        vec sums = across(part + v, 0), *total = (vec *)(to->total + v);
        *total = first ? sums : *total * *(vec *)(to->kept + v) + sums;
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
                turn(k, key->token, keys, P, m->scale, s.turned);
                gather(v, value->token, keys, P, 1.0f, 0, 0, s.values, pitch);
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t i = at; i < end; i += ROWS) {
                        int64_t rows = least(ROWS, end - i), count = least(KEYS, i + ROWS - at);
                        int64_t diagonal = i < at + KEYS;
                        const float *from = query->data + i * query->token + h * query->head;
                        float *top = s.per_query + ((i - begin) / ROWS * per + h - g * per) * 2 * ROWS;
                        Running to = {top, top + ROWS, {0}};
                        gather_block(from, query->token, rows, P, 0, 0, s.query);
                        product(rows, count, P, s.query, s.turned, KEY_PITCH, s.weights, PITCH);
                        soften(rounded(rows, TALL), count, diagonal, first, s.weights, &to);
                        product(rows, P, least(count, keys), s.weights, s.values, pitch, s.product, PITCH);
                        for (int64_t r = 0; r < rows; r++) {
                            float *o = out + ((i + r) * H + h) * P, inverse = diagonal ? 1.0f / to.total[r] : 1.0f;
                            for (int64_t p = 0; p < P; p += VEC) {
                                vec sum = *(vec *)(s.product + r * PITCH + p);
                                if (!first) sum += *(vec *)(o + p) * to.kept[r];
                                *(vec *)(o + p) = sum * inverse;
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
    product(rows, count, P, s->query, s->turned, KEY_PITCH, s->weights, PITCH);
    product(rows, count, P, s->upstream, s->turned_values, KEY_PITCH, s->dscores, PITCH);
    for (int64_t r = 0; r < rows; r++) {
        float *w = s->weights + r * PITCH, *d = s->dscores + r * PITCH, top = b->tops[r * b->step];
        for (int64_t k = 0; k < count; k += VEC) {
            vec weight = exp_vec(*(vec *)(w + k) - top);
            *(vec *)(w + k) = weight;
            *(vec *)(d + k) = weight * (*(vec *)(d + k) - b->through[r]);
        }
        if (diagonal) {
            mask(w + count - ROWS, r, 0.0f);
            mask(d + count - ROWS, r, 0.0f);
        }
    }
    add_turned_product(least(count, keys), P, rows, s->weights, s->upstream, s->dvalues, pitch);
    add_turned_product(least(count, keys), P, rows, s->dscores, s->query, s->dkeys, pitch);
    product(rows, P, least(count, keys), s->dscores, s->keys, pitch, s->product, PITCH);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < P; p += VEC) {
            vec sum = *(vec *)(s->product + r * PITCH + p), *to = (vec *)(b->dquery + r * wide + p);
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
                turn(k, key->token, keys, P, m->scale, s.turned);
                turn(v, value->token, keys, P, 1.0f, s.turned_values);
                gather(k, key->token, keys, P, m->scale, 0, 0, s.keys, pitch);
                memset(s.dkeys, 0, sizeof(float) * rounded(keys, TALL) * pitch);
                memset(s.dvalues, 0, sizeof(float) * rounded(keys, TALL) * pitch);
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t i = at; i < end; i += ROWS) {
                        int64_t place = i * H + h;
                        const float *from = query->data + i * query->token + h * query->head;
                        const float *through = s.per_query + (h - g * per) * length + i - begin;
                        Queries block = {from, dout + place * P, tops + place, inverses + place, through,
                                         dquery + place * P, query->token, H};
                        block_back(m, &s, &block, least(ROWS, end - i), least(KEYS, i + ROWS - at), keys, i < at + KEYS,
                                   at == begin);
                    }
                gather(s.dkeys, pitch, keys, P, m->scale, 0, 0, dkey + (at * G + g) * P, G * P);
                gather(s.dvalues, pitch, keys, P, 1.0f, 0, 0, dvalue + (at * G + g) * P, G * P);
            }
        }
}
