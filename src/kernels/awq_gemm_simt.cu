// The kernel that runs everywhere and takes every shape: sm_75, odd K, mixed dtypes. Products in
// float32 on ordinary cores, from weights rounded as the tensor core kernels round them.

#include "device/weights.cuh"
#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 32;
constexpr int kOutputs = 64;
constexpr int kDepth = 32;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    AwqGemmSimtKernel(const __grid_constant__ AwqGemmParams p) {
  __shared__ float x_tile[kDepth][kTokens + 1];
  __shared__ float w_tile[kDepth][kOutputs + 1];
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t output0 = static_cast<int64_t>(blockIdx.y) * kOutputs;
  const T* x = static_cast<const T*>(p.buffers.x) + blockIdx.z * p.buffers.x_stride;
  const AwqWeight weight = BatchEntry(p.buffers.weight);

  // Each thread owns tokens ty + 8 i and outputs tx + 16 j.
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  float acc[4][4] = {};
  for (int64_t depth0 = 0; depth0 < p.contraction; depth0 += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kTokens; i += kThreads) {
      const int64_t token = token0 + i / kDepth;
      const int64_t c = depth0 + i % kDepth;
      x_tile[i % kDepth][i / kDepth] = token < p.m && c < p.contraction
                                           ? static_cast<float>(x[token * p.contraction + c])
                                           : 0.0f;
    }
    for (int i = threadIdx.x; i < kDepth * kOutputs; i += kThreads) {
      const int64_t c = depth0 + i / kOutputs;
      const int64_t o = output0 + i % kOutputs;
      float w = 0.0f;
      if (c < p.contraction && o < p.outputs) {
        w = static_cast<float>(
            RoundTo<T>(p.transpose ? WeightAt(weight, o, c) : WeightAt(weight, c, o)));
      }
      w_tile[i / kOutputs][i % kOutputs] = w;
    }
    __syncthreads();
    for (int c = 0; c < kDepth; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc[i][j] = fmaf(x_tile[c][ty + 8 * i], w_tile[c][tx + 16 * j], acc[i][j]);
        }
      }
    }
    __syncthreads();
  }

  const EpilogueParams epilogue = MakeEpilogue(p, blockIdx.z);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t token = token0 + ty + 8 * i;
      const int64_t output = output0 + tx + 16 * j;
      if (token < p.m && output < p.outputs) FinishOne(epilogue, token, output, acc[i][j]);
    }
  }
}

template <typename T>
cudaError_t Launch(const AwqGemmParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((p.outputs + kOutputs - 1) / kOutputs),
                  static_cast<unsigned>(p.batch));
  AwqGemmSimtKernel<T><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAwqGemmSimt(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                              const AwqGemmBuffers& buffers, cudaStream_t stream) {
  const AwqGemmParams params = MakeParams(p, plan, buffers);
  return p.x_dtype == DType::kF16 ? Launch<__half>(params, stream)
                                  : Launch<__nv_bfloat16>(params, stream);
}

}  // namespace jax_awq
