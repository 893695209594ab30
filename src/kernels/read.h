// What it costs to read a weight and nothing else: the floor that benchmarks hold kernels against.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace jax_awq {

constexpr int kReadParts = 3;
constexpr int kReadShapes = 6;

struct ReadProblem {
  const void* parts[kReadParts];  // 16-byte aligned
  int64_t bytes[kReadParts];      // multiples of 16
  int shape;    // of the launch, below kReadShapes: which is best depends on sizes
  uint32_t* y;  // one word that depends on all of them
};

// Returns nullptr, or what went wrong.
const char* LaunchRead(const ReadProblem& problem, int sm_count, Stream stream);

}  // namespace jax_awq
