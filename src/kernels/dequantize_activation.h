// x = q * scale, a product in float32.
#pragma once

#include "kernels/types.h"

namespace jax_awq {

struct DequantizeActivationProblem {
  int64_t rows;
  int64_t k;               // below 2^31
  int bits;                // 8, or 4: two codes a byte, the even column in the low nibble
  int64_t scale_columns;   // 1, or K: a scale for every column
  int64_t rows_per_scale;  // rows that share an entry of `scale`
  DType x_dtype;
  const void* q;       // (rows, K) int8, or (rows, ceil(K/2))
  const float* scale;  // (rows / rows_per_scale, scale_columns)
  void* x;             // (rows, K)
};

// Returns nullptr, or what went wrong.
const char* LaunchDequantizeActivation(const DequantizeActivationProblem& problem, Stream stream);

}  // namespace jax_awq
