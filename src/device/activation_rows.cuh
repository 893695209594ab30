// Rows of activations, which a warp or a block holds in registers: x is read once, in 16-byte
// vectors, and stays between its largest value and its codes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device/codes.cuh"

namespace jax_awq {

// Vectors of a row that a thread can hold in registers. With many rows each thread takes as many:
// its loads are in flight together, and a row of few warps leaves room for other rows, which load
// while this one stores. With 4, a row of 28672 would have a whole SM; with 16 there are spills.
template <bool kAligned>
constexpr int kVectors = kAligned ? 8 : 4;
constexpr int64_t kManyRows = 1024;  // enough to fill the device; with fewer, latency counts
constexpr int kMaxWarps = 32;
constexpr int kSmallRowWarps = 4;  // rows in a block where one warp has a row

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

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
      if constexpr (sizeof(T) == 1) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint8_t*>(row) + first + i);
        words[i / 4] |= bits << (i % 4 * 8);
      } else if constexpr (sizeof(T) == 2) {
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

// How rows are divided: a warp for each where its registers hold one, else a block.
struct RowBlocks {
  RowBlocks(int64_t rows, int vectors, int vectors_of_thread) {
    const int per_warp = 32 * (rows < kManyRows ? 1 : vectors_of_thread);
    const int wanted = vectors / per_warp + (vectors % per_warp != 0);
    warp_has_row = wanted <= 1;
    const int warps = warp_has_row ? kSmallRowWarps : std::min(wanted, kMaxWarps);
    threads = 32 * warps;
    blocks = warp_has_row ? (rows + warps - 1) / warps : rows;
  }
  bool warp_has_row;
  int threads;
  int64_t blocks;  // may be more than a grid has
};

// The threads that have a row together.
struct RowTeam {
  __device__ explicit RowTeam(bool has_warp)
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        warps(blockDim.x / 32),
        is_warp(has_warp),
        thread(has_warp ? lane : threadIdx.x),
        size(has_warp ? 32 : blockDim.x),
        row(has_warp ? static_cast<int64_t>(blockIdx.x) * warps + warp : blockIdx.x) {}

  // Of what every thread brings; `of_warps` has an entry for each warp. Once in a kernel.
  __device__ __forceinline__ uint32_t Max(uint32_t v, uint32_t* of_warps) const {
    v = WarpMax(v);
    if (is_warp) return v;
    if (lane == 0) of_warps[warp] = v;
    __syncthreads();
    return WarpMax(lane < warps ? of_warps[lane] : 0u);
  }
  __device__ __forceinline__ int Sum(int v, int* of_warps) const {
    v = WarpSum(v);
    if (is_warp) return v;
    if (lane == 0) of_warps[warp] = v;
    __syncthreads();
    return WarpSum(lane < warps ? of_warps[lane] : 0);
  }

  int lane;
  int warp;
  int warps;
  bool is_warp;
  int thread;
  int size;
  int64_t row;  // may be past the last one
};

// A thread's vectors of a row. What a team cannot hold is read again, from the L2 cache.
template <typename T, bool kAligned>
struct HeldRow {
  static constexpr int kCount = kVectors<kAligned>;

  __device__ HeldRow(const T* x, int vectors, int64_t k, const RowTeam& team)
      : x(x), vectors(vectors), k(k), team(team), step(kCount * team.size) {}

  __device__ __forceinline__ int Index(int first, int j) const {
    return first + j * team.size + team.thread;
  }
  __device__ __forceinline__ void Load(int first) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int index = Index(first, j);
      v[j] = index < vectors ? LoadVector<T, kAligned>(x, index, k) : make_uint4(0, 0, 0, 0);
    }
  }
  // The bits of the largest magnitude that this thread sees. The first vectors stay.
  __device__ __forceinline__ uint32_t LoadLargest() {
    uint32_t seen = 0;
    for (int first = step;; first += step) {
      const bool more = first < vectors;
      Load(more ? first : 0);
#pragma unroll
      for (int j = 0; j < kCount; ++j) seen = LargestBits<T>(v[j], seen);
      if (!more) break;
    }
    if constexpr (sizeof(T) == 2) seen = max(seen & 0xffffu, seen >> 16);
    return seen;
  }

  const T* x;
  int vectors;
  int64_t k;
  const RowTeam& team;
  int step;  // from the vectors that the team holds to the next
  uint4 v[kCount];
};

// The scale of a row whose largest magnitude is `absmax`; NaN and infinity stay.
__device__ __forceinline__ float ScaleOf(float absmax, float largest_inverse) {
  const float scale = __fmul_rn(absmax, largest_inverse);
  return scale < kSmallestScale ? 0.0f : scale;
}

}  // namespace jax_awq
