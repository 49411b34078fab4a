// What the kernels share: vectors of sixteen lanes, and the threads that XLA has.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace gpt_jax {

namespace ffi = xla::ffi;

constexpr int64_t LANES = 16;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <typename To>
inline To load(const void* from) {
  To value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Does pieces 0, 1, ... of some work, on the threads that XLA has for that.
template <typename Do>
void share(ffi::ThreadPool& pool, int64_t pieces, Do piece) {
  struct Shared {
    Do piece;
    int64_t pieces;
    std::atomic<int64_t> next{0}, done{0};
    Shared(Do piece, int64_t pieces) : piece(piece), pieces(pieces) {}
    void help() {
      for (int64_t i; (i = next.fetch_add(1)) < pieces;) {
        piece(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  // A helper that comes too late finds no piece left and touches nothing else.
  auto shared = std::make_shared<Shared>(piece, pieces);
  const int64_t helpers = std::min(pool.num_threads(), pieces) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->help(); });
  shared->help();
  while (shared->done.load(std::memory_order_acquire) < pieces) {
  }
}

}  // namespace gpt_jax
