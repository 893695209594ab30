// The tensor core kernel for sm_80 and later: cp.async pipeline, dequantization in registers,
// mma.sync with the weights as the row operand.
//
// A CTA of four warps computes kTokens x 128 outputs over its share of the contraction, 64 indices
// a stage. Two warps lie side by side along the outputs (64 each). The other two take the second
// half of every stage's depth when there are at most 64 tokens, or the second 64 tokens otherwise:
// a warp's accumulators (64 x 64 in float32) fill half of its registers either way.
#pragma once

#include "device/ptx.cuh"
#include "kernels/awq_gemm_staged.cuh"

namespace jax_awq {

template <typename T, Layout kLayout, bool kTranspose, int kTokens>
struct MmaTile : StagedTile<T, kLayout, kTranspose, kTokens, 128, 128, 4> {
  using Frag = typename MmaTile::Stage::Frag;
  static constexpr int kTokenWarps = kTokens > 64 ? 2 : 1;
  static constexpr int kDepthWarps = 2 / kTokenWarps;
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kWarpSteps = kDepth / 16 / kDepthWarps;
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

  const unsigned split = blockIdx.x % p.splits;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x / p.splits) * kTokens;
  const int output0 = blockIdx.y * Tile::kOutputs;
  const int group_shift = p.buffers.weight.group_shift;
  const unsigned tiles = (static_cast<unsigned>(p.contraction) + kDepth - 1) / kDepth;
  const Share share(tiles, split, p.splits);
  const int count = share.count;
  int depth0 = share.first * kDepth;

  const uint32_t shared_base = SharedAddress(shared);
  typename Tile::Loader loader(p, shared_base, token0, output0, depth0);
  if (p.buffers.weight.qzeros == nullptr) Tile::Stage::FillZeros(shared, Tile::kStages);
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < count) loader.Load(s);
    CopyAsyncCommit();
  }

  float acc[Tile::kWarpTokens / 8][4][4] = {};
  Frag fragments(0, g, t);
  TileView view;
  view.warp_output = warp % 2 * 64;
  view.group_shift = group_shift;
  view.scales_are_bf16 = p.scales_are_bf16;
  // Row and chunk of x that this lane addresses for ldmatrix.
  const int x_row = warp_token + lane / 16 * 8 + lane % 8;
  const int x_chunk = lane / 8 % 2;

  for (int i = 0; i < count; ++i) {
    CopyAsyncWait<Tile::kStages - 2>();
    __syncthreads();
    const int next = i + Tile::kStages - 1;
    if (next < count) loader.Load(next % Tile::kStages);
    CopyAsyncCommit();

    const int stage = i % Tile::kStages;
    const char* base = shared + stage * Tile::Stage::kBytes;
    const uint32_t x_base = shared_base + stage * Tile::Stage::kBytes + x_row * 128;
    Tile::Stage::Point(&view, base);
#pragma unroll
    for (int s = 0; s < Tile::kWarpSteps; ++s) {
      const int step = depth_warp * Tile::kWarpSteps + s;
      if (s % 2 == 0) fragments.EnterGroup(&view, depth0, step);
      uint32_t a[4][4];
      fragments.Dequantize(view, step, fragments.Fetch(view, step), a);
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
    depth0 += kDepth;
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
        for (int i = 0; i < 2; ++i) {
          fragments.template Store<typename Tile::Result>(
              tile, warp_token + 8 * n + 2 * t + i, view.warp_output, turn > 0,
              [&](int j, int h) { return acc[n][j][2 * h + i]; });
        }
      }
    }
    __syncthreads();
  }

  ReduceAndStore<typename Tile::Result, Tile::kThreads>(
      MakeEpilogue(p, blockIdx.z), tile, token0, output0, split, p.splits, p.batch * p.size());
#endif
}

template <typename T>
struct MmaKernels {
  template <Layout kLayout, bool kTranspose, int kTokens>
  static cudaError_t Launch(const AwqGemmParams& params, cudaStream_t stream) {
    return LaunchStagedTile<MmaTile<T, kLayout, kTranspose, kTokens>>(
        AwqGemmMmaKernel<T, kLayout, kTranspose, kTokens>, params, stream);
  }
};

template <typename T>
cudaError_t LaunchAwqGemmMma(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                             const AwqGemmBuffers& buffers, cudaStream_t stream) {
  return LaunchStaged<MmaKernels<T>, 32, 64, 128>(p, plan, buffers, stream);
}

}  // namespace jax_awq
