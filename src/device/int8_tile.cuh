// What producer and consumers of the int8 kernel for sm_90a agree on: shared memory, and how b
// becomes the register operand.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"

namespace jax_awq {

// kTokens: rows of a. A stage has 128 indices of the contraction, a row of the 128-byte swizzle.
template <int kTokens, bool kPacked>
struct Int8Tile {
  static constexpr int kOutputs = 128;
  static constexpr int kDepth = 128;
  static constexpr int kConsumerWarps = 8;
  // Registers can only move to the consumers from a whole warpgroup; one thread of it copies.
  static constexpr int kThreads = 32 * (kConsumerWarps + 4);

  static constexpr int kABytes = kTokens * kDepth;
  static constexpr int kBRows = kPacked ? kDepth / 2 : kDepth;
  static constexpr int kBBytes = kBRows * kOutputs;
  // Sums of a warp on their way to an activation: 64 tokens x 16 outputs.
  static constexpr int kStagedBytes = 64 * 16 * 4;
  static constexpr int kAlignment = 1024;  // dynamic shared memory may start anywhere

  static constexpr int kRoom = 227 * 1024 - kAlignment - 256 - kConsumerWarps * kStagedBytes;
  static constexpr int kMaxStages = 12;
  static constexpr int kStages =
      kRoom / (kABytes + kBBytes) < kMaxStages ? kRoom / (kABytes + kBBytes) : kMaxStages;
  static constexpr int kBAt = kStages * kABytes;
  static constexpr int kStagedAt = kBAt + kStages * kBBytes;
  static constexpr int kBarriersAt = kStagedAt + kConsumerWarps * kStagedBytes;
  static constexpr int kSharedBytes = kBarriersAt + 16 * kStages + kAlignment;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static uint32_t A(uint32_t shared, int s) { return shared + s * kABytes; }
  __device__ static uint32_t B(uint32_t shared, int s) { return shared + kBAt + s * kBBytes; }
  __device__ static uint32_t Staged(uint32_t shared, int warp) {
    return shared + kStagedAt + warp * kStagedBytes;
  }
  // Completed by the bytes of a stage, and by the consumers that have read it.
  __device__ static uint32_t Full(uint32_t shared, int s) { return shared + kBarriersAt + 8 * s; }
  __device__ static uint32_t Empty(uint32_t shared, int s) {
    return shared + kBarriersAt + 8 * (kStages + s);
  }
};

// A stage of b for one warp, which has 16 outputs: rows of 16 bytes, read as 8 x 8 matrices of
// pairs of bytes, transposed. Lane (g, t) gets outputs 2g and 2g + 1 of two rows and picks the
// bytes of an output apart: 4 consecutive indices of row g of the fragment from output 2g, of
// row g + 8 from output 2g + 1.
template <bool kPacked>
class Int8Fragments {
 public:
  __device__ Int8Fragments(int warp, int lane) {
    const int matrix = lane / 8;
    const int row = lane % 8;
    // Packed, a row has two indices and eight rows in order will do. Otherwise lane t takes indices
    // 4t, 4t + 1 from one matrix and 4t + 2, 4t + 3 from the next, or the other way round for half
    // of the lanes: any eight rows then differ in their last three bits, by which chunks of 16
    // bytes are swizzled, and no two of them share banks.
    const int upper_lanes = row / 4;
    const int k =
        kPacked ? 8 * matrix + row
                : 16 * (matrix / 2) + 4 * (row / 2) + row % 2 + 2 * (matrix % 2 ^ upper_lanes);
    offset_ = KeepInRegister(k * 128 + ((warp ^ k % 8) << 4));
    const bool swapped = !kPacked && lane % 4 >= 2;
    even_ = kPacked ? 0x6240 : KeepInRegister(swapped ? 0x2064 : 0x6420);
    odd_ = kPacked ? 0x7351 : KeepInRegister(swapped ? 0x3175 : 0x7531);
  }

  __device__ void Load(uint32_t b) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) LoadMatrix4Transposed(raw_[i], b + offset_ + i * 32 * 128);
  }

  // The fragment of indices [32 * step, 32 * step + 32).
  __device__ void Get(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t first, second;
      if constexpr (kPacked) {
        const uint32_t codes = raw_[step / 2][step % 2 * 2 + half];
        first = codes << 4 & 0xf0f0f0f0u;
        second = codes & 0xf0f0f0f0u;
      } else {
        first = raw_[step][2 * half];
        second = raw_[step][2 * half + 1];
      }
      a[2 * half] = SelectBytes(first, second, even_);
      a[2 * half + 1] = SelectBytes(first, second, odd_);
    }
  }

 private:
  static constexpr int kLoads = kPacked ? 2 : 4;
  uint32_t raw_[kLoads][4];
  uint32_t offset_, even_, odd_;
};

// Where a tile lies. Eight rows of tiles go together, so that the CTAs at work at one time share
// their parts of a and b in the L2.
struct Int8TileOrder {
  static constexpr unsigned kRaster = 8;

  __device__ Int8TileOrder(int64_t m, int64_t n, int64_t batch, int splits, int tokens, int outputs)
      : rows(static_cast<unsigned>((m + tokens - 1) / tokens)),
        columns(static_cast<unsigned>((n + outputs - 1) / outputs)),
        splits(splits),
        count(rows * columns * static_cast<unsigned>(batch) * splits) {}

  __device__ void Find(unsigned tile, unsigned* split, unsigned* batch, unsigned* row,
                       unsigned* column) const {
    *split = tile % splits;
    tile /= splits;
    *batch = tile / (rows * columns);
    tile -= *batch * rows * columns;
    const unsigned band = tile / (kRaster * columns);
    tile -= band * kRaster * columns;
    const unsigned height = min(kRaster, rows - band * kRaster);
    *column = tile / height;
    *row = band * kRaster + tile % height;
  }

  unsigned rows, columns, splits, count;
};

}  // namespace jax_awq
