// Consumers of the TMA kernel where x is int8 or float8: the tensor cores multiply codes of the
// weight with codes of x, and the sums of a group are multiplied by its scales in float32.
//
// A zero point would cost as many instructions as the rest of a code. Its share of the result,
// -z * s * sum(x), is a product of its own instead, of a depth that is K / 32: bfloat16 holds
// z * s and the sums as two numbers each, exact for int8.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "device/dequant.cuh"
#include "device/epilogue.cuh"
#include "device/tma_tile.cuh"
#include "device/wgmma.cuh"

namespace jax_awq {

// Four codes of one output, as x has its type: the low nibbles of `bytes` or the high ones, both
// times one over kUnit.
template <typename T>
struct ByteCodes;

// 16 (q - 8): half the zero point of most weights is in the sign bit.
template <>
struct ByteCodes<int8_t> {
  static constexpr float kUnit = 1.0f / 16;
  static constexpr int kZero = 8;  // what a code of 0 counts
  __device__ static uint32_t Low(uint32_t bytes) { return High(bytes << 4); }
  __device__ static uint32_t High(uint32_t bytes) {
    return MaskXor(bytes, 0xf0f0f0f0u, 0x80808080u);
  }
};

// As a number of four exponent and three mantissa bits a code is itself times 2^-9.
template <>
struct ByteCodes<__nv_fp8_e4m3> {
  static constexpr float kUnit = 512;
  static constexpr int kZero = 0;
  __device__ static uint32_t Low(uint32_t bytes) { return bytes & 0x0f0f0f0fu; }
  __device__ static uint32_t High(uint32_t bytes) { return Low(bytes >> 4); }
};

template <typename T, int kTokens, int kOutputs>
class CodesConsumer {
  using Tile = TmaTile<kTokens, kOutputs, 1>;
  static constexpr int kTiles = Tile::kTiles;
  using Codes = ByteCodes<T>;

 public:
  __device__ CodesConsumer(const StageReader<Tile>& reader, int group_shift, bool has_zeros,
                           bool bf16_scales)
      : lane(reader.shared, has_zeros),
        shared_(reader.shared),
        reader_(reader),
        single_(group_shift == kSingleGroup),
        bf16_scales_(bf16_scales) {
    const bool swapped = threadIdx.x % 4 >= 2;
    selector_ = KeepInRegister((swapped ? 0x2064 : 0x6420) + 0x1111 * lane.byte);
  }

  // The chunks of the steps in `share`, from an even one on: two of them are the 16 bytes that a
  // copy has to start at.
  __device__ static Share SumShare(Share share) {
    share.count += share.first % 2;
    share.first -= share.first % 2;
    return share;
  }
  // How many stages they take.
  __device__ static int SumStages(const Share& share, bool has_zeros) {
    const int chunks = SumShare(share).count;
    return has_zeros || Codes::kZero == 0 ? (chunks + Tile::kSumChunks - 1) / Tile::kSumChunks : 0;
  }

  // As WgmmaConsumer's.
  __device__ __forceinline__ void Accumulate(const Share& share,
                                             float (&acc)[kTiles][kTokens / 2]) {
    if constexpr (kTokens > 128) {
      MultiplySingle(share, acc);
    } else if (single_) {
      MultiplySingle(share, acc);
    } else {
      MultiplyGroups(share, acc);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) PinRegisters(acc[j]);
    SubtractZeroPoints(share, acc);
  }

  const TmaLane<Tile> lane;

 private:
  using Sums = SumOf<T>[kTiles][kTokens / 2];

  // A step is a group.
  __device__ __forceinline__ void MultiplyGroups(const Share& share,
                                                 float (&acc)[kTiles][kTokens / 2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[j][i] = 0.0f;
    }
    Sums sums;
    uint32_t codes[4][4];
    BarrierWait(Tile::Full(shared_, at_.stage), at_.phase);
    lane.LoadCodes(at_.stage, codes);
#pragma unroll 1
    for (int i = 0; i < share.count; ++i) {
      const int stage = at_.stage;
      float scales[2 * kTiles];
      LoadScales(stage, scales);
      uint32_t a[4][kTiles][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) Get(codes[s], a[s]);
      WgmmaFence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          Wgmma<T, kTokens>(sums[j], a[s][j], XTile(stage) + 2 * s, s > 0);
        }
      }
      WgmmaCommit();
      // The next stage, or once more this one where there is none.
      if (i + 1 < share.count) at_.Advance();
      BarrierWait(Tile::Full(shared_, at_.stage), at_.phase);
      lane.LoadCodes(at_.stage, codes);
      WgmmaWait<0>();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) PinRegisters(sums[j]);
      reader_.Release(stage);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int k = 0; k < kTokens / 2; ++k) {
          acc[j][k] = fmaf(static_cast<float>(sums[j][k]), scales[2 * j + k / 2 % 2], acc[j][k]);
        }
      }
    }
    at_.Advance();
  }

  // All steps are one group.
  __device__ __forceinline__ void MultiplySingle(const Share& share,
                                                 float (&acc)[kTiles][kTokens / 2]) {
    Sums& sums = reinterpret_cast<Sums&>(acc);  // in the same registers
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sums[j][i] = 0;
      PinRegisters(sums[j]);
    }
    WgmmaFence();
    float scales[2 * kTiles];
    uint32_t a[2][kTiles][4];
    int previous = -1;
#pragma unroll 1
    for (int i = 0; i < share.count; ++i) {
      const int stage = at_.stage;
      BarrierWait(Tile::Full(shared_, stage), at_.phase);
      uint32_t codes[4][4];
      lane.LoadCodes(stage, codes);
      LoadScales(stage, scales);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        // All but the newest are done: these registers are free again.
        WgmmaWait<1>();
        if (s == 1 && previous >= 0) reader_.Release(previous);
        Get(codes[s], a[s % 2]);
        WgmmaFence();
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          Wgmma<T, kTokens>(sums[j], a[s % 2][j], XTile(stage) + 2 * s);
        }
        WgmmaCommit();
      }
      previous = stage;
      at_.Advance();
    }
    WgmmaWait<0>();
#pragma unroll
    for (int j = 0; j < kTiles; ++j) PinRegisters(sums[j]);
    reader_.Release(previous);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        acc[j][i] = static_cast<float>(sums[j][i]) * scales[2 * j + i / 2 % 2];
      }
    }
  }

  // Fragments of 32 rows of codes.
  __device__ __forceinline__ void Get(const uint32_t (&codes)[4], uint32_t (&a)[kTiles][4]) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bytes =
            SelectBytes(codes[2 * half], codes[2 * half + 1], selector_ + 0x1111 * j);
        a[j][2 * half] = Codes::Low(bytes);
        a[j][2 * half + 1] = Codes::High(bytes);
      }
      PinRegisters(a[j]);  // or they are made behind the fence
    }
  }

  __device__ uint64_t XTile(int stage) const {  // descriptors count 16 bytes
    return SwizzledRows(Tile::X(shared_, 0)) + (stage * Tile::kXBytes >> 4);
  }

  // acc -= sum of z * s * (sum of x), over the chunks of `share`.
  __device__ __forceinline__ void SubtractZeroPoints(const Share& share,
                                                     float (&acc)[kTiles][kTokens / 2]) {
    const int stages = SumStages(share, lane.has_zeros);
    const Share chunks = SumShare(share);
    const int t = threadIdx.x % 4;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      const int stage = at_.stage;
      BarrierWait(Tile::Full(shared_, stage), at_.phase);
      uint32_t a[4][kTiles][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Of the four entries of a chunk, high, low, high, low, two lanes have two each: the
          // first multiplies them with the high part of z * s, the second with the low.
          const int chunk = 4 * s + 2 * half + t / 2;
          const int at = chunks.first + Tile::kSumChunks * i + chunk;
          const bool valid = at >= share.first && at < share.first + share.count;
          float products[2 * kTiles];
          LoadZeroPoints(stage, single_ ? 0 : chunk, products);
#pragma unroll
          for (int j = 0; j < 2 * kTiles; ++j) {
            const float v = valid ? products[j] : 0.0f;
            const float high = __bfloat162float(__float2bfloat16_rn(v));
            const __nv_bfloat16 part = __float2bfloat16_rn(t % 2 ? v - high : high);
            a[s][j / 2][2 * half + j % 2] = Splat(__bfloat16_as_ushort(part));
          }
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) PinRegisters(a[s][j]);
      }
      WgmmaFence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          Wgmma<__nv_bfloat16, kTokens>(acc[j], a[s][j], XTile(stage) + 2 * s);
        }
      }
      WgmmaCommit();
      WgmmaWait<0>();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) PinRegisters(acc[j]);
      reader_.Release(stage);
      at_.Advance();
    }
  }

  // -z * s of the lane's outputs, z less what the codes have without it.
  __device__ __forceinline__ void LoadZeroPoints(int stage, int row,
                                                 float (&products)[2 * kTiles]) const {
    const uint32_t base = Tile::Words(shared_, stage);
    uint32_t scales[2 * kTiles], packed[1] = {0x88888888u};
    LoadShared(scales, base + row * Tile::kOutputs * 2 + 16 * lane.word + 8 * lane.byte);
    if (lane.has_zeros) {
      LoadShared(packed, base + Tile::kSumZerosAt + row * Tile::kOutputs / 2 + 4 * lane.word);
    }
    const uint32_t zeros = SelectBytes(packed[0], 0, lane.half_selector) >> 8 * lane.byte;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int zero = static_cast<int>(zeros >> 4 * i & 15) - Codes::kZero;
      products[i] = -static_cast<float>(zero) * ToFloat(scales[i]);
    }
  }

  __device__ __forceinline__ void LoadScales(int stage, float (&scales)[2 * kTiles]) const {
    uint32_t pairs[2 * kTiles];
    LoadShared(pairs, lane.scales_at + stage * Tile::kScaleBytes);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) scales[i] = ToFloat(pairs[i]) * Codes::kUnit;
  }

  // Of the lane's half of a pair.
  __device__ __forceinline__ float ToFloat(uint32_t pair) const {
    const uint32_t own = SelectBytes(pair, 0, lane.half_selector);
    return bf16_scales_ ? LowerToFloat<__nv_bfloat16>(own) : LowerToFloat<__half>(own);
  }

  const uint32_t shared_;
  const StageReader<Tile> reader_;
  const bool single_, bf16_scales_;
  uint32_t selector_;
  StageCounter<Tile::kStages> at_;
};

}  // namespace jax_awq
