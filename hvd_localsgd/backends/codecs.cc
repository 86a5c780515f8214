// core/codecs.py once more, in one pass over the numbers instead of ten. What it decodes is the same to the bit, so that a rank
// that has this library and one that has not can talk to each other: no contraction of a product and a sum (see build_kernel.py).

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 512;
constexpr int kLanes = 16;

// A version for each instruction set, of which the machine that runs it takes the best.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define EVERY_MACHINE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_MACHINE
#endif

inline uint32_t bits(float value) {
  uint32_t result;
  std::memcpy(&result, &value, 4);
  return result;
}

inline float number(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

struct Int8 {
  using Code = int8_t;
  static constexpr float kTop = 127;
  static inline Code Round(float scaled) { return static_cast<Code>(static_cast<int32_t>(std::nearbyint(scaled))); }
  static inline float Widen(Code code) { return code; }
};

struct Bf16 {
  using Code = uint16_t;
  static constexpr float kTop = 1;
  static inline Code Round(float scaled) {
    const uint32_t b = bits(scaled);
    return static_cast<Code>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  static inline float Widen(Code code) { return number(static_cast<uint32_t>(code) << 16); }
};

// Numbers too small for float16's exponents are rounded, and read, by an addition that shifts their bits to where they belong.
struct Fp16 {
  using Code = uint16_t;
  static constexpr float kTop = 1;
  static inline Code Round(float scaled) {
    const uint32_t b = bits(scaled), size = b & 0x7fffffff;
    const uint32_t normal = (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;
    const uint32_t small = bits(number(size) + 0.5f) - bits(0.5f);
    return static_cast<Code>(((b >> 16) & 0x8000) | (size < (113u << 23) ? small : normal));
  }
  static inline float Widen(Code code) {
    const uint32_t size = static_cast<uint32_t>(code & 0x7fff) << 13, sign = static_cast<uint32_t>(code & 0x8000) << 16;
    const uint32_t normal = size + (112u << 23);
    const uint32_t small = bits(number(size + (113u << 23)) - number(113u << 23));
    return number(sign | (size < (1u << 23) ? small : normal));
  }
};

template <class Codec>
inline __attribute__((always_inline)) void Encode(float* values, int64_t blocks, float* scales, typename Codec::Code* codes,
                                                  double* sums) {
  for (int64_t block = 0; block < blocks; ++block, values += kBlock, codes += kBlock) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint32_t size = bits(values[i]) & 0x7fffffff;
      largest = size > largest ? size : largest;
    }
    const float top = number(largest);
    const float inverse = top > Codec::kTop / 3.4028234663852886e38f ? Codec::kTop / top : 0;
    float scale = top / Codec::kTop;
    if (Codec::kTop > 1 && scale > 0) scale = number(bits(scale) - 1);
    scales[block] = scale;
    float sent[kLanes] = {0}, lost[kLanes] = {0};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = values[i + lane];
        codes[i + lane] = Codec::Round(value * inverse);
        const float rest = value - Codec::Widen(codes[i + lane]) * scale;
        values[i + lane] = rest;
        sent[lane] += value * value;
        lost[lane] += rest * rest;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[0] += sent[lane];
      sums[1] += lost[lane];
    }
  }
}

template <class Codec, bool kAdd>
inline __attribute__((always_inline)) void Decode(const typename Codec::Code* codes, const float* scales, float* values,
                                                  int64_t size) {
  for (int64_t start = 0; start < size; start += kBlock) {
    const float scale = scales[start / kBlock];
    const int64_t stop = start + kBlock < size ? start + kBlock : size;
    for (int64_t i = start; i < stop; ++i) {
      const float value = Codec::Widen(codes[i]) * scale;
      values[i] = kAdd ? values[i] + value : value;
    }
  }
}

}  // namespace

// stages.scale: values times a weight, and NaN if one of them is not finite. Memory is what it waits for, and four quarters at a time
// keep more of it on its way than one stretch does: 0.8 of the time.
extern "C" EVERY_MACHINE float scale(float* values, int64_t size, float weight) {
  typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
  constexpr int64_t kQuarters = 4, kStep = sizeof(Vector) / sizeof(float);
  const int64_t quarter = size / kQuarters / kStep * kStep;
  Vector witness = {0};
  for (int64_t i = 0; i < quarter; i += kStep) {
    for (int64_t start = 0; start < kQuarters * quarter; start += quarter) {
      Vector* const value = reinterpret_cast<Vector*>(values + start + i);
      witness += *value * 0.0f;
      *value *= weight;
    }
  }
  float sum = 0;
  for (int64_t i = kQuarters * quarter; i < size; ++i) {
    sum += values[i] * 0.0f;
    values[i] *= weight;
  }
  for (int64_t lane = 0; lane < kStep; ++lane) sum += witness[lane];
  return sum;
}

#define FUNCTIONS(name, Codec)                                                                                            \
  extern "C" EVERY_MACHINE void name##_encode(float* values, int64_t blocks, float* scales, Codec::Code* codes,           \
                                              double* sums) {                                                             \
    Encode<Codec>(values, blocks, scales, codes, sums);                                                                   \
  }                                                                                                                       \
  extern "C" EVERY_MACHINE void name##_decode(const Codec::Code* codes, const float* scales, float* values, int64_t size) { \
    Decode<Codec, false>(codes, scales, values, size);                                                                    \
  }                                                                                                                       \
  extern "C" EVERY_MACHINE void name##_add(const Codec::Code* codes, const float* scales, float* values, int64_t size) {  \
    Decode<Codec, true>(codes, scales, values, size);                                                                     \
  }

FUNCTIONS(int8, Int8)
FUNCTIONS(bf16, Bf16)
FUNCTIONS(fp16, Fp16)
