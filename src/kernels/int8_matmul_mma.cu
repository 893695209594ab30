// The kernels that take every shape: mma.sync for sm_80 and later, dp4a for sm_75. A CTA of eight
// warps computes 64 tokens x 128 outputs, 64 indices of the contraction a step; the next step's
// bytes are on their way to registers meanwhile.

#include "device/ptx.cuh"
#include "kernels/int8_matmul_launch.cuh"

namespace jax_awq {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 64;
constexpr int kOutputs = 128;
constexpr int kStep = 64;
constexpr int kWords = kStep / 4;
// Words of a row of a in shared memory: eight rows start in different banks.
constexpr int kStride = kWords + 4;

// Where a word of b lies. A warp stores one word of 32 rows that are four apart, and reads four of
// eight neighbours: no more than two of them in a bank either way.
__device__ __forceinline__ int SwizzledWord(int row, int word) {
  return row * kWords + (word ^ (row / 4 % 16) ^ (row % 4 << 2));
}

// Bytes [i, i + 4) of a row of `size`; what lies outside is 0. `words`: the row and i are aligned.
__device__ __forceinline__ uint32_t LoadFour(const uint8_t* row, int64_t i, int64_t size,
                                             bool words) {
  if (words && i + 4 <= size) return __ldg(reinterpret_cast<const uint32_t*>(row + i));
  uint32_t v = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + j < size) v |= static_cast<uint32_t>(__ldg(row + i + j)) << (8 * j);
  }
  return v;
}

// Rows of four bytes to columns: word j becomes byte j of each.
__device__ __forceinline__ void Transpose(uint32_t (&w)[4]) {
  const uint32_t low01 = SelectBytes(w[0], w[1], 0x5140), high01 = SelectBytes(w[0], w[1], 0x7362);
  const uint32_t low23 = SelectBytes(w[2], w[3], 0x5140), high23 = SelectBytes(w[2], w[3], 0x7362);
  w[0] = SelectBytes(low01, low23, 0x5410);
  w[1] = SelectBytes(low01, low23, 0x7632);
  w[2] = SelectBytes(high01, high23, 0x5410);
  w[3] = SelectBytes(high01, high23, 0x7632);
}

// Copies steps of a and b into shared memory, both with the contraction innermost and int4 in the
// upper halves of bytes.
class Int8Loader {
 public:
  __device__ Int8Loader(const Int8MatmulParams& p, int64_t token0, int64_t output0) : p_(p) {
    const int64_t batch = blockIdx.z;
    a_ = static_cast<const uint8_t*>(p.buffers.a) + batch * p.buffers.a_stride;
    b_ = static_cast<const uint8_t*>(p.buffers.b) + batch * p.buffers.b_stride;
    a_words_ = p.a_columns % 4 == 0 && reinterpret_cast<uintptr_t>(a_) % 4 == 0;
    b_words_ = p.n % 4 == 0 && reinterpret_cast<uintptr_t>(b_) % 4 == 0;
    token_ = token0 + threadIdx.x / 4;
    output_ = output0 + threadIdx.x % 32 * 4;
  }

  // To registers, from index `depth` on.
  __device__ void Fetch(int64_t depth) {
    const int part = threadIdx.x % 4;  // 16 indices of a row of a
    const uint8_t* row = a_ + token_ * p_.a_columns;
    const bool has_row = token_ < p_.m;
    const int64_t column = p_.packed ? depth / 2 + 8 * part : depth + 16 * part;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool load = has_row && (!p_.packed || i < 2);
      a_fetched_[i] = load ? LoadFour(row, column + 4 * i, p_.a_columns, a_words_) : 0;
    }
    if (p_.packed && p_.k % 2) {  // the half after the last index
      const int64_t last = p_.k / 2 - column;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (last / 4 == i && last >= 0) a_fetched_[i] &= ~(0xf0u << 8 * (last % 4));
      }
    }
    const int block = threadIdx.x / 32;  // of 4 indices; another lies 32 indices on
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t first = p_.packed ? depth / 2 + 2 * block + 16 * i : depth + 4 * block + 32 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool load = first + j < p_.b_rows && (!p_.packed || j < 2);
        b_fetched_[i][j] = load ? LoadFour(b_ + (first + j) * p_.n, output_, p_.n, b_words_) : 0;
      }
    }
  }

  __device__ void Store(uint32_t (*a)[kStride], uint32_t* b) {
    if (p_.packed) {
      const uint32_t codes[2] = {a_fetched_[0], a_fetched_[1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t even = codes[i] << 4 & 0xf0f0f0f0u;
        const uint32_t odd = codes[i] & 0xf0f0f0f0u;
        a_fetched_[2 * i] = SelectBytes(even, odd, 0x5140);
        a_fetched_[2 * i + 1] = SelectBytes(even, odd, 0x7362);
      }
    }
    *reinterpret_cast<uint4*>(&a[threadIdx.x / 4][threadIdx.x % 4 * 4]) =
        make_uint4(a_fetched_[0], a_fetched_[1], a_fetched_[2], a_fetched_[3]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t(&w)[4] = b_fetched_[i];
      if (p_.packed) {
        w[3] = w[1] & 0xf0f0f0f0u;
        w[2] = w[1] << 4 & 0xf0f0f0f0u;
        w[1] = w[0] & 0xf0f0f0f0u;
        w[0] = w[0] << 4 & 0xf0f0f0f0u;
      }
      Transpose(w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        b[SwizzledWord(threadIdx.x % 32 * 4 + j, threadIdx.x / 32 + 8 * i)] = w[j];
      }
    }
  }

 private:
  const Int8MatmulParams& p_;
  const uint8_t* a_;
  const uint8_t* b_;
  bool a_words_, b_words_;
  int64_t token_, output_;
  uint32_t a_fetched_[4], b_fetched_[2][4];
};

template <bool kMma>
__global__ void __launch_bounds__(kThreads, 2)
    Int8MatmulKernel(const __grid_constant__ Int8MatmulParams p) {
#if __CUDA_ARCH__ < 800
  if constexpr (kMma) return;
#endif
  __shared__ __align__(16) uint32_t a[kTokens][kStride];
  __shared__ uint32_t b[kOutputs * kWords];
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t output0 = static_cast<int64_t>(blockIdx.y) * kOutputs;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  // Of a warp with mma.sync: 32 tokens x 32 outputs.
  const int warp_token = warp / 4 * 32;
  const int warp_output = warp % 4 * 32;
  // Of a thread with dp4a: 4 tokens x 8 outputs.
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;

  int32_t acc[8][4] = {};  // mma.sync: of 16-token tile i and 8-output tile j, acc[4 * i + j]
  Int8Loader loader(p, token0, output0);
  loader.Fetch(0);
  for (int64_t depth = 0; depth < p.k; depth += kStep) {
    __syncthreads();
    loader.Store(a, b);
    __syncthreads();
    if (depth + kStep < p.k) loader.Fetch(depth + kStep);
    if constexpr (kMma) {
#if __CUDA_ARCH__ >= 800
#pragma unroll
      for (int s = 0; s < kStep / 32; ++s) {
        uint32_t tokens[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = warp_token + 16 * i + g;
          tokens[i][0] = a[row][8 * s + t];
          tokens[i][1] = a[row + 8][8 * s + t];
          tokens[i][2] = a[row][8 * s + t + 4];
          tokens[i][3] = a[row + 8][8 * s + t + 4];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = warp_output + 8 * j + g;
          const uint32_t outputs[2] = {b[SwizzledWord(row, 8 * s + t)],
                                       b[SwizzledWord(row, 8 * s + t + 4)]};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            Mma16x8x32(acc[4 * i + j], tokens[i], outputs[0], outputs[1]);
          }
        }
      }
#endif
    } else {
#pragma unroll 4
      for (int w = 0; w < kStep / 4; ++w) {
        int tokens[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) tokens[i] = a[ty + 16 * i][w];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int output = b[SwizzledWord(tx + 16 * j, w)];
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[j][i] = __dp4a(tokens[i], output, acc[j][i]);
        }
      }
    }
  }

  const Int8Epilogue epilogue = MakeEpilogue(p, blockIdx.z, p.packed ? kPackedShift : 0);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = kMma ? warp_token + 16 * (j / 4) + 8 * (i / 2) + g : ty + 16 * i;
      const int output = kMma ? warp_output + 8 * (j % 4) + 2 * t + i % 2 : tx + 16 * j;
      if (token0 + token < p.m && output0 + output < p.n) {
        FinishOne(epilogue, token0 + token, output0 + output, acc[j][i]);
      }
    }
  }
}

template <bool kMma>
cudaError_t Launch(const Int8MatmulParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((p.n + kOutputs - 1) / kOutputs),
                  static_cast<unsigned>(p.batch));
  Int8MatmulKernel<kMma><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchInt8MatmulMma(const Int8MatmulParams& p, cudaStream_t stream) {
  return Launch<true>(p, stream);
}

cudaError_t LaunchInt8MatmulDp4a(const Int8MatmulParams& p, cudaStream_t stream) {
  return Launch<false>(p, stream);
}

}  // namespace jax_awq
