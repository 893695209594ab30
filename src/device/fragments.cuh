// A fragments of mma.m16n8k16 (weights as the row operand) from 4-bit words in shared memory.
//
// Lane (g = lane / 4, t = lane % 4) holds, of each of the four 16-row tiles j of a warp's 64
// outputs, rows g and g + 8 (h = 0, 1) at contraction indices 2t, 2t + 1 (pair 0) and 2t + 8, 2t +
// 9 (pair 1). Which output sits in row (j, h, g) is free, and chosen so that a word serves one lane
// whole.
#pragma once

#include <cstdint>

#include "device/dequant.cuh"
#include "kernels/types.h"

namespace jax_awq {

constexpr int kDepth = 64;  // contraction indices of a tile

// A tile of qweight in shared memory. Row strides are padded for conflict-free reads.
template <bool kOutputPacked, int kTileOutputs>
struct WordTile;

template <int kTileOutputs>
struct WordTile<true, kTileOutputs> {  // words lie along the outputs: row = contraction index
  static constexpr int kRows = kDepth;
  static constexpr int kWords = kTileOutputs / 8;
  static constexpr int kStride = kWords + 4;  // rows 2t, 2t + 2, ... fall 8 banks apart
};

template <int kTileOutputs>
struct WordTile<false, kTileOutputs> {  // words lie along the contraction: row = output
  static constexpr int kRows = kTileOutputs;
  static constexpr int kWords = kDepth / 8;
  static constexpr int kStride = kWords + 4;
};

// Scales and zero points of a tile: kRows groups of kColumns columns of N.
template <bool kTranspose, int kTileOutputs>
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
  int warp_output;  // first of the warp's 64 outputs within the tile
  int group_shift;
  bool scales_are_bf16;
  int group = -1;  // whose scales and zero points the fragments have
};

// `kTiles` of the four 16-row tiles: all, or those two that are left to one of two warpgroups,
// which then share every word, one taking its even bytes and the other its odd ones.
template <typename T, Layout kLayout, bool kTranspose, int kTileOutputs, int kTiles = 4>
class Fragments {
 public:
  static constexpr bool kOutputPacked = (kLayout == Layout::kGemm) != kTranspose;
  using Words = WordTile<kOutputPacked, kTileOutputs>;
  using Groups = GroupTile<kTranspose, kTileOutputs>;

  __device__ Fragments(int warpgroup, int g, int t) : part_(warpgroup), g_(g), t_(t) {}

  // Output of row g of tile j, or of row g + 8 (h = 1), relative to the warp's first.
  __device__ int OutputOf(int j, int h) const {
    const int tile = kTiles == 4 ? j : 2 * j + part_;
    if constexpr (!kOutputPacked) {
      return 16 * tile + 8 * h + g_;
    } else {
      return 8 * g_ + (kLayout == Layout::kGemm ? AwqColumn(2 * tile + h) : 2 * tile + h);
    }
  }

  // Before k16 step `step` of the tile that starts at contraction index `depth`: reads scales and
  // zero points where a group begins. 32 rows never cross one.
  __device__ void EnterGroup(TileView* v, int depth, int step) {
    if constexpr (!kTranspose) {
      const int group = (depth + 16 * step) >> v->group_shift;
      if (group != v->group) {
        LoadGroup(*v, group - (depth >> v->group_shift));
        v->group = group;
      }
    }
  }

  // Reads scales and zero points of the lane's outputs. `row` is the group's row in the tile.
  __device__ void LoadGroup(const TileView& v, int row) {
    static_assert(!kTranspose);
    const uint16_t* scales = v.scales + row * Groups::kColumns + v.warp_output;
    const uint32_t* zeros = v.zeros + (row * Groups::kColumns + v.warp_output) / 8;
    if constexpr (kOutputPacked) {
      // Columns of the tiles: all eight, or the lower or upper four.
      uint32_t s[kTiles];
      if constexpr (kTiles == 4) {
        const uint4 raw = *reinterpret_cast<const uint4*>(scales + 8 * g_);
        s[0] = raw.x, s[1] = raw.y, s[2] = raw.z, s[3] = raw.w;
      } else {
        const uint2 raw = *reinterpret_cast<const uint2*>(scales + 8 * g_ + 4 * part_);
        s[0] = raw.x, s[1] = raw.y;
      }
      const uint32_t zero = Part(zeros[g_]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint32_t z = BytePair(zero, zero, Byte(j));
        neg_zero_[2 * j] = D::template NegZero<false>(z);
        neg_zero_[2 * j + 1] = D::template NegZero<true>(z);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int c = kTiles == 4 ? AwqColumn(2 * j + h) : 2 * h + j;
          scale_[2 * j + h] =
              D::MakeScale(SelectBytes(s[c / 2], 0, c % 2 ? 0x3232 : 0x1010), v.scales_are_bf16);
        }
      }
    } else {
      const int shift = 4 * AwqNibble(g_);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int output = OutputOf(i / 2, i % 2);
        neg_zero_[i] = D::template NegZero<false>(Splat((zeros[output / 8] >> shift) & 0xf));
        scale_[i] = D::MakeScale(Splat(scales[output]), v.scales_are_bf16);
      }
    }
  }

  // Codes of contraction indices [16 * step, 16 * step + 16) of the tile, still packed.
  struct Codes {
    uint32_t words[kOutputPacked ? 4 : 4 * kTiles];
  };

  __device__ Codes Fetch(const TileView& v, int step) const {
    Codes c;
    if constexpr (kOutputPacked) {
      const uint32_t* from =
          v.words + (16 * step + 2 * t_) * Words::kStride + v.warp_output / 8 + g_;
      c.words[0] = from[0];
      c.words[1] = from[Words::kStride];
      c.words[2] = from[8 * Words::kStride];
      c.words[3] = from[9 * Words::kStride];
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int output = v.warp_output + OutputOf(i / 2, i % 2);
        const uint2 w =
            *reinterpret_cast<const uint2*>(v.words + output * Words::kStride + 2 * step);
        c.words[2 * i] = w.x;
        c.words[2 * i + 1] = w.y;
      }
    }
    return c;
  }

  // The fragments of the same indices.
  __device__ void Dequantize(const TileView& v, int step, const Codes& c,
                             uint32_t (&a)[kTiles][4]) const {
    if constexpr (kTranspose) {
      DequantizeTransposed(v, step, c, a);
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int i = 2 * j;
          if constexpr (kOutputPacked) {
            const uint32_t p = Bytes(c, pair, j);
            a[j][2 * pair] = D::Multiply(D::template Difference<false>(p, neg_zero_[i]), scale_[i]);
            a[j][2 * pair + 1] =
                D::Multiply(D::template Difference<true>(p, neg_zero_[i + 1]), scale_[i + 1]);
          } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t p = NaturalPair(c.words[2 * (i + h) + pair], t_);
              a[j][2 * pair + h] =
                  D::Multiply(D::template Difference<false>(p, neg_zero_[i + h]), scale_[i + h]);
            }
          }
        }
      }
    }
  }

  // Puts the results of one token into a tile, or adds them to what is there. acc(j, h) is the
  // lane's result in row (j, h).
  template <typename Result, typename Acc>
  __device__ void Store(float* tile, int token, int warp_output, bool add, Acc acc) const {
    if constexpr (kOutputPacked && (kTiles == 4 || kLayout == Layout::kGemm)) {
      // Eight neighbouring outputs, or four.
#pragma unroll
      for (int four = 0; four < kTiles / 2; ++four) {
        float v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if constexpr (kTiles == 4) {
            const int row = kLayout == Layout::kGemm ? AwqNibble(4 * four + c) : 4 * four + c;
            v[c] = acc(row / 2, row % 2);
          } else {
            v[c] = acc(c % 2, c / 2);
          }
        }
        const int first = kTiles == 4 ? 4 * four : 4 * part_;
        float4* to = Result::Four(tile, token, warp_output + 8 * g_ + first);
        float4 sum = make_float4(v[0], v[1], v[2], v[3]);
        if (add) {
          const float4 old = *to;
          sum = make_float4(old.x + v[0], old.y + v[1], old.z + v[2], old.w + v[3]);
        }
        *to = sum;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int output = warp_output + OutputOf(i / 2, i % 2);
        float* to = reinterpret_cast<float*>(Result::Four(tile, token, output)) + output % 4;
        *to = add ? *to + acc(i / 2, i % 2) : acc(i / 2, i % 2);
      }
    }
  }

 private:
  using D = Dequant<T>;

  // With two warpgroups the second sees its odd bytes moved to even places.
  __device__ uint32_t Part(uint32_t word) const { return kTiles == 4 ? word : word >> 8 * part_; }
  __device__ static constexpr int Byte(int j) { return kTiles == 4 ? j : 2 * j; }

  // Two pairs of codes, of both rows of tile j.
  __device__ uint32_t Bytes(const Codes& c, int pair, int j) const {
    return BytePair(Part(c.words[2 * pair]), Part(c.words[2 * pair + 1]), Byte(j));
  }

  // The scale varies along the contraction here, so it comes as natural pairs, per group of
  // outputs.
  struct PairGroup {
    typename D::Scale scale[2];
    uint32_t zero[2];  // zero points as low nibbles
  };

  __device__ PairGroup LoadPairs(const TileView& v, int step, int output) const {
    PairGroup r;
    const int row = (v.warp_output + output) >> v.group_shift;
    const uint16_t* scales = v.scales + row * Groups::kColumns + 16 * step + 2 * t_;
    const uint32_t* zeros = v.zeros + row * Groups::kColumns / 8 + 2 * step;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      r.scale[pair] =
          D::MakeScale(*reinterpret_cast<const uint32_t*>(scales + 8 * pair), v.scales_are_bf16);
      r.zero[pair] = AwqPair(zeros[pair], t_) & 0x000f000fu;
    }
    return r;
  }

  __device__ void DequantizeTransposed(const TileView& v, int step, const Codes& c,
                                       uint32_t (&a)[kTiles][4]) const {
    // A lane's outputs lie in one group where words lie along them, in two (of 32) otherwise.
    constexpr int kParts = kOutputPacked ? 1 : 2;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const PairGroup group = LoadPairs(v, step, kOutputPacked ? 8 * g_ : 32 * part);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t low = D::template NegZero<false>(group.zero[pair]);
        const uint32_t high = D::template NegZero<true>(group.zero[pair] << 4);
#pragma unroll
        for (int j = kTiles / kParts * part; j < kTiles / kParts * (part + 1); ++j) {
          if constexpr (kOutputPacked) {
            const uint32_t p = Bytes(c, pair, j);
            a[j][2 * pair] = D::Multiply(D::template Difference<false>(p, low), group.scale[pair]);
            a[j][2 * pair + 1] =
                D::Multiply(D::template Difference<true>(p, high), group.scale[pair]);
          } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t p = AwqPair(c.words[2 * (2 * j + h) + pair], t_);
              a[j][2 * pair + h] =
                  D::Multiply(D::template Difference<false>(p, low), group.scale[pair]);
            }
          }
        }
      }
    }
  }

  int part_, g_, t_;
  uint32_t neg_zero_[2 * kTiles];
  typename D::Scale scale_[2 * kTiles];
};

}  // namespace jax_awq
