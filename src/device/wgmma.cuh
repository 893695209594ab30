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

// Makes shared memory written by ordinary stores visible to wgmma.
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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

#define JAX_AWQ_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JAX_AWQ_F16(d, i) \
  JAX_AWQ_F4(d, i), JAX_AWQ_F4(d, i + 4), JAX_AWQ_F4(d, i + 8), JAX_AWQ_F4(d, i + 12)
#define JAX_AWQ_F64(d, i) \
  JAX_AWQ_F16(d, i), JAX_AWQ_F16(d, i + 16), JAX_AWQ_F16(d, i + 32), JAX_AWQ_F16(d, i + 48)

// d (64 outputs x kTokens) += a (64 x 16, registers) * b (16 x kTokens, shared memory).
template <typename T, int kTokens>
__device__ __forceinline__ void Wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b);

template <>
__device__ __forceinline__ void Wgmma<__half, 16>(float (&d)[8], const uint32_t (&a)[4],
                                                  uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
      : JAX_AWQ_F4(d, 0), JAX_AWQ_F4(d, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 32>(float (&d)[16], const uint32_t (&a)[4],
                                                  uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, "
      "%18, %19}, %20, 1, 1, 1, 0;"
      : JAX_AWQ_F16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 64>(float (&d)[32], const uint32_t (&a)[4],
                                                  uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, "
      "%34, %35}, %36, 1, 1, 1, 0;"
      : JAX_AWQ_F16(d, 0), JAX_AWQ_F16(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 96>(float (&d)[48], const uint32_t (&a)[4],
                                                  uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, {%48, %49, %50, %51}, %52, 1, 1, "
      "1, 0;"
      : JAX_AWQ_F16(d, 0), JAX_AWQ_F16(d, 16), JAX_AWQ_F16(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 128>(float (&d)[64], const uint32_t (&a)[4],
                                                   uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, "
      "%68, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 160>(float (&d)[80], const uint32_t (&a)[4],
                                                   uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79}, {%80, %81, %82, %83}, %84, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F16(d, 64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 192>(float (&d)[96], const uint32_t (&a)[4],
                                                   uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F16(d, 64), JAX_AWQ_F16(d, 80)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 224>(float (&d)[112], const uint32_t (&a)[4],
                                                   uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n224k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "
      "%107, %108, %109, %110, %111}, {%112, %113, %114, %115}, %116, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F16(d, 64), JAX_AWQ_F16(d, 80), JAX_AWQ_F16(d, 96)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__half, 256>(float (&d)[128], const uint32_t (&a)[4],
                                                   uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, "
      "%69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "
      "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "
      "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "
      "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, {%128, "
      "%129, %130, %131}, %132, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F64(d, 64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 16>(float (&d)[8], const uint32_t (&a)[4],
                                                         uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
      : JAX_AWQ_F4(d, 0), JAX_AWQ_F4(d, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 32>(float (&d)[16], const uint32_t (&a)[4],
                                                         uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, "
      "%18, %19}, %20, 1, 1, 1, 0;"
      : JAX_AWQ_F16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 64>(float (&d)[32], const uint32_t (&a)[4],
                                                         uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, "
      "%34, %35}, %36, 1, 1, 1, 0;"
      : JAX_AWQ_F16(d, 0), JAX_AWQ_F16(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 96>(float (&d)[48], const uint32_t (&a)[4],
                                                         uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, {%48, %49, %50, %51}, %52, 1, 1, "
      "1, 0;"
      : JAX_AWQ_F16(d, 0), JAX_AWQ_F16(d, 16), JAX_AWQ_F16(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 128>(float (&d)[64], const uint32_t (&a)[4],
                                                          uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, "
      "%68, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 160>(float (&d)[80], const uint32_t (&a)[4],
                                                          uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79}, {%80, %81, %82, %83}, %84, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F16(d, 64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 192>(float (&d)[96], const uint32_t (&a)[4],
                                                          uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F16(d, 64), JAX_AWQ_F16(d, 80)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 224>(float (&d)[112], const uint32_t (&a)[4],
                                                          uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n224k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, "
      "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, "
      "%91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "
      "%107, %108, %109, %110, %111}, {%112, %113, %114, %115}, %116, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F16(d, 64), JAX_AWQ_F16(d, 80), JAX_AWQ_F16(d, 96)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <>
__device__ __forceinline__ void Wgmma<__nv_bfloat16, 256>(float (&d)[128], const uint32_t (&a)[4],
                                                          uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, "
      "%69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "
      "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "
      "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "
      "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, {%128, "
      "%129, %130, %131}, %132, 1, 1, 1, 0;"
      : JAX_AWQ_F64(d, 0), JAX_AWQ_F64(d, 64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef JAX_AWQ_F64
#undef JAX_AWQ_F16
#undef JAX_AWQ_F4

// What products of bytes are summed in.
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

#define JAX_AWQ_4(kind, d, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define JAX_AWQ_16(kind, d, i)                                                 \
  JAX_AWQ_4(kind, d, i), JAX_AWQ_4(kind, d, i + 4), JAX_AWQ_4(kind, d, i + 8), \
      JAX_AWQ_4(kind, d, i + 12)
#define JAX_AWQ_32(kind, d, i) JAX_AWQ_16(kind, d, i), JAX_AWQ_16(kind, d, i + 16)
#define JAX_AWQ_64(kind, d, i) JAX_AWQ_32(kind, d, i), JAX_AWQ_32(kind, d, i + 32)
#define JAX_AWQ_128(kind, d, i) JAX_AWQ_64(kind, d, i), JAX_AWQ_64(kind, d, i + 64)
#define JAX_AWQ_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define JAX_AWQ_D32 \
  JAX_AWQ_D16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_AWQ_D64                                                                    \
  JAX_AWQ_D32                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_AWQ_D128                                                                     \
  JAX_AWQ_D64                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "     \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

// d (64 outputs x kTokens) = or += a (64 x 32, int8 or float8 in registers) * b (32 x kTokens, the
// same in shared memory). Both have the contraction innermost: wgmma transposes 16-bit types alone.
template <typename T, int kTokens>
__device__ __forceinline__ void WgmmaBytes(SumOf<T> (&d)[kTokens / 2], const uint32_t (&a)[4],
                                           uint64_t b, bool accumulate = true);

#define JAX_AWQ_WGMMA_BYTES(T, kTokens, types, flags, outputs, inputs, add, constraints)      \
  template <>                                                                                 \
  __device__ __forceinline__ void WgmmaBytes<T, kTokens>(                                     \
      SumOf<T>(&d)[kTokens / 2], const uint32_t(&a)[4], uint64_t b, bool accumulate) {        \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add                                  \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kTokens "k32." types " {" outputs \
                 "}, " inputs ", add" flags ";\n}"                                            \
                 : constraints                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                   "r"(static_cast<int>(accumulate)));                                        \
  }

// Operands behind kTokens / 2 sums.
#define JAX_AWQ_IN16 "{%16, %17, %18, %19}, %20"
#define JAX_AWQ_IN32 "{%32, %33, %34, %35}, %36"
#define JAX_AWQ_IN64 "{%64, %65, %66, %67}, %68"
#define JAX_AWQ_IN128 "{%128, %129, %130, %131}, %132"
#define JAX_AWQ_S8(kTokens, outputs, inputs, add, sums) \
  JAX_AWQ_WGMMA_BYTES(int8_t, kTokens, "s32.s8.s8", "", outputs, inputs, add, sums("+r", d, 0))
#define JAX_AWQ_E4M3(kTokens, outputs, inputs, add, sums)                                      \
  JAX_AWQ_WGMMA_BYTES(__nv_fp8_e4m3, kTokens, "f32.e4m3.e4m3", ", 1, 1", outputs, inputs, add, \
                      sums("+f", d, 0))

JAX_AWQ_S8(32, JAX_AWQ_D16, JAX_AWQ_IN16, "%21", JAX_AWQ_16)
JAX_AWQ_S8(64, JAX_AWQ_D32, JAX_AWQ_IN32, "%37", JAX_AWQ_32)
JAX_AWQ_S8(128, JAX_AWQ_D64, JAX_AWQ_IN64, "%69", JAX_AWQ_64)
JAX_AWQ_S8(256, JAX_AWQ_D128, JAX_AWQ_IN128, "%133", JAX_AWQ_128)
JAX_AWQ_E4M3(32, JAX_AWQ_D16, JAX_AWQ_IN16, "%21", JAX_AWQ_16)
JAX_AWQ_E4M3(64, JAX_AWQ_D32, JAX_AWQ_IN32, "%37", JAX_AWQ_32)
JAX_AWQ_E4M3(128, JAX_AWQ_D64, JAX_AWQ_IN64, "%69", JAX_AWQ_64)
JAX_AWQ_E4M3(256, JAX_AWQ_D128, JAX_AWQ_IN128, "%133", JAX_AWQ_128)

#undef JAX_AWQ_E4M3
#undef JAX_AWQ_S8
#undef JAX_AWQ_IN128
#undef JAX_AWQ_IN64
#undef JAX_AWQ_IN32
#undef JAX_AWQ_IN16
#undef JAX_AWQ_WGMMA_BYTES
#undef JAX_AWQ_D128
#undef JAX_AWQ_D64
#undef JAX_AWQ_D32
#undef JAX_AWQ_D16
#undef JAX_AWQ_128
#undef JAX_AWQ_64
#undef JAX_AWQ_32
#undef JAX_AWQ_16
#undef JAX_AWQ_4

}  // namespace jax_awq
