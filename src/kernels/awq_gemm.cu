// Dispatch of awq_gemm to its kernels, and the sum over splits that met in the workspace.

#include <cuda_fp8.h>

#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {
namespace {

// y = finish(sum over splits, in their order).
__global__ void FinishSplitsKernel(const __grid_constant__ AwqGemmParams p) {
  EpilogueParams epilogue = MakeEpilogue(p, blockIdx.z);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.size()) return;
  float v = 0.0f;
  for (int s = 0; s < p.splits; ++s) {
    v += epilogue.partials[s * p.batch * p.size() + i];
  }
  FinishOne(epilogue, i / p.outputs, i % p.outputs, v);
}

cudaError_t LaunchFinishSplits(const AwqGemmParams& p, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const dim3 grid(static_cast<unsigned>((p.size() + kThreads - 1) / kThreads), 1,
                  static_cast<unsigned>(p.batch));
  FinishSplitsKernel<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchTensorCores(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                              const AwqGemmBuffers& buffers, cudaStream_t stream) {
  switch (plan.kernel) {
    case AwqGemmKernel::kDecode:
      return LaunchAwqGemmDecode(p, plan, buffers, stream);
    case AwqGemmKernel::kFew:
      return LaunchAwqGemmFew(p, plan, buffers, stream);
    case AwqGemmKernel::kTma:
      return LaunchAwqGemmTma<T>(p, plan, buffers, stream);
    case AwqGemmKernel::kWgmma:
      return LaunchAwqGemmWgmma<T>(p, plan, buffers, stream);
    default:
      return LaunchAwqGemmMma<T>(p, plan, buffers, stream);
  }
}

}  // namespace

const char* LaunchAwqGemm(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                          const AwqGemmBuffers& buffers, Stream stream) {
  cudaError_t error;
  if (plan.kernel == AwqGemmKernel::kSimt) {
    error = LaunchAwqGemmSimt(p, plan, buffers, stream);
  } else if (p.x_dtype == DType::kS8) {
    error = LaunchAwqGemmTma<int8_t>(p, plan, buffers, stream);
  } else if (p.x_dtype == DType::kE4M3) {
    error = LaunchAwqGemmTma<__nv_fp8_e4m3>(p, plan, buffers, stream);
  } else if (p.x_dtype == DType::kF16) {
    error = LaunchTensorCores<__half>(p, plan, buffers, stream);
  } else {
    error = LaunchTensorCores<__nv_bfloat16>(p, plan, buffers, stream);
  }
  if (error == cudaSuccess && plan.split_k > 1 && !plan.cluster) {
    error = LaunchFinishSplits(MakeParams(p, plan, buffers), stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_awq
