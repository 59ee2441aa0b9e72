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

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline Vector spread(float x) { return x - (Vector){0}; }

// exp(x) for x <= 0, to 1 ulp or so: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline Vector exponential(Vector x) {
  x = x < -87.0f ? spread(-87.0f) : x;
  const Integers n = __builtin_convertvector(x * 1.442695041f - 0.5f, Integers);
  const Vector whole = __builtin_convertvector(n, Vector);
  const Vector f = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Vector p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * (Vector)((n + 127) << 23);
}

static void widen(const uint16_t *from, float *to, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

static inline Vector at(const float *from) { return *(const Unaligned *)from; }
static inline void put(float *to, Vector x) { *(Unaligned *)to = x; }

static inline float largest_of(Vector x) {
  for (int width = LANES / 2; width; width /= 2)
    for (int j = 0; j < width; j++) x[j] = x[j] > x[j + width] ? x[j] : x[j + width];
  return x[0];
}

static inline float sum_of(Vector x) {
  for (int width = LANES / 2; width; width /= 2)
    for (int j = 0; j < width; j++) x[j] += x[j + width];
  return x[0];
}

// Pages lie anywhere, so the processor does not guess the next one: its lines are fetched beside computing.
typedef struct {
  const char *keys, *values;
  int64_t key_bytes, num_bytes, done, step;
} Ahead;

static inline void fetch(Ahead *ahead) {
  for (int64_t end = ahead->done + ahead->step; ahead->done < end; ahead->done += 64)
    __builtin_prefetch(
        ahead->done < ahead->key_bytes ? ahead->keys + ahead->done : ahead->values + ahead->done - ahead->key_bytes, 0, 2);
}

static inline Vector scores_of(const float *query, const float *keys, int32_t width, Ahead *ahead) {
  Vector a = {0}, b = {0}, c = {0}, e = {0};
  int32_t d = 0;
  for (; d + 4 <= width; d += 4, keys += 4 * PAGE) {
    if (ahead->done < ahead->num_bytes) fetch(ahead);
    a += query[d] * at(keys);
    b += query[d + 1] * at(keys + PAGE);
    c += query[d + 2] * at(keys + 2 * PAGE);
    e += query[d + 3] * at(keys + 3 * PAGE);
  }
  for (; d < width; d++, keys += PAGE) a += query[d] * at(keys);
  return (a + b) + (c + e);
}

// total = total * factor + weights * values, for positions [first, stop) of a page.
static inline void add_values(
    float *total, float factor, const float *values, const float *weights, int first, int stop, int32_t width,
    Ahead *ahead) {
  int32_t d = 0;
  for (; d + 4 * LANES <= width; d += 4 * LANES) {
    Vector a = at(total + d) * factor, b = at(total + d + LANES) * factor;
    Vector c = at(total + d + 2 * LANES) * factor, e = at(total + d + 3 * LANES) * factor;
    for (int j = first; j < stop; j++) {
      const float *v = values + (int64_t)j * width + d;
      if (ahead->done < ahead->num_bytes) fetch(ahead);
      a += weights[j] * at(v);
      b += weights[j] * at(v + LANES);
      c += weights[j] * at(v + 2 * LANES);
      e += weights[j] * at(v + 3 * LANES);
    }
    put(total + d, a);
    put(total + d + LANES, b);
    put(total + d + 2 * LANES, c);
    put(total + d + 3 * LANES, e);
  }
  for (; d < width; d++) {
    total[d] *= factor;
    for (int j = first; j < stop; j++) total[d] += weights[j] * values[(int64_t)j * width + d];
  }
}

static void attend_unit(const Attention *a, int64_t unit) {
  const int32_t *item = a->items + unit / a->kv_heads * 4;
  const int32_t head = (int32_t)(unit % a->kv_heads), group = a->heads / a->kv_heads;
  const int32_t rows = item[1], first_position = item[3];
  const int32_t *table = a->tables + item[2];
  const int64_t key_size = (int64_t)a->key_width * PAGE, value_size = (int64_t)a->value_width * PAGE;
  const int64_t element = a->is_bfloat16 ? 2 : 4;
  const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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
    Ahead ahead = {0};
    if (page < (first_position + rows - 1) / PAGE) {
      const int64_t next = (int64_t)table[page + 1] * a->kv_heads + head, steps = rows * group * (a->key_width / 4 + a->value_width / 4);
      ahead.keys = (const char *)a->keys + next * key_size * element;
      ahead.values = (const char *)a->values + next * value_size * element;
      ahead.key_bytes = key_size * element;
      ahead.num_bytes = (key_size + value_size) * element;
      ahead.step = steps ? (ahead.num_bytes / steps + 63) / 64 * 64 : 0;
    }
    for (int32_t row = 0; row < rows; row++) {
      const int32_t last = first_position + row - page * PAGE;
      const int32_t lowest = a->window ? last - a->window + 1 : 0;
      const int first = lowest < 0 ? 0 : lowest, stop = last < PAGE - 1 ? last + 1 : PAGE;
      if (first >= stop) continue;
      for (int32_t i = 0; i < group; i++) {
        const int64_t vector = (int64_t)(item[0] + row) * a->heads + head * group + i;
        float *output = a->output + vector * a->value_width;
        Vector scores = scores_of(a->query + vector * a->key_width, keys, a->key_width, &ahead) * a->scale;
        if (a->softcap > 0)
          for (int j = 0; j < LANES; j++) scores[j] = tanhf(scores[j] / a->softcap) * a->softcap;
        const float before = top[row * group + i];
        if (stop - first < LANES) scores = lane >= first && lane < stop ? scores : spread(-INFINITY);
        const float largest = largest_of(scores), highest = largest > before ? largest : before;
        const Vector weights = exponential(scores - highest);
        const float factor = highest > before ? exponential(spread(before - highest))[0] : 1.0f;
        sum[row * group + i] = sum[row * group + i] * factor + sum_of(weights);
        top[row * group + i] = highest;
        add_values(output, factor, values, (const float *)&weights, first, stop, a->value_width, &ahead);
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
