// Between LaunchInt8Matmul and the kernels. Every function returns a CUDA error.
#pragma once

#include <cuda_runtime.h>

#include "device/int8_epilogue.cuh"
#include "kernels/int8_matmul.h"

namespace jax_awq {

// Everything a kernel reads.
struct Int8MatmulParams {
  Int8MatmulBuffers buffers;
  int64_t m, n, k, batch;
  int64_t a_columns, b_rows;
  bool packed;
  int splits;
  int32_t* partials;  // (splits, batch, M, N) sums in the workspace; nullptr where K is not split

  __host__ __device__ int64_t size() const { return m * n; }
};

cudaError_t LaunchInt8MatmulTma(const Int8MatmulPlan&, const Int8MatmulParams&, cudaStream_t);
cudaError_t LaunchInt8MatmulMma(const Int8MatmulParams&, cudaStream_t);
cudaError_t LaunchInt8MatmulDp4a(const Int8MatmulParams&, cudaStream_t);

// What finishes the result of batch entry `b`. `shift`: sums are that many powers of two too large.
__device__ __forceinline__ Int8Epilogue MakeEpilogue(const Int8MatmulParams& p, int64_t b,
                                                     int shift) {
  const Int8MatmulBuffers& buf = p.buffers;
  Int8Epilogue e;
  e.y = static_cast<char*>(buf.y) + b * p.size() * (buf.raw ? 4 : SizeOf(buf.out_dtype));
  e.scale_a = buf.scale_a ? buf.scale_a + b * buf.scale_a_stride : nullptr;
  e.scale_b = buf.scale_b ? buf.scale_b + b * buf.scale_b_stride : nullptr;
  e.scale_c = buf.scale_c ? buf.scale_c + b * buf.scale_c_stride : nullptr;
  e.bias = buf.bias
               ? static_cast<const char*>(buf.bias) + b * buf.bias_stride * SizeOf(buf.bias_dtype)
               : nullptr;
  e.n = p.n;
  e.shift = shift;
  e.row_scales = buf.row_scales;
  e.column_scales = buf.column_scales;
  e.raw = buf.raw;
  e.out_dtype = buf.out_dtype;
  e.bias_dtype = buf.bias_dtype;
  e.activation = buf.activation;
  return e;
}

}  // namespace jax_awq
