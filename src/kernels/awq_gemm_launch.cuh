// Between LaunchAwqGemm and the kernel families. Every function returns a CUDA error.
#pragma once

#include <cuda_runtime.h>

#include "device/epilogue.cuh"
#include "kernels/awq_gemm.h"
#include "kernels/launch_clusters.h"

namespace jax_awq {

cudaError_t LaunchAwqGemmDecode(const AwqGemmProblem&, const AwqGemmPlan&, const AwqGemmBuffers&,
                                cudaStream_t);
cudaError_t LaunchAwqGemmFew(const AwqGemmProblem&, const AwqGemmPlan&, const AwqGemmBuffers&,
                             cudaStream_t);
template <typename T>
cudaError_t LaunchAwqGemmMma(const AwqGemmProblem&, const AwqGemmPlan&, const AwqGemmBuffers&,
                             cudaStream_t);
template <typename T>
cudaError_t LaunchAwqGemmTma(const AwqGemmProblem&, const AwqGemmPlan&, const AwqGemmBuffers&,
                             cudaStream_t);
template <typename T>
cudaError_t LaunchAwqGemmWgmma(const AwqGemmProblem&, const AwqGemmPlan&, const AwqGemmBuffers&,
                               cudaStream_t);
cudaError_t LaunchAwqGemmSimt(const AwqGemmProblem&, const AwqGemmPlan&, const AwqGemmBuffers&,
                              cudaStream_t);

// Everything a kernel reads; one grid.z entry per batch entry.
struct AwqGemmParams {
  AwqGemmBuffers buffers;
  int64_t m;
  int64_t outputs;
  int64_t contraction;
  int64_t batch;
  DType out_dtype;
  bool scales_are_bf16;
  bool transpose;
  int splits;
  bool cluster;  // splits meet in a cluster; otherwise in the workspace

  // Elements of one batch entry of y.
  __host__ __device__ int64_t size() const { return m * outputs; }
  int cluster_size() const { return cluster ? splits : 1; }
};

inline AwqGemmParams MakeParams(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                                const AwqGemmBuffers& buffers) {
  return {buffers,
          p.m,
          p.outputs(),
          p.contraction(),
          p.batch,
          p.out_dtype,
          p.scales_dtype == DType::kBF16,
          p.transpose,
          plan.split_k,
          plan.cluster};
}

// Which operands every batch entry has its own of: 1, or 0 where all share one.
struct OwnEntries {
  OwnEntries() = default;
  explicit OwnEntries(const AwqGemmBuffers& b)
      : words(b.weight.qweight_stride != 0),
        scales(b.weight.scales_stride != 0),
        zeros(b.weight.qzeros_stride != 0),
        x(b.x_stride != 0) {}

  uint8_t words, scales, zeros, x;
};

// This CTA's weight of the batch.
__device__ __forceinline__ AwqWeight BatchEntry(const AwqWeight& weight) {
  const int64_t b = blockIdx.z;
  AwqWeight w = weight;
  w.qweight = static_cast<const uint32_t*>(w.qweight) + b * w.qweight_stride;
  w.scales = static_cast<const char*>(w.scales) + b * w.scales_stride * SizeOf(w.scales_dtype);
  if (w.qzeros) w.qzeros = static_cast<const uint32_t*>(w.qzeros) + b * w.qzeros_stride;
  return w;
}

// What finishes the (M, outputs) result of batch entry b.
__device__ __forceinline__ EpilogueParams MakeEpilogue(const AwqGemmParams& p, int64_t b) {
  const AwqGemmBuffers& buf = p.buffers;
  EpilogueParams e;
  e.y = static_cast<char*>(buf.y) + b * p.size() * SizeOf(p.out_dtype);
  e.bias = buf.bias
               ? static_cast<const char*>(buf.bias) + b * buf.bias_stride * SizeOf(buf.bias_dtype)
               : nullptr;
  e.row_scale = buf.row_scale ? buf.row_scale + b * buf.row_scale_stride : nullptr;
  e.partials =
      p.splits > 1 && !p.cluster ? static_cast<float*>(buf.workspace) + b * p.size() : nullptr;
  e.m = p.m;
  e.outputs = p.outputs;
  e.out_dtype = p.out_dtype;
  e.bias_dtype = buf.bias_dtype;
  e.activation = buf.activation;
  return e;
}

}  // namespace jax_awq
