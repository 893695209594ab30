// From float32 accumulators to y: ordered sum over splits, bias, activation, one rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/ptx.cuh"
#include "kernels/types.h"

namespace jax_awq {

__device__ __forceinline__ float Activate(float v, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < 0.0f ? 0.0f : v;  // keeps NaN
    case Activation::kGelu:
      return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::kSilu:
      return v / (1.0f + expf(-v));
  }
  return v;
}

__device__ __forceinline__ float LoadAsFloat(const void* p, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case DType::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ uint32_t PackPair(float a, float b, DType dtype) {
  if (dtype == DType::kF16) {
    const __half2 h = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(h);
  }
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(h);
}

// Rounds eight values and stores them; `p` is aligned to their size.
__device__ __forceinline__ void StoreEight(void* p, const float (&v)[8], DType dtype) {
  if (dtype == DType::kF32) {
    static_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    static_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    *static_cast<uint4*>(p) = make_uint4(PackPair(v[0], v[1], dtype), PackPair(v[2], v[3], dtype),
                                         PackPair(v[4], v[5], dtype), PackPair(v[6], v[7], dtype));
  }
}

// Part `index` of `parts` of `total` units: as even as can be, whatever else is in the problem.
struct Share {
  __device__ Share(unsigned total, unsigned index, unsigned parts)
      : first(total / parts * index + min(index, total % parts)),
        count(total / parts + (index < total % parts)) {}
  int first;
  int count;
};

struct EpilogueParams {
  void* y;           // this batch entry's (M, outputs)
  const void* bias;  // this batch entry's (outputs), or nullptr
  float* partials;   // (splits, batch, M, outputs); nullptr unless splits meet in the workspace
  int64_t m;
  int64_t outputs;
  DType out_dtype;
  DType bias_dtype;
  Activation activation;
};

__device__ __forceinline__ float Finish(const EpilogueParams& p, int64_t output, float v) {
  if (p.bias) v += LoadAsFloat(p.bias, output, p.bias_dtype);
  return Activate(v, p.activation);
}

__device__ __forceinline__ void FinishOne(const EpilogueParams& p, int64_t token, int64_t output,
                                          float v) {
  const int64_t at = token * p.outputs + output;
  v = Finish(p, output, v);
  if (p.out_dtype == DType::kF32) {
    static_cast<float*>(p.y)[at] = v;
  } else {
    static_cast<uint16_t*>(p.y)[at] = PackPair(v, 0.0f, p.out_dtype) & 0xffffu;
  }
}

// Finishes four neighbouring outputs of one token.
__device__ __forceinline__ void FinishFour(const EpilogueParams& p, int64_t token, int64_t output,
                                           float4 v) {
  if (p.outputs % 4) {  // only a transposed product with odd K
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (output + i < p.outputs) FinishOne(p, token, output + i, values[i]);
    }
    return;
  }
  v.x = Finish(p, output, v.x);
  v.y = Finish(p, output + 1, v.y);
  v.z = Finish(p, output + 2, v.z);
  v.w = Finish(p, output + 3, v.w);
  const int64_t at = token * p.outputs + output;
  if (p.out_dtype == DType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = v;
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.y) + at) =
        make_uint2(PackPair(v.x, v.y, p.out_dtype), PackPair(v.z, v.w, p.out_dtype));
  }
}

__device__ __forceinline__ void Add(float4& sum, float4 v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// A float32 tile (kTokens, kOutputs) of results in shared memory. Groups of four outputs are
// swizzled by token, because the lanes of an mma hold neighbouring tokens of one output, which
// would all fall into one bank. kLaneFours is the distance of two lanes along the outputs, in
// groups.
template <int kTokens_, int kOutputs_, int kLaneFours>
struct ResultTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kBytes = kTokens * kOutputs * 4;
  static_assert(kLaneFours == 2 || kLaneFours == 4);

  // The group of four that holds `output`.
  __device__ static float4* Four(float* tile, int token, int output) {
    const int t = token / 2 % 4;
    const int swizzle = kLaneFours == 4 ? t : (t & 1) | (t & 2) << 1;
    return reinterpret_cast<float4*>(tile) + token * (kOutputs / 4) + (output / 4 ^ swizzle);
  }
};

// Sums a tile of float32 partial results over the cluster (`splits` CTAs, in rank order, so that
// the bits never depend on timing) and finishes it; or writes it to the workspace for FinishSplits.
// `tile` is complete and synchronized within the CTA.
template <typename Result, int kThreads>
__device__ __forceinline__ void ReduceAndStore(const EpilogueParams& p, float* tile, int64_t token0,
                                               int64_t output0, int split, int splits,
                                               int64_t partial_stride) {
  constexpr int kFours = Result::kOutputs / 4;  // of a token
  const int tokens = static_cast<int>(min(p.m - token0, static_cast<int64_t>(Result::kTokens)));
  int first = 0;
  int last = tokens * kFours;
#if __CUDA_ARCH__ >= 900
  const bool cluster = splits > 1 && p.partials == nullptr;
  if (cluster) {
    ClusterSync();
    const Share share(last, split, splits);
    first = share.first;
    last = share.first + share.count;
  }
#endif
  for (int e = first + threadIdx.x; e < last; e += kThreads) {
    const int row = e / kFours;
    const int column = e % kFours * 4;
    const int64_t token = token0 + row;
    const int64_t output = output0 + column;
    if (output >= p.outputs) continue;
    const float4* from = Result::Four(tile, row, column);
#if __CUDA_ARCH__ >= 900
    if (cluster) {
      const uint32_t local = SharedAddress(from);
      float4 parts[kMaxCluster];  // all loads in flight at once: a remote one takes 200 cycles
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        if (r < splits) parts[r] = LoadClusterShared(MapToRank(local, r));
      }
      float4 sum = parts[0];
#pragma unroll
      for (int r = 1; r < kMaxCluster; ++r) {
        if (r < splits) Add(sum, parts[r]);
      }
      FinishFour(p, token, output, sum);
      continue;
    }
#endif
    const float4 v = *from;
    if (p.partials) {
      float* to = p.partials + split * partial_stride + token * p.outputs + output;
      const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (output + i < p.outputs) to[i] = values[i];
      }
    } else {
      FinishFour(p, token, output, v);
    }
  }
#if __CUDA_ARCH__ >= 900
  if (cluster) ClusterSync();  // a CTA must not leave while others read its shared memory
#endif
}

}  // namespace jax_awq
