// q = round(x * (1 / scale)), saturated; the scale of a row is found where none is given.
#pragma once

#include "kernels/types.h"

namespace jax_awq {

struct QuantizeActivationProblem {
  int64_t rows;
  int64_t k;  // below 2^31
  DType x_dtype;
  int bits;                // 8, or 4: two codes a byte, the even column in the low nibble
  int64_t group_size;      // 32, 64, 128 or K; 0 if there are no sums
  int64_t scale_columns;   // 1, or K: a scale for every column
  int64_t rows_per_scale;  // rows that share an entry of `scale`
  const void* x;           // (rows, K)
  const float* scale;      // (rows / rows_per_scale, scale_columns), or nullptr
  void* q;                 // (rows, K) int8, or (rows, ceil(K/2))
  float* row_scale;        // (rows), written where `scale` is nullptr
  int32_t* group_sums;     // (rows, K / group_size), or nullptr
};

// Returns nullptr, or what went wrong.
const char* LaunchQuantizeActivation(const QuantizeActivationProblem& problem, Stream stream);

}  // namespace jax_awq
