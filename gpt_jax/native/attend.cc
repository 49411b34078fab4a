// Attention over a cache, on a CPU: a call of XLA's foreign function interface.
//
// A running softmax over blocks of 64 keys (Dao et al. 2022, "FlashAttention"; Milakov and
// Gimelshein 2018), in float32. Only keys that some query sees are read. A query's sums run
// over the same blocks in the same order whatever stands beside it, so neither its batch,
// its neighbours nor the number of threads change a bit of it.
//
// B rows  T queries of a row  H query heads  G key/value heads  S places  K head dim

#include <cmath>
#include <vector>

#include "shared.h"

namespace gpt_jax {
namespace {

constexpr int64_t KEYS = 64, PARTS = KEYS / LANES;  // of a block
constexpr int64_t TOGETHER = 32;                    // queries of one head that share a block
constexpr float NOTHING = -1e30f;

inline Floats all(float value) { return Floats{} + value; }

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

// W vectors of a query's sum + values times their weights.
template <int W>
void add(Floats* sum, const float* weight, const float* values, int64_t count, int64_t K) {
  Floats own[W];
  for (int w = 0; w < W; ++w) own[w] = sum[w];
  for (int64_t i = 0; i < count; ++i)
    for (int w = 0; w < W; ++w) own[w] += weight[i] * load<Floats>(values + i * K + w * LANES);
  for (int w = 0; w < W; ++w) sum[w] = own[w];
}

struct Heads {
  const float *query, *keys, *values;
  const int32_t* place;  // [B, T]
  float* out;
  int64_t T, H, G, S, K, window;
  float scale, softcap;
};

// Queries from, from + 1, ... to of one row, of the query heads that share a key head.
void attend(const Heads& it, int64_t b, int64_t g, int64_t from, int64_t to) {
  const int64_t R = it.H / it.G, K = it.K, M = (to - from) * R, wide = K / LANES;
  const float* keys = it.keys + (b * it.G + g) * it.S * K;
  const float* values = it.values + (b * it.G + g) * it.S * K;
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
  for (int64_t s = first / KEYS * KEYS; s <= last; s += KEYS) {
    const int64_t count = std::min(KEYS, it.S - s);
    float* by_feature = reinterpret_cast<float*>(turned.data());  // [K, 64]
    for (int64_t i = 0; i < KEYS; ++i)
      for (int64_t k = 0; k < K; ++k)
        by_feature[k * KEYS + i] = i < count ? keys[(s + i) * K + k] : 0.0f;
    for (int64_t m = 0; m < M; ++m) {
      const float* q = it.query + query(m);
      Floats sum[PARTS] = {};
      for (int64_t k = 0; k < K; ++k)
        for (int64_t p = 0; p < PARTS; ++p) sum[p] += q[k] * turned[k * PARTS + p];
      const int64_t until = place(m);
      const int64_t since = it.window ? until - it.window : -1;
      float* score = reinterpret_cast<float*>(&scores[m * PARTS]);
      for (int64_t p = 0; p < PARTS; ++p) scores[m * PARTS + p] = sum[p] * it.scale;
      if (it.softcap > 0.0f)
        for (int64_t i = 0; i < KEYS; ++i) score[i] = it.softcap * std::tanh(score[i] / it.softcap);
      float now = most[m];
      for (int64_t i = 0; i < KEYS; ++i) {
        const bool seen = s + i <= until && s + i > since && i < count;
        score[i] = seen ? score[i] : NOTHING;
        now = std::max(now, score[i]);
      }
      const float shrink = exp_of(all(most[m] - now))[0];
      Floats weights = {};
      for (int64_t p = 0; p < PARTS; ++p) {
        Floats& weight = scores[m * PARTS + p];
        weight = weight > NOTHING ? exp_of(weight - now) : Floats{};
        weights += weight;
      }
      float added = 0.0f;
      for (int64_t i = 0; i < LANES; ++i) added += weights[i];
      total[m] = total[m] * shrink + added;
      most[m] = now;
      for (int64_t w = 0; w < wide; ++w) sums[m * wide + w] *= shrink;
    }
    for (int64_t m = 0; m < M; ++m) {
      const float* weight = reinterpret_cast<const float*>(&scores[m * PARTS]);
      const int64_t seen = std::min(count, std::max<int64_t>(0, place(m) + 1 - s));
      int64_t w = 0;
      for (; w + 4 <= wide; w += 4)
        add<4>(&sums[m * wide + w], weight, values + s * K + w * LANES, seen, K);
      for (; w < wide; ++w)
        add<1>(&sums[m * wide + w], weight, values + s * K + w * LANES, seen, K);
    }
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

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query,
                     ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
                     ffi::Buffer<ffi::S32> place, ffi::ResultBuffer<ffi::F32> out,
                     int64_t window, float scale, float softcap) {
  const auto q = query.dimensions(), k = keys.dimensions();
  const Heads it = {query.typed_data(), keys.typed_data(), values.typed_data(),
                    place.typed_data(), out->typed_data(),
                    q[1], q[2], k[1], k[2], q[3], window, scale, softcap};
  const int64_t parts = (it.T + TOGETHER - 1) / TOGETHER;
  share(pool, q[0] * it.G * parts, [&](int64_t i) {
    const int64_t part = parts - 1 - i % parts, pair = i / parts;  // the longest first
    attend(it, pair / it.G, pair % it.G, part * TOGETHER,
           std::min(it.T, (part + 1) * TOGETHER));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gpt_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(gpt_jax_attention, gpt_jax::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
