// y = act(row_scale * (codes of x @ ((q - z) * s)) + bias): a kernel that rounds x to codes, and
// awq_gemm's on them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/awq_gemm.h"

namespace jax_awq {

enum class Codes : uint8_t { kInt8, kInt4, kFloat8 };  // -127 to 127, -7 to 7, float8_e4m3fn
enum class GivenScale : uint8_t { kNone, kOne, kForEachRow };  // kNone: found for each row

std::optional<Codes> CodesFromName(std::string_view name);

struct AwqGemmW4A8Problem {
  int64_t m = 0;  // rows of x; 0 while planning: not known yet
  int64_t n = 0;
  int64_t k = 0;
  int64_t batch = 1;    // weights or inputs stacked in front
  int64_t x_batch = 1;  // of x, and of its scale: 1 where all share it
  int64_t scale_batch = 1;
  int64_t group_size = 0;
  Layout layout = Layout::kGemm;
  DType x_dtype = DType::kF16;  // kS8: codes already, whose scale is given
  DType scales_dtype = DType::kF16;
  DType out_dtype = DType::kF16;
  bool has_zeros = false;
  bool has_activation = false;
  Codes codes = Codes::kInt8;
  GivenScale scale = GivenScale::kNone;
  std::string variant;  // of awq_gemm; empty: chosen by the plan

  // Whether the given scales are what awq_gemm takes; a single one is, of a single row.
  bool has_row_scales() const {
    return scale == GivenScale::kForEachRow || (scale == GivenScale::kOne && m == 1);
  }
};

struct AwqGemmW4A8Plan {
  std::string variant;     // gemm.variant, or "reference"
  std::string reason;      // for codes as floats, or for the reference
  AwqGemmProblem problem;  // of x_dtype kS8 or kE4M3, or a float of 16 bits
  AwqGemmPlan gemm;
  int64_t code_batch = 1;    // batch entries with codes, sums and scales of their own
  bool copies_codes = true;  // into the workspace; otherwise they are x
  // Where parts of the workspace begin.
  size_t row_scale_at = 0;
  size_t chunk_sums_at = 0;
  size_t gemm_at = 0;
  size_t workspace_bytes = 0;
  std::vector<std::pair<std::string, std::string>> refused;  // variant, why it cannot run
};

// Throws std::invalid_argument when problem.variant names a kernel that cannot run the problem.
// Never needs more than `workspace_limit` bytes.
AwqGemmW4A8Plan PlanAwqGemmW4A8(const AwqGemmW4A8Problem& problem, const Device& device,
                                size_t workspace_limit = SIZE_MAX);

struct AwqGemmW4A8Buffers {
  AwqWeight weight;
  const void* x;       // (batch?, M, K)
  const float* scale;  // (batch?, M) or (batch?, 1), or nullptr
  const void* bias;    // (batch?, N), or nullptr
  void* y;             // (batch?, M, N)
  void* workspace;     // plan.workspace_bytes
  // Elements from one batch entry to the next; 0 where all share one.
  int64_t x_stride;
  int64_t scale_stride;
  int64_t bias_stride;
  DType bias_dtype;
  Activation activation;
};

// Returns nullptr, or what went wrong.
const char* LaunchAwqGemmW4A8(const AwqGemmW4A8Problem& problem, const AwqGemmW4A8Plan& plan,
                              const AwqGemmW4A8Buffers& buffers, Stream stream);

}  // namespace jax_awq
