// The tensor core kernel for sm_80 and later: cp.async pipeline, dequantization in registers,
// mma.sync with the weights as the row operand.
//
// A CTA of four warps computes kTokens x 128 outputs over its share of the contraction, 64 indices
// a stage. Two warps lie side by side along the outputs (64 each). The other two take the second
// half of every stage's depth when there are at most 64 tokens, or the second 64 tokens otherwise:
// a warp's accumulators (64 x 64 in float32) fill half of its registers either way.
#pragma once

#include <algorithm>

#include "device/epilogue.cuh"
#include "device/fragments.cuh"
#include "device/ptx.cuh"
#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {

template <typename T, Layout kLayout, bool kTranspose, int kTokens>
struct MmaTile {
  using Frag = Fragments<T, kLayout, kTranspose>;
  static constexpr int kThreads = 128;
  static constexpr int kStages = 4;
  static constexpr int kTokenWarps = kTokens > 64 ? 2 : 1;
  static constexpr int kDepthWarps = 2 / kTokenWarps;
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kWarpSteps = kDepth / 16 / kDepthWarps;

  static constexpr int kXBytes = kTokens * kDepth * 2;
  static constexpr int kWordBytes = Frag::Words::kRows * Frag::Words::kStride * 4;
  static constexpr int kScaleAt = kXBytes + kWordBytes;
  static constexpr int kZeroAt = kScaleAt + Frag::Groups::kScaleBytes;
  static constexpr int kStageBytes = kZeroAt + Frag::Groups::kZeroBytes;
  static_assert(kStageBytes % 128 == 0);

  // The output tile takes the place of the pipeline when that has drained.
  static constexpr int kTileStride = kTileOutputs + 4;
  static constexpr int kSharedBytes =
      std::max(kStages * kStageBytes, kTokens * kTileStride * 4);
};

// Copies one stage of x, qweight, scales and zero points into shared memory.
template <typename T, Layout kLayout, bool kTranspose, int kTokens>
class StageLoader {
  using Tile = MmaTile<T, kLayout, kTranspose, kTokens>;
  using Words = typename Tile::Frag::Words;
  using Groups = typename Tile::Frag::Groups;

 public:
  __device__ StageLoader(const AwqGemmParams& p, uint32_t shared, int64_t token0, int64_t output0)
      : shared_(shared),
        token0_(token0),
        output0_(output0),
        contraction_(p.contraction),
        m_(p.m),
        x_(static_cast<const T*>(p.buffers.x) + blockIdx.z * p.buffers.x_stride),
        weight_(BatchEntry(p.buffers.weight)),
        last_group_(weight_.k / weight_.group_size - 1),
        row_words_((kLayout == Layout::kGemm ? weight_.n : weight_.k) / 8),
        word_rows_(kLayout == Layout::kGemm ? weight_.k : weight_.n),
        aligned_(row_words_ % 4 == 0) {}

  __device__ void Load(int stage, int64_t depth0) const {
    const uint32_t base = shared_ + stage * Tile::kStageBytes;
    const int tid = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTokens * 8 / Tile::kThreads; ++i) {
      const int row = (tid + i * Tile::kThreads) / 8;
      const int chunk = tid % 8;
      const int64_t c = depth0 + 8 * chunk;
      const bool valid = token0_ + row < m_ && c < contraction_;
      // Chunks are swizzled by row so that ldmatrix finds its eight rows in different banks.
      CopyAsync16(base + row * 128 + ((chunk ^ (row & 7)) << 4),
                  valid ? x_ + (token0_ + row) * contraction_ + c : x_, valid);
    }
    LoadWords(base + Tile::kXBytes, depth0);
    LoadGroups(base, depth0);
  }

 private:
  __device__ void LoadWords(uint32_t to, int64_t depth0) const {
    const int64_t row0 = Tile::Frag::kOutputPacked ? depth0 : output0_;
    const uint32_t* words = static_cast<const uint32_t*>(weight_.qweight);
    const int64_t word0 = (Tile::Frag::kOutputPacked ? output0_ : depth0) / 8;
    constexpr int kChunks = Words::kWords / 4;
#pragma unroll
    for (int i = 0; i < Words::kRows * kChunks / Tile::kThreads; ++i) {
      const int chunk = threadIdx.x % kChunks;
      const int row = (threadIdx.x + i * Tile::kThreads) / kChunks;
      const int64_t word = word0 + 4 * chunk;
      const bool row_valid = row0 + row < word_rows_;
      const uint32_t at = to + (row * Words::kStride + 4 * chunk) * 4;
      const uint32_t* from = words + (row0 + row) * row_words_ + word;
      if (aligned_) {
        const bool valid = row_valid && word < row_words_;
        CopyAsync16(at, valid ? from : words, valid);
      } else {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const bool valid = row_valid && word + w < row_words_;
          CopyAsync4(at + 4 * w, valid ? from + w : words, valid);
        }
      }
    }
  }

  // Rows past the last group repeat it: they meet only zero rows of x, and stay finite with it.
  __device__ void LoadGroups(uint32_t base, int64_t depth0) const {
    const uint16_t* scales = static_cast<const uint16_t*>(weight_.scales);
    const uint32_t* zeros = static_cast<const uint32_t*>(weight_.qzeros);
    const int64_t n = weight_.n;
    const int64_t group0 = (kTranspose ? output0_ : depth0) / weight_.group_size;
    const int64_t column0 = kTranspose ? depth0 : output0_;
    constexpr int kScaleChunks = Groups::kColumns / 8;
    const int i = threadIdx.x % 32;
    const int64_t row = min(group0 + i / kScaleChunks, last_group_);
    const int64_t column = column0 + 8 * (i % kScaleChunks);
    const bool valid = column < n;
    if (threadIdx.x < 32) {
      CopyAsync16(base + Tile::kScaleAt + 16 * i, valid ? scales + row * n + column : scales, valid);
    } else if (threadIdx.x < 64 && zeros) {
      CopyAsync4(base + Tile::kZeroAt + 4 * i,
                 valid ? zeros + row * (n / 8) + column / 8 : zeros, valid);
    }
  }

  uint32_t shared_;
  int64_t token0_, output0_, contraction_, m_;
  const T* x_;
  AwqWeight weight_;
  int64_t last_group_, row_words_, word_rows_;
  bool aligned_;
};

template <typename T, Layout kLayout, bool kTranspose, int kTokens>
__global__ void __launch_bounds__(128, kTokens > 32 ? 2 : 3)
    AwqGemmMmaKernel(const __grid_constant__ AwqGemmParams p) {
#if __CUDA_ARCH__ >= 800
  using Tile = MmaTile<T, kLayout, kTranspose, kTokens>;
  using Frag = typename Tile::Frag;
  extern __shared__ __align__(1024) char shared[];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int depth_warp = Tile::kDepthWarps == 2 ? warp / 2 : 0;
  const int warp_token = Tile::kTokenWarps == 2 ? warp / 2 * Tile::kWarpTokens : 0;

  const int split = blockIdx.x % p.splits;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x / p.splits) * kTokens;
  const int64_t output0 = static_cast<int64_t>(blockIdx.y) * kTileOutputs;
  const int64_t group_size = p.buffers.weight.group_size;
  const int64_t tiles = (p.contraction + kDepth - 1) / kDepth;
  const int64_t tile0 = tiles * split / p.splits;
  const int count = static_cast<int>(tiles * (split + 1) / p.splits - tile0);

  const uint32_t shared_base = SharedAddress(shared);
  const StageLoader<T, kLayout, kTranspose, kTokens> loader(p, shared_base, token0, output0);
  if (p.buffers.weight.qzeros == nullptr) {
    for (int i = threadIdx.x; i < Tile::kStages * Frag::Groups::kZeroBytes / 4;
         i += Tile::kThreads) {
      constexpr int kWords = Frag::Groups::kZeroBytes / 4;
      uint32_t* zeros = reinterpret_cast<uint32_t*>(shared + i / kWords * Tile::kStageBytes +
                                                    Tile::kZeroAt);
      zeros[i % kWords] = 0x88888888u;
    }
  }
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < count) loader.Load(s, (tile0 + s) * kDepth);
    CopyAsyncCommit();
  }

  float acc[Tile::kWarpTokens / 8][4][4] = {};
  Frag fragments;
  int64_t current_group = -1;
  TileView view;
  view.warp_output = warp % 2 * 64;
  view.group_size = group_size;
  view.scales_are_bf16 = p.scales_are_bf16;
  // Row and chunk of x that this lane addresses for ldmatrix.
  const int x_row = warp_token + lane / 16 * 8 + lane % 8;
  const int x_chunk = lane / 8 % 2;

  for (int i = 0; i < count; ++i) {
    CopyAsyncWait<Tile::kStages - 2>();
    __syncthreads();
    const int next = i + Tile::kStages - 1;
    if (next < count) loader.Load(next % Tile::kStages, (tile0 + next) * kDepth);
    CopyAsyncCommit();

    const int stage = i % Tile::kStages;
    const char* base = shared + stage * Tile::kStageBytes;
    const uint32_t x_base = shared_base + stage * Tile::kStageBytes + x_row * 128;
    view.words = reinterpret_cast<const uint32_t*>(base + Tile::kXBytes);
    view.scales = reinterpret_cast<const uint16_t*>(base + Tile::kScaleAt);
    view.zeros = reinterpret_cast<const uint32_t*>(base + Tile::kZeroAt);
    const int64_t depth0 = (tile0 + i) * kDepth;
#pragma unroll
    for (int s = 0; s < Tile::kWarpSteps; ++s) {
      const int step = depth_warp * Tile::kWarpSteps + s;
      if constexpr (!kTranspose) {
        if (s % 2 == 0) {  // 32 rows never cross a group
          const int64_t group = (depth0 + 16 * step) / group_size;
          if (group != current_group) {
            fragments.LoadGroup(view, static_cast<int>(group - depth0 / group_size), g);
            current_group = group;
          }
        }
      }
      uint32_t a[4][4];
      fragments.Load(view, step, g, t, a);
#pragma unroll
      for (int n = 0; n < Tile::kWarpTokens / 16; ++n) {
        uint32_t b[4];
        LoadMatrix4(b, x_base + n * 16 * 128 + (((2 * step + x_chunk) ^ (x_row & 7)) << 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Mma16x8x16<T>(acc[2 * n][j], a[j], b[0], b[1]);
          Mma16x8x16<T>(acc[2 * n + 1][j], a[j], b[2], b[3]);
        }
      }
    }
  }
  CopyAsyncWait<0>();
  __syncthreads();

  // Warps that split the depth add up in a fixed order.
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int turn = 0; turn < Tile::kDepthWarps; ++turn) {
    if (depth_warp == turn) {
#pragma unroll
      for (int n = 0; n < Tile::kWarpTokens / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* to = tile + (warp_token + 8 * n + 2 * t + i % 2) * Tile::kTileStride +
                        view.warp_output + Frag::OutputOf(j, i / 2, g);
            *to = turn == 0 ? acc[n][j][i] : *to + acc[n][j][i];
          }
        }
      }
    }
    __syncthreads();
  }

  ReduceAndStore<kTokens, kTileOutputs, Tile::kTileStride, Tile::kThreads>(
      MakeEpilogue(p), tile, token0, output0, split, p.splits, p.batch * p.size());
#endif
}

template <typename T, Layout kLayout, bool kTranspose, int kTokens>
cudaError_t LaunchMmaTile(const AwqGemmParams& params, cudaStream_t stream) {
  using Tile = MmaTile<T, kLayout, kTranspose, kTokens>;
  const dim3 grid(static_cast<unsigned>((params.m + kTokens - 1) / kTokens * params.splits),
                  static_cast<unsigned>((params.outputs + kTileOutputs - 1) / kTileOutputs),
                  static_cast<unsigned>(params.batch));
  return LaunchSplit(AwqGemmMmaKernel<T, kLayout, kTranspose, kTokens>, params, grid,
                     Tile::kThreads, Tile::kSharedBytes, stream);
}

template <typename T, Layout kLayout, bool kTranspose>
cudaError_t LaunchMmaTokens(int tokens, const AwqGemmParams& params, cudaStream_t stream) {
  switch (tokens) {
    case 32:
      return LaunchMmaTile<T, kLayout, kTranspose, 32>(params, stream);
    case 64:
      return LaunchMmaTile<T, kLayout, kTranspose, 64>(params, stream);
    default:
      return LaunchMmaTile<T, kLayout, kTranspose, 128>(params, stream);
  }
}

template <typename T>
cudaError_t LaunchAwqGemmMma(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                             const AwqGemmBuffers& buffers, cudaStream_t stream) {
  const AwqGemmParams params = MakeParams(p, plan, buffers);
  const int tokens = plan.tile_tokens;
  if (p.layout == Layout::kGemm) {
    return p.transpose ? LaunchMmaTokens<T, Layout::kGemm, true>(tokens, params, stream)
                       : LaunchMmaTokens<T, Layout::kGemm, false>(tokens, params, stream);
  }
  return p.transpose ? LaunchMmaTokens<T, Layout::kOcMajor, true>(tokens, params, stream)
                     : LaunchMmaTokens<T, Layout::kOcMajor, false>(tokens, params, stream);
}

}  // namespace jax_awq
