// x @ weights of eight or four bits, on a CPU: a call of XLA's foreign function interface.
//
// A weight is scale * (code - 128), or scale * code + offset, where 32 of one output share
// a scale and an offset (the numbers of ggml's Q8_0 and Q4_1). 32 numbers of a row of x are
// rounded to eight bits with one step, so that a product is a sum of whole numbers. Neither
// the other rows nor the number of threads change a bit of a row.
//
// Sixteen outputs lie together, a lane each, so that one instruction serves them all:
//   codes of 8 bits  [F / 16, D / 32, 8, 16, 4]   4 inputs of 16 outputs, 8 times
//   codes of 4 bits  [F / 16, D / 32, 4, 16, 4]   the high halves 16 inputs further on
//   scales, offsets  [F / 16, D / 32, 16]
// N rows of x, D inputs and F outputs, both filled up.

#include <cmath>
#include <type_traits>
#include <vector>

#include "shared.h"

namespace gpt_jax {
namespace {

constexpr int64_t GROUP = 32, QUAD = 4;
constexpr int64_t BYTES = LANES * QUAD;  // of four inputs of sixteen outputs

typedef uint8_t Codes __attribute__((vector_size(BYTES)));

// Sixteen numbers of half precision; left to itself, GCC converts them one by one.
inline Floats halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
  const __m256 both[2] = {_mm256_cvtph_ps(load<__m128i>(from)),
                          _mm256_cvtph_ps(load<__m128i>(from + LANES / 2))};
  return load<Floats>(both);
#else
  Floats found;
  for (int lane = 0; lane < LANES; ++lane) found[lane] = load<_Float16>(from + lane);
  return found;
#endif
}

// sum + four inputs of each lane times the four of x.
#if defined(__AVX512VNNI__)
constexpr int AT_ONCE = 8;  // rows that share what is read of the weights
inline Ints dot(Ints sum, Codes codes, const int8_t* x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes,
                                   _mm512_set1_epi32(load<int32_t>(x)));
}
#elif defined(__AVX2__)
constexpr int AT_ONCE = 2;
inline __m256i dot8(__m256i sum, __m256i codes, const int8_t* x) {
  // Even and odd bytes apart, as numbers of 16 bits: pairs of bytes would overflow.
  const __m256i each = _mm256_set1_epi32(load<int32_t>(x));
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(each, 8), 8);
  const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi16(255));
  const __m256i high = _mm256_srli_epi16(codes, 8);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, even));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_srai_epi16(each, 8)));
}
inline Ints dot(Ints sum, Codes codes, const int8_t* x) {
  __m256i sums[2], parts[2];
  std::memcpy(sums, &sum, sizeof sum);
  std::memcpy(parts, &codes, sizeof codes);
  for (int i = 0; i < 2; ++i) sums[i] = dot8(sums[i], parts[i], x);
  std::memcpy(&sum, sums, sizeof sum);
  return sum;
}
#else
constexpr int AT_ONCE = 2;
inline Ints dot(Ints sum, Codes codes, const int8_t* x) {
  for (int lane = 0; lane < LANES; ++lane)
    for (int i = 0; i < QUAD; ++i) sum[lane] += codes[lane * QUAD + i] * x[i];
  return sum;
}
#endif

// Rows of x as whole numbers.
struct Rows {
  int64_t count, groups;
  std::vector<int8_t> whole;     // [count, groups, 32]
  std::vector<float> step, sum;  // [count, groups]; the sum is times the step
  std::vector<int32_t> start;    // [count, groups]: -128 times the sum of whole numbers

  Rows(int64_t n, int64_t g)
      : count(n), groups(g), whole(n * g * GROUP), step(n * g), sum(n * g), start(n * g) {}
};

void round_row(const float* x, int64_t inputs, int64_t row, Rows& rows) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    const int64_t at = row * rows.groups + g, from = g * GROUP;
    float filled[GROUP] = {};
    std::memcpy(filled, x + from, std::min(GROUP, inputs - from) * sizeof(float));
    Floats value[2], largest = {}, zero = {};
    for (int i = 0; i < 2; ++i) {
      value[i] = load<Floats>(filled + i * LANES);
      const Floats size = value[i] < 0 ? -value[i] : value[i];
      largest = size > largest ? size : largest;
      zero += value[i] * 0;
    }
    float most = 0.0f, none = 0.0f;
    for (int i = 0; i < LANES; ++i) {
      most = std::max(most, largest[i]);
      none += zero[i];
    }
    const float step = most / 127.0f + none;  // what is not finite stays so
    const float per = step > 0.0f && step < INFINITY ? 1.0f / step : 0.0f;
    Ints sums = {};
    for (int i = 0; i < 2; ++i) {
      // Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even ones.
      Floats near = (per > 0.0f ? value[i] * per : Floats{}) + 12582912.0f;
      near -= 12582912.0f;
      const Ints whole = __builtin_convertvector(near, Ints);
      sums += whole;
      const Bytes bytes = __builtin_convertvector(whole, Bytes);
      std::memcpy(&rows.whole[at * GROUP + i * LANES], &bytes, sizeof bytes);
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += sums[i];
    rows.step[at] = step;
    rows.sum[at] = static_cast<float>(sum) * step;
    rows.start[at] = -128 * sum;
  }
}

// Sixteen outputs of R rows.
template <int BITS, int R>
void tile(const uint8_t* codes, const uint16_t* scales, const uint16_t* offsets,
          const Rows& rows, int64_t row, float* out, int64_t outputs, int64_t lanes) {
  constexpr int64_t READS = BITS == 8 ? 8 : 4;
  const int64_t groups = rows.groups;
  Floats total[R] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* own = codes + g * READS * BYTES;
    Ints sum[R];
    for (int r = 0; r < R; ++r)
      sum[r] = Ints{} + (BITS == 8 ? rows.start[(row + r) * groups + g] : 0);
    for (int64_t i = 0; i < READS; ++i) {
      const Codes read = load<Codes>(own + i * BYTES);
      for (int r = 0; r < R; ++r) {
        const int8_t* x = &rows.whole[((row + r) * groups + g) * GROUP + i * QUAD];
        if constexpr (BITS == 8) {
          sum[r] = dot(sum[r], read, x);
        } else {
          sum[r] = dot(sum[r], read & 15, x);
          sum[r] = dot(sum[r], read >> 4, x + GROUP / 2);
        }
      }
    }
    const Floats scale = halves(scales + g * LANES);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * groups + g;
      total[r] += __builtin_convertvector(sum[r], Floats) * (scale * rows.step[at]);
    }
    if constexpr (BITS == 4) {
      const Floats offset = halves(offsets + g * LANES);
      for (int r = 0; r < R; ++r) total[r] += offset * rows.sum[(row + r) * groups + g];
    }
  }
  for (int r = 0; r < R; ++r)
    std::memcpy(out + r * outputs, &total[r], lanes * sizeof(float));
}

// R rows from one on, and tiles of sixteen outputs: those rows stay close meanwhile.
template <int BITS, int R>
void band(int64_t from, int64_t to, const uint8_t* codes, const uint16_t* scales,
          const uint16_t* offsets, const Rows& rows, int64_t row, float* out, int64_t outputs) {
  for (int64_t t = from; t < to; ++t) {
    const int64_t first = t * rows.groups;
    tile<BITS, R>(codes + first * BYTES * BITS, scales + first * LANES, offsets + first * LANES,
                  rows, row, out + row * outputs + t * LANES, outputs,
                  std::min(LANES, outputs - t * LANES));
  }
}

// Tiles of sixteen outputs, of all rows.
template <int BITS>
void tiles(int64_t from, int64_t to, const uint8_t* codes, const uint16_t* scales,
           const uint16_t* offsets, const Rows& rows, float* out, int64_t outputs) {
  int64_t row = 0;
  auto some = [&]<int R>(std::integral_constant<int, R>) {
    for (; row + R <= rows.count; row += R)
      band<BITS, R>(from, to, codes, scales, offsets, rows, row, out, outputs);
  };
  some(std::integral_constant<int, AT_ONCE>{});
  some(std::integral_constant<int, AT_ONCE / 2>{});
  some(std::integral_constant<int, 1>{});
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes,
                    ffi::Buffer<ffi::F16> scales, ffi::Buffer<ffi::F16> offsets,
                    ffi::ResultBuffer<ffi::F32> out, int64_t bits) {
  const int64_t count = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = out->dimensions()[1];
  Rows rows(count, (inputs + GROUP - 1) / GROUP);
  const float* read = x.typed_data();
  auto round = [&](int64_t i) {
    for (int64_t row = i * AT_ONCE; row < std::min(count, (i + 1) * AT_ONCE); ++row)
      round_row(read + row * inputs, inputs, row, rows);
  };
  share(pool, (count + AT_ONCE - 1) / AT_ONCE, round);
  const int64_t all = (outputs + LANES - 1) / LANES;
  // Small pieces, so that no thread waits long for the last one.
  const int64_t size = std::max<int64_t>(1, all / (std::max<int64_t>(1, pool.num_threads()) * 2));
  auto multiply = [&](int64_t i) {
    (bits == 8 ? tiles<8> : tiles<4>)(
        i * size, std::min(all, (i + 1) * size), codes.typed_data(),
        static_cast<const uint16_t*>(scales.untyped_data()),
        static_cast<const uint16_t*>(offsets.untyped_data()), rows, out->typed_data(), outputs);
  };
  share(pool, (all + size - 1) / size, multiply);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt_jax_product, gpt_jax::multiply,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits"));
