// Codes of four bits become the numbers they stand for, in bfloat16.

#include <stdint.h>
#include <string.h>

enum { LINE = 64, HALF = LINE / 2, LANES = 16 };

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline Vector widened(const uint16_t *pairs) {
  Vector values;
  for (int i = 0; i < LANES; i++) {
    const uint32_t word = (uint32_t)pairs[2 * i] << 16;
    memcpy((float *)&values + i, &word, sizeof word);
  }
  return values;
}

// Stores `codes * scale + zero`, rounded to the nearest, ties to even.
static inline void put(uint16_t *to, Words codes, Vector scale, Vector zero) {
  const Words words = (Words)(__builtin_convertvector((__typeof__((Words){0} == 0))codes, Vector) * scale + zero);
  const Halves rounded = __builtin_convertvector((words + 0x7fff + ((words >> 16) & 1)) >> 16, Halves);
  memcpy(to, &rounded, sizeof rounded);
}

struct Widening {
  const uint8_t *codes;    // [lines, columns, HALF]
  const uint16_t *scales;  // [columns / group, rows, 2]
  uint16_t *out;           // [columns, (last_line - line) * LINE]
  int64_t *next;           // the next group to be taken, shared by all threads
  int64_t columns, rows, group, line, last_line;
};

extern "C" const int32_t WIDENING_BYTES = sizeof(Widening);  // to compare with what Python has

static void widen_group(const Widening *w, int64_t begin) {
  const int64_t width = (w->last_line - w->line) * LINE;
  for (int64_t n = w->line; n < w->last_line; n++) {
    Vector scale[LINE / LANES], zero[LINE / LANES];
    const uint16_t *pairs = w->scales + (begin / w->group * w->rows + n * LINE) * 2;
    for (int i = 0; i < LINE / LANES; i++) {
      scale[i] = widened(pairs + 2 * LANES * i);
      zero[i] = widened(pairs + 2 * LANES * i + 1) - 8 * scale[i];
    }
    for (int64_t k = begin; k < begin + w->group; k++) {
      const uint8_t *from = w->codes + (n * w->columns + k) * HALF;
      uint16_t *to = w->out + k * width + (n - w->line) * LINE;
      for (int i = 0; i < HALF / LANES; i++) {
        Bytes bytes;
        memcpy(&bytes, from + LANES * i, sizeof bytes);
        const Words words = __builtin_convertvector(bytes, Words);
        put(to + LANES * i, words & 15, scale[i], zero[i]);
        put(to + HALF + LANES * i, words >> 4, scale[HALF / LANES + i], zero[HALF / LANES + i]);
      }
    }
  }
}

// Take groups of columns until none is left; any number of threads may.
extern "C" void widen(const Widening *w) {
  for (;;) {
    const int64_t group = __atomic_fetch_add(w->next, 1, __ATOMIC_RELAXED);
    if (group >= w->columns / w->group) return;
    widen_group(w, group * w->group);
  }
}
