// y = act(row_scale * (x @ ((q - z) * s)) + bias), or x @ ((q - z) * s)^T.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/types.h"

namespace jax_awq {

// With x of one byte, kernels multiply codes as they are and take what zero points make of it from
// sums of x over chunks of so many indices of K.
constexpr int64_t kSumChunk = 128;
// bfloat16 entries of a row of those sums: four for each chunk, and a multiple of 16 bytes.
JAX_AWQ_HOST_DEVICE constexpr int64_t ChunkSumColumns(int64_t k) {
  return (k + 2 * kSumChunk - 1) / (2 * kSumChunk) * 8;
}

struct AwqGemmProblem {
  int64_t m = 0;  // rows of x; 0 while planning: not known yet
  int64_t n = 0;  // the weight is (K, N), whether or not the product is transposed
  int64_t k = 0;
  int64_t batch = 1;       // weights or inputs stacked in front
  int64_t group_size = 0;  // rows of K that share one scale and zero point; K for a single group
  Layout layout = Layout::kGemm;
  DType x_dtype = DType::kF16;
  DType scales_dtype = DType::kF16;
  DType out_dtype = DType::kF16;
  bool has_zeros = false;  // otherwise every zero point is 8
  bool has_activation = false;
  bool transpose = false;
  int64_t split_k = 0;  // 0: chosen by the plan
  std::string variant;  // empty: chosen by the plan
  // A row's result does not depend on how many rows there are, nor on where it stands among them.
  bool batch_invariant = false;
  bool fused_only = false;  // "dequantize_dot" is out of the question

  int64_t contraction() const { return transpose ? n : k; }
  int64_t outputs() const { return transpose ? k : n; }
};

enum class AwqGemmKernel : uint8_t { kNone, kDecode, kFew, kTma, kWgmma, kMma, kSimt };

struct AwqGemmPlan {
  std::string variant;  // a kernel, or "dequantize_dot" or "reference", which JAX composes
  AwqGemmKernel kernel = AwqGemmKernel::kNone;
  int tile_tokens = 0;
  int tile_outputs = 0;
  int split_k = 1;
  int members = 1;        // CTAs side by side that share x, which is copied to all at once
  int resident_ctas = 0;  // that the device runs at once
  bool cluster = false;   // splits meet in a thread block cluster; otherwise in the workspace
  bool stream_k = false;  // all CTAs share the tiles that would not fill a wave (see TmaSchedule)
  size_t workspace_bytes = 0;
  double microseconds = 0;  // that the cost model expects; 0 where it does not cover the plan
  std::vector<std::pair<std::string, std::string>> refused;  // variant, why it cannot run
};

// Throws std::invalid_argument when problem.variant names a kernel that cannot run the problem.
// Never needs more than `workspace_limit` bytes: it splits K less instead.
AwqGemmPlan PlanAwqGemm(const AwqGemmProblem& problem, const Device& device,
                        size_t workspace_limit = SIZE_MAX);

struct AwqGemmBuffers {
  AwqWeight weight;
  const void* x;     // (batch?, M, contraction)
  const void* bias;  // (batch?, outputs), or nullptr
  void* y;           // (batch?, M, outputs)
  void* workspace;   // plan.workspace_bytes
  // Elements from one batch entry to the next; 0 where all share one.
  int64_t x_stride;
  int64_t bias_stride;
  DType bias_dtype;
  Activation activation;
  // (batch?, M), or nullptr: 1. With x of float16 it makes the codes of W4A8 of them, too.
  const float* row_scale;
  // (batch?, M, ChunkSumColumns(K)) bfloat16, where x is int8 or float8: the sum of a chunk as
  // high, low, high, low, whose sum it is; zeros past the last chunk.
  const void* chunk_sums;
  int64_t row_scale_stride;
  int64_t chunk_sums_stride;
  bool overlap;  // the kernel before writes x, row_scale and chunk_sums, and lets this one start
};

// Returns nullptr, or what went wrong.
const char* LaunchAwqGemm(const AwqGemmProblem& problem, const AwqGemmPlan& plan,
                          const AwqGemmBuffers& buffers, Stream stream);

}  // namespace jax_awq
