// w = (q - z) * s for the whole matrix. It reads half a byte and writes two (or four) per weight,
// so everything serves full-width, coalesced stores.

#include <cuda_runtime.h>

#include "device/weights.cuh"
#include "kernels/awq_dequantize.h"

namespace jax_awq {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;  // rows of K a thread takes at a time; divides every group but -1's

// One thread: eight columns (one word of the GEMM layout, one 16-byte store) of kRows rows, which
// share their scales and zero points.
template <Layout kLayout>
__global__ void __launch_bounds__(kThreads)
    AwqDequantizeKernel(const __grid_constant__ AwqDequantizeProblem p) {
  const AwqWeight& q = p.weight;
  const int64_t columns = q.n / 8;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows;
  if (column >= columns) return;
  const int64_t b = blockIdx.z;
  const uint32_t* words = static_cast<const uint32_t*>(q.qweight) + b * q.qweight_stride;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), q.k - row0));

  uint32_t packed[kRows];  // one word per row: the codes of its eight columns, in AWQ order
  if constexpr (kLayout == Layout::kGemm) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      packed[r] = r < rows ? __ldg(words + (row0 + r) * columns + column) : 0;
    }
  } else {
#pragma unroll
    for (int half = 0; half < kRows / 8; ++half) {
#pragma unroll
      for (int r = 0; r < 8; ++r) packed[8 * half + r] = 0;
      if (8 * half >= rows) continue;
#pragma unroll
      for (int c = 0; c < 8; ++c) {  // transposes an 8 x 8 block of codes
        const uint32_t word = __ldg(words + (8 * column + c) * (q.k / 8) + row0 / 8 + half);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          packed[8 * half + r] |= (word >> (4 * r) & 0xfu) << (4 * AwqNibble(c));
        }
      }
    }
  }

  const int64_t group = row0 >> q.group_shift;
  const uint32_t zero = q.qzeros ? __ldg(static_cast<const uint32_t*>(q.qzeros) +
                                         b * q.qzeros_stride + group * columns + column)
                                 : 0x88888888u;
  float scale[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    scale[c] =
        LoadAsFloat(q.scales, b * q.scales_stride + group * q.n + 8 * column + c, q.scales_dtype);
  }
  char* to = static_cast<char*>(p.w) + ((b * q.k + row0) * q.n + 8 * column) * SizeOf(p.out_dtype);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) return;
    float v[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int shift = 4 * AwqNibble(c);
      // Exact in float32: the only rounding is the store's.
      v[c] = static_cast<float>(static_cast<int>(packed[r] >> shift & 0xf) -
                                static_cast<int>(zero >> shift & 0xf)) *
             scale[c];
    }
    StoreRounded<8>(to + r * q.n * SizeOf(p.out_dtype), v, p.out_dtype);
  }
}

}  // namespace

const char* LaunchAwqDequantize(const AwqDequantizeProblem& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>((p.weight.n / 8 + kThreads - 1) / kThreads),
                  static_cast<unsigned>((p.weight.k + kRows - 1) / kRows),
                  static_cast<unsigned>(p.batch));
  if (p.weight.layout == Layout::kGemm) {
    AwqDequantizeKernel<Layout::kGemm><<<grid, kThreads, 0, stream>>>(p);
  } else {
    AwqDequantizeKernel<Layout::kOcMajor><<<grid, kThreads, 0, stream>>>(p);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_awq
