// The tensor core kernel for sm_90a: as the mma kernel, with wgmma taking the weights from
// registers and x from shared memory.
//
// A CTA of two warpgroups computes kTokens x 256 outputs over its share of the contraction. A warp
// owns 64 outputs, one column of words per lane, so that a word is read and dequantized by one lane
// only. Up to 64 tokens each warpgroup takes half of every stage's depth for all outputs; with 128
// tokens its accumulators hold two of the four 64-row tiles j, those of the even or of the odd
// bytes of a word. Fragments are double-buffered: while the tensor cores work on one k16 step, the
// next is dequantized.
#pragma once

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "kernels/awq_gemm_staged.cuh"

namespace jax_awq {

template <typename T, Layout kLayout, bool kTranspose, int kTokens>
struct WgmmaTile : StagedTile<T, kLayout, kTranspose, kTokens, 256, 256, 5> {
  static constexpr bool kSplitDepth = kTokens <= 64;
  static constexpr int kTiles = kSplitDepth ? 4 : 2;  // 64-row tiles of a warpgroup
  static constexpr int kSteps = kSplitDepth ? 2 : 4;  // k16 steps of a warpgroup in a stage
  using Frag = Fragments<T, kLayout, kTranspose, WgmmaTile::kOutputs, kTiles>;
  // Stages copied ahead. The slot filled next was last read two tiles ago, so no wgmma that may
  // still be in flight reads it.
  static constexpr int kAhead = WgmmaTile::kStages - 2;
  static constexpr int kCtasPerSm = kTokens == 16 && Frag::kOutputPacked ? 2 : 1;
};

// Which part of the contraction a CTA has, and which tokens. The compiler cannot see that two of
// them are the same: the epilogue's is made after the main loop, and takes no registers in it.
struct WgmmaPlace {
  __device__ WgmmaPlace(int splits, int tokens) {
    unsigned block = blockIdx.x;
    asm volatile("" : "+r"(block));
    split = block % splits;
    token0 = static_cast<int64_t>(block / splits) * tokens;
  }
  unsigned split;
  int64_t token0;
};

template <typename T, Layout kLayout, bool kTranspose, int kTokens>
__global__ void __launch_bounds__(WgmmaTile<T, kLayout, kTranspose, kTokens>::kThreads,
                                  WgmmaTile<T, kLayout, kTranspose, kTokens>::kCtasPerSm)
    AwqGemmWgmmaKernel(const __grid_constant__ AwqGemmParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = WgmmaTile<T, kLayout, kTranspose, kTokens>;
  using Frag = typename Tile::Frag;
  extern __shared__ __align__(1024) char shared[];

  const int cta_warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be uniform
  const int warpgroup = cta_warp / 4;
  const int warp = cta_warp % 4;
  const int t = threadIdx.x % 4;

  const WgmmaPlace place(p.splits, kTokens);
  const int output0 = blockIdx.y * Tile::kOutputs;
  const int group_shift = p.buffers.weight.group_shift;
  const unsigned tiles = (static_cast<unsigned>(p.contraction) + kDepth - 1) / kDepth;
  const Share share(tiles, place.split, p.splits);
  int depth0 = share.first * kDepth;

  const uint32_t shared_base = SharedAddress(shared);
  typename Tile::Loader loader(p, shared_base, place.token0, output0, depth0);
#pragma unroll
  for (int s = 0; s < Tile::kAhead; ++s) {
    if (s < share.count) loader.Load(s);
    CopyAsyncCommit();
  }
  if (p.buffers.weight.qzeros == nullptr) Tile::Stage::FillZeros(shared, Tile::kStages);

  float acc[Tile::kTiles][kTokens / 2];
#pragma unroll
  for (int j = 0; j < Tile::kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[j][i] = 0.0f;
    PinRegisters(acc[j]);
  }
  WgmmaFence();
  Frag fragments(warpgroup, threadIdx.x % 32 / 4, t);
  const int step0 = Tile::kSplitDepth ? Tile::kSteps * warpgroup : 0;
  uint32_t a[2][Tile::kTiles][4];
  TileView view;
  view.warp_output = warp * 64;
  view.group_shift = group_shift;
  view.scales_are_bf16 = p.scales_are_bf16;

  int stage = 0;
  int next_stage = Tile::kAhead;
#pragma unroll 1
  for (int i = 0; i < share.count; ++i) {
    CopyAsyncWait<Tile::kAhead - 1>();
    FenceProxyAsync();
    __syncthreads();
    Tile::Stage::Point(&view, shared + stage * Tile::Stage::kBytes);
    const uint64_t x = SwizzledRows(shared_base + stage * Tile::Stage::kBytes);
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
    // All reads of packed codes go out first, to wait for them once.
    typename Frag::Codes codes[Tile::kSteps];
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) codes[s] = fragments.Fetch(view, step0 + s);
    // While they are on their way, and before the next wgmma: a branch among wgmmas serializes
    // them.
    if (i + Tile::kAhead < share.count) loader.Load(next_stage);
    CopyAsyncCommit();
    next_stage = next_stage == Tile::kStages - 1 ? 0 : next_stage + 1;
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) {
      const int step = step0 + s;
      if (s % 2 == 0) fragments.EnterGroup(&view, depth0, step);
      // All but the newest group of wgmmas are done: these registers are free again.
      WgmmaWait<1>();
      uint32_t(&now)[Tile::kTiles][4] = a[s % 2];
      fragments.Dequantize(view, step, codes[s], now);
      WgmmaFence();
#pragma unroll
      for (int j = 0; j < Tile::kTiles; ++j) {
        Wgmma<T, kTokens>(acc[j], now[j], x + 2 * step);
      }
      WgmmaCommit();
    }
    depth0 += kDepth;
  }
  WgmmaWait<0>();
#pragma unroll
  for (int j = 0; j < Tile::kTiles; ++j) PinRegisters(acc[j]);
  CopyAsyncWait<0>();
  __syncthreads();

  // Warpgroups that split the depth add up in a fixed order.
  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int turn = 0; turn < (Tile::kSplitDepth ? 2 : 1); ++turn) {
    if (!Tile::kSplitDepth || warpgroup == turn) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          fragments.template Store<typename Tile::Result>(
              tile, 8 * n + 2 * t + i, view.warp_output, turn > 0,
              [&](int j, int h) { return acc[j][4 * n + 2 * h + i]; });
        }
      }
    }
    __syncthreads();
  }
  const WgmmaPlace end(p.splits, kTokens);
  ReduceAndStore<typename Tile::Result, Tile::kThreads>(MakeEpilogue(p, blockIdx.z), tile,
                                                        end.token0, output0, end.split, p.splits,
                                                        p.batch * p.size());
#endif
}

template <typename T>
struct WgmmaKernels {
  template <Layout kLayout, bool kTranspose, int kTokens>
  static cudaError_t Launch(const AwqGemmParams& params, cudaStream_t stream) {
    return LaunchStagedTile<WgmmaTile<T, kLayout, kTranspose, kTokens>>(
        AwqGemmWgmmaKernel<T, kLayout, kTranspose, kTokens>, params, stream);
  }
};

template <typename T>
cudaError_t LaunchAwqGemmWgmma(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                               const AwqGemmBuffers& buffers, cudaStream_t stream) {
  return LaunchStaged<WgmmaKernels<T>, 16, 32, 64, 128>(p, plan, buffers, stream);
}

}  // namespace jax_awq
