// Streams buffers through the processors, eight 16-byte loads a thread in flight.

#include "kernels/read.h"

#include <cuda_runtime.h>

namespace jax_awq {
namespace {

struct Shape {
  int threads;
  int ctas_per_sm;
};

constexpr Shape kShapes[kReadShapes] = {{256, 2}, {256, 4}, {256, 8},
                                        {512, 1}, {512, 4}, {1024, 2}};

__global__ void ReadKernel(const __grid_constant__ ReadProblem p) {
  constexpr int kUnroll = 8;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  uint32_t seen = 0;
#pragma unroll
  for (int part = 0; part < kReadParts; ++part) {
    const uint4* from = static_cast<const uint4*>(p.parts[part]);
    const int64_t count = p.bytes[part] / 16;
    for (int64_t i = first; i < count; i += kUnroll * step) {
      uint4 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        v[u] = i + u * step < count ? __ldcs(from + i + u * step) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) seen ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
  }
  // Nearly never true of any other thread, but the compiler cannot know.
  if (first == 0 || seen == 0x5bd1e995u) *p.y = seen;
}

}  // namespace

const char* LaunchRead(const ReadProblem& problem, int sm_count, Stream stream) {
  const Shape& shape = kShapes[problem.shape];
  ReadKernel<<<sm_count * shape.ctas_per_sm, shape.threads, 0, stream>>>(problem);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_awq
