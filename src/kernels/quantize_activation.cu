// Codes of activations. Memory is everything: x is read once, in 16-byte vectors, and between its
// largest value and its codes a row stays in registers.

#include "kernels/quantize_activation.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "device/codes.cuh"

namespace jax_awq {
namespace {

// Vectors of a row that a thread can hold in registers. With many rows each thread takes as many:
// its loads are in flight together, and a row of few warps leaves room for other rows, which load
// while this one stores. With 4, a row of 28672 would have a whole SM; with 16 there are spills.
template <bool kAligned>
constexpr int kVectors = kAligned ? 8 : 4;
constexpr int64_t kManyRows = 1024;  // enough to fill the device; with fewer, latency counts
constexpr int kMaxWarps = 32;
constexpr int kSmallRowWarps = 4;  // rows in a block where one warp has a row

struct Params {
  QuantizeActivationProblem problem;
  int vectors;      // of a row, the last one perhaps not full
  int group_shift;  // a group is the vectors of 1 << group_shift threads; -1: it is the row
  int64_t groups;   // of a row
};

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

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

// Vector `index` of a row, zeros past the end. kAligned: every vector is full and can be moved as a
// whole; else elements are moved one by one.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 LoadVector(const T* row, int index, int64_t k) {
  if constexpr (kAligned) {
    return __ldg(reinterpret_cast<const uint4*>(row) + index);
  } else {
    const int64_t first = static_cast<int64_t>(index) * kWidth<T>;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (first + i >= k) continue;
      if constexpr (sizeof(T) == 2) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint16_t*>(row) + first + i);
        words[i / 2] |= bits << (i % 2 * 16);
      } else {
        words[i] = __ldg(reinterpret_cast<const uint32_t*>(row) + first + i);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Magnitudes are compared as integers, which orders floats, infinity and, above it, NaN alike.
// Halves of 16-bit types are kept apart.
template <typename T>
__device__ __forceinline__ uint32_t LargestBits(const uint4& v, uint32_t seen) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      seen = __vmaxu2(seen, words[i] & 0x7fff7fffu);
    } else {
      seen = max(seen, words[i] & 0x7fffffffu);
    }
  }
  return seen;
}

__device__ __forceinline__ uint32_t WarpMax(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, v);
#else
  for (int distance = 16; distance > 0; distance /= 2) {
    v = max(v, __shfl_xor_sync(kAllLanes, v, distance));
  }
  return v;
#endif
}

__device__ __forceinline__ int WarpSum(int v) {
  for (int distance = 16; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(kAllLanes, v, distance);
  }
  return v;
}

template <typename T>
__device__ __forceinline__ float FloatOf(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  } else {
    return __uint_as_float(sizeof(T) == 2 ? bits << 16 : bits);
  }
}

template <typename T>
__device__ __forceinline__ void ToFloats(const uint4& v, float (&f)[kWidth<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      f[2 * i] = FloatOf<T>(words[i] & 0xffffu);
      f[2 * i + 1] = FloatOf<T>(words[i] >> 16);
    } else {
      f[i] = FloatOf<T>(words[i]);
    }
  }
}

// One store: a uint2 the compiler stores as two words, one of them shared with another branch, and
// half-written sectors would cost twice.
__device__ __forceinline__ void StoreEightBytes(uint8_t* to, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}

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

// A scale for every row, which a warp has, or else a block. What 32 warps cannot hold is read
// again, from the L2 cache.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps)
    QuantizeRowsKernel(const __grid_constant__ Params p, bool warp_has_row) {
  __shared__ uint32_t largest_of[kMaxWarps];
  __shared__ int sum_of[kMaxWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int thread = warp_has_row ? lane : threadIdx.x;
  const int team = warp_has_row ? 32 : blockDim.x;
  const int64_t row = warp_has_row ? static_cast<int64_t>(blockIdx.x) * warps + warp : blockIdx.x;
  if (row >= p.problem.rows) return;  // whole warps, and only where there is no barrier below
  const Row<T> at(p, row);
  const bool packed = p.problem.bits == 4;
  const int held = kVectors<kAligned> * team;

  uint4 v[kVectors<kAligned>];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kVectors<kAligned>; ++j) {
      const int index = first + j * team + thread;
      v[j] = index < p.vectors ? LoadVector<T, kAligned>(at.x, index, p.problem.k)
                               : make_uint4(0, 0, 0, 0);
    }
  };
  uint32_t seen = 0;
  for (int first = held;; first += held) {
    const bool more = first < p.vectors;
    load(more ? first : 0);  // the first vectors last: these stay
#pragma unroll
    for (int j = 0; j < kVectors<kAligned>; ++j) seen = LargestBits<T>(v[j], seen);
    if (!more) break;
  }
  if constexpr (sizeof(T) == 2) seen = max(seen & 0xffffu, seen >> 16);
  seen = WarpMax(seen);
  if (!warp_has_row) {
    if (lane == 0) largest_of[warp] = seen;
    __syncthreads();
    seen = WarpMax(lane < warps ? largest_of[lane] : 0u);
  }

  float scale = __fmul_rn(FloatOf<T>(seen), packed ? 1.0f / 7.0f : 1.0f / 127.0f);
  if (scale < kSmallestScale) scale = 0.0f;  // NaN and infinity stay
  const float inverse = InverseScale(scale);
  const uint32_t keep = inverse == 0.0f ? 0u : ~0u;
  if (thread == 0) p.problem.row_scale[row] = scale;

  const bool by_group = p.problem.group_sums && p.group_shift >= 0;
  int total = 0;
  for (int first = 0; first < p.vectors; first += held) {
    if (first > 0) load(first);
#pragma unroll
    for (int j = 0; j < kVectors<kAligned>; ++j) {
      const int index = first + j * team + thread;
      int sum = 0;
      if (index < p.vectors) {
        float step[kWidth<T>];
        ToFloats<T>(v[j], step);
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
  total = WarpSum(total);
  if (!warp_has_row) {
    if (lane == 0) sum_of[warp] = total;
    __syncthreads();
    total = WarpSum(lane < warps ? sum_of[lane] : 0);
  }
  if (thread == 0) at.group_sums[0] = total;
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
          const float s = __fmul_rn(step[i], inverse[i]);
          step[i] = s == s ? fminf(fmaxf(s, -largest), largest) : 0.0f;
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
    const int per_warp = 32 * (problem.rows < kManyRows ? 1 : kVectors<kAligned>);
    const int wanted = p.vectors / per_warp + (p.vectors % per_warp != 0);
    const bool warp_has_row = wanted <= 1;
    const int warps = warp_has_row ? kSmallRowWarps : std::min(wanted, kMaxWarps);
    const int64_t blocks = warp_has_row ? (problem.rows + warps - 1) / warps : problem.rows;
    if (blocks > kMaxBlocks) return "x has too many rows";
    QuantizeRowsKernel<T, kAligned>
        <<<static_cast<unsigned>(blocks), 32 * warps, 0, stream>>>(p, warp_has_row);
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
