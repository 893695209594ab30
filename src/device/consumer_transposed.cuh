// Consumers of the TMA kernel for the transposed product x @ W^T, whose outputs are rows of K and
// whose contraction runs along the words of qweight.
//
// All four lanes of a quad read the same words of a row and take two neighbouring codes of each, so
// that x needs no other order than it has in memory. Every index of the contraction has a scale and
// a zero point of its own, which the rows of a lane share: they are of one group.
#pragma once

#include <type_traits>

#include "device/dequant.cuh"
#include "device/epilogue.cuh"
#include "device/tma_tile.cuh"
#include "device/wgmma.cuh"

namespace jax_awq {

template <typename T, typename S, int kTokens>
class TransposedConsumer {
  using Tile = TmaTile<kTokens, 128, 2, true>;
  static constexpr int kSteps = Tile::kDepth / 16;
  static constexpr int kWords = Tile::kDepth / 8;  // of a row in a stage
  static constexpr int kRowBytes = 4 * kWords;
  using D = Dequant<T>;

 public:
  // Which outputs a lane has, as TmaLane.
  struct Lane {
    int word, byte;
  };

  __device__ TransposedConsumer(const StageReader<Tile>& reader, int group_shift, bool has_zeros)
      : lane{TmaLane<Tile>::Word(threadIdx.x / 32 % Tile::kTeamWarps),
             TmaLane<Tile>::Byte(threadIdx.x / 32 % Tile::kTeamWarps)},
        shared_(reader.shared),
        reader_(reader),
        has_zeros_(KeepInRegister(has_zeros)) {
    const int l = threadIdx.x % 32;
    const int row = 8 * lane.word + 4 * lane.byte + l / 4 % 2;  // the other one is two on
    const int group = 8 * lane.word >> group_shift;
    shift_ = KeepInRegister(l % 4 * 4);
    // Pieces of 16 bytes are swizzled by the row, whose bits for it are those of the byte.
    words_at_[0] = KeepInRegister(Tile::Words(shared_, 0) + row * kRowBytes + (2 * lane.byte << 4));
    words_at_[1] = KeepInRegister(words_at_[0] + 2 * kRowBytes ^ 1 << 4);
    scales_at_ = KeepInRegister(Tile::Scales(shared_, 0) + group * 2 * Tile::kDepth + l % 4 * 4);
    zeros_at_ = KeepInRegister(Tile::Zeros(shared_, 0) + group * kRowBytes);
  }

  // As WgmmaConsumer's.
  __device__ __forceinline__ void Accumulate(const Share& share, float (&acc)[1][kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[0][i] = 0.0f;
    PinRegisters(acc[0]);
    WgmmaFence();

    const uint64_t x_tiles = SwizzledRows(Tile::X(shared_, 0));
    uint32_t a[2][4];
    int read = Tile::kNoStage;  // and not yet released
#pragma unroll 1
    for (int i = 0; i < share.count; ++i) {
      const int stage = at_.stage;
      BarrierWait(Tile::Full(shared_, stage), at_.phase);
      uint32_t words[2][kWords / 4][4], zeros[kWords / 4][4], scales[kWords][1];
#pragma unroll
      for (int c = 0; c < kWords / 4; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          LoadShared(words[h][c], (words_at_[h] + stage * Tile::kWordBytes) ^ c << 4);
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) zeros[c][w] = 0x88888888u;
        if (has_zeros_) LoadShared(zeros[c], zeros_at_ + stage * Tile::kZeroBytes + 16 * c);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        LoadShared(scales[w], scales_at_ + stage * Tile::kScaleBytes + 16 * w);
      }
      const uint64_t x = x_tiles + (stage * Tile::kXBytes >> 4);  // descriptors count 16 bytes
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        // All but the newest group of wgmmas are done: these registers are free again.
        WgmmaWait<1>();
        if (s == 1) reader_.Release(read);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int w = 2 * s + pair;
          const uint32_t neg_zero = D::template NegZero<false>(zeros[w / 4][w % 4] >> shift_);
          const auto scale = MakeScale(scales[w][0]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t codes = words[h][w / 4][w % 4] >> shift_;
            a[s % 2][2 * pair + h] =
                D::Multiply(D::template Difference<false>(codes, neg_zero), scale);
          }
        }
        WgmmaFence();
        Wgmma<T, kTokens>(acc[0], a[s % 2], x + s / 4 * (kTokens * 128 >> 4) + s % 4 * 2);
        WgmmaCommit();
      }
      read = stage;
      at_.Advance();
    }
    WgmmaWait<0>();
    PinRegisters(acc[0]);
    reader_.Release(read);
  }

  const Lane lane;

 private:
  __device__ static auto MakeScale(uint32_t pair) {
    if constexpr (std::is_same_v<T, S>) {
      return pair;
    } else {
      return D::MakeScale(pair, false);
    }
  }

  const uint32_t shared_;
  const StageReader<Tile> reader_;
  const uint32_t has_zeros_;
  uint32_t shift_, words_at_[2], scales_at_, zeros_at_;
  StageCounter<Tile::kStages> at_;
};

}  // namespace jax_awq
