/* What lies between the two projections of a Mamba-2 mixer, and its gradients, for one packed row in plain C.
 *
 * Per sequence: u = conv(x B C) + bias, s = silu(u); dt = softplus(raw + bias), a = exp(-exp(A_log) dt);
 * h_t = a_t h_{t-1} + B_t (dt_t x_t)^T, y_t = C_t h_t + D x_t; out = rmsnorm_group(y silu(z)) weight.
 * The recurrence runs in chunks of as many tokens as a vector has lanes (state-space duality), i and j in a chunk:
 *   decay_ij = a_i ... a_{j+1}, begin_i = a_i ... a_0, end_j = decay_{last,j}, S_ij = C_i B_j;
 *   y_i = sum_{j<=i} decay_ij S_ij dt_j x_j + D x_i + begin_i C_i h; h' = begin_last h + sum_j end_j B_j (dt_j x_j)^T.
 * The decays are products of a, not exp of differences, so that one of 0 leaves the others exact. A chunk stays in the
 * first cache levels; memory sees the row, out, y and the state that enters each chunk. Tokens that a chunk lacks are
 * zeros. Sums over tokens are made per sequence and then added up. Built by native.py, called by mixer_native.py.
 */
#include <string.h>

#include "tiles.h"

#define CHUNK LANES
#define USUAL_TAPS 4 /* for which the loops over taps are unrolled */

typedef struct {
    int64_t heads, width, groups, state, taps;
    float eps;
} Shape;

typedef struct {
    const float *conv;      /* [taps][channels], the last tap meets the current token */
    const float *conv_bias; /* [channels] of x | B | C */
    const float *dt_bias, *A_log, *D; /* [heads] */
    const float *norm;      /* [heads * width] */
} Weights;

typedef struct {
    float *conv, *conv_bias, *dt_bias, *A_log, *D, *norm;
} Gradients;

typedef struct {
    float *s, *gate;        /* [CHUNK][channels]: silu(u), sigmoid(u) */
    float *dt, *slope, *a;  /* [heads][CHUNK]; slope is that of softplus */
    float *B, *C;           /* [state][CHUNK] of a group */
    float *scores;          /* [CHUNK][CHUNK]: S of a group */
    float *decay, *mixing;  /* [CHUNK][CHUNK] of a head; mixing_ij = decay_ij S_ij dt_j + D [i = j] */
    float *Bd, *Cd;         /* [state][CHUNK]: B end dt, C begin, of a head */
    float *states;          /* [heads][state][width]; backward: gradient of the state after the chunk */
    float *y;               /* [CHUNK][heads * width]; backward: its gradient */
    /* backward only */
    float *x_t, *g_t;       /* [width][CHUNK]: x and the gradient of y of a head */
    float *R, *dscores;     /* [CHUNK][CHUNK]: gradient of y_i times x_j, of a head; gradient of S */
    float *Z, *V;           /* [state][CHUNK] of a head: h times gradient of y_i; gradient of h' times x_j */
    float *dB, *dC;         /* [state][CHUNK] of a group */
    float *draw;            /* [heads][CHUNK]: gradient of raw */
    float *ds;              /* [CHUNK][channels] */
    float *du;              /* [CHUNK + taps - 1][channels], the last rows from the chunk after this one */
    /* from du on zero when a sequence begins; gradients of weights */
    float *dt_bias, *A_log, *D; /* [heads][CHUNK], not yet summed over lanes */
    float *conv, *conv_bias, *norm;
} Tiles;

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

/* log(1 + e) = 2 atanh(e / (2 + e)) with e = exp(-|x|): to the precision of a float also where it is tiny. */
INLINE float softplus(float x) {
    float e = exp_(-fabsf(x)), z = e / (2.0f + e), q = z * z;
    float series = 1 / 9.0f + q * (1 / 11.0f + q * (1 / 13.0f + q * (1 / 15.0f)));
    series = 1.0f + q * (1 / 3.0f + q * (1 / 5.0f + q * (1 / 7.0f + q * series)));
    return (x > 0.0f ? x : 0.0f) + 2.0f * z * series;
}

static inline int64_t inner_of(const Shape *m) { return m->heads * m->width; }
static inline int64_t channels_of(const Shape *m) { return inner_of(m) + 2 * m->groups * m->state; }

/* Places the tiles in scratch and says how many floats they take. */
static int64_t place(const Shape *m, Tiles *w, float *scratch) {
    int64_t channels = channels_of(m), row = m->heads * CHUNK, group = m->state * CHUNK, square = CHUNK * CHUNK;
    float *at = scratch;
#define TAKE(name, count) w->name = at, at += (count)
    TAKE(s, CHUNK * channels), TAKE(gate, CHUNK * channels), TAKE(dt, row), TAKE(slope, row), TAKE(a, row);
    TAKE(B, group), TAKE(C, group), TAKE(scores, square), TAKE(decay, square), TAKE(mixing, square);
    TAKE(Bd, group), TAKE(Cd, group), TAKE(states, m->heads * m->state * m->width), TAKE(y, CHUNK * inner_of(m));
    TAKE(x_t, m->width * CHUNK), TAKE(g_t, m->width * CHUNK), TAKE(R, square), TAKE(dscores, square);
    TAKE(Z, group), TAKE(V, group), TAKE(dB, group), TAKE(dC, group), TAKE(draw, row), TAKE(ds, CHUNK * channels);
    TAKE(du, (CHUNK + m->taps - 1) * channels), TAKE(dt_bias, row), TAKE(A_log, row), TAKE(D, row);
    TAKE(conv, m->taps * channels), TAKE(conv_bias, channels), TAKE(norm, inner_of(m));
#undef TAKE
    return at - scratch;
}

/* Floats of scratch. */
int64_t mixer_scratch(const Shape *m) {
    Tiles unused;
    return place(m, &unused, 0);
}

/* u of a token (without a bias where that is null) from the last tap and its x backwards. */
INLINE void convolve(const int64_t taps, int64_t channels, const float *restrict bias, const float *restrict tap,
                     const float *restrict x, int64_t stride, float *restrict u) {
    for (int64_t c = 0; c < channels; c++) {
        float made = bias ? bias[c] : 0.0f;
        for (int64_t k = 0; k < taps; k++) made += tap[c - k * channels] * x[c - k * stride];
        u[c] = made;
    }
}

/* s, gate, dt, slope and a of the `count` tokens from `begin` on; `in` has `stride` floats a row: x B C raw. Asks for
 * the row that lies `ahead` tokens on. */
static void prepare(const Shape *m, const Weights *weights, const float *in, int64_t stride, int64_t begin,
                    int64_t count, int64_t ahead, Tiles *w) {
    int64_t channels = channels_of(m), H = m->heads;
    const float *last = weights->conv + (m->taps - 1) * channels;
    for (int64_t t = 0; t < count; t++) {
        float *restrict s = w->s + t * channels, *restrict gate = w->gate + t * channels;
        int64_t reach = begin + t < m->taps ? begin + t + 1 : m->taps;
        const float *x = in + (begin + t) * stride;
        prefetch(x + ahead * stride, channels);
        if (reach == USUAL_TAPS) convolve(USUAL_TAPS, channels, weights->conv_bias, last, x, stride, s);
        else convolve(reach, channels, weights->conv_bias, last, x, stride, s);
        for (int64_t c = 0; c < channels; c++) {
            gate[c] = sigmoid(s[c]);
            s[c] *= gate[c];
        }
    }
    memset(w->s + count * channels, 0, sizeof(float) * (CHUNK - count) * channels);
    memset(w->gate + count * channels, 0, sizeof(float) * (CHUNK - count) * channels);
    for (int64_t h = 0; h < H; h++) {
        float rate = -expf(weights->A_log[h]), *restrict a = w->a + h * CHUNK, *restrict dt = w->dt + h * CHUNK;
        float *restrict slope = w->slope + h * CHUNK;
        for (int64_t t = 0; t < CHUNK; t++) /* a missing token has a = 1 */
            a[t] = t < count ? in[(begin + t) * stride + channels + h] + weights->dt_bias[h] : -100.0f;
        for (int64_t t = 0; t < CHUNK; t++) {
            dt[t] = softplus(a[t]);
            slope[t] = sigmoid(a[t]);
            a[t] = exp_(rate * dt[t]);
        }
    }
}

/* B, C and S of a group. */
static void prepare_group(const Shape *m, int64_t g, Tiles *w) {
    int64_t N = m->state, channels = channels_of(m);
    const float *B = w->s + inner_of(m) + g * N;
    transpose(CHUNK, N, B, channels, w->B, CHUNK);
    transpose(CHUNK, N, B + m->groups * N, channels, w->C, CHUNK);
    product(CHUNK, CHUNK, N, w->C, 1, CHUNK, w->B, CHUNK, 0.0f, w->scores, CHUNK);
}

/* Decay and mixing of a head, B and C times theirs; returns begin. */
INLINE lanes prepare_head(const Shape *m, int64_t h, float D, Tiles *w) {
    const float *a = w->a + h * CHUNK;
    lanes dt = load(w->dt + h * CHUNK), decay = {0}, begin;
    float running[CHUNK], product = 1.0f;
    for (int64_t i = 0; i < CHUNK; i++) {
        lanes unit = first(i + 1) - first(i);
        running[i] = product *= a[i];
        decay = decay * a[i] + unit;
        store(w->decay + i * CHUNK, decay);
        store(w->mixing + i * CHUNK, load(w->scores + i * CHUNK) * decay * dt + unit * D);
    }
    begin = load(running);
    for (int64_t n = 0; n < m->state; n++) {
        store(w->Bd + n * CHUNK, load(w->B + n * CHUNK) * (decay * dt));
        store(w->Cd + n * CHUNK, load(w->C + n * CHUNK) * begin);
    }
    return begin;
}

/* Gate and norm of one token. */
static void gate_forward(const Shape *m, const float *norm, const float *restrict z, const float *restrict y,
                         float *restrict out) {
    int64_t size = inner_of(m) / m->groups;
    for (int64_t g = 0; g < m->groups; g++) {
        lanes squares = {0};
        for (int64_t i = g * size; i < (g + 1) * size; i++) out[i] = y[i] * z[i] * sigmoid(z[i]);
        for (int64_t i = g * size; i < (g + 1) * size; i += LANES) squares += load(out + i) * load(out + i);
        float inverse = 1.0f / sqrtf(sum(squares) / size + m->eps);
        for (int64_t i = g * size; i < (g + 1) * size; i++) out[i] *= inverse * norm[i];
    }
}

/* out [T][inner] from the projected row [z | x B C | raw]; y [T][inner] and the state entering each chunk
 * [chunks][heads][state][width] are kept for backward (no state where `kept_states` is null). `bounds` has
 * sequences + 1 entries. */
void mixer_forward(const Shape *m, const Weights *weights, const float *projected, int64_t stride,
                   const int64_t *bounds, int64_t sequences, float *out, float *kept_y, float *kept_states,
                   float *scratch) {
    int64_t inner = inner_of(m), channels = channels_of(m), N = m->state, P = m->width, H = m->heads, square = N * P;
    Tiles tiles, *w = &tiles;
    place(m, w, scratch);
    for (int64_t q = 0; q < sequences; q++) {
        int64_t L = bounds[q + 1] - bounds[q];
        memset(w->states, 0, sizeof(float) * H * square);
        for (int64_t begin = 0; begin < L; begin += CHUNK) {
            int64_t count = L - begin < CHUNK ? L - begin : CHUNK, at = bounds[q] + begin;
            if (kept_states) {
                memcpy(kept_states, w->states, sizeof(float) * H * square);
                kept_states += H * square;
            }
            prepare(m, weights, projected + bounds[q] * stride + inner, stride, begin, count, 4, w);
            for (int64_t h = 0; h < H; h++) {
                if (h % (H / m->groups) == 0) prepare_group(m, h / (H / m->groups), w);
                lanes passed = prepare_head(m, h, weights->D[h], w);
                float *x = w->s + h * P, *y = w->y + h * P, *state = w->states + h * square;
                product(CHUNK, P, CHUNK, w->mixing, CHUNK, 1, x, channels, 0.0f, y, inner);
                product(CHUNK, P, N, w->Cd, 1, CHUNK, state, P, 1.0f, y, inner);
                product(N, P, CHUNK, w->Bd, CHUNK, 1, x, channels, passed[CHUNK - 1], state, P);
            }
            memcpy(kept_y + at * inner, w->y, sizeof(float) * count * inner);
            for (int64_t t = 0; t < count; t++) {
                const float *z = projected + (at + t) * stride;
                prefetch(z + CHUNK * stride, inner);
                gate_forward(m, weights->norm, z, w->y + t * inner, out + (at + t) * inner);
            }
        }
    }
}

/* Gate and norm of one token: from the gradient of out to those of y and z; adds to the norm's. */
static void gate_backward(const Shape *m, const float *restrict norm, const float *restrict z,
                          const float *restrict y, const float *restrict dout, float *restrict dy, float *restrict dz,
                          float *restrict dnorm) {
    int64_t size = inner_of(m) / m->groups;
    for (int64_t g = 0; g < m->groups; g++) {
        lanes squares = {0}, products = {0};
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            dz[i] = sigmoid(z[i]);
            dy[i] = y[i] * z[i] * dz[i];
        }
        for (int64_t i = g * size; i < (g + 1) * size; i += LANES) {
            squares += load(dy + i) * load(dy + i);
            products += load(dout + i) * load(norm + i) * load(dy + i);
        }
        float inverse = 1.0f / sqrtf(sum(squares) / size + m->eps), mean = sum(products) * inverse * inverse / size;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            float gated = dy[i], gate = dz[i];
            dnorm[i] += dout[i] * gated * inverse;
            float dgated = (dout[i] * norm[i] - gated * mean) * inverse;
            dy[i] = dgated * z[i] * gate;
            dz[i] = dgated * y[i] * gate * (1.0f + z[i] * (1.0f - gate));
        }
    }
}

/* A head in a chunk: from the gradients of y and of the state after it to those of x, raw and the state before it; adds
 * to those of B, C, S and of the head's weights. */
static void head_backward(const Shape *m, int64_t h, const Weights *weights, const float *state, Tiles *w) {
    int64_t inner = inner_of(m), channels = channels_of(m), N = m->state, P = m->width;
    const float *x = w->s + h * P, *g = w->y + h * P;
    float *dx = w->ds + h * P, *dstate = w->states + h * N * P;
    lanes begin = prepare_head(m, h, weights->D[h], w), end = load(w->decay + (CHUNK - 1) * CHUNK);
    lanes dt = load(w->dt + h * CHUNK);
    lanes read = {0}, written = {0}, kept = {0}, ddt = {0}, dlog = {0}, dD = {0};
    transpose(CHUNK, P, x, channels, w->x_t, CHUNK);
    transpose(CHUNK, P, g, inner, w->g_t, CHUNK);
    product(CHUNK, CHUNK, P, g, inner, 1, w->x_t, CHUNK, 0.0f, w->R, CHUNK);
    product(N, CHUNK, P, state, P, 1, w->g_t, CHUNK, 0.0f, w->Z, CHUNK);
    product(N, CHUNK, P, dstate, P, 1, w->x_t, CHUNK, 0.0f, w->V, CHUNK);
    for (int64_t n = 0; n < N; n++) {
        lanes Z = load(w->Z + n * CHUNK), V = load(w->V + n * CHUNK);
        read += load(w->Cd + n * CHUNK) * Z;
        written += load(w->B + n * CHUNK) * V;
        store(w->dC + n * CHUNK, load(w->dC + n * CHUNK) + Z * begin);
        store(w->dB + n * CHUNK, load(w->dB + n * CHUNK) + V * (end * dt));
    }
    for (int64_t i = 0; i < N * P; i += LANES) kept += load(state + i) * load(dstate + i);
    /* log a_k moves what goes from a token before k to one from k on, to the end, or from the beginning to there */
    lanes across = written * (end * dt);
    for (int64_t i = CHUNK - 1; i >= 0; i--) {
        lanes R = load(w->R + i * CHUNK), decay = load(w->decay + i * CHUNK), before = first(i);
        lanes weight = load(w->scores + i * CHUNK) * decay * R;
        store(w->dscores + i * CHUNK, load(w->dscores + i * CHUNK) + R * decay * dt);
        ddt += weight;
        across += weight * dt;
        dD += R * (first(i + 1) - before);
        store(w->R + i * CHUNK, across * before + read * (1.0f - before));
    }
    transpose(CHUNK, CHUNK, w->R, CHUNK, w->x_t, CHUNK);
    dlog += sum(kept) * begin[CHUNK - 1];
    for (int64_t i = 0; i < CHUNK; i++) dlog += load(w->x_t + i * CHUNK);
    product(CHUNK, P, CHUNK, w->mixing, 1, CHUNK, g, inner, 0.0f, dx, channels);
    product(CHUNK, P, N, w->Bd, 1, CHUNK, dstate, P, 1.0f, dx, channels);
    product(N, P, CHUNK, w->Cd, CHUNK, 1, g, inner, begin[CHUNK - 1], dstate, P);
    float rate = -expf(weights->A_log[h]);
    lanes draw = (ddt + written * end + dlog * rate) * load(w->slope + h * CHUNK);
    store(w->draw + h * CHUNK, draw);
    store(w->dt_bias + h * CHUNK, load(w->dt_bias + h * CHUNK) + draw);
    store(w->A_log + h * CHUNK, load(w->A_log + h * CHUNK) + dlog * dt * rate);
    store(w->D + h * CHUNK, load(w->D + h * CHUNK) + dD);
}

/* The scan of a chunk: all of ds and draw. */
static void scan_backward(const Shape *m, const Weights *weights, const float *states, Tiles *w) {
    int64_t channels = channels_of(m), N = m->state, per = m->heads / m->groups, group = N * CHUNK;
    for (int64_t g = 0; g < m->groups; g++) {
        prepare_group(m, g, w);
        memset(w->dscores, 0, sizeof(float) * CHUNK * CHUNK);
        memset(w->dB, 0, sizeof(float) * group);
        memset(w->dC, 0, sizeof(float) * group);
        for (int64_t h = g * per; h < (g + 1) * per; h++) head_backward(m, h, weights, states + h * N * m->width, w);
        product(N, CHUNK, CHUNK, w->C, CHUNK, 1, w->dscores, CHUNK, 1.0f, w->dB, CHUNK);
        transpose(CHUNK, CHUNK, w->dscores, CHUNK, w->R, CHUNK);
        product(N, CHUNK, CHUNK, w->B, CHUNK, 1, w->R, CHUNK, 1.0f, w->dC, CHUNK);
        float *dB = w->ds + inner_of(m) + g * N;
        transpose(N, CHUNK, w->dB, CHUNK, dB, channels);
        transpose(N, CHUNK, w->dC, CHUNK, dB + m->groups * N, channels);
    }
}

/* du of a token; adds to the gradients of bias and taps. */
INLINE void convolve_back(const int64_t taps, int64_t channels, int64_t t, const float *restrict x, int64_t stride,
                          float *restrict dtap, Tiles *w) {
    const float *restrict s = w->s + t * channels, *restrict gate = w->gate + t * channels;
    const float *restrict ds = w->ds + t * channels;
    float *restrict du = w->du + t * channels, *restrict dbias = w->conv_bias;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
        float d = ds[c] * (gate[c] + s[c] * (1.0f - gate[c]));
        du[c] = d;
        dbias[c] += d;
        for (int64_t k = 0; k < taps; k++) dtap[c - k * channels] += d * x[c - k * stride];
    }
}

/* From ds and draw to the gradient of the projected row, for `count` tokens from `begin` on. */
static void conv_backward(const Shape *m, const Weights *weights, const float *in, int64_t stride, int64_t begin,
                          int64_t count, float *drow, int64_t wide, Tiles *w) {
    int64_t channels = channels_of(m), T = m->taps;
    float *dlast = w->conv + (T - 1) * channels;
    const float *last = weights->conv + (T - 1) * channels;
    for (int64_t t = 0; t < CHUNK; t++) {
        int64_t reach = t >= count ? 0 : begin + t < T ? begin + t + 1 : T;
        const float *x = in + (begin + t) * stride;
        if (reach == USUAL_TAPS) convolve_back(USUAL_TAPS, channels, t, x, stride, dlast, w);
        else convolve_back(reach, channels, t, x, stride, dlast, w);
    }
    for (int64_t t = 0; t < count; t++) {
        const float *du = w->du + t * channels;
        if (T == USUAL_TAPS) convolve(USUAL_TAPS, channels, 0, last, du, -channels, drow + t * wide);
        else convolve(T, channels, 0, last, du, -channels, drow + t * wide);
        for (int64_t h = 0; h < m->heads; h++) drow[t * wide + channels + h] = w->draw[h * CHUNK + t];
    }
    memmove(w->du + CHUNK * channels, w->du, sizeof(float) * (m->taps - 1) * channels);
}

static void add(float *restrict to, const float *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

/* Gradients of the projected row (every entry is written) and of the weights (added to). */
void mixer_backward(const Shape *m, const Weights *weights, const float *projected, int64_t stride,
                    const int64_t *bounds, int64_t sequences, const float *kept_y, const float *kept_states,
                    const float *dout, float *dprojected, Gradients *total, float *scratch) {
    int64_t inner = inner_of(m), channels = channels_of(m), H = m->heads, wide = inner + channels + H;
    int64_t square = H * m->state * m->width;
    Tiles tiles, *w = &tiles;
    float *over = scratch + place(m, w, scratch);
    for (int64_t q = 0; q < sequences; q++) {
        int64_t L = bounds[q + 1] - bounds[q], chunks = (L + CHUNK - 1) / CHUNK;
        const float *in = projected + bounds[q] * stride + inner;
        memset(w->states, 0, sizeof(float) * square);
        memset(w->du, 0, sizeof(float) * (over - w->du));
        for (int64_t k = chunks - 1; k >= 0; k--) {
            int64_t begin = k * CHUNK, count = L - begin < CHUNK ? L - begin : CHUNK, at = bounds[q] + begin;
            float *drow = dprojected + at * wide;
            prepare(m, weights, in, stride, begin, count, -CHUNK, w);
            for (int64_t t = 0; t < count; t++) {
                const float *z = projected + (at + t) * stride, *y = kept_y + (at + t) * inner;
                const float *g = dout + (at + t) * inner;
                prefetch(z - CHUNK * stride, inner);
                prefetch(y - CHUNK * inner, inner);
                prefetch(g - CHUNK * inner, inner);
                prefetch(drow + (t - CHUNK) * wide, wide);
                gate_backward(m, weights->norm, z, y, g, w->y + t * inner, drow + t * wide, w->norm);
            }
            memset(w->y + count * inner, 0, sizeof(float) * (CHUNK - count) * inner);
            scan_backward(m, weights, kept_states + k * square, w);
            conv_backward(m, weights, in, stride, begin, count, drow + inner, wide, w);
        }
        kept_states += chunks * square;
        add(total->conv, w->conv, m->taps * channels);
        add(total->conv_bias, w->conv_bias, channels);
        add(total->norm, w->norm, inner);
        for (int64_t h = 0; h < H; h++) {
            total->dt_bias[h] += sum(load(w->dt_bias + h * CHUNK));
            total->A_log[h] += sum(load(w->A_log + h * CHUNK));
            total->D[h] += sum(load(w->D + h * CHUNK));
        }
    }
}
