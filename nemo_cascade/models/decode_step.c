/* One decoding step of NemotronH for a batch of rows, in plain C: the same formulas as decode_layers.py.
 *
 * Every row is computed by the same instructions in the same order whatever the other rows are: matrix products run over
 * blocks of exactly ROWS rows (the caller's buffers are padded), so results are bit-identical alone and in any batch.
 * Weights come as panels of COLS columns, [out / COLS][in][COLS], zero-padded. Built by decode_native.py, called by ctypes.
 */
#include <string.h>

#include "lanes.h"

#define ROWS 4
#define COLS 32

typedef struct {
    int64_t hidden, vocab, num_layers;
    int64_t heads, kv_heads, head_dim;
    int64_t mamba_heads, mamba_width, groups, state, taps;
    int64_t experts, chosen, expert_width, shared_width;
    float eps, routed_scale;
} Config;

/* offsets[layer * SLOTS + slot] into the weight blob; kinds[layer] is 'M', '*' or 'E'. */
enum { SLOTS = 12 };
enum { NORM, IN, CONV, CONV_BIAS, DT_BIAS, DECAY, SKIP, OUT };                  /* Mamba and attention (IN: q|k|v) */
enum { GATE = 1, GATE_BIAS = 2, SHARED_UP = 3, SHARED_DOWN = 4, UP = 5, DOWN = 6 }; /* experts */

typedef struct {
    int64_t rows;
    const int64_t *index;   /* which row of the state each active row is */
    const int64_t *lengths; /* tokens read before, per active row */
    float *fixed;           /* convolution windows and SSM states, one stretch per row */
    int64_t fixed_stride;
    float *kv; /* [row][attention layer][room][2 * kv_heads * head_dim] */
    int64_t kv_stride, room;
    float *scratch;
    uint8_t *experts; /* [row][layer of experts][chosen]: written when somebody asked, else NULL */
} Batch;

static int64_t padded(int64_t n) { return (n + COLS - 1) / COLS * COLS; }

static inline float silu(float x) { return x / (1.0f + exp_(-x)); }

/* y [rows][padded(out)] = x [rows][in] times the panels; both buffers hold a multiple of ROWS rows. */
static void product(int64_t rows, int64_t in, int64_t out, const float *x, int64_t x_stride, const float *w, float *y) {
    int64_t y_stride = padded(out);
    for (int64_t panel = 0; panel < y_stride; panel += COLS, w += in * COLS) {
        for (int64_t row = 0; row < rows; row += ROWS) {
            const float *x0 = x + row * x_stride;
            lanes sum[ROWS][COLS / LANES] = {0};
            for (int64_t k = 0; k < in; k++) {
                lanes w0 = *(const lanes *)(w + k * COLS), w1 = *(const lanes *)(w + k * COLS + LANES);
                for (int r = 0; r < ROWS; r++) {
                    float value = x0[r * x_stride + k];
                    sum[r][0] += value * w0;
                    sum[r][1] += value * w1;
                }
            }
            for (int r = 0; r < ROWS; r++) {
                *(lanes *)(y + (row + r) * y_stride + panel) = sum[r][0];
                *(lanes *)(y + (row + r) * y_stride + panel + LANES) = sum[r][1];
            }
        }
    }
}

static void rms_norm(int64_t width, const float *x, const float *weight, float eps, float *y) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / width + eps);
    if (weight)
        for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    else
        for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale;
}

static void add_rows(int64_t rows, int64_t width, const float *y, int64_t y_stride, float *x) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) x[row * width + i] += y[row * y_stride + i];
}

/* ---- Mamba-2 ---- */
static void mamba_row(const Config *c, const float *w, const int64_t *at, const float *projected, float *window,
                      float *ssm, float *conv, float *y) {
    int64_t width = c->mamba_width, inner = c->mamba_heads * width, bc = c->groups * c->state;
    int64_t channels = inner + 2 * bc, group_width = inner / c->groups;
    const float *gate = projected, *mixed = projected + inner, *dt_raw = mixed + channels;
    const float *tap = w + at[CONV], *bias = w + at[CONV_BIAS];
    memcpy(conv, bias, channels * sizeof(float));
    for (int64_t k = 0; k < c->taps - 1; k++)
        for (int64_t i = 0; i < channels; i++) conv[i] += window[k * channels + i] * tap[k * channels + i];
    for (int64_t i = 0; i < channels; i++) conv[i] += mixed[i] * tap[(c->taps - 1) * channels + i];
    for (int64_t i = 0; i < channels; i++) conv[i] = silu(conv[i]);
    memmove(window, window + channels, (c->taps - 2) * channels * sizeof(float));
    memcpy(window + (c->taps - 2) * channels, mixed, channels * sizeof(float));
    for (int64_t head = 0; head < c->mamba_heads; head++) {
        int64_t group = head / (c->mamba_heads / c->groups), state = c->state;
        const float *b = conv + inner + group * state, *cc = b + bc;
        float raw = dt_raw[head] + w[at[DT_BIAS] + head];
        float dt = (raw > 0.0f ? raw : 0.0f) + log1pf(expf(-fabsf(raw)));
        float keep = expf(dt * w[at[DECAY] + head]), skip = w[at[SKIP] + head];
        float *restrict h = ssm + head * width * state, *restrict out = y + head * width;
        const float *restrict x = conv + head * width;
        for (int64_t p = 0; p < width; p++) out[p] = x[p] * skip;
        for (int64_t s = 0; s < state; s++, h += width) { /* the state is held as [S][P]: no sum across lanes */
            float in = dt * b[s], read = cc[s];
            for (int64_t p = 0; p < width; p++) {
                h[p] = h[p] * keep + in * x[p];
                out[p] += h[p] * read;
            }
        }
    }
    for (int64_t i = 0; i < inner; i++) y[i] *= silu(gate[i]);
    for (int64_t group = 0; group < c->groups; group++)
        rms_norm(group_width, y + group * group_width, 0, c->eps, y + group * group_width);
}

/* ---- attention ---- */
static void attention_row(const Config *c, const float *projected, float *kv, int64_t length, float *scores, float *y) {
    int64_t dim = c->head_dim, kv_width = c->kv_heads * dim, stride = 2 * kv_width, read = length + 1;
    memcpy(kv + length * stride, projected + c->heads * dim, stride * sizeof(float)); /* k|v as projected */
    float scale = 1.0f / sqrtf((float)dim);
    for (int64_t head = 0; head < c->heads; head++) {
        const float *q = projected + head * dim, *k = kv + head / (c->heads / c->kv_heads) * dim;
        float *out = y + head * dim, top = -INFINITY, total = 0.0f;
        for (int64_t t = 0; t < read; t++) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < dim; i++) sum += q[i] * k[t * stride + i];
            scores[t] = sum * scale;
            top = scores[t] > top ? scores[t] : top;
        }
        for (int64_t t = 0; t < read; t++) scores[t] = exp_(scores[t] - top);
        for (int64_t i = 0; i < dim; i++) out[i] = 0.0f;
        for (int64_t t = 0; t < read; t++) {
            const float *v = k + t * stride + kv_width;
            total += scores[t];
            for (int64_t i = 0; i < dim; i++) out[i] += scores[t] * v[i];
        }
        for (int64_t i = 0; i < dim; i++) out[i] /= total;
    }
}

/* ---- experts ---- */
static void choose(const Config *c, const float *logits, const float *bias, int64_t *chosen, float *weight) {
    float score[c->experts], total = 0.0f;
    for (int64_t e = 0; e < c->experts; e++) score[e] = 1.0f / (1.0f + expf(-logits[e]));
    for (int64_t slot = 0; slot < c->chosen; slot++) {
        int64_t best = -1;
        for (int64_t e = 0; e < c->experts; e++) {
            int taken = 0;
            for (int64_t before = 0; before < slot; before++) taken |= chosen[before] == e;
            if (!taken && (best < 0 || score[e] + bias[e] > score[best] + bias[best])) best = e;
        }
        chosen[slot] = best;
        weight[slot] = score[best];
        total += score[best];
    }
    for (int64_t slot = 0; slot < c->chosen; slot++) weight[slot] *= c->routed_scale / (total + 1e-20f);
}

static void squared_relu(int64_t count, float *x) {
    for (int64_t i = 0; i < count; i++) x[i] = x[i] > 0.0f ? x[i] * x[i] : 0.0f;
}

static void experts(const Config *c, const float *w, const int64_t *at, int64_t rows, const float *normed, float *x,
                    float *scratch, uint8_t *noted, int64_t noted_stride) {
    int64_t hidden = c->hidden, out_stride = padded(hidden), slots = rows * c->chosen;
    int64_t rows_up = (rows + ROWS - 1) / ROWS * ROWS;
    float *wide = scratch, *out = wide + rows_up * padded(c->shared_width > c->expert_width ? c->shared_width : c->expert_width);
    float *gathered = out + rows_up * out_stride, *logits = gathered + rows_up * hidden;
    float *weight = logits + rows_up * padded(c->experts);
    int64_t chosen[slots];
    product(rows_up, hidden, c->experts, normed, hidden, w + at[GATE], logits);
    for (int64_t row = 0; row < rows; row++)
        choose(c, logits + row * padded(c->experts), w + at[GATE_BIAS], chosen + row * c->chosen, weight + row * c->chosen);
    for (int64_t row = 0; noted && row < rows; row++)
        for (int64_t slot = 0; slot < c->chosen; slot++)
            noted[row * noted_stride + slot] = (uint8_t)chosen[row * c->chosen + slot];
    product(rows_up, hidden, c->shared_width, normed, hidden, w + at[SHARED_UP], wide);
    squared_relu(rows_up * padded(c->shared_width), wide);
    product(rows_up, c->shared_width, hidden, wide, padded(c->shared_width), w + at[SHARED_DOWN], out);
    add_rows(rows, hidden, out, out_stride, x);
    int64_t up_size = hidden * padded(c->expert_width), down_size = c->expert_width * out_stride;
    for (int64_t slot = 0; slot < c->chosen; slot++) /* a row adds its experts in the order of its choice */
        for (int64_t e = 0; e < c->experts; e++) {
            int64_t mine[rows], count = 0;
            for (int64_t row = 0; row < rows; row++)
                if (chosen[row * c->chosen + slot] == e) mine[count++] = row;
            if (!count) continue;
            int64_t count_up = (count + ROWS - 1) / ROWS * ROWS;
            for (int64_t i = 0; i < count_up; i++) /* the spare rows repeat the last one; nobody reads their result */
                memcpy(gathered + i * hidden, normed + mine[i < count ? i : count - 1] * hidden, hidden * sizeof(float));
            product(count_up, hidden, c->expert_width, gathered, hidden, w + at[UP] + e * up_size, wide);
            squared_relu(count_up * padded(c->expert_width), wide);
            product(count_up, c->expert_width, hidden, wide, padded(c->expert_width), w + at[DOWN] + e * down_size, out);
            for (int64_t i = 0; i < count; i++) {
                float factor = weight[mine[i] * c->chosen + slot], *target = x + mine[i] * hidden;
                for (int64_t j = 0; j < hidden; j++) target[j] += factor * out[i * out_stride + j];
            }
        }
}

/* Floats of scratch that `step` and `logits` need for `rows` rows and attention over `room` positions. */
int64_t scratch_size(const Config *c, int64_t rows, int64_t room) {
    int64_t rows_up = (rows + ROWS - 1) / ROWS * ROWS, inner = c->mamba_heads * c->mamba_width;
    int64_t channels = inner + 2 * c->groups * c->state;
    int64_t widest = inner + channels + c->mamba_heads + (c->heads + 2 * c->kv_heads) * c->head_dim + c->shared_width
                     + c->expert_width + 4 * c->hidden + c->experts + c->chosen + 8 * COLS;
    return rows_up * (widest + inner + c->heads * c->head_dim) + channels + room + 64;
}

/* x [rows rounded up to ROWS][hidden]: the embedded tokens in, the last hidden state (before norm_f) out. */
void step(const Config *c, const char *kinds, const float *w, const int64_t *offsets, const Batch *batch, float *x) {
    int64_t rows = batch->rows, rows_up = (rows + ROWS - 1) / ROWS * ROWS, hidden = c->hidden;
    int64_t inner = c->mamba_heads * c->mamba_width, channels = inner + 2 * c->groups * c->state;
    int64_t window_size = (c->taps - 1) * channels, ssm_size = inner * c->state;
    int64_t kv_layer = batch->room * 2 * c->kv_heads * c->head_dim, mamba_seen = 0, attention_seen = 0;
    int64_t noted_stride = 0, noted_seen = 0;
    for (int64_t layer = 0; layer < c->num_layers; layer++) noted_stride += kinds[layer] == 'E' ? c->chosen : 0;
    float *normed = batch->scratch, *rest = normed + rows_up * hidden;
    for (int64_t layer = 0; layer < c->num_layers; layer++) {
        const int64_t *at = offsets + layer * SLOTS;
        for (int64_t row = 0; row < rows_up; row++)
            rms_norm(hidden, x + row * hidden, w + at[NORM], c->eps, normed + row * hidden);
        if (kinds[layer] == 'E') {
            experts(c, w, at, rows, normed, x, rest, batch->experts ? batch->experts + noted_seen : 0, noted_stride);
            noted_seen += c->chosen;
            continue;
        }
        int is_mamba = kinds[layer] == 'M';
        int64_t in_width = is_mamba ? inner + channels + c->mamba_heads : (c->heads + 2 * c->kv_heads) * c->head_dim;
        int64_t mid_width = is_mamba ? inner : c->heads * c->head_dim;
        float *projected = rest, *mid = projected + rows_up * padded(in_width), *spare = mid + rows_up * mid_width;
        float *out = projected; /* the projection is no longer needed when the output is written */
        product(rows_up, hidden, in_width, normed, hidden, w + at[IN], projected);
        for (int64_t row = 0; row < rows; row++) {
            const float *own = projected + row * padded(in_width);
            if (is_mamba) {
                float *window = batch->fixed + batch->index[row] * batch->fixed_stride + mamba_seen * (window_size + ssm_size);
                mamba_row(c, w, at, own, window, window + window_size, spare, mid + row * mid_width);
            } else {
                float *kv = batch->kv + batch->index[row] * batch->kv_stride + attention_seen * kv_layer;
                attention_row(c, own, kv, batch->lengths[row], spare, mid + row * mid_width);
            }
        }
        memset(mid + rows * mid_width, 0, (rows_up - rows) * mid_width * sizeof(float));
        if (padded(hidden) > padded(in_width)) out = spare + channels + batch->room;
        product(rows_up, mid_width, hidden, mid, mid_width, w + at[OUT], out);
        add_rows(rows, hidden, out, padded(hidden), x);
        mamba_seen += is_mamba;
        attention_seen += !is_mamba;
    }
}

/* logits [rows rounded up][padded(vocab)] of hidden states; `norm` and `head` are offsets of norm_f and lm_head. */
void logits(const Config *c, const float *w, int64_t norm, int64_t head, int64_t rows, const float *x, float *scratch,
            float *out) {
    int64_t rows_up = (rows + ROWS - 1) / ROWS * ROWS;
    for (int64_t row = 0; row < rows_up; row++)
        rms_norm(c->hidden, x + row * c->hidden, w + norm, c->eps, scratch + row * c->hidden);
    product(rows_up, c->hidden, c->vocab, scratch, c->hidden, w + head, out);
}
