// Attention over a cache, on a CPU: a call of XLA's foreign function interface.
//
// A running softmax over blocks of 64 keys (Dao et al. 2022, "FlashAttention"; Milakov and
// Gimelshein 2018), in float32. Only keys that some query sees are read. A query's sums run
// over the same blocks in the same order whatever stands beside it, so neither its batch,
// its neighbours nor the number of threads change a bit of it.
//
// B rows  T queries of a row  H query heads  G key/value heads  S places  K head dim

#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "shared.h"

namespace gpt_jax {
namespace {

constexpr int64_t KEYS = 64, PARTS = KEYS / LANES;  // of a block
constexpr int64_t TOGETHER = 32;                    // queries of one head that share a block
constexpr float NOTHING = -1e30f;

const Ints STEPS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats all(float value) { return Floats{} + value; }

// Sixteen numbers of a cache: float32, the upper halves of such (bfloat16), or bytes.
inline Floats read(const float* from) { return load<Floats>(from); }
inline Floats read(const uint16_t* from) {
  const Ints wide = __builtin_convertvector(load<Halves>(from), Ints) << 16;
  return load<Floats>(&wide);
}
inline Floats read(const int8_t* from) {
#if defined(__AVX512F__)  // GCC converts sixteen bytes one by one
  const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
  return load<Floats>(&wide);
#elif defined(__AVX2__)
  const __m256 wide[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from))),
                          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8))))};
  return load<Floats>(wide);
#else
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}

// exp(x) of numbers up to 0, to two units in the last place; 0 below -87.
inline Floats exp_of(Floats x) {
  const Floats low = x < -87.0f ? all(-87.0f) : x;
  Floats whole = low * 1.44269504f + 12582912.0f;  // rounds to the nearest
  whole -= 12582912.0f;
  const Floats r = low - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : y * load<Floats>(&power);
}

// Of two vectors, one whose lanes with the bit D come from the other (its own, or the D
// lanes before), and the same the other way round.
template <int D, size_t... L>
inline void cross(Floats& a, Floats& b, std::index_sequence<L...>) {
  const Floats low = __builtin_shufflevector(a, b, (L & D ? 16 + L - D : L)...);
  b = __builtin_shufflevector(a, b, (L & D ? 16 + L : L + D)...);
  a = low;
}

template <int D>
inline void cross_all(Floats* rows) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & D)) cross<D>(rows[i], rows[i + D], std::make_index_sequence<LANES>{});
}

// Sixteen features of sixteen keys, of which `count` are there, with the keys as lanes.
template <typename Number>
inline void turn(const Number* keys, int64_t K, int64_t count, Floats* turned) {
  Floats rows[LANES];
  for (int64_t i = 0; i < LANES; ++i)
    rows[i] = i < count ? read(keys + i * K) : Floats{};
  cross_all<1>(rows);
  cross_all<2>(rows);
  cross_all<4>(rows);
  cross_all<8>(rows);
  for (int64_t i = 0; i < LANES; ++i) turned[i * PARTS] = rows[i];
}

// Scores of R queries with 64 keys: their products over the features.
template <int R>
void multiply(const float* const* query, const Floats* turned, int64_t K, float scale,
              Floats* scores) {
  Floats sum[R][PARTS] = {};
  for (int64_t k = 0; k < K; ++k)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < PARTS; ++p) sum[r][p] += query[r][k] * turned[k * PARTS + p];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < PARTS; ++p) scores[r * PARTS + p] = sum[r][p] * scale;
}

// R queries' sums + values times their weights, four vectors of each at a time or one.
template <int R, int W, typename Number>
void add(Floats* sums, int64_t wide, const float* weights, const Number* values, int64_t count,
         int64_t K) {
  Floats own[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) own[r][w] = sums[r * wide + w];
  for (int64_t i = 0; i < count; ++i)
    for (int w = 0; w < W; ++w) {
      const Floats value = read(values + i * K + w * LANES);
      for (int r = 0; r < R; ++r) own[r][w] += weights[r * KEYS + i] * value;
    }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sums[r * wide + w] = own[r][w];
}

template <typename Number>
struct Heads {
  const float* query;
  const Number *keys, *values;
  const float *key_scale, *value_scale;  // [B, G, S] of bytes; else null
  const int32_t* place;  // [B, T]
  float* out;
  int64_t T, H, G, S, K, window;
  float scale, softcap;
};

// Queries from, from + 1, ... to of one row, of the query heads that share a key head.
template <typename Number>
void attend(const Heads<Number>& it, int64_t b, int64_t g, int64_t from, int64_t to) {
  const int64_t R = it.H / it.G, K = it.K, M = (to - from) * R, wide = K / LANES;
  const int64_t head = (b * it.G + g) * it.S;
  const Number* keys = it.keys + head * K;
  const Number* values = it.values + head * K;
  auto query = [&](int64_t m) {  // of head m % R at time m / R
    return ((b * it.T + from + m / R) * it.H + g * R + m % R) * K;
  };
  auto place = [&](int64_t m) { return static_cast<int64_t>(it.place[b * it.T + from + m / R]); };
  int64_t first = it.S, last = -1;
  for (int64_t m = 0; m < M; m += R) {
    last = std::max(last, std::min(it.S - 1, place(m)));
    first = std::min(first, it.window ? std::max<int64_t>(0, place(m) - it.window + 1) : 0);
  }
  std::vector<Floats> turned(K * PARTS), sums(M * wide), scores(M * PARTS);
  std::vector<float> most(M, NOTHING), total(M, 0.0f);
  const std::integral_constant<int, 4> four{};  // queries at once, then those that are left
  const std::integral_constant<int, 1> one{};
  for (int64_t s = first / KEYS * KEYS; s <= last; s += KEYS) {
    const int64_t count = std::min(KEYS, last + 1 - s);  // what none sees is not read
    for (int64_t p = 0; p < PARTS; ++p)
      for (int64_t k = 0; k < K; k += LANES)
        turn(keys + (s + p * LANES) * K + k, K, count - p * LANES, &turned[k * PARTS + p]);
    auto compare = [&]<int Q>(std::integral_constant<int, Q>, int64_t m) {
      for (; m + Q <= M; m += Q) {
        const float* some[Q];
        for (int r = 0; r < Q; ++r) some[r] = it.query + query(m + r);
        multiply<Q>(some, turned.data(), K, it.scale, &scores[m * PARTS]);
      }
      return m;
    };
    compare(one, compare(four, 0));
    Floats key_scale[PARTS] = {}, value_scale[PARTS] = {};
    if (it.key_scale) {
      std::memcpy(key_scale, it.key_scale + head + s, count * sizeof(float));
      std::memcpy(value_scale, it.value_scale + head + s, count * sizeof(float));
    }
    for (int64_t m = 0; m < M; ++m) {
      Floats* score = &scores[m * PARTS];
      float* each = reinterpret_cast<float*>(score);
      if (it.key_scale)
        for (int64_t p = 0; p < PARTS; ++p) score[p] *= key_scale[p];
      if (it.softcap > 0.0f)
        for (int64_t i = 0; i < KEYS; ++i) each[i] = it.softcap * std::tanh(each[i] / it.softcap);
      // Of this block, the keys from `since` on and before `until`.
      const int64_t until = std::min(count, place(m) + 1 - s);
      const int64_t since = it.window ? place(m) + 1 - it.window - s : 0;
      if (until < KEYS || since > 0)
        for (int64_t p = 0; p < PARTS; ++p) {
          const Ints key = STEPS + static_cast<int32_t>(p * LANES);
          const Ints seen = (key < static_cast<int32_t>(until)) & (key >= static_cast<int32_t>(since));
          score[p] = seen ? score[p] : all(NOTHING);
        }
      Floats highest = score[0];
      for (int64_t p = 1; p < PARTS; ++p) highest = score[p] > highest ? score[p] : highest;
      float now = most[m];
      for (int64_t i = 0; i < LANES; ++i) now = std::max(now, highest[i]);
      const float shrink = exp_of(all(most[m] - now))[0];
      Floats added = {};
      for (int64_t p = 0; p < PARTS; ++p) {
        score[p] = score[p] > NOTHING ? exp_of(score[p] - now) : Floats{};
        added += score[p];
        if (it.value_scale) score[p] *= value_scale[p];
      }
      float more = 0.0f;
      for (int64_t i = 0; i < LANES; ++i) more += added[i];
      total[m] = total[m] * shrink + more;
      most[m] = now;
      if (shrink != 1.0f)
        for (int64_t w = 0; w < wide; ++w) sums[m * wide + w] *= shrink;
    }
    // What a query does not see has no weight.
    const Number* value = values + s * K;
    const float* weight = reinterpret_cast<const float*>(scores.data());
    auto gather = [&]<int Q>(std::integral_constant<int, Q>, int64_t m) {
      for (; m + Q <= M; m += Q) {
        Floats* sum = &sums[m * wide];
        int64_t w = 0;
        for (; w + 4 <= wide; w += 4)
          add<Q, 4>(sum + w, wide, weight + m * KEYS, value + w * LANES, count, K);
        for (; w < wide; ++w)
          add<Q, 1>(sum + w, wide, weight + m * KEYS, value + w * LANES, count, K);
      }
      return m;
    };
    gather(one, gather(four, 0));
  }
  for (int64_t m = 0; m < M; ++m) {
    const float per = 1.0f / total[m];
    float* out = it.out + query(m);
    for (int64_t w = 0; w < wide; ++w) {
      const Floats mean = sums[m * wide + w] * per;
      std::memcpy(out + w * LANES, &mean, sizeof mean);
    }
  }
}

template <typename Number>
void every(ffi::ThreadPool& pool, const Heads<Number>& it, int64_t B) {
  const int64_t parts = (it.T + TOGETHER - 1) / TOGETHER;
  share(pool, B * it.G * parts, [&](int64_t i) {
    const int64_t part = parts - 1 - i % parts, pair = i / parts;  // the longest first
    attend(it, pair / it.G, pair % it.G, part * TOGETHER,
           std::min(it.T, (part + 1) * TOGETHER));
  });
}

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::F32> key_scale,
                     ffi::Buffer<ffi::F32> value_scale, ffi::Buffer<ffi::S32> place,
                     ffi::ResultBuffer<ffi::F32> out, int64_t window, float scale,
                     float softcap) {
  const auto q = query.dimensions(), k = keys.dimensions();
  auto of = [&]<typename Number>(Number) {
    const bool scaled = key_scale.element_count() > 0;
    every(pool,
          Heads<Number>{query.typed_data(), static_cast<const Number*>(keys.untyped_data()),
                        static_cast<const Number*>(values.untyped_data()),
                        scaled ? key_scale.typed_data() : nullptr,
                        scaled ? value_scale.typed_data() : nullptr, place.typed_data(),
                        out->typed_data(), q[1], q[2], k[1], k[2], q[3], window, scale, softcap},
          q[0]);
    return ffi::Error::Success();
  };
  switch (keys.element_type()) {
    case ffi::F32: return of(float{});
    case ffi::BF16: return of(uint16_t{});
    case ffi::S8: return of(int8_t{});
    default: return ffi::Error::InvalidArgument("a cache is float32, bfloat16 or int8");
  }
}

}  // namespace
}  // namespace gpt_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt_jax_attention, gpt_jax::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
