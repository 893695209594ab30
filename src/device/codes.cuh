// int8 and int4 codes of floats: inverse scales, rounding, two codes a byte; and tiles of threads
// for kernels that treat every column by itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace jax_awq {

constexpr unsigned kAllLanes = 0xffffffffu;

// A scale outside of these, or its inverse, can be subnormal, which plain JAX flushes on a CPU: it
// counts as none, so that kernels and plain JAX have the same codes.
constexpr float kSmallestScale = 0x1p-100f;
constexpr float kLargestScale = 0x1p125f;

// 1 / scale, correctly rounded; 0 for NaN, infinity and everything that is no usable scale.
__device__ __forceinline__ float InverseScale(float scale) {
  return scale >= kSmallestScale && scale <= kLargestScale ? __frcp_rn(scale) : 0.0f;
}

// From -largest to largest; 0 for NaN.
__device__ __forceinline__ float Saturated(float step, float largest) {
  return step == step ? fminf(fmaxf(step, -largest), largest) : 0.0f;
}

// Four codes of |step| <= 127, a byte each, to the nearest, ties to even. With 1.5 * 2^23 added the
// last bit of a float32 is worth 1, so the addition rounds and the low byte is the code: one
// instruction at full rate, where a conversion to integer runs at a quarter of it.
__device__ __forceinline__ uint32_t FourCodes(const float (&step)[4]) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(step[i], 12582912.0f));
  return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                     0x5410);
}

// The low nibbles of four bytes as two bytes, the first code in the low nibble.
__device__ __forceinline__ uint32_t PackNibbles(uint32_t codes) {
  codes &= 0x0f0f0f0fu;
  codes = (codes | codes >> 4) & 0x00ff00ffu;
  return (codes | codes >> 8) & 0xffffu;
}

// Code i of a word of `bits`-bit codes.
__device__ __forceinline__ int SignedCode(uint32_t word, int i, int bits) {
  return static_cast<int>(word << (32 - bits * (i + 1))) >> (32 - bits);
}

// Entries of scales are of equally many rows. 64-bit division costs hundreds of cycles, so it is
// left to the one case that needs it, a batch.
__device__ __forceinline__ int64_t ScaleEntry(int64_t row, int64_t rows, int64_t rows_per_scale) {
  if (rows_per_scale == 1) return row;
  return rows_per_scale == rows ? 0 : row / rows_per_scale;
}

// A thread has one vector of columns in kTileRows rows, `step` apart: what belongs to a column
// is loaded once, and the loads of kRowsAtOnce rows are in flight together. A warp lies along a
// row.
constexpr int kTileThreads = 256;
constexpr int kRowsAtOnce = 4;
constexpr int kTileRows = 8;

struct ColumnTiles {
  ColumnTiles(int64_t rows, int64_t vectors) {
    int along = 32;
    while (along < kTileThreads && along < vectors) along *= 2;
    block = dim3(along, kTileThreads / along);
    column_blocks = static_cast<int>((vectors + along - 1) / along);
    const int64_t tile_rows = static_cast<int64_t>(block.y) * kTileRows;
    blocks = (rows + tile_rows - 1) / tile_rows * column_blocks;
  }
  dim3 block;
  int column_blocks;
  int64_t blocks;  // may be more than a grid has
};

struct ColumnTile {
  __device__ explicit ColumnTile(int column_blocks)
      : index(blockIdx.x % column_blocks * blockDim.x + threadIdx.x),
        row0(static_cast<int64_t>(blockIdx.x / column_blocks) * blockDim.y * kTileRows +
             threadIdx.y),
        step(blockDim.y) {}
  int index;  // vector of columns
  int64_t row0;
  int step;
};

constexpr int64_t kMaxBlocks = 0x7fffffff;

}  // namespace jax_awq
