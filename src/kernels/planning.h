// What the plans of several ops share. Plain C++.
#pragma once

#include <cstdint>

namespace jax_awq {

// False where a build has code for GPUs, but none for sm_90a: plain sm_90 has no wgmma.
#if defined(JAX_AWQ_REAL_ARCHS) && !defined(JAX_AWQ_SM90A)
constexpr bool kHasSm90a = false;
#else
constexpr bool kHasSm90a = true;
#endif

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of tiles that go together, so that the CTAs at work at one time share their rows of x and
// their columns of the weight in the L2.
constexpr unsigned kTileRaster = 8;

// Stream-K: of so many tiles, those that CTAs compute alone. The rest are too few to go round, or
// the one wave and more before them of which everyone can have an equal share.
constexpr int64_t WholeTiles(int64_t tiles, int64_t ctas) {
  if (tiles % ctas == 0) return tiles;
  return tiles < ctas ? 0 : (tiles / ctas - 1) * ctas;
}

}  // namespace jax_awq
