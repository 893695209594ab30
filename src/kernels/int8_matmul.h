// y = act((a @ b) * scale_a * scale_b * scale_c + bias) of int8, or of int4 packed two a byte; sums
// are int32.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/types.h"

namespace jax_awq {

struct Int8MatmulProblem {
  int64_t m = 0;  // rows of a; 0 while planning: not known yet
  int64_t n = 0;
  int64_t k = 0;
  int64_t batch = 1;    // matrices stacked in front of y
  int64_t a_batch = 1;  // and of a: 1 where all share it
  bool packed = false;  // int4, two a byte, the even index of K in the low half
  std::string variant;  // empty: chosen by the plan

  int64_t a_columns() const { return packed ? (k + 1) / 2 : k; }  // bytes of a row
  int64_t b_rows() const { return packed ? (k + 1) / 2 : k; }
};

enum class Int8MatmulKernel : uint8_t { kTma, kMma, kDp4a };

struct Int8MatmulPlan {
  std::string variant;  // or "reference"
  Int8MatmulKernel kernel = Int8MatmulKernel::kDp4a;
  int tile_tokens = 0;  // rows of a
  int tile_outputs = 0;
  int split_k = 1;
  int cluster = 1;  // CTAs that share their rows of a
  int sm_count = 0;
  bool widen = false;        // a is copied first, as int8 in rows of padded_k
  int64_t padded_k = 0;      // a multiple of 16
  size_t widened_bytes = 0;  // of a in the workspace; sums of splits follow
  size_t workspace_bytes = 0;
  std::vector<std::pair<std::string, std::string>> refused;  // variant, why it cannot run
};

// Throws std::invalid_argument when problem.variant names a kernel that cannot run the problem.
// Never needs more than `workspace_limit` bytes.
Int8MatmulPlan PlanInt8Matmul(const Int8MatmulProblem& problem, const Device& device,
                              size_t workspace_limit = SIZE_MAX);

struct Int8MatmulBuffers {
  const void* a;         // (batch?, M, K) or (batch?, M, K/2)
  const void* b;         // (batch?, K, N) or (batch?, K/2, N)
  const float* scale_a;  // (batch?, M) or (batch?, 1); nullptr is 1, as of the other two
  const float* scale_b;  // (batch?, N) or (batch?, 1)
  const float* scale_c;  // (batch?, 1)
  const void* bias;      // (batch?, N), or nullptr
  void* y;               // (batch?, M, N)
  void* workspace;       // plan.workspace_bytes
  // Elements from one batch entry to the next; 0 where all share one.
  int64_t a_stride, b_stride, scale_a_stride, scale_b_stride, scale_c_stride, bias_stride;
  bool row_scales;     // scale_a has one for each row
  bool column_scales;  // scale_b has one for each column
  bool raw;            // y is the int32 sums
  DType out_dtype;     // otherwise
  DType bias_dtype;
  Activation activation;
};

// Returns nullptr, or what went wrong.
const char* LaunchInt8Matmul(const Int8MatmulProblem& problem, const Int8MatmulPlan& plan,
                             const Int8MatmulBuffers& buffers, Stream stream);

}  // namespace jax_awq
