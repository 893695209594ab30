// What the mma and the wgmma kernel have in common: tiles whose stages all threads copy, and their
// launch. How warps that split the depth add up is written out in both: the compiler allocates
// registers differently around a function.
#pragma once

#include <algorithm>

#include "device/epilogue.cuh"
#include "device/stage.cuh"
#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {

template <typename T, Layout kLayout, bool kTranspose, int kTokens_, int kOutputs_, int kThreads_,
          int kStages_>
struct StagedTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kStages = kStages_;
  using Stage = jax_awq::Stage<T, kLayout, kTranspose, kTokens, kOutputs>;
  using Loader = StageLoader<T, kLayout, kTranspose, kTokens, kOutputs, kThreads>;
  // The result takes the place of the pipeline when that has drained.
  using Result = ResultTile<kTokens, kOutputs, 2>;
  static constexpr int kSharedBytes = std::max(kStages * Stage::kBytes, Result::kBytes);
};

// `kernel` works on such a tile in each CTA.
template <typename Tile, typename Kernel>
cudaError_t LaunchStagedTile(Kernel kernel, const AwqGemmParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.m + Tile::kTokens - 1) / Tile::kTokens * p.splits),
                  static_cast<unsigned>((p.outputs + Tile::kOutputs - 1) / Tile::kOutputs),
                  static_cast<unsigned>(p.batch));
  return LaunchClusters(kernel, p, p.cluster_size(), grid, Tile::kThreads, Tile::kSharedBytes,
                        stream);
}

// The last of the numbers of tokens stands for any other, too.
template <typename Kernels, Layout kLayout, bool kTranspose, int kTokens, int... kMore>
cudaError_t LaunchStagedTokens(int tokens, const AwqGemmParams& p, cudaStream_t stream) {
  if constexpr (sizeof...(kMore) > 0) {
    if (tokens != kTokens) {
      return LaunchStagedTokens<Kernels, kLayout, kTranspose, kMore...>(tokens, p, stream);
    }
  }
  return Kernels::template Launch<kLayout, kTranspose, kTokens>(p, stream);
}

// Launches the one of `Kernels` that fits the problem and its plan.
template <typename Kernels, int... kTokens>
cudaError_t LaunchStaged(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                         const AwqGemmBuffers& buffers, cudaStream_t stream) {
  const AwqGemmParams params = MakeParams(p, plan, buffers);
  const auto launch =
      p.layout == Layout::kGemm
          ? p.transpose ? LaunchStagedTokens<Kernels, Layout::kGemm, true, kTokens...>
                        : LaunchStagedTokens<Kernels, Layout::kGemm, false, kTokens...>
      : p.transpose ? LaunchStagedTokens<Kernels, Layout::kOcMajor, true, kTokens...>
                    : LaunchStagedTokens<Kernels, Layout::kOcMajor, false, kTokens...>;
  return launch(plan.tile_tokens, params, stream);
}

}  // namespace jax_awq
