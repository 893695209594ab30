// A fragments of mma.m16n8k16 (weights as the row operand) from 4-bit words in shared memory.
//
// Lane (g = lane / 4, t = lane % 4) holds, of each of the four 16-row tiles j of a warp's 64 outputs,
// rows g and g + 8 (h = 0, 1) at contraction indices 2t, 2t + 1 (pair 0) and 2t + 8, 2t + 9 (pair 1).
// Which output sits in row (j, h, g) is free, and chosen so that a word serves one lane whole.
#pragma once

#include <cstdint>

#include "device/dequant.cuh"
#include "kernels/types.h"

namespace jax_awq {

constexpr int kDepth = 64;         // contraction indices of a tile
constexpr int kTileOutputs = 128;  // outputs of a tile

// A tile of qweight in shared memory. Row strides are padded for conflict-free reads.
template <bool kOutputPacked>
struct WordTile;

template <>
struct WordTile<true> {  // words lie along the outputs: row = contraction index
  static constexpr int kRows = kDepth;
  static constexpr int kWords = kTileOutputs / 8;
  static constexpr int kStride = kWords + 4;  // rows 2t, 2t + 2, ... fall 8 banks apart
};

template <>
struct WordTile<false> {  // words lie along the contraction: row = output
  static constexpr int kRows = kTileOutputs;
  static constexpr int kWords = kDepth / 8;
  static constexpr int kStride = kWords + 4;
};

// Scales and zero points of a tile: kRows groups of kColumns columns of N.
template <bool kTranspose>
struct GroupTile {
  static constexpr int kRows = kTranspose ? kTileOutputs / 32 : kDepth / 32;
  static constexpr int kColumns = kTranspose ? kDepth : kTileOutputs;
  static constexpr int kScaleBytes = kRows * kColumns * 2;
  static constexpr int kZeroBytes = kRows * kColumns / 2;
};

struct TileView {
  const uint32_t* words;
  const uint16_t* scales;
  const uint32_t* zeros;
  int warp_output;       // first of the warp's 64 outputs within the tile
  int64_t group_size;
  bool scales_are_bf16;
};

template <typename T, Layout kLayout, bool kTranspose>
class Fragments {
 public:
  static constexpr bool kOutputPacked = (kLayout == Layout::kGemm) != kTranspose;
  using Words = WordTile<kOutputPacked>;
  using Groups = GroupTile<kTranspose>;

  // Output of fragment row (j, h, g), relative to the warp's first.
  __device__ static int OutputOf(int j, int h, int g) {
    if constexpr (!kOutputPacked) {
      return 16 * j + 8 * h + g;
    } else {
      return 8 * g + (kLayout == Layout::kGemm ? AwqColumn(2 * j + h) : 2 * j + h);
    }
  }

  // Reads scales and zero points of the lane's eight outputs. `row` is the group's row in the tile.
  __device__ void LoadGroup(const TileView& v, int row, int g) {
    static_assert(!kTranspose);
    const uint16_t* scales = v.scales + row * Groups::kColumns + v.warp_output;
    const uint32_t* zeros = v.zeros + (row * Groups::kColumns + v.warp_output) / 8;
    if constexpr (kOutputPacked) {
      const uint4 raw = *reinterpret_cast<const uint4*>(scales + 8 * g);
      const uint32_t s[4] = {raw.x, raw.y, raw.z, raw.w};
      const uint32_t zero = zeros[g];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t z = BytePair(zero, zero, j);
        neg_zero_[2 * j] = D::template NegZero<false>(z);
        neg_zero_[2 * j + 1] = D::template NegZero<true>(z);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int c = AwqColumn(2 * j + h);
          scale_[2 * j + h] = D::MakeScale(SelectBytes(s[c / 2], 0, c % 2 ? 0x3232 : 0x1010),
                                           v.scales_are_bf16);
        }
      }
    } else {
      const int shift = 4 * AwqNibble(g);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        neg_zero_[i] = D::template NegZero<false>(Splat((zeros[i] >> shift) & 0xf));
        scale_[i] = D::MakeScale(Splat(scales[8 * i + g]), v.scales_are_bf16);
      }
    }
  }

  // The four fragments of contraction indices [16 * step, 16 * step + 16) of the tile.
  __device__ void Load(const TileView& v, int step, int g, int t, uint32_t (&a)[4][4]) {
    if constexpr (kTranspose) {
      LoadTransposed(v, step, g, t, a);
    } else if constexpr (kOutputPacked) {
      uint32_t w[2][2];
      LoadRows(v, step, g, t, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t p = BytePair(w[pair][0], w[pair][1], j);
          a[j][2 * pair] = D::Multiply(D::template Difference<false>(p, neg_zero_[2 * j]),
                                       scale_[2 * j]);
          a[j][2 * pair + 1] = D::Multiply(D::template Difference<true>(p, neg_zero_[2 * j + 1]),
                                           scale_[2 * j + 1]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 2 * j + h;
          const uint2 w = OutputWords(v, step, 8 * i + g);
          a[j][h] = D::Multiply(D::template Difference<false>(NaturalPair(w.x, t), neg_zero_[i]),
                                scale_[i]);
          a[j][2 + h] = D::Multiply(
              D::template Difference<false>(NaturalPair(w.y, t), neg_zero_[i]), scale_[i]);
        }
      }
    }
  }

 private:
  using D = Dequant<T>;

  __device__ static void LoadRows(const TileView& v, int step, int g, int t, uint32_t (&w)[2][2]) {
    const uint32_t* from = v.words + (16 * step + 2 * t) * Words::kStride + v.warp_output / 8 + g;
    w[0][0] = from[0];
    w[0][1] = from[Words::kStride];
    w[1][0] = from[8 * Words::kStride];
    w[1][1] = from[9 * Words::kStride];
  }

  __device__ static uint2 OutputWords(const TileView& v, int step, int output) {
    return *reinterpret_cast<const uint2*>(v.words + (v.warp_output + output) * Words::kStride +
                                           2 * step);
  }

  // The scale varies along the contraction here, so it comes as natural pairs, per group of outputs.
  struct PairGroup {
    typename D::Scale scale[2];
    uint32_t zero[2];  // zero points as low nibbles
  };

  __device__ static PairGroup LoadPairs(const TileView& v, int step, int row, int t) {
    PairGroup r;
    const uint16_t* scales = v.scales + row * Groups::kColumns + 16 * step + 2 * t;
    const uint32_t* zeros = v.zeros + row * Groups::kColumns / 8 + 2 * step;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      r.scale[pair] = D::MakeScale(*reinterpret_cast<const uint32_t*>(scales + 8 * pair),
                                   v.scales_are_bf16);
      r.zero[pair] = AwqPair(zeros[pair], t) & 0x000f000fu;
    }
    return r;
  }

  __device__ static int GroupRow(const TileView& v, int output) {
    return v.group_size < kTileOutputs ? (v.warp_output + output) / static_cast<int>(v.group_size)
                                       : 0;
  }

  __device__ static void LoadTransposed(const TileView& v, int step, int g, int t,
                                        uint32_t (&a)[4][4]) {
    if constexpr (kOutputPacked) {
      uint32_t w[2][2];
      LoadRows(v, step, g, t, w);
      const PairGroup group = LoadPairs(v, step, GroupRow(v, 8 * g), t);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t low = D::template NegZero<false>(group.zero[pair]);
        const uint32_t high = D::template NegZero<true>(group.zero[pair] << 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t p = BytePair(w[pair][0], w[pair][1], j);
          a[j][2 * pair] = D::Multiply(D::template Difference<false>(p, low), group.scale[pair]);
          a[j][2 * pair + 1] =
              D::Multiply(D::template Difference<true>(p, high), group.scale[pair]);
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 32 outputs never cross a group
        const PairGroup group = LoadPairs(v, step, GroupRow(v, 32 * half), t);
        const uint32_t zero[2] = {D::template NegZero<false>(group.zero[0]),
                                  D::template NegZero<false>(group.zero[1])};
#pragma unroll
        for (int i = 4 * half; i < 4 * half + 4; ++i) {
          const uint2 w = OutputWords(v, step, 8 * i + g);
          a[i / 2][i % 2] = D::Multiply(
              D::template Difference<false>(AwqPair(w.x, t), zero[0]), group.scale[0]);
          a[i / 2][2 + i % 2] = D::Multiply(
              D::template Difference<false>(AwqPair(w.y, t), zero[1]), group.scale[1]);
        }
      }
    }
  }

  uint32_t neg_zero_[8];
  typename D::Scale scale_[8];
};

}  // namespace jax_awq
