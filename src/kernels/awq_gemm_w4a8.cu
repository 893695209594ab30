// The kernel before awq_gemm's: codes of activations with what a product of them needs, the scales
// of rows and the sums of chunks. For few rows its latency counts, so awq_gemm's starts behind it.

#include "kernels/awq_gemm_w4a8.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "device/activation_rows.cuh"
#include "device/epilogue.cuh"
#include "device/ptx.cuh"

namespace jax_awq {
namespace {

struct Params {
  int64_t m, k;  // rows of a batch entry, which blockIdx.y is
  int vectors;   // of a row, the last one perhaps not full
  const void* x;
  int64_t x_stride;
  const float* scale;  // nullptr: found for each row
  int64_t scale_stride;
  bool row_scales;  // `scale` has an entry for each row
  float largest;    // code
  float largest_inverse;
  uint8_t* q;             // (entries, M, K) codes; nullptr: not wanted
  DType q_dtype;          // kS8 for a byte each, or float16 or bfloat16
  float* row_scale;       // (entries, M), or nullptr
  uint2* chunk_sums;      // (entries, M, chunk_columns), or nullptr
  int64_t chunk_columns;  // four bfloat16 each
};

// Four float8 codes, a byte each.
__device__ __forceinline__ uint32_t FourFloat8(const float (&step)[4]) {
  uint32_t pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[i] = __nv_cvt_float2_to_fp8x2(make_float2(step[2 * i], step[2 * i + 1]), __NV_SATFINITE,
                                        __NV_E4M3);
  }
  return pairs[0] | pairs[1] << 16;
}

// The values of the two codes in the low half of `pair`, exact.
template <bool kFloat8>
__device__ __forceinline__ __half2 TwoHalves(uint32_t pair) {
  if constexpr (kFloat8) {
    return __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
  } else {
    // 1024 + 128 + code, since the last bit of 1024 is worth 1.
    const uint32_t biased = __byte_perm(pair ^ 0x8080u, 0x64u, 0x4140);
    return __hsub2(reinterpret_cast<const __half2&>(biased), __float2half2_rn(1152.0f));
  }
}

// The same in either of the 16-bit types, exact in both.
template <bool kFloat8>
__device__ __forceinline__ uint32_t TwoFloats(uint32_t pair, DType dtype) {
  const __half2 halves = TwoHalves<kFloat8>(pair);
  if (dtype == DType::kF16) return reinterpret_cast<const uint32_t&>(halves);
  const float2 values = __half22float2(halves);
  return PackPair(values.x, values.y, DType::kBF16);
}

template <bool kFloat8>
using Sum = std::conditional_t<kFloat8, float, int>;

template <bool kFloat8>
__device__ __forceinline__ Sum<kFloat8> AddFour(uint32_t codes, Sum<kFloat8> sum) {
  if constexpr (kFloat8) {
    const float2 a = __half22float2(TwoHalves<true>(codes & 0xffffu));
    const float2 b = __half22float2(TwoHalves<true>(codes >> 16));
    return sum + ((a.x + a.y) + (b.x + b.y));
  } else {
    return __dp4a(static_cast<int>(codes), 0x01010101, sum);
  }
}

// Codes of a vector, a byte each. All are masked with `keep`: 0 makes them 0 whatever x is.
template <typename T, bool kFloat8>
__device__ __forceinline__ void CodesOf(const Params& p, const uint4& v, float inverse,
                                        uint32_t keep, uint32_t (&codes)[kWidth<T> / 4]) {
  if constexpr (sizeof(T) == 1) {
    codes[0] = v.x, codes[1] = v.y, codes[2] = v.z, codes[3] = v.w;
  } else {
    float step[kWidth<T>];
    ToFloats<T>(v, step);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) step[i] = __fmul_rn(step[i], inverse);
    if (p.scale) {  // by a scale that was found here the largest is 127, 7 or 448, up to rounding
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) step[i] = Saturated(step[i], p.largest);
    }
#pragma unroll
    for (int i = 0; i < kWidth<T> / 4; ++i) {
      const float four[4] = {step[4 * i], step[4 * i + 1], step[4 * i + 2], step[4 * i + 3]};
      codes[i] = (kFloat8 ? FourFloat8(four) : FourCodes(four)) & keep;
    }
  }
}

// Stores vector `index` of a row of codes.
template <typename T, bool kAligned, bool kFloat8>
__device__ __forceinline__ void Store(uint8_t* row, int index, int64_t k, DType q_dtype,
                                      const uint32_t (&codes)[kWidth<T> / 4]) {
  constexpr int kWords = kWidth<T> / 4;
  const int64_t first = static_cast<int64_t>(index) * kWidth<T>;
  if (q_dtype == DType::kS8) {
    if constexpr (!kAligned) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        if (first + i < k) row[first + i] = static_cast<uint8_t>(codes[i / 4] >> (i % 4 * 8));
      }
    } else if constexpr (kWords == 1) {
      *reinterpret_cast<uint32_t*>(row + first) = codes[0];
    } else {  // codes that are there are not stored again: there is no vector of 16
      StoreEightBytes(row + first, codes[0], codes[1]);
    }
    return;
  }
  uint32_t out[2 * kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    out[2 * i] = TwoFloats<kFloat8>(codes[i] & 0xffffu, q_dtype);
    out[2 * i + 1] = TwoFloats<kFloat8>(codes[i] >> 16, q_dtype);
  }
  uint8_t* to = row + 2 * first;
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (first + i >= k) continue;
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(out[i / 2] >> (i % 2 * 16));
    }
  } else if constexpr (kWords == 1) {
    StoreEightBytes(to, out[0], out[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      reinterpret_cast<uint4*>(to)[i] =
          make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    }
  }
}

// Called by whole warps, whose vectors lie side by side and start at a chunk. As two bfloat16 the
// sum of 128 integer codes is exact.
template <typename T, typename S>
__device__ __forceinline__ void StoreChunkSum(uint2* row, int index, int vectors, S sum) {
  constexpr int kLanes = kSumChunk / kWidth<T>;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (index >= vectors || index % kLanes != 0) return;
  const float value = static_cast<float>(sum);
  const __nv_bfloat16 high = __float2bfloat16_rn(value);
  const __nv_bfloat16 low = __float2bfloat16_rn(value - __bfloat162float(high));
  const uint32_t both = static_cast<uint32_t>(__bfloat16_as_ushort(high)) |
                        static_cast<uint32_t>(__bfloat16_as_ushort(low)) << 16;
  row[index / kLanes] = make_uint2(both, both);
}

// A warp has a row, or else a block. x of int8 is codes already.
template <typename T, bool kAligned, bool kFloat8>
__global__ void __launch_bounds__(32 * kMaxWarps)
    ActivationCodesKernel(const __grid_constant__ Params p, bool warp_has_row) {
  StartKernelBehind();
  __shared__ uint32_t largest_of[kMaxWarps];
  const RowTeam team(warp_has_row);
  if (team.row >= p.m) return;  // whole warps, and only where there is no barrier below
  const int64_t entry = blockIdx.y;
  const int64_t at = entry * p.m + team.row;
  HeldRow<T, kAligned> row(static_cast<const T*>(p.x) + entry * p.x_stride + team.row * p.k,
                           p.vectors, p.k, team);
  float scale;
  if constexpr (sizeof(T) == 1) {
    row.Load(0);
    scale = __ldg(p.scale + entry * p.scale_stride + (p.row_scales ? team.row : 0));
  } else if (p.scale) {
    row.Load(0);
    scale = __ldg(p.scale + entry * p.scale_stride + (p.row_scales ? team.row : 0));
  } else {
    const uint32_t seen = team.Max(row.LoadLargest(), largest_of);
    scale = ScaleOf(FloatOf<T>(seen), p.largest_inverse);
  }
  const float inverse = InverseScale(scale);
  const uint32_t keep = inverse == 0.0f ? 0u : ~0u;
  uint8_t* q = p.q + at * p.k * SizeOf(p.q_dtype);
  uint2* chunk_sums = p.chunk_sums + at * p.chunk_columns;
  if (team.thread == 0) {
    if (p.row_scale) p.row_scale[at] = scale;
    const int64_t chunks = (p.k + kSumChunk - 1) / kSumChunk;
    if (p.chunk_sums && chunks % 2) chunk_sums[chunks] = make_uint2(0, 0);
  }

  for (int first = 0; first < p.vectors; first += row.step) {
    if (first > 0) row.Load(first);
#pragma unroll
    for (int j = 0; j < row.kCount; ++j) {
      const int index = row.Index(first, j);
      if (index - team.lane >= p.vectors) break;  // whole warps
      Sum<kFloat8> sum = 0;
      if (index < p.vectors) {
        uint32_t codes[kWidth<T> / 4];
        CodesOf<T, kFloat8>(p, row.v[j], inverse, keep, codes);
        if (p.q) Store<T, kAligned, kFloat8>(q, index, p.k, p.q_dtype, codes);
#pragma unroll
        for (uint32_t four : codes) sum = AddFour<kFloat8>(four, sum);
      }
      if (p.chunk_sums) StoreChunkSum<T>(chunk_sums, index, p.vectors, sum);
    }
  }
}

template <typename T, bool kFloat8>
const char* LaunchCodes(Params p, int64_t entries, Stream stream) {
  p.vectors = static_cast<int>((p.k + kWidth<T> - 1) / kWidth<T>);
  const bool aligned = p.k % kWidth<T> == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.q) % 16 == 0;
  const RowBlocks rows(p.m, p.vectors, aligned ? kVectors<true> : kVectors<false>);
  if (rows.blocks > kMaxBlocks) return "x has too many rows";
  const dim3 grid(static_cast<unsigned>(rows.blocks), static_cast<unsigned>(entries));
  auto* kernel =
      aligned ? ActivationCodesKernel<T, true, kFloat8> : ActivationCodesKernel<T, false, kFloat8>;
  kernel<<<grid, rows.threads, 0, stream>>>(p, rows.warp_has_row);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* LaunchCodes(const Params& p, bool is_float8, int64_t entries, Stream stream) {
  return is_float8 ? LaunchCodes<T, true>(p, entries, stream)
                   : LaunchCodes<T, false>(p, entries, stream);
}

const char* LaunchCodes(const Params& p, const AwqGemmW4A8Problem& problem, int64_t entries,
                        Stream stream) {
  const bool is_float8 = problem.codes == Codes::kFloat8;
  switch (problem.x_dtype) {
    case DType::kS8:
      return LaunchCodes<int8_t, false>(p, entries, stream);
    case DType::kF16:
      return LaunchCodes<__half>(p, is_float8, entries, stream);
    case DType::kBF16:
      return LaunchCodes<__nv_bfloat16>(p, is_float8, entries, stream);
    default:
      return LaunchCodes<float>(p, is_float8, entries, stream);
  }
}

}  // namespace

const char* LaunchAwqGemmW4A8(const AwqGemmW4A8Problem& problem, const AwqGemmW4A8Plan& plan,
                              const AwqGemmW4A8Buffers& buffers, Stream stream) {
  char* workspace = static_cast<char*>(buffers.workspace);
  Params p = {};
  p.m = problem.m;
  p.k = problem.k;
  p.x = buffers.x;
  p.x_stride = buffers.x_stride;
  p.scale = buffers.scale;
  p.scale_stride = buffers.scale_stride;
  p.row_scales = problem.has_row_scales();
  p.largest = problem.codes == Codes::kInt8   ? 127.0f
              : problem.codes == Codes::kInt4 ? 7.0f
                                              : 448.0f;
  p.largest_inverse = 1.0f / p.largest;
  const bool bytes = SizeOf(plan.problem.x_dtype) == 1;
  p.q_dtype = bytes ? DType::kS8 : plan.problem.x_dtype;
  if (plan.copies_codes) p.q = reinterpret_cast<uint8_t*>(workspace);
  if (!p.row_scales) p.row_scale = reinterpret_cast<float*>(workspace + plan.row_scale_at);
  if (bytes) p.chunk_sums = reinterpret_cast<uint2*>(workspace + plan.chunk_sums_at);
  p.chunk_columns = ChunkSumColumns(p.k) / 4;
  if (const char* error = LaunchCodes(p, problem, plan.code_batch, stream)) return error;

  const bool own_entries = plan.code_batch > 1;
  AwqGemmBuffers product = {};
  product.weight = buffers.weight;
  product.x = plan.copies_codes ? workspace : buffers.x;
  product.x_stride = !plan.copies_codes ? buffers.x_stride : own_entries ? p.m * p.k : 0;
  product.bias = buffers.bias;
  product.bias_stride = buffers.bias_stride;
  product.bias_dtype = buffers.bias_dtype;
  product.y = buffers.y;
  product.workspace = workspace + plan.gemm_at;
  product.activation = buffers.activation;
  product.row_scale = p.row_scales ? buffers.scale : p.row_scale;
  product.row_scale_stride = p.row_scales ? buffers.scale_stride : own_entries ? p.m : 0;
  product.chunk_sums = p.chunk_sums;
  product.chunk_sums_stride = own_entries ? p.m * ChunkSumColumns(p.k) : 0;
  product.overlap = true;
  return LaunchAwqGemm(plan.problem, plan.gemm, product, stream);
}

}  // namespace jax_awq
