// Names that kernels, planning and FFI handlers share. Plain C++: no CUDA, XLA or Python header.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

#ifdef __CUDACC__
#define JAX_AWQ_HOST_DEVICE __host__ __device__
#else
#define JAX_AWQ_HOST_DEVICE
#endif

namespace jax_awq {

using Stream = CUstream_st*;

enum class DType : uint8_t { kF16, kBF16, kF32, kS8, kE4M3 };

JAX_AWQ_HOST_DEVICE constexpr int SizeOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kS8 || dtype == DType::kE4M3 ? 1 : 2;
}

// How the eight codes of a word of qweight lie.
enum class Layout : uint8_t {
  kGemm,     // (K, N/8), along N, nibble k holds column 0 2 4 6 1 3 5 7 of its eight
  kOcMajor,  // (N, K/8), along K, natural order
};

enum class Activation : uint8_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };

constexpr int kMaxCluster = 8;  // the largest portable cluster (PTX ISA, "cluster dimension")

// Group sizes are powers of two, so that kernels never divide: 64-bit division costs hundreds of
// cycles, more than the work between two groups.
constexpr int kSingleGroup = 31;

// A quantized (K, N) matrix on the device: (q - z) * s.
struct AwqWeight {
  int64_t k;
  int64_t n;
  int group_shift;  // row k lies in group k >> group_shift; kSingleGroup if there is but one
  Layout layout;
  DType scales_dtype;
  const void* qweight;  // (batch?, K, N/8) or (batch?, N, K/8) int32
  const void* scales;   // (batch?, K/G, N)
  const void* qzeros;   // (batch?, K/G, N/8) int32 in AWQ order, or nullptr: every zero point is 8
  // Elements from one batch entry to the next; 0 where all share one.
  int64_t qweight_stride;
  int64_t scales_stride;
  int64_t qzeros_stride;
};

struct Device {
  int arch;  // compute capability of the code that will run, 90 for sm_90
  int sm_count;
};

// The newest architecture this build has code for that a device of `arch` can run; `arch` itself
// in a build without device code. Code compiled from older PTX lacks the newer paths.
int EffectiveArch(int arch);

// Whether that code is PTX, which the driver compiles when it is loaded.
bool RunsFromPtx(int arch);

// That of the CUDA device `ordinal`, 90 for 9.0; 0 if there is no such device.
int ComputeCapability(int ordinal);

// Description of the CUDA device `ordinal`, read once.
Device DescribeDevice(int ordinal);

}  // namespace jax_awq
