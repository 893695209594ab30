// Activations from their codes: everything serves full-width stores.

#include "kernels/dequantize_activation.h"

#include <cuda_runtime.h>

#include "device/codes.cuh"
#include "device/epilogue.cuh"

namespace jax_awq {
namespace {

constexpr int kColumns = 8;  // of a thread: one 16-byte store of a 16-bit type

// Codes of eight columns in two words, or for 4 bits in the first; zeros past the end of a row.
template <bool kAligned>
__device__ __forceinline__ uint2 LoadCodes(const DequantizeActivationProblem& p, int64_t row,
                                           int64_t first) {
  const bool packed = p.bits == 4;
  const uint8_t* from = static_cast<const uint8_t*>(p.q) + row * (packed ? (p.k + 1) / 2 : p.k) +
                        (packed ? first / 2 : first);
  if constexpr (kAligned) {
    if (packed) return make_uint2(__ldg(reinterpret_cast<const uint32_t*>(from)), 0);
    return __ldg(reinterpret_cast<const uint2*>(from));
  } else {
    const int64_t bytes = packed ? (p.k - first + 1) / 2 : p.k - first;
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i < bytes && i < (packed ? kColumns / 2 : kColumns)) {
        words[i / 4] |= static_cast<uint32_t>(__ldg(from + i)) << (i % 4 * 8);
      }
    }
    return make_uint2(words[0], words[1]);
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kTileThreads)
    DequantizeActivationKernel(const __grid_constant__ DequantizeActivationProblem p,
                               int column_blocks) {
  const ColumnTile tile(column_blocks);
  const int64_t first = static_cast<int64_t>(tile.index) * kColumns;
  if (first >= p.k) return;
  float scale[kColumns];
  int64_t entry = -1;
  for (int done = 0; done < kTileRows; done += kRowsAtOnce) {
    uint2 codes[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int64_t row = tile.row0 + (done + j) * tile.step;
      codes[j] = row < p.rows ? LoadCodes<kAligned>(p, row, first) : make_uint2(0, 0);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int64_t row = tile.row0 + (done + j) * tile.step;
      if (row >= p.rows) return;
      const int64_t own = ScaleEntry(row, p.rows, p.rows_per_scale);
      if (own != entry) {
        entry = own;
        const float* from = p.scale + own * p.scale_columns;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int64_t column = p.scale_columns == 1 ? 0 : first + i;
          scale[i] = column < p.scale_columns ? __ldg(from + column) : 0.0f;
        }
      }
      float v[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int code = p.bits == 4 ? SignedCode(codes[j].x, i, 4)
                                     : SignedCode(i < 4 ? codes[j].x : codes[j].y, i % 4, 8);
        v[i] = __fmul_rn(static_cast<float>(code), scale[i]);
      }
      char* to = static_cast<char*>(p.x) + (row * p.k + first) * SizeOf(p.x_dtype);
      if constexpr (kAligned) {
        StoreRounded<8>(to, v, p.x_dtype);
      } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if (first + i >= p.k) continue;
          if (p.x_dtype == DType::kF32) {
            reinterpret_cast<float*>(to)[i] = v[i];
          } else {
            reinterpret_cast<uint16_t*>(to)[i] =
                static_cast<uint16_t>(PackPair(v[i], 0.0f, p.x_dtype));
          }
        }
      }
    }
  }
}

}  // namespace

const char* LaunchDequantizeActivation(const DequantizeActivationProblem& p, Stream stream) {
  if (p.rows == 0 || p.k == 0) return nullptr;
  const ColumnTiles tiles(p.rows, (p.k + kColumns - 1) / kColumns);
  if (tiles.blocks > kMaxBlocks) return "q has too many rows";
  const unsigned grid = static_cast<unsigned>(tiles.blocks);
  const bool aligned = p.k % kColumns == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.q) % 8 == 0;
  if (aligned) {
    DequantizeActivationKernel<true><<<grid, tiles.block, 0, stream>>>(p, tiles.column_blocks);
  } else {
    DequantizeActivationKernel<false><<<grid, tiles.block, 0, stream>>>(p, tiles.column_blocks);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_awq
