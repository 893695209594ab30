// One stage of the pipeline in shared memory, and the copies that fill it.
#pragma once

#include "device/fragments.cuh"
#include "device/ptx.cuh"
#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {

// x (kTokens rows of 128 bytes, swizzled), words, scales, zero points.
template <typename T, Layout kLayout, bool kTranspose, int kTokens, int kTileOutputs>
struct Stage {
  using Frag = Fragments<T, kLayout, kTranspose, kTileOutputs>;
  static constexpr int kXBytes = kTokens * kDepth * 2;
  static constexpr int kWordBytes = Frag::Words::kRows * Frag::Words::kStride * 4;
  static constexpr int kScaleAt = kXBytes + kWordBytes;
  static constexpr int kZeroAt = kScaleAt + Frag::Groups::kScaleBytes;
  // The swizzle of x repeats every 1024 bytes.
  static constexpr int kBytes = (kZeroAt + Frag::Groups::kZeroBytes + 1023) / 1024 * 1024;

  // What the lanes of a warp read of the stage at `base`.
  __device__ static void Point(TileView* view, const char* base) {
    view->words = reinterpret_cast<const uint32_t*>(base + kXBytes);
    view->scales = reinterpret_cast<const uint16_t*>(base + kScaleAt);
    view->zeros = reinterpret_cast<const uint32_t*>(base + kZeroAt);
  }

  // Without zero points every one is 8, once and for all stages.
  __device__ static void FillZeros(char* shared, int stages) {
    constexpr int kWords = Frag::Groups::kZeroBytes / 4;
    for (int i = threadIdx.x; i < stages * kWords; i += blockDim.x) {
      reinterpret_cast<uint32_t*>(shared + i / kWords * kBytes + kZeroAt)[i % kWords] = 0x88888888u;
    }
  }
};

// Copies stage after stage of x, qweight, scales and zero points into shared memory. Every thread
// keeps pointers to its own chunks and moves them along the contraction.
template <typename T, Layout kLayout, bool kTranspose, int kTokens, int kTileOutputs, int kThreads>
class StageLoader {
  using Tile = Stage<T, kLayout, kTranspose, kTokens, kTileOutputs>;
  using Words = typename Tile::Frag::Words;
  using Groups = typename Tile::Frag::Groups;
  static constexpr int kXRows = kThreads / 8;  // of x, loaded by all threads at once
  static constexpr int kWordChunks = Words::kWords / 4;
  static constexpr int kWordRows = kThreads / kWordChunks;
  static constexpr int kScaleChunks = Groups::kColumns / 8;

 public:
  // Starts at contraction index `depth`.
  __device__ StageLoader(const AwqGemmParams& p, uint32_t shared, int64_t token0, int output0,
                         int depth)
      : shared_(shared),
        depth_(depth),
        output0_(output0),
        contraction_(static_cast<int>(p.contraction)),
        weight_(BatchEntry(p.buffers.weight)) {
    const int tid = threadIdx.x;
    const int64_t x_row = token0 + tid / 8;
    x_rows_ = static_cast<int>(min(p.m - x_row, static_cast<int64_t>(kTokens)));
    x_ = static_cast<const T*>(p.buffers.x) + blockIdx.z * p.buffers.x_stride +
         x_row * p.contraction + depth + tid % 8 * 8;

    const int row_words = static_cast<int>(kLayout == Layout::kGemm ? weight_.n : weight_.k) / 8;
    const int rows = static_cast<int>(kLayout == Layout::kGemm ? weight_.k : weight_.n);
    const int row = (Tile::Frag::kOutputPacked ? depth : output0) + tid / kWordChunks;
    const int word = (Tile::Frag::kOutputPacked ? output0 : depth) / 8 + tid % kWordChunks * 4;
    row_words_ = row_words;
    rows_left_ = rows - row;
    words_left_ = row_words - word;
    words_ = static_cast<const uint32_t*>(weight_.qweight) + int64_t{row} * row_words + word;
  }

  __device__ void Load(int stage) {
    const uint32_t base = shared_ + stage * Tile::kBytes;
    LoadX(base);
    LoadWords(base + Tile::kXBytes);
    LoadGroups(base);
    depth_ += kDepth;
  }

 private:
  __device__ void LoadX(uint32_t to) {
    const int row = threadIdx.x / 8;
    const int chunk = threadIdx.x % 8;
    const bool in_depth = depth_ + 8 * chunk < contraction_;
#pragma unroll
    for (int i = 0; i < (kTokens + kXRows - 1) / kXRows; ++i) {
      if (kTokens < kXRows && row >= kTokens) break;
      const bool valid = in_depth && i * kXRows < x_rows_;
      // Chunks are swizzled by row so that ldmatrix finds its eight rows in different banks.
      CopyAsync16(to + (row + i * kXRows) * 128 + ((chunk ^ (row & 7)) << 4),
                  valid ? x_ + int64_t{i} * kXRows * contraction_ : x_, valid);
    }
    x_ += kDepth;
  }

  __device__ void LoadWords(uint32_t to) {
    const int chunk = threadIdx.x % kWordChunks;
    const int row = threadIdx.x / kWordChunks;
#pragma unroll
    for (int i = 0; i < Words::kRows / kWordRows; ++i) {
      const bool row_valid = i * kWordRows < rows_left_;
      const uint32_t at = to + ((row + i * kWordRows) * Words::kStride + 4 * chunk) * 4;
      const uint32_t* from = words_ + int64_t{i} * kWordRows * row_words_;
      if (row_words_ % 4 == 0) {
        CopyAsync16(at, from, row_valid && words_left_ > 0);
      } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) CopyAsync4(at + 4 * w, from + w, row_valid && words_left_ > w);
      }
    }
    if constexpr (Tile::Frag::kOutputPacked) {
      words_ += int64_t{kDepth} * row_words_;
      rows_left_ -= kDepth;
    } else {
      words_ += kDepth / 8;
      words_left_ -= kDepth / 8;
    }
  }

  // Rows past the last group repeat it: they meet only zero rows of x, and stay finite with it.
  __device__ void LoadGroups(uint32_t base) {
    constexpr int kChunks = Groups::kRows * kScaleChunks;  // also the words of zero points
    static_assert(2 * kChunks <= kThreads);
    const int i = threadIdx.x % kChunks;
    if (threadIdx.x >= 2 * kChunks) return;
    const int n = static_cast<int>(weight_.n);
    const int shift = weight_.group_shift;
    const int group0 = (kTranspose ? output0_ : depth_) >> shift;
    const int last_group = (static_cast<int>(weight_.k) - 1) >> shift;
    const int row = min(group0 + i / kScaleChunks, last_group);
    const int column = (kTranspose ? depth_ : output0_) + 8 * (i % kScaleChunks);
    const bool valid = column < n;
    if (threadIdx.x < kChunks) {
      const uint16_t* scales = static_cast<const uint16_t*>(weight_.scales);
      CopyAsync16(base + Tile::kScaleAt + 16 * i,
                  valid ? scales + int64_t{row} * n + column : scales, valid);
    } else if (weight_.qzeros) {
      const uint32_t* zeros = static_cast<const uint32_t*>(weight_.qzeros);
      CopyAsync4(base + Tile::kZeroAt + 4 * i,
                 valid ? zeros + int64_t{row} * (n / 8) + column / 8 : zeros, valid);
    }
  }

  uint32_t shared_;
  int depth_, output0_, contraction_, x_rows_, row_words_, rows_left_, words_left_;
  const T* x_;
  const uint32_t* words_;
  AwqWeight weight_;
};

}  // namespace jax_awq
