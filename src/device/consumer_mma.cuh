// Consumers of the kernel for few tokens, where instructions for each weight decide: q - z enters
// mma.sync, exact and unscaled, and scales are applied to sums once a group.
#pragma once

#include "device/dequant.cuh"
#include "device/epilogue.cuh"
#include "device/few_tile.cuh"

namespace jax_awq {

template <typename T, typename S, int kTokens, int kWarps>
class MmaConsumer {
  using Tile = FewTile<kTokens, kWarps>;
  static constexpr int kTiles = Tile::kTiles;
  using D = Dequant<T>;
  static constexpr int kBlocks = kTokens / 8;

 public:
  __device__ MmaConsumer(uint32_t shared, int group_shift, bool has_zeros)
      : lane(shared, has_zeros), shared_(shared), group_shift_(group_shift) {}

  // As WgmmaConsumer's.
  __device__ __forceinline__ void Accumulate(const Share& share,
                                             float (&acc)[kTiles][kTokens / 2]) {
    float sums[kTiles][kBlocks][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[j][i] = 0.0f;
    }
    // Groups of 128 rows or more need no look inside a stage.
    if (group_shift_ >= 7) {
      Loop<false>(share, sums, acc);
    } else {
      Loop<true>(share, sums, acc);
    }
  }

  const TmaLane<Tile> lane;

 private:
  template <bool kSmallGroups>
  __device__ __forceinline__ void Loop(const Share& share, float (&sums)[kTiles][kBlocks][4],
                                       float (&acc)[kTiles][kTokens / 2]) const {
    const int l = threadIdx.x % 32;
    const int team = threadIdx.x / (32 * Tile::kTeamWarps);
    const int group_mask = kSmallGroups ? (1 << (group_shift_ - 5)) - 1 : 3;  // of 32 rows
    const uint32_t x0 = Tile::X(shared_, 0) + l % 8 * 128u;
    const uint32_t x_at[2] = {KeepInRegister(x0 + ((l / 8 ^ l % 8) << 4)),
                              KeepInRegister(x0 + ((l / 8 ^ l % 8 ^ 4) << 4))};
    const uint32_t full = KeepInRegister(Tile::Full(shared_, 0));
    StageCounter<Tile::kStages, Tile::kTeams> at;
    at.stage = team;
#pragma unroll 1
    for (int i = team; i < share.count; i += Tile::kTeams) {
      BarrierWait(full + 8 * at.stage, at.phase);
      uint32_t codes[4][4];
      lane.LoadCodes(at.stage, codes);
      const uint32_t x_stage = at.stage * Tile::kXBytes;
      uint32_t scales[2 * kTiles], neg_zero[2 * kTiles];
      EnterGroup(at.stage, 0, scales, neg_zero);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        uint32_t x[kBlocks][4];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          LoadMatrix4(x[b], x_at[h % 2] + x_stage + h / 2 * (Tile::kXBytes / 2) + 1024 * b);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const uint32_t pair0 = codes[h][2 * s] >> 8 * j;
            const uint32_t pair1 = codes[h][2 * s + 1] >> 8 * j;
            const uint32_t a[4] = {D::template Difference<false>(pair0, neg_zero[2 * j]),
                                   D::template Difference<true>(pair0, neg_zero[2 * j + 1]),
                                   D::template Difference<false>(pair1, neg_zero[2 * j]),
                                   D::template Difference<true>(pair1, neg_zero[2 * j + 1])};
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
              Mma16x8x16<T>(sums[j][b], a, x[b][2 * s], x[b][2 * s + 1]);
            }
          }
        }
        if (kSmallGroups && h < 3 && (h & group_mask) == group_mask) {
          LeaveGroup(scales, sums, acc);
          EnterGroup(at.stage, (h + 1) >> (group_shift_ - 5), scales, neg_zero);
        }
      }
      if (group_shift_ <= 7 || i + Tile::kTeams >= share.count) LeaveGroup(scales, sums, acc);
      if (l == 0) BarrierArrive(full + 8 * (Tile::kStages + at.stage));
      at.Advance();
    }
  }

  __device__ void EnterGroup(int stage, int row, uint32_t (&scales)[2 * kTiles],
                             uint32_t (&neg_zero)[2 * kTiles]) const {
    uint32_t zeros;
    lane.LoadGroup(stage, row, scales, &zeros);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      neg_zero[2 * j] = D::template NegZero<false>(zeros >> 8 * j);
      neg_zero[2 * j + 1] = D::template NegZero<true>(zeros >> 8 * j);
    }
  }

  __device__ static void LeaveGroup(const uint32_t (&scales)[2 * kTiles],
                                    float (&sums)[kTiles][kBlocks][4],
                                    float (&acc)[kTiles][kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float s = LowerToFloat<S>(scales[i]);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& from = sums[i / 2][b][i % 2 * 2 + c];
          float& to = acc[i / 2][4 * b + i % 2 * 2 + c];
          to = fmaf(s, from, to);
          from = 0.0f;
        }
      }
    }
  }

  const uint32_t shared_;
  const int group_shift_;
};

}  // namespace jax_awq
