// One weight at a time, for kernels where simplicity comes before speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/dequant.cuh"
#include "device/epilogue.cuh"
#include "kernels/types.h"

namespace jax_awq {

template <typename T>
__device__ __forceinline__ T RoundTo(float v);
template <>
__device__ __forceinline__ float RoundTo<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half RoundTo<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 RoundTo<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float WeightAt(const AwqWeight& w, int64_t row, int64_t column) {
  const uint32_t* words = static_cast<const uint32_t*>(w.qweight);
  const uint32_t* zeros = static_cast<const uint32_t*>(w.qzeros);
  const bool gemm = w.layout == Layout::kGemm;
  const uint32_t word =
      gemm ? words[row * (w.n / 8) + column / 8] : words[column * (w.k / 8) + row / 8];
  const int awq_nibble = AwqNibble(static_cast<int>(column % 8));
  const int nibble = gemm ? awq_nibble : static_cast<int>(row % 8);
  const int q = word >> (4 * nibble) & 0xf;
  const int64_t group = row >> w.group_shift;
  const int z = zeros ? zeros[group * (w.n / 8) + column / 8] >> (4 * awq_nibble) & 0xf : 8;
  // Both factors have at most eleven significant bits, so the float32 product is exact.
  return static_cast<float>(q - z) * LoadAsFloat(w.scales, group * w.n + column, w.scales_dtype);
}

}  // namespace jax_awq
