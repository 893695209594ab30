// wgmma with the weights in registers (PTX ISA 9.7.16, "asynchronous warpgroup level matrix").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace jax_awq {

// Orders this thread's register writes before the wgmmas that follow.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps writes of an accumulator before the first wgmma, and reads behind the last wait: where the
// compiler moves either between them, ptxas serializes every wgmma (warnings C7514, C7515).
template <int kSize>
__device__ __forceinline__ void PinRegisters(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <typename T, int kSize>
__device__ __forceinline__ std::enable_if_t<std::is_integral_v<T>> PinRegisters(T (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Descriptor of rows of 128 bytes with the 128-byte swizzle, eight rows to 1024 bytes.
__device__ __forceinline__ uint64_t SwizzledRows(uint32_t shared_address) {
  constexpr uint32_t kHigh = 64 | 1u << 30;
  return uint64_t{kHigh} << 32 | ((shared_address >> 4 & 0x3fff) | 1u << 16);
}

// What products are summed in.
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

// d (64 outputs x kTokens) = or += a (64 x 32 bytes of T, registers) * b (32 bytes of T x kTokens,
// shared memory). Both have the contraction innermost: wgmma transposes 16-bit types alone.
template <typename T, int kTokens>
__device__ __forceinline__ void Wgmma(SumOf<T> (&d)[kTokens / 2], const uint32_t (&a)[4],
                                      uint64_t b, bool accumulate = true);

// Sums, as asm's operands and in its text.
#define JAX_AWQ_SUMS8(kind, i)                                                                \
  kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), kind(d[i + 4]), kind(d[i + 5]), \
      kind(d[i + 6]), kind(d[i + 7])
#define JAX_AWQ_SUMS16(kind, i) JAX_AWQ_SUMS8(kind, i), JAX_AWQ_SUMS8(kind, i + 8)
#define JAX_AWQ_SUMS32(kind, i) JAX_AWQ_SUMS16(kind, i), JAX_AWQ_SUMS16(kind, i + 16)
#define JAX_AWQ_SUMS48(kind, i) JAX_AWQ_SUMS32(kind, i), JAX_AWQ_SUMS16(kind, i + 32)
#define JAX_AWQ_SUMS64(kind, i) JAX_AWQ_SUMS32(kind, i), JAX_AWQ_SUMS32(kind, i + 32)
#define JAX_AWQ_SUMS72(kind, i) JAX_AWQ_SUMS64(kind, i), JAX_AWQ_SUMS8(kind, i + 64)
#define JAX_AWQ_SUMS80(kind, i) JAX_AWQ_SUMS64(kind, i), JAX_AWQ_SUMS16(kind, i + 64)
#define JAX_AWQ_SUMS96(kind, i) JAX_AWQ_SUMS64(kind, i), JAX_AWQ_SUMS32(kind, i + 64)
#define JAX_AWQ_SUMS112(kind, i) JAX_AWQ_SUMS64(kind, i), JAX_AWQ_SUMS48(kind, i + 64)
#define JAX_AWQ_SUMS128(kind, i) JAX_AWQ_SUMS64(kind, i), JAX_AWQ_SUMS64(kind, i + 64)
#define JAX_AWQ_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAX_AWQ_D16 JAX_AWQ_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAX_AWQ_D32 \
  JAX_AWQ_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_AWQ_D48 \
  JAX_AWQ_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_AWQ_D64 \
  JAX_AWQ_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_AWQ_D72 JAX_AWQ_D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JAX_AWQ_D80 \
  JAX_AWQ_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define JAX_AWQ_D96 \
  JAX_AWQ_D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JAX_AWQ_D112                                                                         \
  JAX_AWQ_D96                                                                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111"
#define JAX_AWQ_D128                                                                       \
  JAX_AWQ_D112                                                                             \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

// Operands are numbered by where they stand: `sums` of them, the four of a, b, `accumulate`.
#define JAX_AWQ_WGMMA(T, types, flags, kind, kTokens, sums, a1, a2, a3, b0, add)               \
  template <>                                                                                  \
  __device__ __forceinline__ void Wgmma<T, kTokens>(SumOf<T>(&d)[sums], const uint32_t(&a)[4], \
                                                    uint64_t b, bool accumulate) {             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add                                 \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kTokens types " {" JAX_AWQ_D##sums \
                 "}, {%" #sums ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", add" flags ";\n}"   \
                 : JAX_AWQ_SUMS##sums(kind, 0)                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                         \
                   "r"(static_cast<int>(accumulate)));                                         \
  }
#define JAX_AWQ_WGMMA_OF_EACH(...)                                                  \
  JAX_AWQ_WGMMA(__half, "k16.f32.f16.f16", ", 1, 1, 0", "+f", __VA_ARGS__)          \
  JAX_AWQ_WGMMA(__nv_bfloat16, "k16.f32.bf16.bf16", ", 1, 1, 0", "+f", __VA_ARGS__) \
  JAX_AWQ_WGMMA(int8_t, "k32.s32.s8.s8", "", "+r", __VA_ARGS__)                     \
  JAX_AWQ_WGMMA(__nv_fp8_e4m3, "k32.f32.e4m3.e4m3", ", 1, 1", "+f", __VA_ARGS__)

JAX_AWQ_WGMMA_OF_EACH(16, 8, 9, 10, 11, 12, 13)
JAX_AWQ_WGMMA_OF_EACH(32, 16, 17, 18, 19, 20, 21)
JAX_AWQ_WGMMA_OF_EACH(64, 32, 33, 34, 35, 36, 37)
JAX_AWQ_WGMMA_OF_EACH(96, 48, 49, 50, 51, 52, 53)
JAX_AWQ_WGMMA_OF_EACH(128, 64, 65, 66, 67, 68, 69)
JAX_AWQ_WGMMA_OF_EACH(144, 72, 73, 74, 75, 76, 77)
JAX_AWQ_WGMMA_OF_EACH(160, 80, 81, 82, 83, 84, 85)
JAX_AWQ_WGMMA_OF_EACH(192, 96, 97, 98, 99, 100, 101)
JAX_AWQ_WGMMA_OF_EACH(224, 112, 113, 114, 115, 116, 117)
JAX_AWQ_WGMMA_OF_EACH(256, 128, 129, 130, 131, 132, 133)

#undef JAX_AWQ_WGMMA_OF_EACH
#undef JAX_AWQ_WGMMA
#undef JAX_AWQ_D128
#undef JAX_AWQ_D112
#undef JAX_AWQ_D96
#undef JAX_AWQ_D80
#undef JAX_AWQ_D72
#undef JAX_AWQ_D64
#undef JAX_AWQ_D48
#undef JAX_AWQ_D32
#undef JAX_AWQ_D16
#undef JAX_AWQ_D8
#undef JAX_AWQ_SUMS128
#undef JAX_AWQ_SUMS112
#undef JAX_AWQ_SUMS96
#undef JAX_AWQ_SUMS80
#undef JAX_AWQ_SUMS72
#undef JAX_AWQ_SUMS64
#undef JAX_AWQ_SUMS48
#undef JAX_AWQ_SUMS32
#undef JAX_AWQ_SUMS16
#undef JAX_AWQ_SUMS8

}  // namespace jax_awq
