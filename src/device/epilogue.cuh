// From float32 accumulators to y: ordered sum over splits, bias, activation, one rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/ptx.cuh"
#include "kernels/types.h"

namespace jax_awq {

__device__ __forceinline__ float Activate(float v, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < 0.0f ? 0.0f : v;  // keeps NaN
    case Activation::kGelu:
      return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::kSilu:
      return v / (1.0f + expf(-v));
  }
  return v;
}

__device__ __forceinline__ float LoadAsFloat(const void* p, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case DType::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ uint32_t PackPair(float a, float b, DType dtype) {
  if (dtype == DType::kF16) {
    const __half2 h = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(h);
  }
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(h);
}

// Rounds four or eight values and stores them; `p` is aligned to their size.
template <int kCount>
__device__ __forceinline__ void StoreRounded(void* p, const float* v, DType dtype) {
  static_assert(kCount == 4 || kCount == 8);
  if (dtype == DType::kF32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      static_cast<float4*>(p)[i / 4] = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
    return;
  }
  const uint2 low = make_uint2(PackPair(v[0], v[1], dtype), PackPair(v[2], v[3], dtype));
  if constexpr (kCount == 4) {
    *static_cast<uint2*>(p) = low;
  } else {
    *static_cast<uint4*>(p) =
        make_uint4(low.x, low.y, PackPair(v[4], v[5], dtype), PackPair(v[6], v[7], dtype));
  }
}

// Part `index` of `parts` of `total` units: as even as can be, whatever else is in the problem.
struct Share {
  __device__ Share(unsigned total, unsigned index, unsigned parts)
      : Share(Even{total / parts, total % parts}, index) {}

  // The least that a part has, and how many parts have one more: for whom division takes too long.
  struct Even {
    unsigned least, longer;
  };
  __device__ Share(Even even, unsigned index)
      : first(even.least * index + min(index, even.longer)),
        count(even.least + (index < even.longer)) {}

  int first;
  int count;
};

struct EpilogueParams {
  void* y;                 // this batch entry's (M, outputs)
  const void* bias;        // this batch entry's (outputs), or nullptr
  const float* row_scale;  // this batch entry's (M), or nullptr: 1
  float* partials;  // (splits, batch, M, outputs); nullptr unless splits meet in the workspace
  int64_t m;
  int64_t outputs;
  DType out_dtype;
  DType bias_dtype;
  Activation activation;

  // From here on, plain sums go to partials, `offset` elements in.
  __device__ void WriteOnly(int64_t offset) {
    y = partials + offset;
    bias = nullptr;
    row_scale = nullptr;
    out_dtype = DType::kF32;
    activation = Activation::kNone;
  }

  __device__ float RowScale(int64_t token) const {
    return row_scale && token < m ? row_scale[token] : 1.0f;
  }
};

__device__ __forceinline__ float Finish(const EpilogueParams& p, int64_t output, float v) {
  if (p.bias) v += LoadAsFloat(p.bias, output, p.bias_dtype);
  return Activate(v, p.activation);
}

__device__ __forceinline__ void FinishOne(const EpilogueParams& p, int64_t token, int64_t output,
                                          float v) {
  const int64_t at = token * p.outputs + output;
  v = Finish(p, output, v * p.RowScale(token));
  if (p.out_dtype == DType::kF32) {
    static_cast<float*>(p.y)[at] = v;
  } else {
    static_cast<uint16_t*>(p.y)[at] = PackPair(v, 0.0f, p.out_dtype) & 0xffffu;
  }
}

// Finishes four neighbouring outputs of one token.
__device__ __forceinline__ void FinishFour(const EpilogueParams& p, int64_t token, int64_t output,
                                           float4 v) {
  if (p.outputs % 4) {  // only a transposed product with odd K
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (output + i < p.outputs) FinishOne(p, token, output + i, values[i]);
    }
    return;
  }
  const float scale = p.RowScale(token);
  v.x = Finish(p, output, v.x * scale);
  v.y = Finish(p, output + 1, v.y * scale);
  v.z = Finish(p, output + 2, v.z * scale);
  v.w = Finish(p, output + 3, v.w * scale);
  const float values[4] = {v.x, v.y, v.z, v.w};
  char* to = static_cast<char*>(p.y) + (token * p.outputs + output) * SizeOf(p.out_dtype);
  StoreRounded<4>(to, values, p.out_dtype);
}

// The same for a sum over part of the contraction, `partial_offset` into the workspace if there.
__device__ __forceinline__ void FinishFourOrPartial(const EpilogueParams& p, int64_t token,
                                                    int64_t output, float4 v,
                                                    int64_t partial_offset) {
  if (!p.partials) return FinishFour(p, token, output, v);
  float* to = p.partials + partial_offset + token * p.outputs + output;
  const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (output + i < p.outputs) to[i] = values[i];
  }
}

__device__ __forceinline__ void Add(float4& sum, float4 v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// A float32 tile (kTokens, kOutputs) of results in shared memory. Groups of four outputs are
// swizzled by token, because the lanes of an mma hold neighbouring tokens of one output, which
// would all fall into one bank. kLaneFours is the distance of two lanes along the outputs, in
// groups.
template <int kTokens_, int kOutputs_, int kLaneFours>
struct ResultTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kBytes = kTokens * kOutputs * 4;
  static_assert(kLaneFours == 2 || kLaneFours == 4);

  // The group of four that holds `output`.
  __device__ static float4* Four(float* tile, int token, int output) {
    const int t = token / 2 % 4;
    const int swizzle = kLaneFours == 4 ? t : (t & 1) | (t & 2) << 1;
    return reinterpret_cast<float4*>(tile) + token * (kOutputs / 4) + (output / 4 ^ swizzle);
  }
};

// Which of `units` pieces of a tile each member of a cluster finishes: an equal share.
struct Deal {
  __device__ Deal(unsigned units, unsigned members, unsigned rank)
      : per(max((units + members - 1) / members, 1u)),
        own(min(per, units - min(units, rank * per))) {}

  unsigned per;  // units of a member, but fewer or none of the last
  unsigned own;  // units of this member
};

// How the results of a cluster change hands: every member reads its units from the shared memory of
// all members. It adds them in rank order, so that a sum depends neither on timing nor on who owns
// it.
struct Exchange : Deal {
  __device__ Exchange(unsigned members, unsigned rank, unsigned units)
      : Deal(units, members, rank), members(members), rank(rank) {}

#if __CUDA_ARCH__ >= 900
  // Sums over the members of what lies at the first `count` of these addresses of each. All loads
  // are in flight at once, since one from another's memory takes half a microsecond; one's own part
  // is read as plain shared memory, which is faster than as a cluster's.
  template <int kBatch>
  __device__ __forceinline__ void Sum(const uint32_t (&at)[kBatch], int count,
                                      float4 (&sums)[kBatch]) const {
    float4 own_part[kBatch], parts[kBatch][kMaxCluster];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= count) continue;
      own_part[u] = LoadSharedFour(at[u]);
#pragma unroll
      for (int r = 0; r < kMaxCluster; ++r) {
        if (r < members && r != rank) parts[u][r] = LoadClusterShared(MapToRank(at[u], r));
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= count) continue;
      sums[u] = rank == 0 ? own_part[u] : parts[u][0];
#pragma unroll
      for (int r = 1; r < kMaxCluster; ++r) {
        if (r < members) Add(sums[u], r == rank ? own_part[u] : parts[u][r]);
      }
    }
  }
#endif

  unsigned members;
  unsigned rank;
};

// Scales of the rows of a tile, on their way while it is computed: a lane has those of tokens lane,
// lane + 32, ...
template <int kTokens>
class RowScales {
 public:
  __device__ __forceinline__ RowScales(const EpilogueParams& p, int64_t token0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) rows_[i] = p.RowScale(token0 + 32 * i + threadIdx.x % 32);
  }

  // Multiplies what a lane has of a block of eight tokens, v[2 h + i] of token 2 t + i. All lanes
  // of a warp ask for the same block, a constant once loops are unrolled.
  __device__ __forceinline__ void Multiply(unsigned block, float* v) const {
    float own = rows_[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) own = block / 4 == i ? rows_[i] : own;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = __shfl_sync(~0u, own, block % 4 * 8 + threadIdx.x % 4 * 2 + i);
      v[i] *= scale;
      v[i + 2] *= scale;
    }
  }

  // That of a token of the tile, another one for each lane. Chosen among what was shuffled: chosen
  // before, rows_ would be an array in memory.
  __device__ __forceinline__ float Of(unsigned token) const {
    float scale = __shfl_sync(~0u, rows_[0], token % 32);
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      const float other = __shfl_sync(~0u, rows_[i], token % 32);
      scale = token / 32 == i ? other : scale;
    }
    return scale;
  }

 private:
  static constexpr int kCount = (kTokens + 31) / 32;
  float rows_[kCount];
};

// Where a lane's results go: the even or the odd ones of a word's eight outputs (kTiles = 2) or of
// four, for two tokens. It swaps one token for the other half with a neighbour and stores
// consecutive outputs of the other.
template <int kTiles>
class HalfWord {
 public:
  // Which half this lane has.
  __device__ static bool HasOdd() { return threadIdx.x / 4 % 2; }

  // `output`: first of the word; `part`: which four of it where kTiles is 1. `token`: of block 0,
  // the one that this lane stores: the first of its two where it has the even outputs.
  __device__ __forceinline__ HalfWord(const EpilogueParams& p, int64_t output, int part,
                                      int64_t token) {
    const bool valid = output < p.outputs;
    const bool odd = HasOdd();
    output += 4 * part;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      bias_[i] = p.bias && valid ? LoadAsFloat(p.bias, output + 2 * i + odd, p.bias_dtype) : 0.0f;
    }
    const int bytes = SizeOf(p.out_dtype);
    to_ = static_cast<char*>(p.y) + (token * p.outputs + output) * bytes;
    tokens_ = valid ? static_cast<int>(min(p.m - token, int64_t{INT32_MAX})) : 0;
  }

  // v[j][2 * h + i]: output 2 * (2 * j + h) + odd of the word, token i of two, `block` times eight
  // tokens on. Called by whole warps. There is no activation.
  __device__ __forceinline__ void Store(const EpilogueParams& p, const float (&v)[kTiles][4],
                                        int block) const {
    const bool has_odd = HasOdd();
    float of[2][2 * kTiles];  // the two tokens
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      of[0][i] = v[i / 2][i % 2 * 2] + bias_[i];
      of[1][i] = v[i / 2][i % 2 * 2 + 1] + bias_[i];
    }
    float mine[2 * kTiles], other[2 * kTiles];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      mine[i] = has_odd ? of[1][i] : of[0][i];
      other[i] = has_odd ? of[0][i] : of[1][i];
    }
    const bool store = 8 * block < tokens_;
    char* to = to_ + 8 * block * p.outputs * SizeOf(p.out_dtype);
    if (p.out_dtype == DType::kF32) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float4 four;
        const float low = __shfl_xor_sync(~0u, other[2 * j], 4);
        const float high = __shfl_xor_sync(~0u, other[2 * j + 1], 4);
        four.x = has_odd ? low : mine[2 * j];
        four.y = has_odd ? mine[2 * j] : low;
        four.z = has_odd ? high : mine[2 * j + 1];
        four.w = has_odd ? mine[2 * j + 1] : high;
        if (store) reinterpret_cast<float4*>(to)[j] = four;
      }
      return;
    }
    uint32_t pairs[2 * kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint32_t own = PackPair(mine[2 * j], mine[2 * j + 1], p.out_dtype);
      const uint32_t swapped =
          __shfl_xor_sync(~0u, PackPair(other[2 * j], other[2 * j + 1], p.out_dtype), 4);
      const uint32_t even = has_odd ? swapped : own;
      const uint32_t odd = has_odd ? own : swapped;
      pairs[2 * j] = SelectBytes(even, odd, 0x5410);
      pairs[2 * j + 1] = SelectBytes(even, odd, 0x7632);
    }
    if (!store) return;
    if constexpr (kTiles == 2) {
      *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
    }
  }

 private:
  char* to_;
  int tokens_;  // from this lane's on, in y
  float bias_[2 * kTiles];
};

// Sums that change hands lie in shared memory in units: of a warp of the mma all outputs of its
// words (kTiles = 2) or half of them, and kBlocks times eight tokens. A lane has one or two vectors
// of it.
template <int kTiles_, int kBlocks_>
struct SumUnit {
  static constexpr int kTiles = kTiles_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kTokens = 8 * kBlocks;
  static constexpr int kVectors = kTiles * kBlocks;
  static_assert(kVectors <= 2);
  static constexpr int kVectorBytes = 32 * 16;
  static constexpr int kBytes = kVectors * kVectorBytes;

  // Where units may begin, from `at` on: addresses in them are told apart by bit.
  static constexpr int Aligned(int at) { return (at + 127) / 128 * 128; }

  // Vector i of the sums acc[j][4 b + 2 h + t] of blocks b of eight tokens, from `block` on: the
  // even or the odd outputs of a word for token i of two, or of half a word in two blocks, or of
  // half a word for both tokens.
  template <int kSums>
  __device__ static float4 Vector(const float (&acc)[kTiles][kSums], int block, int i) {
    const float* first = acc[0] + 4 * block + i;
    const float* second = kTiles == 2 ? acc[1] + 4 * block + i : first + (kBlocks == 2 ? 4 : 1);
    return make_float4(first[0], first[2], second[0], second[2]);
  }

  // Where a lane's vector i lies. Whoever reads takes both vectors at once: in other banks.
  __device__ static uint32_t VectorAt(unsigned lane, int i) {
    return i * kVectorBytes + (lane * 16 ^ i * 64);
  }

  // Where the even outputs lie of word `lane` / 8 and of token `lane` % 8 (and eight on); the odd
  // ones are at that address with bit 6 the other way round.
  __device__ static uint32_t EvensAt(unsigned lane) {
    const unsigned owner = lane / 8 * 8 + lane % 8 / 2;
    return kVectors == 2 ? VectorAt(owner, lane % 2) : owner * 16 + lane % 2 * 8;
  }
};

// What a lane finishes of units: eight outputs of one token, or four of one or of two that are
// eight apart.
template <typename Unit>
class UnitOutputs {
  static constexpr int kOutputs = 4 * Unit::kTiles;
  static constexpr int kTokens = Unit::kBlocks;
  static constexpr int kValues = kOutputs * kTokens;

 public:
  UnitOutputs() = default;
  // `output`: the first that this lane has of its word; `token`: the first of the first unit.
  __device__ __forceinline__ UnitOutputs(const EpilogueParams& p, int64_t output, int64_t token) {
    const bool valid = output < p.outputs;
    token += threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      bias_[i] = p.bias && valid ? LoadAsFloat(p.bias, output + i, p.bias_dtype) : 0.0f;
    }
    to_ = static_cast<char*>(p.y) + (token * p.outputs + output) * SizeOf(p.out_dtype);
    tokens_ = valid ? static_cast<int>(min(p.m - token, int64_t{INT32_MAX})) : 0;
  }

  // Finishes and stores `count` units of a warp. `parts` of each lie one behind the other from
  // `unit` on and are added in this order, so that a sum depends neither on timing nor on who adds.
  // What the other warps of kWarps finish lies between one unit and the next, which is `parts`
  // units of tokens on. `token`: of the tile, the first unit's first. Called by whole warps.
  template <int kWarps, typename Scales>
  __device__ __forceinline__ void Finish(const EpilogueParams& p, uint32_t unit, unsigned parts,
                                         unsigned token, unsigned count, const Scales& row_scales) {
    uint32_t from = unit + Unit::EvensAt(threadIdx.x % 32);
    token += threadIdx.x % 8;
    const int64_t row_bytes = p.outputs * SizeOf(p.out_dtype);
#pragma unroll 1
    for (; count > 0; --count) {
      float v[kValues];
      Sum(from, parts, v);
      if (p.row_scale) {
#pragma unroll
        for (int n = 0; n < kTokens; ++n) {
          const float scale = row_scales.Of(token + 8 * n);
#pragma unroll
          for (int i = 0; i < kOutputs; ++i) v[n * kOutputs + i] *= scale;
        }
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[i] += bias_[i % kOutputs];
      if (__builtin_expect(p.activation != Activation::kNone, 0)) {
        // One after the other through the same instructions: copies of all activations would stand
        // between the sums and what stores them.
#pragma unroll 1
        for (int n = 0; n < kValues; ++n) {
          const float next = Activate(v[0], p.activation);
#pragma unroll
          for (int i = 0; i < kValues - 1; ++i) v[i] = v[i + 1];
          v[kValues - 1] = next;
        }
      }
#pragma unroll
      for (int n = 0; n < kTokens; ++n) {
        if (8 * n >= tokens_) continue;
        StoreRounded<kOutputs>(to_ + n * 8 * row_bytes, v + n * kOutputs, p.out_dtype);
      }
      from += kWarps * parts * Unit::kBytes;
      to_ += parts * Unit::kTokens * row_bytes;
      tokens_ -= parts * Unit::kTokens;
      token += parts * Unit::kTokens;
    }
  }

 private:
  // Two parts at a time, after the first where their number is odd.
  __device__ __forceinline__ static void Sum(uint32_t from, unsigned parts, float (&v)[kValues]) {
    float first[kValues], second[kValues];
    Load(from, v);
    if (parts % 2 == 0) {
      Load(from + Unit::kBytes, second);
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[i] += second[i];
    }
#pragma unroll 1
    for (unsigned r = 2 - parts % 2; r < parts; r += 2) {
      Load(from + r * Unit::kBytes, first);
      Load(from + (r + 1) * Unit::kBytes, second);
#pragma unroll
      for (int i = 0; i < kValues; ++i) v[i] = v[i] + first[i] + second[i];
    }
  }

  __device__ __forceinline__ static void Load(uint32_t from, float (&v)[kValues]) {
    float evens[kValues / 2], odds[kValues / 2];
    LoadShared(evens, from);
    LoadShared(odds, from ^ 64);
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = i % 2 ? odds[i / 2] : evens[i / 2];
  }

  char* to_;
  int tokens_;  // from the first unit's on, in y
  float bias_[kOutputs];
};

// Sums a tile of float32 partial results over the cluster (`splits` CTAs, in rank order, so that
// the bits never depend on timing) and finishes it; or writes it to the workspace for FinishSplits.
// `tile` is complete and synchronized within the CTA.
template <typename Result, int kThreads>
__device__ __forceinline__ void ReduceAndStore(const EpilogueParams& p, float* tile, int64_t token0,
                                               int64_t output0, int split, int splits,
                                               int64_t partial_stride) {
  constexpr int kFours = Result::kOutputs / 4;  // of a token
  const int tokens = static_cast<int>(min(p.m - token0, static_cast<int64_t>(Result::kTokens)));
  const bool cluster = splits > 1 && p.partials == nullptr;
  const Exchange exchange(cluster ? splits : 1, cluster ? split : 0, tokens * kFours);
#if __CUDA_ARCH__ >= 900
  if (cluster) ClusterSync();
#endif
  for (unsigned i = threadIdx.x; i < exchange.own; i += kThreads) {
    const unsigned e = exchange.rank * exchange.per + i;
    const int row = e / kFours;
    const int column = e % kFours * 4;
    const int64_t token = token0 + row;
    const int64_t output = output0 + column;
    if (output >= p.outputs) continue;
    const float4* from = Result::Four(tile, row, column);
#if __CUDA_ARCH__ >= 900
    if (cluster) {
      float4 sum[1];
      exchange.Sum<1>({SharedAddress(from)}, 1, sum);
      FinishFour(p, token, output, sum[0]);
      continue;
    }
#endif
    FinishFourOrPartial(p, token, output, *from, split * partial_stride);
  }
#if __CUDA_ARCH__ >= 900
  if (cluster) {  // a CTA must not leave while others read its shared memory
    ClusterArriveRelaxed();
    ClusterWait();
  }
#endif
}

}  // namespace jax_awq
