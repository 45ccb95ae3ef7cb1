/* What lies between the two projections of a Mamba-2 mixer, and its gradients, for one packed row in plain C.
 *
 * Per sequence: u = conv(x B C) + bias, s = silu(u); dt = softplus(raw + bias), a = exp(-exp(A_log) dt);
 * h_t = a_t h_{t-1} + B_t (dt_t x_t)^T, y_t = C_t h_t + D x_t; out = rmsnorm_group(y silu(z)) weight.
 * The recurrence runs token by token with a head's state in the first-level cache, so that no intermediate of the row
 * is written to memory but y and the state that enters each CHUNK of tokens. Backward makes the states of a chunk again.
 * Sums over tokens are made per sequence and then added up. Built by native.py, called by mixer_native.py.
 */
#include <string.h>

#include "lanes.h"

#define CHUNK 16

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

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

static inline float sum(lanes v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

static inline int64_t inner_of(const Shape *m) { return m->heads * m->width; }
static inline int64_t channels_of(const Shape *m) { return inner_of(m) + 2 * m->groups * m->state; }

/* Floats of scratch for sequences of at most `longest` tokens. */
int64_t mixer_scratch(const Shape *m, int64_t longest) {
    int64_t inner = inner_of(m), channels = channels_of(m), square = m->state * m->width;
    int64_t per_group = m->heads / m->groups;
    int64_t rows = longest * (2 * channels + 4 * m->heads + inner);
    int64_t sums = (m->taps + 1) * channels + 3 * m->heads + inner;
    return rows + sums + (CHUNK + 1 + per_group) * square + 2 * CHUNK * m->state * LANES;
}

/* u and silu(u) [L][channels], dt and its derivative, and a, [L][heads]. `in` has `stride` floats a row: x B C dt. */
static void prepare(const Shape *m, const Weights *w, const float *in, int64_t stride, int64_t L, float *u, float *s,
                    float *dt, float *slope, float *a) {
    int64_t channels = channels_of(m);
    float rate[m->heads];
    for (int64_t h = 0; h < m->heads; h++) rate[h] = -expf(w->A_log[h]);
    for (int64_t t = 0; t < L; t++) {
        float *restrict row = u + t * channels;
        memcpy(row, w->conv_bias, sizeof(float) * channels);
        for (int64_t k = 0; k < m->taps && k <= t; k++) {
            const float *restrict tap = w->conv + (m->taps - 1 - k) * channels, *restrict x = in + (t - k) * stride;
            for (int64_t c = 0; c < channels; c++) row[c] += tap[c] * x[c];
        }
        float *restrict out = s + t * channels;
        for (int64_t c = 0; c < channels; c++) out[c] = row[c] * sigmoid(row[c]);
        for (int64_t h = 0; h < m->heads; h++) {
            float raw = in[t * stride + channels + h] + w->dt_bias[h];
            float step = raw > 20.0f ? raw : log1pf(exp_(raw));
            dt[t * m->heads + h] = step;
            slope[t * m->heads + h] = sigmoid(raw);
            a[t * m->heads + h] = exp_(rate[h] * step);
        }
    }
}

/* One token of one head: h = a h + B xd^T; adds C h to y. All [state][width]. */
static inline void advance(int64_t N, int64_t P, float a, float dt, const float *x, const float *B, const float *C,
                           const float *from, float *to, float *y) {
    for (int64_t p = 0; p < P; p += LANES) {
        lanes xd = *(const lanes *)(x + p) * dt, even = {0}, odd = {0};
        for (int64_t n = 0; n < N; n += 2) {
            lanes one = *(const lanes *)(from + n * P + p) * a + xd * B[n];
            lanes two = *(const lanes *)(from + (n + 1) * P + p) * a + xd * B[n + 1];
            *(lanes *)(to + n * P + p) = one;
            *(lanes *)(to + (n + 1) * P + p) = two;
            even += one * C[n];
            odd += two * C[n + 1];
        }
        *(lanes *)(y + p) = even + odd;
    }
}

/* out [L][inner] from the projected row [z | x B C | dt]; y [L][inner] and the state entering each chunk
 * [chunks][heads][state][width] are kept for backward (no state where `kept_states` is null). `bounds` has sequences + 1
 * entries. */
void mixer_forward(const Shape *m, const Weights *w, const float *projected, int64_t stride, const int64_t *bounds,
                   int64_t sequences, float *out, float *kept_y, float *kept_states, float *scratch) {
    int64_t inner = inner_of(m), channels = channels_of(m), N = m->state, P = m->width, per = m->heads / m->groups;
    int64_t square = N * P, size = inner / m->groups, chunk = 0;
    for (int64_t q = 0; q < sequences; q++) {
        int64_t L = bounds[q + 1] - bounds[q], chunks = (L + CHUNK - 1) / CHUNK;
        const float *row = projected + bounds[q] * stride;
        float *y = kept_y + bounds[q] * inner, *u = scratch, *s = u + L * channels;
        float *dt = s + L * channels, *slope = dt + L * m->heads, *a = slope + L * m->heads;
        float *state = a + L * m->heads;
        prepare(m, w, row + inner, stride, L, u, s, dt, slope, a);
        for (int64_t h = 0; h < m->heads; h++) {
            memset(state, 0, sizeof(float) * square);
            for (int64_t t = 0; t < L; t++) {
                if (kept_states && t % CHUNK == 0)
                    memcpy(kept_states + ((chunk + t / CHUNK) * m->heads + h) * square, state, sizeof(float) * square);
                const float *x = s + t * channels + h * P, *B = s + t * channels + inner + h / per * N;
                float *to = y + t * inner + h * P;
                advance(N, P, a[t * m->heads + h], dt[t * m->heads + h], x, B, B + m->groups * N, state, state, to);
                for (int64_t p = 0; p < P; p++) to[p] += w->D[h] * x[p];
            }
        }
        for (int64_t t = 0; t < L; t++) {
            const float *restrict z = row + t * stride, *restrict yt = y + t * inner;
            float *restrict o = out + (bounds[q] + t) * inner;
            for (int64_t i = 0; i < inner; i++) o[i] = yt[i] * z[i] * sigmoid(z[i]);
            for (int64_t g = 0; g < m->groups; g++) {
                float square_sum = 0.0f;
                float *restrict og = o + g * size;
                const float *restrict wg = w->norm + g * size;
#pragma omp simd reduction(+ : square_sum)
                for (int64_t i = 0; i < size; i++) square_sum += og[i] * og[i];
                float inverse = 1.0f / sqrtf(square_sum / size + m->eps);
                for (int64_t i = 0; i < size; i++) og[i] *= inverse * wg[i];
            }
        }
        chunk += chunks;
    }
}

/* Gate and norm of one token: from the gradient of out to those of y and z; adds to the norm's. */
static void gate_backward(const Shape *m, const Weights *w, const float *restrict z, const float *restrict y,
                          const float *restrict dout, float *restrict dy, float *restrict dz, float *restrict dnorm) {
    int64_t size = inner_of(m) / m->groups;
    for (int64_t g = 0; g < m->groups; g++) {
        float square_sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : square_sum, product)
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            float gate = sigmoid(z[i]), gated = y[i] * z[i] * gate;
            dz[i] = gate;
            dy[i] = gated;
            square_sum += gated * gated;
            product += dout[i] * w->norm[i] * gated;
        }
        float inverse = 1.0f / sqrtf(square_sum / size + m->eps), mean = product * inverse * inverse / size;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            float gated = dy[i], gate = dz[i];
            dnorm[i] += dout[i] * gated * inverse;
            float dgated = (dout[i] * w->norm[i] - gated * mean) * inverse;
            dy[i] = dgated * z[i] * gate;
            dz[i] = dgated * y[i] * gate * (1.0f + z[i] * (1.0f - gate));
        }
    }
}

typedef struct {
    float *states;  /* [CHUNK + 1][state][width]: before the chunk and after each of its tokens */
    float *carried; /* [heads of a group][state][width]: gradient of the state after the chunk, times its decay */
    float *dB, *dC; /* [CHUNK][state][LANES], over the heads of a group and not yet summed over lanes */
} ScanScratch;

/* `blocks` times LANES columns of one token of one head, whose state goes from `before` (after it: + square) on. */
static inline __attribute__((always_inline)) void step_back(
    const int blocks, int64_t N, int64_t P, float step, float decay, const float *x, const float *B, const float *C,
    const float *g, const float *before, float *carried, float *dB, float *dC, float *dx, lanes *through, lanes *pulled) {
    lanes gp[2], xp[2], xd[2], dxd[2] = {{0}, {0}};
    for (int b = 0; b < blocks; b++) {
        gp[b] = *(const lanes *)(g + b * LANES);
        xp[b] = *(const lanes *)(x + b * LANES);
        xd[b] = xp[b] * step;
    }
    for (int64_t n = 0; n < N; n++) {
        lanes to_B = *(lanes *)(dB + n * LANES), to_C = *(lanes *)(dC + n * LANES);
        for (int b = 0; b < blocks; b++) {
            int64_t at = n * P + b * LANES;
            lanes *place = (lanes *)(carried + at);
            lanes grad = *place + gp[b] * C[n];
            dxd[b] += grad * B[n];
            *through += grad * *(const lanes *)(before + at);
            to_B += grad * xd[b];
            to_C += gp[b] * *(const lanes *)(before + N * P + at);
            *place = grad * decay;
        }
        *(lanes *)(dB + n * LANES) = to_B;
        *(lanes *)(dC + n * LANES) = to_C;
    }
    for (int b = 0; b < blocks; b++) {
        *(lanes *)(dx + b * LANES) += dxd[b] * step;
        *pulled += dxd[b] * xp[b];
    }
}

/* One chunk of one head, last token first. `row` [L][wide] is the gradient of the projected row: adds to that of x after
 * silu and writes that of dt; `dlog` is that of log a. */
static void scan_backward(const Shape *m, int64_t L, int64_t begin, int64_t h, const float *s, const float *dt,
                          const float *a, const float *dy, float *row, float *dlog, ScanScratch *r) {
    int64_t inner = inner_of(m), channels = channels_of(m), N = m->state, P = m->width, per = m->heads / m->groups;
    int64_t square = N * P, wide = inner + channels + m->heads, count = L - begin < CHUNK ? L - begin : CHUNK;
    float *carried = r->carried + h % per * square, unused[P];
    for (int64_t i = 0; i < count; i++) {
        int64_t t = begin + i;
        const float *x = s + t * channels + h * P, *B = s + t * channels + inner + h / per * N;
        float *after = r->states + (i + 1) * square;
        advance(N, P, a[t * m->heads + h], dt[t * m->heads + h], x, B, B + m->groups * N, after - square, after, unused);
    }
    for (int64_t i = count - 1; i >= 0; i--) {
        int64_t t = begin + i;
        const float *x = s + t * channels + h * P, *B = s + t * channels + inner + h / per * N, *C = B + m->groups * N;
        const float *g = dy + t * inner + h * P, *before = r->states + i * square;
        float decay = a[t * m->heads + h], step = dt[t * m->heads + h];
        float *dB = r->dB + i * N * LANES, *dC = r->dC + i * N * LANES, *dx = row + t * wide + inner + h * P;
        lanes through = {0}, pulled = {0};
        int64_t p = 0;
        for (; p + 2 * LANES <= P; p += 2 * LANES)
            step_back(2, N, P, step, decay, x + p, B, C, g + p, before + p, carried + p, dB, dC, dx + p, &through, &pulled);
        for (; p < P; p += LANES)
            step_back(1, N, P, step, decay, x + p, B, C, g + p, before + p, carried + p, dB, dC, dx + p, &through, &pulled);
        row[t * wide + inner + channels + h] = sum(pulled);
        dlog[t * m->heads + h] = sum(through) * decay;
    }
}

/* From the gradient of silu(u) and dt in `row` [L][wide] to that of the projected row, in place; `du` is scratch. */
static void conv_backward(const Shape *m, const Weights *w, const float *in, int64_t stride, int64_t L, const float *u,
                          float *row, float *du, float *dconv, float *dbias) {
    int64_t inner = inner_of(m), channels = channels_of(m), wide = inner + channels + m->heads;
    for (int64_t t = 0; t < L; t++) {
        const float *restrict before = u + t * channels, *restrict ds = row + t * wide + inner;
        float *restrict to = du + t * channels;
        for (int64_t c = 0; c < channels; c++) {
            float gate = sigmoid(before[c]);
            to[c] = ds[c] * gate * (1.0f + before[c] * (1.0f - gate));
            dbias[c] += to[c];
        }
        for (int64_t k = 0; k < m->taps && k <= t; k++) {
            float *restrict tap = dconv + (m->taps - 1 - k) * channels;
            const float *restrict x = in + (t - k) * stride;
            for (int64_t c = 0; c < channels; c++) tap[c] += to[c] * x[c];
        }
    }
    for (int64_t t = 0; t < L; t++) {
        float *restrict to = row + t * wide + inner;
        memset(to, 0, sizeof(float) * channels);
        for (int64_t k = 0; k < m->taps && t + k < L; k++) {
            const float *restrict tap = w->conv + (m->taps - 1 - k) * channels, *restrict later = du + (t + k) * channels;
            for (int64_t c = 0; c < channels; c++) to[c] += tap[c] * later[c];
        }
    }
}

static void add(float *restrict to, const float *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

/* Gradients of the projected row (every entry is written) and of the weights (added to). */
void mixer_backward(const Shape *m, const Weights *w, const float *projected, int64_t stride, const int64_t *bounds,
                    int64_t sequences, const float *kept_y, const float *kept_states, const float *dout, float *dprojected,
                    Gradients *total, float *scratch) {
    int64_t inner = inner_of(m), channels = channels_of(m), N = m->state, P = m->width, per = m->heads / m->groups;
    int64_t H = m->heads, square = N * P, wide = inner + channels + H, chunk = 0;
    for (int64_t q = 0; q < sequences; q++) {
        int64_t L = bounds[q + 1] - bounds[q], chunks = (L + CHUNK - 1) / CHUNK;
        const float *row = projected + bounds[q] * stride, *y = kept_y + bounds[q] * inner;
        float *drow = dprojected + bounds[q] * wide, *u = scratch, *s = u + L * channels, *dt = s + L * channels;
        float *slope = dt + L * H, *a = slope + L * H, *dlog = a + L * H, *dy = dlog + L * H;
        float *dconv = dy + L * inner, *dconv_bias = dconv + m->taps * channels, *ddt_bias = dconv_bias + channels;
        float *dA = ddt_bias + H, *dD = dA + H, *dnorm = dD + H, *rest = dnorm + inner;
        ScanScratch r = {rest, rest + (CHUNK + 1) * square, 0, 0};
        r.dB = r.carried + per * square;
        r.dC = r.dB + CHUNK * N * LANES;
        memset(dconv, 0, sizeof(float) * (rest - dconv));
        prepare(m, w, row + inner, stride, L, u, s, dt, slope, a);
        for (int64_t t = 0; t < L; t++) {
            float *dz = drow + t * wide, *dx = dz + inner;
            const float *g = dy + t * inner, *x = s + t * channels;
            gate_backward(m, w, row + t * stride, y + t * inner, dout + (bounds[q] + t) * inner, dy + t * inner, dz, dnorm);
            for (int64_t h = 0; h < H; h++) {
                float product = 0.0f;
#pragma omp simd reduction(+ : product)
                for (int64_t p = h * P; p < (h + 1) * P; p++) product += g[p] * x[p];
                dD[h] += product;
                for (int64_t p = h * P; p < (h + 1) * P; p++) dx[p] = w->D[h] * g[p];
            }
        }
        for (int64_t g = 0; g < m->groups; g++) {
            memset(r.carried, 0, sizeof(float) * per * square);
            for (int64_t k = chunks - 1; k >= 0; k--) {
                int64_t begin = k * CHUNK, count = L - begin < CHUNK ? L - begin : CHUNK;
                memset(r.dB, 0, sizeof(float) * 2 * CHUNK * N * LANES);
                for (int64_t h = g * per; h < (g + 1) * per; h++) {
                    memcpy(r.states, kept_states + ((chunk + k) * H + h) * square, sizeof(float) * square);
                    scan_backward(m, L, begin, h, s, dt, a, dy, drow, dlog, &r);
                }
                for (int64_t i = 0; i < count; i++) {
                    float *dB = drow + (begin + i) * wide + 2 * inner + g * N, *dC = dB + m->groups * N;
                    for (int64_t n = 0; n < N; n++) {
                        dB[n] = sum(*(lanes *)(r.dB + (i * N + n) * LANES));
                        dC[n] = sum(*(lanes *)(r.dC + (i * N + n) * LANES));
                    }
                }
            }
        }
        for (int64_t h = 0; h < H; h++) {
            float rate = -expf(w->A_log[h]);
            for (int64_t t = 0; t < L; t++) {
                float *raw = drow + t * wide + inner + channels + h;
                dA[h] += dlog[t * H + h] * dt[t * H + h] * rate;
                *raw = (*raw + dlog[t * H + h] * rate) * slope[t * H + h];
                ddt_bias[h] += *raw;
            }
        }
        conv_backward(m, w, row + inner, stride, L, u, drow, s, dconv, dconv_bias);
        add(total->conv, dconv, m->taps * channels);
        add(total->conv_bias, dconv_bias, channels);
        add(total->dt_bias, ddt_bias, H);
        add(total->A_log, dA, H);
        add(total->D, dD, H);
        add(total->norm, dnorm, inner);
        chunk += chunks;
    }
}
