// 4-bit codes to pairs of 16-bit weights (q - z) * s in the registers of an mma fragment.
//
// A code is put under the mantissa of a power of two large enough that its unit is the last
// mantissa bit, so that "or" converts: 1024 + q in float16, 128 + q in bfloat16. The zero point
// joins the same offset, -(1024 + z), and the sum q - z is exact. Folding the scale into that
// addition would round s * (1024 + z), which loses half a scale step; it is therefore a second,
// singly rounded multiplication.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/ptx.cuh"

namespace jax_awq {

// Position in a word of logical column c of eight, in the order of AutoAWQ's GEMM layout.
__host__ __device__ constexpr int AwqNibble(int c) { return (c >> 1) + 4 * (c & 1); }
// Logical column that lies in nibble k.
__host__ __device__ constexpr int AwqColumn(int k) { return k < 4 ? 2 * k : 2 * (k - 4) + 1; }

// Nibbles 2t and 2t + 1 of a word in natural order, as low nibbles of a pair of halves.
__device__ __forceinline__ uint32_t NaturalPair(uint32_t word, int t) {
  const uint32_t byte = word >> (8 * t);
  return (byte & 0xfu) | ((byte << 12) & 0xf0000u);
}

// Columns 2t and 2t + 1 of a word in AWQ order: the order puts them sixteen bits apart.
__device__ __forceinline__ uint32_t AwqPair(uint32_t word, int t) { return word >> (4 * t); }

// Byte b of two words as (b0, b0, b1, b1): two pairs of halves at once, low and high nibbles.
__device__ __forceinline__ uint32_t BytePair(uint32_t word0, uint32_t word1, int b) {
  return SelectBytes(word0, word1, b | b << 4 | (b + 4) << 8 | (b + 4) << 12);
}

__device__ __forceinline__ uint32_t Splat(uint16_t v) { return v | uint32_t{v} << 16; }

// The lower of a pair of 16-bit floats.
template <typename S>
__device__ __forceinline__ float LowerToFloat(uint32_t pair);
template <>
__device__ __forceinline__ float LowerToFloat<__half>(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
}
template <>
__device__ __forceinline__ float LowerToFloat<__nv_bfloat16>(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

template <typename T>
struct Dequant;

template <>
struct Dequant<__half> {
  using Scale = uint32_t;

  __device__ static Scale MakeScale(uint32_t pair, bool) { return pair; }

  // -(offset + z) for codes in the low (or high) nibbles of the bytes of `pair`.
  template <bool kHigh>
  __device__ static uint32_t NegZero(uint32_t pair) {
    if constexpr (kHigh) {
      return Fma(MaskOr(pair, 0x00f000f0u, 0x64006400u), 0xac00ac00u, 0x80008000u);  // * -1/16
    } else {
      return MaskOr(pair, 0x000f000fu, 0xe400e400u);
    }
  }

  // q - z, exact.
  template <bool kHigh>
  __device__ static uint32_t Difference(uint32_t pair, uint32_t neg_zero) {
    if constexpr (kHigh) {
      // 1024 + 16 q needs no shift: (1024 + 16 q) / 16 - (64 + z).
      return Fma(MaskOr(pair, 0x00f000f0u, 0x64006400u), 0x2c002c00u, neg_zero);
    } else {
      uint32_t r;
      asm("add.rn.f16x2 %0, %1, %2;"
          : "=r"(r)
          : "r"(MaskOr(pair, 0x000f000fu, 0x64006400u)), "r"(neg_zero));
      return r;
    }
  }

  __device__ static uint32_t Multiply(uint32_t v, Scale scale) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(scale));
    return r;
  }

 private:
  __device__ static uint32_t Fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
};

template <>
struct Dequant<__nv_bfloat16> {
  // A float16 scale has eleven significant bits: the upper eight and the lower three are bfloat16
  // numbers each. (q - z) * low is exact (four bits times three), so the fused multiply-add rounds
  // the whole product once.
  struct Scale {
    uint32_t high;
    uint32_t low;
  };

  __device__ static Scale MakeScale(uint32_t pair, bool is_bf16) {
    const float2 f = __half22float2(reinterpret_cast<const __half2&>(pair));
    const __nv_bfloat162 high = __float22bfloat162_rn(f);
    const float2 h = __bfloat1622float2(high);
    const __nv_bfloat162 low = __float22bfloat162_rn(make_float2(f.x - h.x, f.y - h.y));
    // Selected, not branched to: a branch amid wgmmas would serialize them.
    return {is_bf16 ? pair : reinterpret_cast<const uint32_t&>(high),
            is_bf16 ? 0u : reinterpret_cast<const uint32_t&>(low)};
  }

  // Bit 7 of bfloat16 belongs to the exponent, so high nibbles are shifted down first.
  template <bool kHigh>
  __device__ static uint32_t NegZero(uint32_t pair) {
    return MaskOr(kHigh ? pair >> 4 : pair, 0x000f000fu, 0xc300c300u);
  }

  template <bool kHigh>
  __device__ static uint32_t Difference(uint32_t pair, uint32_t neg_zero) {
    // sub.bf16x2 needs sm_90, fma.bf16x2 only sm_80; both run at the same rate.
    return Fma(MaskOr(kHigh ? pair >> 4 : pair, 0x000f000fu, 0x43004300u), 0x3f803f80u, neg_zero);
  }

  __device__ static uint32_t Multiply(uint32_t v, Scale scale) {
    return Fma(v, scale.high, Fma(v, scale.low, 0x80008000u));
  }

  // By a scale that is a bfloat16 number.
  __device__ static uint32_t Multiply(uint32_t v, uint32_t pair) {
    return Fma(v, pair, 0x80008000u);
  }

 private:
  __device__ static uint32_t Fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
};

}  // namespace jax_awq
