// The small operations between the convolutions of the VAE's decoder, each in one pass over memory.
//
// The same arithmetic as in static_conv.py and winograd.py, in float32 but for what is stored. Frames are
// [T, pixels, width]; `step` is the length of one. Vectors of GCC's, sixteen floats wide: fast with AVX-512 alone.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr long LANES = 16;
constexpr float LOW = 0.70710678f, HIGH = 1.41421356f;  // the points of winograd.py
constexpr float SMALLEST_SQUARE = 1e-24f;

using bf16 = uint16_t;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

inline floats widened(halves h) { return (floats)(__builtin_convertvector(h, bits) << 16); }

inline halves narrowed(floats v) {  // to the nearest, ties to even
  bits u = (bits)v;
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, halves);
}

// The first `count` of sixteen; the others are zero, and are not stored.
template <class Number, class Vector>
inline Vector take(const Number *from, long count) {
  Vector v{};
  if (count == LANES) std::memcpy(&v, from, sizeof v);
  else std::memcpy(&v, from, count * sizeof(Number));
  return v;
}
template <class Number, class Vector>
inline void put(Number *to, Vector v, long count) {
  if (count == LANES) std::memcpy(to, &v, sizeof v);
  else std::memcpy(to, &v, count * sizeof(Number));
}
inline floats load(const float *from, long count) { return take<float, floats>(from, count); }
inline floats load(const bf16 *from, long count) { return widened(take<bf16, halves>(from, count)); }
inline void store(float *to, floats v, long count) { put(to, v, count); }
inline void store(bf16 *to, floats v, long count) { put(to, narrowed(v), count); }

inline long lanes(long at, long width) { return width - at < LANES ? width - at : LANES; }

// z / (1 + exp(-z)); the power of two by its exponent's bits times a polynomial of the rest, which is off by 2e-7.
inline floats silu(floats z) {
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  floats t = z * -1.44269504f;
  t = t < -126.0f ? floats{} - 126.0f : t;
  t = t > 126.0f ? floats{} + 126.0f : t;
  floats shifted = t + rounding, r = t - (shifted - rounding);
  ints exponent = (ints)shifted - 0x4b400000 + 127;
  floats p = r * 1.54035304e-4f + 1.33335581e-3f;
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  return z / (1.0f + p * (floats)(exponent << 23));
}

// Halves and adds: of two vectors that each hold 16 / (2 * SPAN) rows of 2 * SPAN numbers, one with rows of SPAN, in turn.
template <int SPAN>
inline floats folded(floats a, floats b) {
  ints low{};
  for (int lane = 0; lane < LANES; lane++) {
    int row = lane / SPAN;
    low[lane] = (row % 2) * LANES + (row / 2) * 2 * SPAN + lane % SPAN;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + SPAN);
}

// 1 / root mean square of sixteen pixels, or of fewer.
template <class In>
inline floats inverse_rms(const In *x, long pixels, long width) {
  floats sums[LANES];
  for (long pixel = 0; pixel < LANES; pixel++) {
    floats sum{};
    for (long k = 0; pixel < pixels && k < width; k += LANES) {
      floats v = load(x + pixel * width + k, lanes(k, width));
      sum += v * v;
    }
    sums[pixel] = sum;
  }
  for (int i = 0; i < 8; i++) sums[i] = folded<8>(sums[i], sums[i + 8]);
  for (int i = 0; i < 4; i++) sums[i] = folded<4>(sums[i], sums[i + 4]);
  for (int i = 0; i < 2; i++) sums[i] = folded<2>(sums[i], sums[i + 2]);
  floats mean = folded<1>(sums[0], sums[1]) / (float)width + SMALLEST_SQUARE, root;
  for (int lane = 0; lane < LANES; lane++) root[lane] = std::sqrt(mean[lane]);
  return 1.0f / root;
}

// Norm and SiLU.
template <class In, class Out>
void activate(const In *x, const float *gamma, Out *out, long pixels, long width) {
  for (long begin = 0; begin < pixels; begin += LANES) {
    const long count = lanes(begin, pixels);
    const floats r = inverse_rms(x + begin * width, count, width);
    for (long pixel = 0; pixel < count; pixel++) {
      for (long k = 0; k < width; k += LANES) {
        const long n = lanes(k, width), i = (begin + pixel) * width + k;
        store(out + i, silu(load(x + i, n) * (r[pixel] * load(gamma + k, n))), n);
      }
    }
  }
}

// The sums of T new frames and of the two before, one for each product.
template <int T, class Set>
inline void sum_inputs(const floats *d, Set set) {
  if constexpr (T == 2) {
    set(0, d[2] - d[0]);
    set(1, d[3] - d[1]);
    set(2, d[2] + d[1]);
    set(3, d[2] - d[1]);
  } else {
    set(0, d[0] + d[4] - 2.5f * d[2]);
    set(1, d[1] + d[5] - 2.5f * d[3]);
    floats odd = d[3] - 2.0f * d[1], even = d[4] - 2.0f * d[2];
    set(2, even + LOW * odd);
    set(3, even - LOW * odd);
    odd = d[3] - 0.5f * d[1], even = d[4] - 0.5f * d[2];
    set(4, even + HIGH * odd);
    set(5, even - HIGH * odd);
  }
}

// Norm and SiLU of T new frames, of which the last two become the past, and the sums for the products.
template <int T, class Out>
void spread(const float *x, const float *gamma, float *past, Out *sums, long pixels, long width) {
  const long step = pixels * width;
  for (long begin = 0; begin < pixels; begin += LANES) {
    const long count = lanes(begin, pixels);
    floats r[T];
    for (int t = 0; t < T; t++) r[t] = inverse_rms(x + t * step + begin * width, count, width);
    for (long pixel = 0; pixel < count; pixel++) {
      for (long k = 0; k < width; k += LANES) {
        const long n = lanes(k, width), i = (begin + pixel) * width + k;
        floats d[T + 2], g = load(gamma + k, n);
        for (int t = 0; t < 2; t++) d[t] = load(past + t * step + i, n);
        for (int t = 0; t < T; t++) d[t + 2] = silu(load(x + t * step + i, n) * (r[t][pixel] * g));
        for (int t = 0; t < 2; t++) store(past + t * step + i, d[t + T], n);
        sum_inputs<T>(d, [&](int number, floats v) { store(sums + number * step + i, v, n); });
      }
    }
  }
}

// T frames of y, set or added to, from T + 2 products.
template <int T, class In>
void gather(const In *const *products, float *y, long step, bool add) {
  for (long i = 0; i < step; i += LANES) {
    const long n = lanes(i, step);
    floats m[T + 2], made[T];
    for (int k = 0; k < T + 2; k++) m[k] = load(products[k] + i, n);
    floats even = m[2] + m[3], odd = m[2] - m[3];
    if constexpr (T == 2) {
      made[0] = m[0] + even;
      made[1] = m[1] + odd;
    } else {
      floats more_even = m[4] + m[5], more_odd = m[4] - m[5];
      made[0] = m[0] + HIGH * even + 0.5f * more_even;
      made[1] = odd + LOW * more_odd;
      made[2] = LOW * even + more_even;
      made[3] = m[1] + 0.5f * odd + HIGH * more_odd;
    }
    for (int t = 0; t < T; t++) {
      float *to = y + t * step + i;
      store(to, add ? load(to, n) + made[t] : made[t], n);
    }
  }
}

}  // namespace

// Name, then the numbers' dtypes and the frames that they are for.
#define ACTIVATE(NAME, In, Out) \
  void activate_##NAME(const In *x, const float *gamma, Out *out, long pixels, long width) { \
    activate(x, gamma, out, pixels, width); \
  }
#define WINOGRAD(T, NAME, Held) \
  void spread_##T##_##NAME(const float *x, const float *gamma, float *past, Held *sums, long pixels, long width) { \
    spread<T>(x, gamma, past, sums, pixels, width); \
  } \
  void gather_##T##_##NAME(const Held *const *products, float *y, long step, bool add) { \
    gather<T>(products, y, step, add); \
  }

extern "C" {
ACTIVATE(float32_float32, float, float)
ACTIVATE(float32_bfloat16, float, bf16)
ACTIVATE(bfloat16_float32, bf16, float)
ACTIVATE(bfloat16_bfloat16, bf16, bf16)
WINOGRAD(2, float32, float)
WINOGRAD(4, float32, float)
WINOGRAD(2, bfloat16, bf16)
WINOGRAD(4, bfloat16, bf16)
}
