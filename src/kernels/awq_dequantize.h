// w = (q - z) * s, rounded once.
#pragma once

#include "kernels/types.h"

namespace jax_awq {

struct AwqDequantizeProblem {
  AwqWeight weight;
  int64_t batch;  // weights stacked in front; 1 if none
  DType out_dtype;
  void* w;  // (batch?, K, N)
};

// Returns nullptr, or what went wrong.
const char* LaunchAwqDequantize(const AwqDequantizeProblem& problem, Stream stream);

}  // namespace jax_awq
