// Numbers become codes of eight or four bits and their scales: the bits of `formats.py`, which says what they mean.

#include <stdint.h>
#include <string.h>

enum { LINE = 64, HALF = LINE / 2, GROUP = 64, GROUPS = 8, ROWS = 16 };  // GROUPS, ROWS: of a unit

struct Packing {
  const void *weights;  // [rows, columns], float or bfloat16
  uint8_t *codes;       // int8: [rows, columns]; int4: [lines, columns, HALF]
  uint16_t *scales;     // int8: [rows]; int4: [columns / GROUP, rows, 2]
  int64_t *next;        // the next unit to be taken, shared by all threads
  int64_t rows, columns;
  int32_t is_bfloat16, is_int4;
};

extern "C" const int32_t PACKING_BYTES = sizeof(Packing);  // to compare with what Python has

static inline float number(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline int32_t bits_at(const float *from) { return bits_of(*from); }
static inline int32_t bits_at(const uint16_t *from) { return (int32_t)((uint32_t)*from << 16); }

enum { NOT_FINITE = 0x7f800000, ALL_BUT_SIGN = 0x7fffffff, BFLOAT16_NAN = 0x7fc0 };

static inline uint16_t bfloat16(float x) {
  const uint32_t bits = (uint32_t)bits_of(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline float scale_of(float step, uint16_t *stored) {
  *stored = bfloat16(step < 1e-20f ? 1e-20f : step);
  return number((int32_t)((uint32_t)*stored << 16));
}

// To the nearest integer, ties to even. Beyond 2^22 that may be another one, of the same sign: callers clamp.
static inline float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }

static inline float clamped(float x, float least, float most) { return x > least ? x < most ? x : most : least; }

template <typename T> static void pack_row(const Packing *p, int64_t row) {
  const int64_t columns = p->columns;
  const T *from = (const T *)p->weights + row * columns;
  int8_t *__restrict to = (int8_t *)p->codes + row * columns;
  int32_t most = 0;  // bits of positive numbers are ordered as they are, those of NaN come last
  for (int64_t k = 0; k < columns; k++) {
    const int32_t size = bits_at(from + k) & ALL_BUT_SIGN;
    most = size > most ? size : most;
  }
  const float scale = scale_of(number(most) / 127, p->scales + row);
  if (most >= NOT_FINITE) p->scales[row] = BFLOAT16_NAN;
  for (int64_t k = 0; k < columns; k++)
    to[k] = (int8_t)(int32_t)clamped(rounded(number(bits_at(from + k)) / scale), -127, 127);
}

template <typename T> static void pack_group(const Packing *p, int64_t line, int64_t group) {
  uint8_t codes[LINE][GROUP];
  uint16_t *pairs = p->scales + (group * p->rows + line * LINE) * 2;
  for (int n = 0; n < LINE; n++) {
    const T *from = (const T *)p->weights + (line * LINE + n) * p->columns + group * GROUP;
    int32_t size = 0, first = INT32_MAX, last = INT32_MIN;
    for (int k = 0; k < GROUP; k++) {
      const int32_t bits = bits_at(from + k), order = bits ^ ((bits >> 31) & ALL_BUT_SIGN);
      size = (bits & ALL_BUT_SIGN) > size ? bits & ALL_BUT_SIGN : size;
      first = order < first ? order : first;
      last = order > last ? order : last;
    }
    const float least = number(first ^ ((first >> 31) & ALL_BUT_SIGN));
    const float most = number(last ^ ((last >> 31) & ALL_BUT_SIGN));
    const float scale = scale_of((most - least) / 15, pairs + 2 * n);
    pairs[2 * n + 1] = bfloat16(least + 8 * scale);
    if (size >= NOT_FINITE) pairs[2 * n] = BFLOAT16_NAN;
    const float zero = number((int32_t)((uint32_t)pairs[2 * n + 1] << 16));
    for (int k = 0; k < GROUP; k++)
      codes[n][k] = (uint8_t)(int32_t)clamped(rounded((number(bits_at(from + k)) - zero) / scale) + 8, 0, 15);
  }
  uint8_t *to = p->codes + (line * p->columns + group * GROUP) * HALF;
  for (int k = 0; k < GROUP; k++)
    for (int n = 0; n < HALF; n++) to[k * HALF + n] = codes[n][k] | codes[n + HALF][k] << 4;
}

template <typename T> static void pack_unit(const Packing *p, int64_t unit, int64_t units_per_line) {
  if (!p->is_int4) {
    for (int64_t row = unit * ROWS; row < (unit + 1) * ROWS && row < p->rows; row++) pack_row<T>(p, row);
    return;
  }
  const int64_t first = unit % units_per_line * GROUPS;
  for (int64_t group = first; group < first + GROUPS && group < p->columns / GROUP; group++)
    pack_group<T>(p, unit / units_per_line, group);
}

// Take units until none is left; any number of threads may.
extern "C" void pack(const Packing *p) {
  const int64_t units_per_line = (p->columns / GROUP + GROUPS - 1) / GROUPS;
  const int64_t num_units = p->is_int4 ? p->rows / LINE * units_per_line : (p->rows + ROWS - 1) / ROWS;
  for (int64_t unit; (unit = __atomic_fetch_add(p->next, 1, __ATOMIC_RELAXED)) < num_units;)
    if (p->is_bfloat16)
      pack_unit<uint16_t>(p, unit, units_per_line);
    else
      pack_unit<float>(p, unit, units_per_line);
}
