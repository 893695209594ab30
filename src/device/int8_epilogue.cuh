// From int32 sums to y: scales, bias, activation in float32, one rounding; or the sums themselves.
#pragma once

#include <cstdint>

#include "device/epilogue.cuh"

namespace jax_awq {

// int4 enters the multipliers in the upper half of a byte, which needs no sign extension: both
// operands are 16 times as large.
constexpr int kPackedShift = 8;

struct Int8Epilogue {
  void* y;  // this batch entry's (M, N); so are the others this entry's
  const float* scale_a;
  const float* scale_b;
  const float* scale_c;
  const void* bias;
  int64_t n;
  int shift;  // sums are that many powers of two too large
  bool row_scales, column_scales, raw;
  DType out_dtype, bias_dtype;
  Activation activation;

  // From here on, the sums go to `partials`, one after the other.
  __device__ void WriteOnly(int32_t* partials) {
    y = partials;
    raw = true;
  }

  __device__ float RowScale(int64_t row) const {
    return scale_a && !raw ? __ldg(scale_a + (row_scales ? row : 0)) : 1.0f;
  }
  __device__ float ColumnScale(int64_t column) const {
    if (raw) return 1.0f;
    const float b = scale_b ? __ldg(scale_b + (column_scales ? column : 0)) : 1.0f;
    return scale_c ? b * __ldg(scale_c) : b;
  }
  __device__ float Bias(int64_t column) const {
    return bias && !raw ? LoadAsFloat(bias, column, bias_dtype) : 0.0f;
  }
};

// The order of the products is that of the reference.
__device__ __forceinline__ float ScaleSum(int32_t sum, float row_scale, float column_scale,
                                          float bias) {
  return static_cast<float>(sum) * row_scale * column_scale + bias;
}

__device__ __forceinline__ void FinishOne(const Int8Epilogue& p, int64_t row, int64_t column,
                                          int32_t sum) {
  const int64_t at = row * p.n + column;
  sum >>= p.shift;
  if (p.raw) {
    static_cast<int32_t*>(p.y)[at] = sum;
    return;
  }
  const float v =
      Activate(ScaleSum(sum, p.RowScale(row), p.ColumnScale(column), p.Bias(column)), p.activation);
  if (p.out_dtype == DType::kF32) {
    static_cast<float*>(p.y)[at] = v;
  } else {
    static_cast<uint16_t*>(p.y)[at] = PackPair(v, 0.0f, p.out_dtype) & 0xffffu;
  }
}

// Four neighbouring columns, the first a multiple of four as N is.
struct FourColumns {
  __device__ FourColumns(const Int8Epilogue& p, int64_t column) : column(column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = p.ColumnScale(column + i);
      bias[i] = p.Bias(column + i);
    }
  }

  __device__ void Finish(const Int8Epilogue& p, int64_t row, float row_scale, int4 sum) const {
    const int64_t at = row * p.n + column;
    sum.x >>= p.shift, sum.y >>= p.shift, sum.z >>= p.shift, sum.w >>= p.shift;
    if (p.raw) {
      *reinterpret_cast<int4*>(static_cast<int32_t*>(p.y) + at) = sum;
      return;
    }
    float v[4] = {ScaleSum(sum.x, row_scale, scale[0], bias[0]),
                  ScaleSum(sum.y, row_scale, scale[1], bias[1]),
                  ScaleSum(sum.z, row_scale, scale[2], bias[2]),
                  ScaleSum(sum.w, row_scale, scale[3], bias[3])};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = Activate(v[i], p.activation);
    if (p.out_dtype == DType::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) =
          make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.y) + at) =
          make_uint2(PackPair(v[0], v[1], p.out_dtype), PackPair(v[2], v[3], p.out_dtype));
    }
  }

  int64_t column;
  float scale[4];
  float bias[4];
};

}  // namespace jax_awq
