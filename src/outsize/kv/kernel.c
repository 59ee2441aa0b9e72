// Attention of queries over keys and values in pages, computed where they lie.
//
// One unit of work is some consecutive queries of one request and some consecutive heads of its keys. It goes through the
// pages in order, with a running maximum and sum (Milakov and Gimelshein, 2018), so nothing is gathered and no score is
// stored. Keys lie transposed in their page: the 16 scores of a page are one vector, and no sum goes across lanes.
//
// What is computed for a query, and in which order, depends on its position alone: never on what else is in the pass. Queries
// that share a tile share nothing but what was read.
//
// Memory sets the pace. Heads of a page lie side by side, so all heads of a unit come before the next page; and a page of one head
// is what is computed on at once, because it and the next one fit into the first cache.

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 16, LANES = 16, CHAINS = 2 };  // CHAINS: partial sums of a score, which do not wait for each other

struct Attention {
  const float *query;     // [rows, heads, key_width]
  const void *keys;       // of each page [kv_heads, key_width, PAGE], float or bfloat16
  const void *values;     // of each page [kv_heads, PAGE, value_width]
  const float *sinks;     // [heads], or null
  const int32_t *items;   // [num_items, 4]: first row, rows, where its table begins, position of the first row
  const int32_t *tables;
  float *output;          // [rows, heads, value_width]
  int64_t *next;          // the next unit to be taken, shared by all threads
  int64_t num_items;
  int64_t page_stride;    // elements from one page to the next, which other layers lie between
  int32_t heads, kv_heads, key_width, value_width;
  int32_t window;         // positions that a query sees, itself included; 0: all
  int32_t is_bfloat16;
  float scale;
  float softcap;          // 0: none
  int32_t unit_heads;     // heads of keys that a unit goes through
};

// What `kernel.py` compares with its own.
extern "C" {
extern const int32_t PAGE_TOKENS, ATTENTION_BYTES;
const int32_t PAGE_TOKENS = PAGE, ATTENTION_BYTES = sizeof(Attention);
}

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static const Integers LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Vector spread(float x) { return x - (Vector){0}; }
static inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }
static inline void put(float *to, Vector x) { *(UnalignedFloats *)to = x; }

static inline Vector at(const float *from) { return *(const UnalignedFloats *)from; }
static inline Vector at(const uint16_t *from) {
  return (Vector)(__builtin_convertvector(*(const UnalignedHalves *)from, Words) << 16);
}

static inline float one_at(const float *from) { return *from; }
static inline float one_at(const uint16_t *from) {
  const uint32_t bits = (uint32_t)*from << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

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

template <int WIDTH> static inline Vector swapped(Vector x) {
#ifdef __clang__
  Vector y;
  for (int j = 0; j < LANES; j++) y[j] = x[j ^ WIDTH];
  return y;
#else
  return __builtin_shuffle(x, LANE ^ WIDTH);
#endif
}

static inline float largest_of(Vector x) {
  x = larger(x, swapped<8>(x));
  x = larger(x, swapped<4>(x));
  x = larger(x, swapped<2>(x));
  return larger(x, swapped<1>(x))[0];
}

static inline float sum_of(Vector x) {
  x += swapped<8>(x);
  x += swapped<4>(x);
  x += swapped<2>(x);
  return (x + swapped<1>(x))[0];
}

// What is known of a query so far.
struct State {
  const float *query;
  float *output;  // the weighted sum of values
  float top, sum;
  int32_t position;
};

// One head's keys and values of a page.
template <typename T> struct Page {
  const T *keys, *values;
};

// Queries that go through a page together: what is read is read once for all of them.
template <int Q> struct Tile {
  State *states;
  int first[Q], stop[Q];  // positions of the page that each sees
  Vector weights[Q];      // its scores, then its weights
};

// `ahead` is what will be read next, at about the same pace: the processor does not guess where other pages lie.
template <int Q, typename T>
static inline void score(Tile<Q> &tile, const Page<T> &page, int32_t width, const T *ahead) {
  Vector total[Q][CHAINS] = {};
  int32_t d = 0;
  for (; d + CHAINS <= width; d += CHAINS) {
    if (ahead)
      for (int c = 0; c < CHAINS; c++) __builtin_prefetch(ahead + (d + c) * PAGE);
    for (int c = 0; c < CHAINS; c++) {
      const Vector key = at(page.keys + (d + c) * PAGE);
      for (int q = 0; q < Q; q++) total[q][c] += tile.states[q].query[d + c] * key;
    }
  }
  for (; d < width; d++)
    for (int q = 0; q < Q; q++) total[q][0] += tile.states[q].query[d] * at(page.keys + d * PAGE);
  for (int q = 0; q < Q; q++) {
    tile.weights[q] = total[q][0];
    for (int c = 1; c < CHAINS; c++) tile.weights[q] += total[q][c];
  }
}

template <int Q> static inline void weigh(Tile<Q> &tile, const Attention *a) {
  for (int q = 0; q < Q; q++) {
    State &state = tile.states[q];
    Vector scores = tile.weights[q] * a->scale;
    if (a->softcap > 0)
      for (int j = 0; j < LANES; j++) scores[j] = tanhf(scores[j] / a->softcap) * a->softcap;
    if (tile.first[q] > 0 || tile.stop[q] < PAGE)
      scores = LANE >= tile.first[q] && LANE < tile.stop[q] ? scores : spread(-INFINITY);
    const float found = largest_of(scores);
    if (found > state.top) {
      const float factor = exponential(spread(state.top - found))[0];
      state.top = found;
      state.sum *= factor;
      for (int32_t d = 0; d < a->value_width; d++) state.output[d] *= factor;
    }
    tile.weights[q] = scores == -INFINITY ? (Vector){0} : exponential(scores - state.top);
    state.sum += sum_of(tile.weights[q]);
  }
}

template <int Q, int V, typename T>
static inline int32_t add_columns(
    Tile<Q> &tile, const Page<T> &page, int32_t d, int32_t width, int first, int stop, const T *ahead) {
  for (; d + V * LANES <= width; d += V * LANES) {
    Vector total[Q][V];
    for (int q = 0; q < Q; q++)
      for (int v = 0; v < V; v++) total[q][v] = at(tile.states[q].output + d + v * LANES);
    for (int j = first; j < stop; j++) {
      const int64_t from = (int64_t)j * width + d;
      Vector value[V];
      for (int v = 0; v < V; v++) value[v] = at(page.values + from + v * LANES);
      if (ahead)
        for (int v = 0; v < V; v++) __builtin_prefetch(ahead + from + v * LANES);
      for (int q = 0; q < Q; q++)
        for (int v = 0; v < V; v++) total[q][v] += tile.weights[q][j] * value[v];
    }
    for (int q = 0; q < Q; q++)
      for (int v = 0; v < V; v++) put(tile.states[q].output + d + v * LANES, total[q][v]);
  }
  return d;
}

template <int Q, typename T>
static inline void add(Tile<Q> &tile, const Page<T> &page, int32_t width, const T *ahead) {
  const int first = tile.first[0], stop = tile.stop[0];
  int32_t d = add_columns<Q, Q <= 2 ? 8 : Q <= 4 ? 4 : 2>(tile, page, 0, width, first, stop, ahead);
  d = add_columns<Q, 1>(tile, page, d, width, first, stop, ahead);
  for (; d < width; d++)
    for (int q = 0; q < Q; q++) {
      float total = tile.states[q].output[d];  // fused as vectors are, whatever the compiler makes of the loop
      for (int j = first; j < stop; j++)
        total = fmaf(tile.weights[q][j], one_at(page.values + (int64_t)j * width + d), total);
      tile.states[q].output[d] = total;
    }
}

// Queries that see the same positions are added together. No value is added to a query that does not see it, not even with a
// weight of zero: it may be infinite.
template <int Q, typename T>
static inline void add_what_is_seen(Tile<Q> &tile, const Page<T> &page, int32_t width, const T *ahead) {
  bool is_alike = true;
  for (int q = 1; q < Q; q++) is_alike &= tile.first[q] == tile.first[0] && tile.stop[q] == tile.stop[0];
  if (is_alike) return add(tile, page, width, ahead);
  if constexpr (Q > 1)
    for (int half = 0; half < 2; half++) {
      Tile<Q / 2> own;
      own.states = tile.states + half * (Q / 2);
      for (int q = 0; q < Q / 2; q++) {
        own.first[q] = tile.first[half * (Q / 2) + q];
        own.stop[q] = tile.stop[half * (Q / 2) + q];
        own.weights[q] = tile.weights[half * (Q / 2) + q];
      }
      add_what_is_seen(own, page, width, half ? nullptr : ahead);
    }
}

// The first tile of a page reads from memory, and fetches the values and the `next_keys` beside; others find all in the cache.
template <int Q, typename T>
static void attend_tile(
    const Attention *a, State *states, int32_t start, const Page<T> &page, const T *next_keys, bool is_first) {
  Tile<Q> tile;
  tile.states = states;
  for (int q = 0; q < Q; q++) {
    const int32_t last = states[q].position - start, first = a->window ? last - a->window + 1 : 0;
    tile.first[q] = first < 0 ? 0 : first < PAGE ? first : PAGE;
    tile.stop[q] = last < 0 ? 0 : last < PAGE ? last + 1 : PAGE;
  }
  score(tile, page, a->key_width, is_first ? page.values : nullptr);
  weigh(tile, a);
  add_what_is_seen(tile, page, a->value_width, is_first ? next_keys : nullptr);
}

template <typename T> static Page<T> page_of(const Attention *a, int32_t page, int32_t head) {
  const int64_t key = page * a->page_stride + (int64_t)head * a->key_width * PAGE;
  const int64_t value = page * a->page_stride + (int64_t)head * a->value_width * PAGE;
  return {(const T *)a->keys + key, (const T *)a->values + value};
}

template <typename T> static void attend_unit(const Attention *a, const int32_t *item, int32_t head, int32_t num_heads) {
  const int32_t group = a->heads / a->kv_heads, count = item[1] * group;
  const int32_t *table = a->tables + item[2];
  State states[num_heads * count];  // of the queries of one head of the keys, then of the next

  State *state = states;
  for (int32_t h = head; h < head + num_heads; h++)
    for (int32_t row = 0; row < item[1]; row++)
      for (int32_t query_head = h * group; query_head < (h + 1) * group; query_head++, state++) {
        const int64_t vector = (int64_t)(item[0] + row) * a->heads + query_head;
        state->query = a->query + vector * a->key_width;
        state->output = a->output + vector * a->value_width;
        state->top = a->sinks ? a->sinks[query_head] : -INFINITY;
        state->sum = a->sinks ? 1.0f : 0.0f;
        state->position = item[3] + row;
        memset(state->output, 0, sizeof(float) * a->value_width);
      }
  const int32_t first_page = a->window && item[3] >= a->window ? (item[3] - a->window + 1) / PAGE : 0;
  const int32_t num_pages = (item[3] + item[1] + PAGE - 1) / PAGE;
  for (int32_t p = first_page; p < num_pages; p++)
    for (int32_t h = 0; h < num_heads; h++) {
      const int32_t next = h + 1 < num_heads || p + 1 == num_pages ? p : p + 1;
      const Page<T> page = page_of<T>(a, table[p], head + h);
      const T *next_keys = page_of<T>(a, table[next], head + (h + 1) % num_heads).keys;
      State *of_head = states + h * count;
      int32_t i = 0;
      for (; i + 8 <= count; i += 8) attend_tile<8>(a, of_head + i, p * PAGE, page, next_keys, i == 0);
      for (; i + 4 <= count; i += 4) attend_tile<4>(a, of_head + i, p * PAGE, page, next_keys, i == 0);
      for (; i + 2 <= count; i += 2) attend_tile<2>(a, of_head + i, p * PAGE, page, next_keys, i == 0);
      for (; i < count; i++) attend_tile<1>(a, of_head + i, p * PAGE, page, next_keys, i == 0);
    }
  for (int32_t i = 0; i < num_heads * count; i++)
    for (int32_t d = 0; d < a->value_width; d++) states[i].output[d] /= states[i].sum;
}

// Take units until none is left; any number of threads may.
extern "C" void attend(const Attention *a) {
  const int32_t parts = (a->kv_heads + a->unit_heads - 1) / a->unit_heads;
  for (;;) {
    const int64_t unit = __atomic_fetch_add(a->next, 1, __ATOMIC_RELAXED);
    if (unit >= a->num_items * parts) return;
    const int32_t *item = a->items + unit / parts * 4;
    const int32_t head = (int32_t)(unit % parts) * a->unit_heads;
    const int32_t num_heads = head + a->unit_heads <= a->kv_heads ? a->unit_heads : a->kv_heads - head;
    if (a->is_bfloat16)
      attend_unit<uint16_t>(a, item, head, num_heads);
    else
      attend_unit<float>(a, item, head, num_heads);
  }
}
