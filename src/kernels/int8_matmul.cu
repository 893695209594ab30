// Dispatch of int8_matmul and int4_matmul to their kernels, with what comes before and after the
// one for sm_90a: a copy of a that it can read, and the sum over splits.

#include <algorithm>

#include "device/ptx.cuh"
#include "kernels/int8_matmul_launch.cuh"
#include "kernels/launch_clusters.h"

namespace jax_awq {
namespace {

constexpr int kThreads = 256;

// a as int8 in rows of `padded` bytes, a multiple of 16, zero behind the last index; int4 in the
// upper halves. A thread writes 16 bytes.
template <bool kPacked>
__global__ void __launch_bounds__(kThreads)
    WidenKernel(const uint8_t* a, uint4* to, int64_t rows, int64_t k, int64_t columns,
                int64_t padded, bool aligned) {
  StartKernelBehind();
  const int64_t chunks = padded / 16;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows * chunks) return;
  const int64_t chunk = i % chunks;
  const uint8_t* row = a + i / chunks * columns;
  uint32_t out[4];
  if constexpr (kPacked) {
    uint32_t codes[2] = {0, 0};
    if (aligned && 8 * chunk + 8 <= columns) {
      const uint2 both = __ldg(reinterpret_cast<const uint2*>(row + 8 * chunk));
      codes[0] = both.x, codes[1] = both.y;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int64_t column = 8 * chunk + j;
        if (column < columns) {
          codes[j / 4] |= static_cast<uint32_t>(__ldg(row + column)) << (8 * (j % 4));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t even = codes[j] << 4 & 0xf0f0f0f0u;
      const uint32_t odd = codes[j] & 0xf0f0f0f0u;
      out[2 * j] = __byte_perm(even, odd, 0x5140);
      out[2 * j + 1] = __byte_perm(even, odd, 0x7362);
    }
    if (k % 2 && chunk == k / 16) {  // the half behind the last index
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (k % 16 / 4 == j) out[j] &= ~(0xffu << 8 * (k % 4));
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int64_t column = 16 * chunk + j;
      const uint32_t byte = column < columns ? __ldg(row + column) : 0;
      out[j / 4] = j % 4 == 0 ? byte : out[j / 4] | byte << (8 * (j % 4));
    }
  }
  to[i] = make_uint4(out[0], out[1], out[2], out[3]);
}

cudaError_t Widen(const Int8MatmulPlan& plan, const Int8MatmulParams& p, cudaStream_t stream) {
  const int64_t rows = p.m * (p.buffers.a_stride != 0 ? p.batch : 1);
  const int64_t blocks = (rows * (plan.padded_k / 16) + kThreads - 1) / kThreads;
  const auto* a = static_cast<const uint8_t*>(p.buffers.a);
  auto* to = static_cast<uint4*>(p.buffers.workspace);
  const bool aligned = p.a_columns % 8 == 0 && reinterpret_cast<uintptr_t>(a) % 8 == 0;
  auto* kernel = p.packed ? WidenKernel<true> : WidenKernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, to, rows, p.k, p.a_columns,
                                                                 plan.padded_k, aligned);
  return cudaGetLastError();
}

// y = finish(sum over splits); a thread has four columns. Integers, so any order gives these bits.
__global__ void __launch_bounds__(kThreads)
    FinishSumsKernel(const __grid_constant__ Int8MatmulParams p) {
  WaitForKernelBefore();
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (i >= p.batch * p.size()) return;
  int4 sum = make_int4(0, 0, 0, 0);
  for (int s = 0; s < p.splits; ++s) {
    const int4 v = *reinterpret_cast<const int4*>(p.partials + s * p.batch * p.size() + i);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  const int64_t batch = i / p.size();
  const int64_t row = i % p.size() / p.n;
  const Int8Epilogue epilogue = MakeEpilogue(p, batch, 0);
  const FourColumns four(epilogue, i % p.n);
  four.Finish(epilogue, row, epilogue.RowScale(row), sum);
}

cudaError_t FinishSums(const Int8MatmulParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.batch * p.size() / 4 + kThreads - 1) / kThreads;
  return LaunchClusters(FinishSumsKernel, p, 1, dim3(static_cast<unsigned>(blocks)), kThreads, 0,
                        stream, true);
}

cudaError_t Launch(const Int8MatmulPlan& plan, const Int8MatmulParams& p, cudaStream_t stream) {
  if (plan.kernel == Int8MatmulKernel::kDp4a) return LaunchInt8MatmulDp4a(p, stream);
  if (plan.kernel == Int8MatmulKernel::kMma) return LaunchInt8MatmulMma(p, stream);
  if (plan.widen) {
    if (cudaError_t e = Widen(plan, p, stream)) return e;
  }
  if (cudaError_t e = LaunchInt8MatmulTma(plan, p, stream)) return e;
  return p.partials ? FinishSums(p, stream) : cudaSuccess;
}

}  // namespace

const char* LaunchInt8Matmul(const Int8MatmulProblem& problem, const Int8MatmulPlan& plan,
                             const Int8MatmulBuffers& buffers, Stream stream) {
  Int8MatmulParams p = {};
  p.buffers = buffers;
  p.m = problem.m;
  p.n = problem.n;
  p.k = problem.k;
  p.batch = problem.batch;
  p.a_columns = problem.a_columns();
  p.b_rows = problem.b_rows();
  p.packed = problem.packed;
  p.splits = plan.split_k;
  if (plan.split_k > 1) {
    p.partials =
        reinterpret_cast<int32_t*>(static_cast<char*>(buffers.workspace) + plan.widened_bytes);
  }
  const cudaError_t error = Launch(plan, p, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_awq
