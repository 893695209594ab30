// What moving bytes costs and nothing else: what benchmarks hold kernels against.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace jax_awq {

constexpr int kReadParts = 3;
constexpr int kMemoryShapes = 7;  // of a launch: which is best depends on sizes

// Pointers are 16-byte aligned, bytes multiples of 16, and shape is below kMemoryShapes.
struct ReadProblem {
  const void* parts[kReadParts];
  int64_t bytes[kReadParts];
  int shape;
  uint32_t* y;  // one word that depends on all of them
};

struct CopyProblem {
  const void* x;
  void* y;
  int64_t bytes;
  int shape;
};

// Both return nullptr, or what went wrong.
const char* LaunchRead(const ReadProblem& problem, int sm_count, Stream stream);
const char* LaunchCopy(const CopyProblem& problem, int sm_count, Stream stream);

}  // namespace jax_awq
