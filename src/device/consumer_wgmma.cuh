// Consumers of the TMA kernel that dequantize into wgmma's register operand. While the tensor cores
// work on one k16 step, the next is dequantized.
#pragma once

#include <type_traits>

#include "device/dequant.cuh"
#include "device/epilogue.cuh"
#include "device/tma_tile.cuh"
#include "device/wgmma.cuh"

namespace jax_awq {

template <typename T, typename S, int kTokens, int kOutputs>
class WgmmaConsumer {
  using Tile = TmaTile<kTokens, kOutputs, 2>;
  static constexpr int kTiles = Tile::kTiles;
  static constexpr int kSteps = Tile::kDepth / 16;
  static constexpr int kStageShift = 6;  // a stage in rows of the weight, as group_shift
  static_assert(Tile::kDepth == 1 << kStageShift);
  static constexpr int kHalves = kTokens > 256 ? 2 : 1;  // wgmma has at most 256 columns
  // Steps of 16 that are a group of wgmmas, where registers are left and the tensor cores wait for
  // what else a warp does.
  static constexpr int kTogether =
      kTiles == 1 && (kTokens <= 64 || kTokens * kOutputs == 128 * 128) ? 2 : 1;
  using D = Dequant<T>;
  using Scale = std::conditional_t<std::is_same_v<T, S>, uint32_t, typename D::Scale>;

 public:
  __device__ WgmmaConsumer(const StageReader<Tile>& reader, int group_shift, bool has_zeros)
      : lane(reader.shared, has_zeros),
        shared_(reader.shared),
        reader_(reader),
        group_shift_(group_shift) {}

  // Sums over this CTA's share of the contraction: acc[j][4 b + 2 h + i] of tile j, row g + 8 h,
  // token 8 b + 2 t + i.
  __device__ __forceinline__ void Accumulate(const Share& share,
                                             float (&acc)[kTiles][kTokens / 2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[j][i] = 0.0f;
      PinRegisters(acc[j]);
    }
    const bool two_groups = group_shift_ < kStageShift;
    if constexpr (kTiles == 2) {  // for two loops 96 x 256 has no registers
      Multiply(share, two_groups, acc);
    } else if (two_groups) {
      Multiply(share, true, acc);
    } else {
      Multiply(share, false, acc);
    }
  }

  // Adds what another CTA has left of the same tile.
  __device__ __forceinline__ void AddPart(float (&acc)[kTiles][kTokens / 2]) {
    constexpr int kFours = Tile::kPartFours;
    const uint32_t from =
        Tile::X(shared_, 0) + (threadIdx.x / 32 * kFours * 32 + threadIdx.x % 32) * 16;
#pragma unroll
    for (int i = 0; i < Tile::kPartStages; ++i) {
      BarrierWait(Tile::Full(shared_, at_.stage), at_.phase);
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        const float4 v = LoadSharedFour(from + at_.stage * Tile::kXBytes + f * 512);
        float* sum = acc[(i * kFours + f) % kTiles] + (i * kFours + f) / kTiles * 4;
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
      __syncwarp();  // the arrival below is one lane's, for what all have read
      reader_.Release(at_.stage);
      at_.Advance();
    }
  }

  const TmaLane<Tile> lane;

 private:
  // A loop over stages within one over groups of the weight; with `two_groups` a stage has two of
  // 32 rows. What a stage does besides dequantizing counts: under wgmma an instruction takes two
  // clocks. A branch between several steps that are a group of wgmmas would serialize them (C7513):
  // these have a constant for `two_groups`.
  __device__ __forceinline__ void Multiply(const Share& share, bool two_groups,
                                           float (&acc)[kTiles][kTokens / 2]) {
    WgmmaFence();
    const uint64_t x_tiles = SwizzledRows(Tile::X(shared_, 0));
    uint32_t a[2][kTogether][kTiles][4];
    int read = Tile::kNoStage;                                            // and not yet released
    const int most = two_groups ? 1 : 1 << (group_shift_ - kStageShift);  // stages of a group
    int left = share.count;
    int stages = min(left, most - (share.first & (most - 1)));
#pragma unroll 1
    while (true) {
      left -= two_groups ? 1 : stages;
      BarrierWait(Tile::Full(shared_, at_.stage), at_.phase);
      EnterGroup(at_.stage, 0);
#pragma unroll 1
      while (true) {
        const int stage = at_.stage;
        uint32_t codes[kSteps / 2][4];
        if constexpr (!Tile::kFewRegisters) lane.LoadCodes(stage, codes);
        const uint64_t x = x_tiles + (stage * Tile::kXBytes >> 4);  // descriptors count 16 bytes
#pragma unroll
        for (int s = 0; s < kSteps; s += kTogether) {
          if (Tile::kFewRegisters && s % 2 == 0) lane.LoadCodes(stage, s / 2, codes[s / 2]);
          if (s == kSteps / 2 && two_groups) EnterGroup(stage, 1);
          // All but the newest group of wgmmas are done: these registers are free again.
          WgmmaWait<1>();
          if (s == kTogether) reader_.Release(read);
          uint32_t(&own)[kTogether][kTiles][4] = a[s / kTogether % 2];
#pragma unroll
          for (int t = 0; t < kTogether; ++t) {
            const int step = s + t;
            Dequantize(codes[step / 2][step % 2 * 2], codes[step / 2][step % 2 * 2 + 1], own[t]);
          }
          WgmmaFence();
#pragma unroll
          for (int t = 0; t < kTogether; ++t) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
              for (int h = 0; h < kHalves; ++h) {
                Wgmma<T, kTokens / kHalves>(
                    reinterpret_cast<float(&)[kHalves][kTokens / kHalves / 2]>(acc[j])[h],
                    own[t][j], x + 2 * (s + t) + h * (kTokens / kHalves * 128 >> 4));
              }
            }
          }
          WgmmaCommit();
        }
        read = stage;
        at_.Advance();
        if (two_groups || --stages == 0) break;
        BarrierWait(Tile::Full(shared_, at_.stage), at_.phase);
      }
      if (left == 0) break;
      stages = min(left, most);
    }
    WgmmaWait<0>();
#pragma unroll
    for (int j = 0; j < kTiles; ++j) PinRegisters(acc[j]);
    reader_.Release(read);
  }

  __device__ void EnterGroup(int stage, int row) {
    uint32_t scales[2 * kTiles], zeros;
    lane.LoadGroup(stage, row, scales, &zeros);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      neg_zero_[2 * j] = D::template NegZero<false>(zeros >> 8 * j);
      neg_zero_[2 * j + 1] = D::template NegZero<true>(zeros >> 8 * j);
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if constexpr (std::is_same_v<T, S>) {
        scale_[i] = scales[i];
      } else {
        scale_[i] = D::MakeScale(scales[i], false);
      }
    }
  }

  __device__ void Dequantize(uint32_t pair0, uint32_t pair1, uint32_t (&a)[kTiles][4]) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t codes = (pair == 0 ? pair0 : pair1) >> 8 * lane.byte;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        a[j][2 * pair] = D::Multiply(
            D::template Difference<false>(codes >> 8 * j, neg_zero_[2 * j]), scale_[2 * j]);
        a[j][2 * pair + 1] = D::Multiply(
            D::template Difference<true>(codes >> 8 * j, neg_zero_[2 * j + 1]), scale_[2 * j + 1]);
      }
    }
  }

  const uint32_t shared_;
  const StageReader<Tile> reader_;
  const int group_shift_;
  StageCounter<Tile::kStages> at_;
  Scale scale_[2 * kTiles];
  uint32_t neg_zero_[2 * kTiles];
};

}  // namespace jax_awq
