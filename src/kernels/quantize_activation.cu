// Codes of activations. Memory is everything: x is read once.

#include "kernels/quantize_activation.h"

#include <cuda_runtime.h>

#include "device/activation_rows.cuh"

namespace jax_awq {
namespace {

struct Params {
  QuantizeActivationProblem problem;
  int vectors;      // of a row, the last one perhaps not full
  int group_shift;  // a group is the vectors of 1 << group_shift threads; -1: it is the row
  int64_t groups;   // of a row
};

template <typename T>
struct Row {
  __device__ Row(const Params& p, int64_t row)
      : x(static_cast<const T*>(p.problem.x) + row * p.problem.k),
        q(static_cast<uint8_t*>(p.problem.q) +
          row * (p.problem.bits == 4 ? (p.problem.k + 1) / 2 : p.problem.k)),
        group_sums(p.problem.group_sums + row * p.groups) {}
  const T* x;
  uint8_t* q;
  int32_t* group_sums;  // no address where none are wanted
};

// Stores the codes of a vector and returns their sum. All are masked with `keep`: 0 makes them 0
// whatever x is.
template <typename T, bool kAligned>
__device__ __forceinline__ int StoreCodes(uint8_t* row, int index, int64_t k, bool packed,
                                          const float (&step)[kWidth<T>], uint32_t keep) {
  constexpr int kWords = kWidth<T> / 4;
  uint32_t codes[kWords];
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float four[4] = {step[4 * i], step[4 * i + 1], step[4 * i + 2], step[4 * i + 3]};
    codes[i] = FourCodes(four) & keep;
    sum = __dp4a(static_cast<int>(codes[i]), 0x01010101, sum);
  }
  uint8_t* to = row + static_cast<int64_t>(index) * (packed ? kWidth<T> / 2 : kWidth<T>);
  if constexpr (!kAligned) {
    const int64_t left = k - static_cast<int64_t>(index) * kWidth<T>;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {  // past the end x was loaded as 0: so is the last nibble
      const uint32_t word = codes[i / 4] >> (i % 4 * 8);
      if (i >= left) continue;
      if (!packed) {
        to[i] = static_cast<uint8_t>(word);
      } else if (i % 2 == 0) {
        to[i / 2] = static_cast<uint8_t>(PackNibbles(word));
      }
    }
  } else if constexpr (kWords == 2) {
    if (packed) {
      *reinterpret_cast<uint32_t*>(to) = PackNibbles(codes[0]) | PackNibbles(codes[1]) << 16;
    } else {
      StoreEightBytes(to, codes[0], codes[1]);
    }
  } else if (packed) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(PackNibbles(codes[0]));
  } else {
    *reinterpret_cast<uint32_t*>(to) = codes[0];
  }
  return sum;
}

// Called by whole warps, whose vectors lie side by side and start at a group.
__device__ __forceinline__ void StoreGroupSum(const Params& p, int32_t* row, int index, int sum) {
  for (int distance = 1; distance < 1 << p.group_shift; distance *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (index < p.vectors && (index & ((1 << p.group_shift) - 1)) == 0) {
    row[index >> p.group_shift] = sum;
  }
}

// A scale for every row, which a warp has, or else a block.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps)
    QuantizeRowsKernel(const __grid_constant__ Params p, bool warp_has_row) {
  __shared__ uint32_t largest_of[kMaxWarps];
  __shared__ int sum_of[kMaxWarps];
  const RowTeam team(warp_has_row);
  if (team.row >= p.problem.rows) return;  // whole warps, and only where there is no barrier below
  const Row<T> at(p, team.row);
  const bool packed = p.problem.bits == 4;
  HeldRow<T, kAligned> row(at.x, p.vectors, p.problem.k, team);
  const uint32_t seen = team.Max(row.LoadLargest(), largest_of);

  const float scale = ScaleOf(FloatOf<T>(seen), packed ? 1.0f / 7.0f : 1.0f / 127.0f);
  const float inverse = InverseScale(scale);
  const uint32_t keep = inverse == 0.0f ? 0u : ~0u;
  if (team.thread == 0) p.problem.row_scale[team.row] = scale;

  const bool by_group = p.problem.group_sums && p.group_shift >= 0;
  int total = 0;
  for (int first = 0; first < p.vectors; first += row.step) {
    if (first > 0) row.Load(first);
#pragma unroll
    for (int j = 0; j < row.kCount; ++j) {
      const int index = row.Index(first, j);
      int sum = 0;
      if (index < p.vectors) {
        float step[kWidth<T>];
        ToFloats<T>(row.v[j], step);
        // None has to be saturated: the largest step is 127 or 7, up to rounding.
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) step[i] = __fmul_rn(step[i], inverse);
        sum = StoreCodes<T, kAligned>(at.q, index, p.problem.k, packed, step, keep);
      }
      total += sum;
      if (by_group) StoreGroupSum(p, at.group_sums, index, sum);
    }
  }
  if (!p.problem.group_sums || by_group) return;
  total = team.Sum(total, sum_of);
  if (team.thread == 0) at.group_sums[0] = total;
}

// Scales that are given, for all columns or for each.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kTileThreads)
    QuantizeColumnsKernel(const __grid_constant__ Params p, int column_blocks) {
  const ColumnTile tile(column_blocks);
  const bool inside = tile.index < p.vectors;
  const bool packed = p.problem.bits == 4;
  const float largest = packed ? 7.0f : 127.0f;
  const int64_t first = static_cast<int64_t>(tile.index) * kWidth<T>;
  float inverse[kWidth<T>];
  int64_t entry = -1;
  for (int done = 0; done < kTileRows; done += kRowsAtOnce) {
    uint4 v[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int64_t row = tile.row0 + (done + j) * tile.step;
      v[j] = inside && row < p.problem.rows
                 ? LoadVector<T, kAligned>(Row<T>(p, row).x, tile.index, p.problem.k)
                 : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int64_t row = tile.row0 + (done + j) * tile.step;
      if (row >= p.problem.rows) return;  // whole warps: each lies along one row
      const Row<T> at(p, row);
      const int64_t own = ScaleEntry(row, p.problem.rows, p.problem.rows_per_scale);
      if (own != entry) {
        entry = own;
        const float* scale = p.problem.scale + own * p.problem.scale_columns;
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) {
          const int64_t column = p.problem.scale_columns == 1 ? 0 : first + i;
          inverse[i] =
              column < p.problem.scale_columns ? InverseScale(__ldg(scale + column)) : 0.0f;
        }
      }
      int sum = 0;
      if (inside) {
        float step[kWidth<T>];
        ToFloats<T>(v[j], step);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) {
          step[i] = Saturated(__fmul_rn(step[i], inverse[i]), largest);
        }
        sum = StoreCodes<T, kAligned>(at.q, tile.index, p.problem.k, packed, step, ~0u);
      }
      if (!p.problem.group_sums) continue;
      if (p.group_shift >= 0) {
        StoreGroupSum(p, at.group_sums, tile.index, sum);
      } else {  // of integers: the order of the additions does not show
        sum = WarpSum(sum);
        if (threadIdx.x % 32 == 0) atomicAdd(at.group_sums, sum);
      }
    }
  }
}

template <typename T, bool kAligned>
const char* LaunchAligned(const Params& p, Stream stream) {
  const QuantizeActivationProblem& problem = p.problem;
  if (!problem.scale) {
    const RowBlocks rows(problem.rows, p.vectors, kVectors<kAligned>);
    if (rows.blocks > kMaxBlocks) return "x has too many rows";
    QuantizeRowsKernel<T, kAligned>
        <<<static_cast<unsigned>(rows.blocks), rows.threads, 0, stream>>>(p, rows.warp_has_row);
  } else {
    const ColumnTiles tiles(problem.rows, p.vectors);
    if (tiles.blocks > kMaxBlocks) return "x has too many rows";
    if (problem.group_sums && p.group_shift < 0) {
      const cudaError_t error = cudaMemsetAsync(
          problem.group_sums, 0, static_cast<size_t>(problem.rows) * sizeof(int32_t), stream);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    QuantizeColumnsKernel<T, kAligned>
        <<<static_cast<unsigned>(tiles.blocks), tiles.block, 0, stream>>>(p, tiles.column_blocks);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* Launch(const QuantizeActivationProblem& problem, Stream stream) {
  Params p = {};
  p.problem = problem;
  p.vectors = static_cast<int>((problem.k + kWidth<T> - 1) / kWidth<T>);
  p.group_shift = -1;
  p.groups = 1;
  if (problem.group_sums && problem.group_size != problem.k) {
    p.groups = problem.k / problem.group_size;
    p.group_shift = 0;
    while (kWidth<T> << p.group_shift < problem.group_size) ++p.group_shift;
  }
  const bool aligned = problem.k % kWidth<T> == 0 &&
                       reinterpret_cast<uintptr_t>(problem.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(problem.q) % 8 == 0;
  return aligned ? LaunchAligned<T, true>(p, stream) : LaunchAligned<T, false>(p, stream);
}

}  // namespace

const char* LaunchQuantizeActivation(const QuantizeActivationProblem& problem, Stream stream) {
  if (problem.rows == 0 || (problem.k == 0 && problem.scale)) return nullptr;
  switch (problem.x_dtype) {
    case DType::kF16:
      return Launch<__half>(problem, stream);
    case DType::kBF16:
      return Launch<__nv_bfloat16>(problem, stream);
    default:
      return Launch<float>(problem, stream);
  }
}

}  // namespace jax_awq
