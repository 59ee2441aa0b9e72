// Attention of queries over keys and values in pages, computed where they lie.
//
// One unit of work is some consecutive queries of one request and one head of its keys. Pages are gone through in order,
// with a running maximum and sum (Milakov and Gimelshein, 2018), so nothing is gathered and no score is stored. Keys lie
// transposed in their page: the 16 scores of a page are one vector, and no sum goes across lanes. What is computed for a
// query, and in which order, depends on its position alone: never on what else is in the pass.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 16, LANES = 16 };

struct Attention {
  const float *query;     // [rows, heads, key_width]
  const void *keys;       // [pages, kv_heads, key_width, PAGE], float or bfloat16
  const void *values;     // [pages, kv_heads, PAGE, value_width]
  const float *sinks;     // [heads], or null
  const int32_t *items;   // [num_items, 4]: first row, rows, where its table begins, position of the first row
  const int32_t *tables;
  float *output;          // [rows, heads, value_width]
  int64_t *next;          // the next unit to be taken, shared by all threads
  int64_t num_items;
  int32_t heads, kv_heads, key_width, value_width;
  int32_t window;         // positions that a query sees, itself included; 0: all
  int32_t is_bfloat16;
  float scale;
  float softcap;          // 0: none
};

// exp(x) for x <= 0, to 1 ulp or so: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float scaled = x * 1.442695041f;
  const int32_t n = (int32_t)(scaled - 0.5f);
  const float f = (x - (float)n * 0.693359375f) - (float)n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

static void widen(const uint16_t *from, float *to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

static void scores_of(const float *query, const float *keys, int32_t width, float *scores) {
  float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, e[LANES] = {0};
  int32_t d = 0;
  for (; d + 4 <= width; d += 4) {
    const float *k = keys + (int64_t)d * PAGE;
    for (int j = 0; j < LANES; j++) a[j] += query[d] * k[j];
    for (int j = 0; j < LANES; j++) b[j] += query[d + 1] * k[PAGE + j];
    for (int j = 0; j < LANES; j++) c[j] += query[d + 2] * k[2 * PAGE + j];
    for (int j = 0; j < LANES; j++) e[j] += query[d + 3] * k[3 * PAGE + j];
  }
  for (; d < width; d++)
    for (int j = 0; j < LANES; j++) a[j] += query[d] * keys[(int64_t)d * PAGE + j];
  for (int j = 0; j < LANES; j++) scores[j] = (a[j] + b[j]) + (c[j] + e[j]);
}

static void add_values(float *total, const float *values, const float *weights, int first, int stop, int32_t width) {
  int32_t d = 0;
  for (; d + LANES <= width; d += LANES) {
    float sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = total[d + i];
    for (int j = first; j < stop; j++)
      for (int i = 0; i < LANES; i++) sum[i] += weights[j] * values[(int64_t)j * width + d + i];
    for (int i = 0; i < LANES; i++) total[d + i] = sum[i];
  }
  for (; d < width; d++)
    for (int j = first; j < stop; j++) total[d] += weights[j] * values[(int64_t)j * width + d];
}

static void attend_unit(const Attention *a, int64_t unit) {
  const int32_t *item = a->items + unit / a->kv_heads * 4;
  const int32_t head = (int32_t)(unit % a->kv_heads), group = a->heads / a->kv_heads;
  const int32_t rows = item[1], first_position = item[3];
  const int32_t *table = a->tables + item[2];
  const int64_t key_size = (int64_t)a->key_width * PAGE, value_size = (int64_t)a->value_width * PAGE;
  float wide_keys[key_size], wide_values[value_size], top[rows * group], sum[rows * group];

  for (int32_t i = 0; i < rows * group; i++) {
    const float sink = a->sinks ? a->sinks[head * group + i % group] : -INFINITY;
    top[i] = sink;
    sum[i] = a->sinks ? 1.0f : 0.0f;
    float *output = a->output + ((int64_t)(item[0] + i / group) * a->heads + head * group + i % group) * a->value_width;
    memset(output, 0, sizeof(float) * a->value_width);
  }
  int32_t begin = a->window ? first_position - a->window + 1 : 0;
  begin = begin < 0 ? 0 : begin;
  for (int32_t page = begin / PAGE; page <= (first_position + rows - 1) / PAGE; page++) {
    const int64_t at = (int64_t)table[page] * a->kv_heads + head;
    const float *keys = (const float *)a->keys + at * key_size;
    const float *values = (const float *)a->values + at * value_size;
    if (a->is_bfloat16) {
      widen((const uint16_t *)a->keys + at * key_size, wide_keys, key_size);
      widen((const uint16_t *)a->values + at * value_size, wide_values, value_size);
      keys = wide_keys;
      values = wide_values;
    }
    for (int32_t row = 0; row < rows; row++) {
      const int32_t last = first_position + row - page * PAGE;
      const int32_t lowest = a->window ? last - a->window + 1 : 0;
      const int first = lowest < 0 ? 0 : lowest, stop = last < PAGE - 1 ? last + 1 : PAGE;
      if (first >= stop) continue;
      for (int32_t i = 0; i < group; i++) {
        const int64_t vector = (int64_t)(item[0] + row) * a->heads + head * group + i;
        float *output = a->output + vector * a->value_width;
        float scores[LANES], weights[LANES];
        scores_of(a->query + vector * a->key_width, keys, a->key_width, scores);
        for (int j = 0; j < LANES; j++) scores[j] *= a->scale;
        if (a->softcap > 0)
          for (int j = 0; j < LANES; j++) scores[j] = tanhf(scores[j] / a->softcap) * a->softcap;
        float highest = top[row * group + i];
        for (int j = first; j < stop; j++) highest = scores[j] > highest ? scores[j] : highest;
        if (highest > top[row * group + i]) {
          const float factor = exponential(top[row * group + i] - highest);
          for (int32_t d = 0; d < a->value_width; d++) output[d] *= factor;
          sum[row * group + i] *= factor;
          top[row * group + i] = highest;
        }
        for (int j = 0; j < LANES; j++) weights[j] = exponential(j < first || j >= stop ? -87.0f : scores[j] - highest);
        for (int j = first; j < stop; j++) sum[row * group + i] += weights[j];
        add_values(output, values, weights, first, stop, a->value_width);
      }
    }
  }
  for (int32_t i = 0; i < rows * group; i++) {
    float *output = a->output + ((int64_t)(item[0] + i / group) * a->heads + head * group + i % group) * a->value_width;
    for (int32_t d = 0; d < a->value_width; d++) output[d] /= sum[i];
  }
}

// Take units until none is left; any number of threads may.
extern "C" void attend(const Attention *a) {
  for (;;) {
    const int64_t unit = __atomic_fetch_add(a->next, 1, __ATOMIC_RELAXED);
    if (unit >= a->num_items * a->kv_heads) return;
    attend_unit(a, unit);
  }
}
