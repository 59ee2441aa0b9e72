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

// Lines [line, last_line) of `codes [lines, columns, HALF]`, columns [column, last_column), both at groups' boundaries, with
// `scales [columns / group, lines * LINE, 2]`, to `out [last_column - column, (last_line - line) * LINE]`.
extern "C" void widen(const uint8_t *codes, const uint16_t *scales, uint16_t *out, int64_t columns, int64_t rows,
                      int64_t group, int64_t line, int64_t last_line, int64_t column, int64_t last_column) {
  const int64_t width = (last_line - line) * LINE;
  for (int64_t begin = column; begin < last_column; begin += group) {
    for (int64_t n = line; n < last_line; n++) {
      Vector scale[LINE / LANES], zero[LINE / LANES];
      const uint16_t *pairs = scales + (begin / group * rows + n * LINE) * 2;
      for (int i = 0; i < LINE / LANES; i++) {
        scale[i] = widened(pairs + 2 * LANES * i);
        zero[i] = widened(pairs + 2 * LANES * i + 1) - 8 * scale[i];
      }
      for (int64_t k = begin; k < begin + group; k++) {
        const uint8_t *from = codes + (n * columns + k) * HALF;
        uint16_t *to = out + (k - column) * width + (n - line) * LINE;
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
}
