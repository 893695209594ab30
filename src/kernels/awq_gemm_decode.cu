// The kernel for few tokens (M <= 16): reading the weights is all the work there is.
//
// Every warp streams its own rows of qweight from global memory straight into mma fragments: no
// shared memory, no barrier until the end, 4 KB per warp in flight. A CTA owns 128 outputs; its
// four warps and, in a cluster, up to eight CTAs divide K. The codes enter the tensor cores
// unscaled, and scale and zero point are applied to the accumulators once a group:
//   sum_k x (q - z) s = s (sum_k x q - z sum_k x),
// with sum_k x from one more mma whose weights are all one. Group sums of at most 128 products are
// held in float32, so nothing is lost that the final rounding would keep.

#include "device/dequant.cuh"
#include "device/epilogue.cuh"
#include "device/ptx.cuh"
#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kOutputs = 128;
constexpr int kUnit = 32;  // rows of K that a warp takes at a time: never across a group border

// Codes as exact mma operands, at two instructions per four of them and no constants per output.
template <typename T>
struct RawCodes;

template <>
struct RawCodes<__half> {
  static constexpr uint32_t kOne = 0x3c003c00u;
  static constexpr int kOffset = 0;
  // A bare code is the float16 subnormal q * 2^-24, or q * 2^-20 in the high nibble, which the
  // tensor cores take at full precision.
  static constexpr float kLowUnit = 0x1p-24f;
  static constexpr float kHighUnit = 0x1p-20f;
  __device__ static uint32_t Low(uint32_t pair) { return pair & 0x000f000fu; }
  __device__ static uint32_t High(uint32_t pair) { return pair & 0x00f000f0u; }
};

template <>
struct RawCodes<__nv_bfloat16> {
  static constexpr uint32_t kOne = 0x3f803f80u;
  // Products with bfloat16 subnormals would underflow float32: use q - 8.
  static constexpr int kOffset = 8;
  static constexpr float kLowUnit = 1.0f;
  static constexpr float kHighUnit = 1.0f;
  __device__ static uint32_t Low(uint32_t pair) {
    return Dequant<__nv_bfloat16>::Difference<false>(pair, 0xc308c308u);
  }
  __device__ static uint32_t High(uint32_t pair) {
    return Dequant<__nv_bfloat16>::Difference<true>(pair, 0xc308c308u);
  }
};

__device__ __forceinline__ uint2 LoadStreaming(const uint32_t* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
}

// What a lane reads of one unit: words 2g and 2g + 1 of rows 8t .. 8t + 7, and the same rows of x.
template <int kTokenTiles>
struct Unit {
  uint2 words[8];
  uint4 x[kTokenTiles];
};

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles == 1 ? 3 : 2)
    AwqGemmDecodeKernel(const __grid_constant__ AwqGemmParams p) {
#if __CUDA_ARCH__ >= 800
  using Codes = RawCodes<T>;
  constexpr int kTokens = 8 * kTokenTiles;
  using Result = ResultTile<kTokens, kOutputs, 4>;
  __shared__ __align__(16) float tiles[kWarps][kTokens * kOutputs];

  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const unsigned split = blockIdx.x % p.splits;
  const int64_t output0 = static_cast<int64_t>(blockIdx.x / p.splits) * kOutputs;
  const AwqWeight weight = BatchEntry(p.buffers.weight);
  const int64_t n = weight.n;
  const int64_t k = weight.k;
  const int64_t row_words = n / 8;
  const int64_t column = output0 + 16 * g;  // first of the lane's sixteen outputs
  const bool in_range = column < n;

  const T* x = static_cast<const T*>(p.buffers.x) + blockIdx.z * p.buffers.x_stride + 8 * t;
  const uint32_t* words =
      static_cast<const uint32_t*>(weight.qweight) + 8 * t * row_words + column / 8;
  const uint16_t* scales = static_cast<const uint16_t*>(weight.scales) + column;
  const uint32_t* zeros =
      weight.qzeros ? static_cast<const uint32_t*>(weight.qzeros) + column / 8 : nullptr;

  // Units of this warp: an even share, the same whatever M is.
  const Share share(static_cast<unsigned>(k) / kUnit, split * kWarps + warp, p.splits * kWarps);
  const int first = share.first;
  const int last = share.first + share.count;
  const int group_shift = weight.group_shift - 5;  // of units

  auto load = [&](Unit<kTokenTiles>& unit, int u) {
    if (u >= last) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      unit.words[i] =
          in_range ? LoadStreaming(words + (int64_t{u} * kUnit + i) * row_words) : make_uint2(0, 0);
    }
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const int token = 8 * m + g;
      unit.x[m] = token < p.m ? __ldg(reinterpret_cast<const uint4*>(x + token * k + u * kUnit))
                              : make_uint4(0, 0, 0, 0);
    }
  };

  float total[kTokenTiles][2][4][4] = {};
  float group[kTokenTiles][2][4][4] = {};
  float sum[kTokenTiles][4] = {};
  uint4 group_scales[2];
  uint2 group_zeros = make_uint2(0x88888888u, 0x88888888u);

  auto enter_group = [&](int index) {
    if (!in_range) return;
    const uint4* s = reinterpret_cast<const uint4*>(scales + int64_t{index} * n);
    group_scales[0] = __ldg(s);
    group_scales[1] = __ldg(s + 1);
    if (zeros) {
      group_zeros = __ldg(reinterpret_cast<const uint2*>(zeros + int64_t{index} * row_words));
    }
  };

  auto leave_group = [&] {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t zero = w == 0 ? group_zeros.x : group_zeros.y;
      const uint32_t pairs[4] = {group_scales[w].x, group_scales[w].y, group_scales[w].z,
                                 group_scales[w].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // physical nibble
        const int c = AwqColumn(i);
        const uint16_t bits = static_cast<uint16_t>(pairs[c / 2] >> (16 * (c % 2)));
        const float unit = i % 2 ? Codes::kHighUnit : Codes::kLowUnit;
        const float s = (p.scales_are_bf16 ? __uint_as_float(uint32_t{bits} << 16)
                                           : __half2float(__ushort_as_half(bits))) /
                        unit;
        const float z =
            -static_cast<float>(static_cast<int>(zero >> (4 * i) & 0xf) - Codes::kOffset) * unit;
#pragma unroll
        for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
          for (int c2 = 0; c2 < 2; ++c2) {
            float& from = group[m][w][i / 2][2 * (i % 2) + c2];
            float& to = total[m][w][i / 2][2 * (i % 2) + c2];
            to = fmaf(s, fmaf(z, sum[m][c2], from), to);
            from = 0.0f;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][i] = 0.0f;
    }
  };

  auto multiply = [&](const Unit<kTokenTiles>& unit) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t x_pair[kTokenTiles][2];
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        x_pair[m][0] = step == 0 ? unit.x[m].x : unit.x[m].z;
        x_pair[m][1] = step == 0 ? unit.x[m].y : unit.x[m].w;
        const uint32_t ones[4] = {Codes::kOne, Codes::kOne, Codes::kOne, Codes::kOne};
        Mma16x8x16<T>(sum[m], ones, x_pair[m][0], x_pair[m][1]);
      }
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        uint32_t row[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          row[i] = w == 0 ? unit.words[4 * step + i].x : unit.words[4 * step + i].y;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t p0 = BytePair(row[0], row[1], j);
          const uint32_t p1 = BytePair(row[2], row[3], j);
          const uint32_t a[4] = {Codes::Low(p0), Codes::High(p0), Codes::Low(p1), Codes::High(p1)};
#pragma unroll
          for (int m = 0; m < kTokenTiles; ++m) {
            Mma16x8x16<T>(group[m][w][j], a, x_pair[m][0], x_pair[m][1]);
          }
        }
      }
    }
  };

  constexpr int kAhead = 2;
  Unit<kTokenTiles> ring[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(ring[i], first + i);
  int current = first >> group_shift;
  if (first < last) enter_group(current);
  for (int u = first; u < last; u += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (u + i >= last) break;
      const int index = (u + i) >> group_shift;
      if (index != current) {
        leave_group();
        current = index;
        enter_group(current);
      }
      multiply(ring[i]);
      load(ring[i], u + i + kAhead);
    }
  }
  if (first < last) leave_group();

  const int tokens = static_cast<int>(min(p.m, static_cast<int64_t>(kTokens)));
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * m + 2 * t + i >= tokens) continue;
#pragma unroll
      for (int c = 0; c < 16; c += 4) {
        auto value = [&](int column) {
          const int nibble = AwqNibble(column % 8);
          return total[m][column / 8][nibble / 2][2 * (nibble % 2) + i];
        };
        *Result::Four(tiles[warp], 8 * m + 2 * t + i, 16 * g + c) =
            make_float4(value(c), value(c + 1), value(c + 2), value(c + 3));
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * kOutputs / 4; i += kThreads) {
    float4 sum = reinterpret_cast<float4*>(tiles[0])[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) Add(sum, reinterpret_cast<float4*>(tiles[w])[i]);
    reinterpret_cast<float4*>(tiles[0])[i] = sum;
  }
  __syncthreads();
  ReduceAndStore<Result, kThreads>(MakeEpilogue(p, blockIdx.z), tiles[0], 0, output0, split,
                                   p.splits, p.batch * p.size());
#endif
}

template <typename T>
cudaError_t Launch(const AwqGemmPlan& plan, const AwqGemmParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.outputs + kOutputs - 1) / kOutputs * params.splits),
                  1, static_cast<unsigned>(params.batch));
  return plan.tile_tokens == 8 ? LaunchClusters(AwqGemmDecodeKernel<T, 1>, params,
                                                params.cluster_size(), grid, kThreads, 0, stream)
                               : LaunchClusters(AwqGemmDecodeKernel<T, 2>, params,
                                                params.cluster_size(), grid, kThreads, 0, stream);
}

}  // namespace

cudaError_t LaunchAwqGemmDecode(const AwqGemmProblem& p, const AwqGemmPlan& plan,
                                const AwqGemmBuffers& buffers, cudaStream_t stream) {
  const AwqGemmParams params = MakeParams(p, plan, buffers);
  return p.x_dtype == DType::kF16 ? Launch<__half>(plan, params, stream)
                                  : Launch<__nv_bfloat16>(plan, params, stream);
}

}  // namespace jax_awq
