// Which CTA of the TMA kernel computes what, and in which order; and who finishes which sums.
#pragma once

#include <algorithm>

#include "device/epilogue.cuh"
#include "device/ptx.cuh"
#include "device/tma_tile.cuh"
#include "kernels/awq_gemm_launch.cuh"
#include "kernels/divider.h"
#include "kernels/planning.h"

namespace jax_awq {

// Where tiles lie: those of up to kTileRaster rows of tiles go together.
struct TmaTileOrder {
  TmaTileOrder() = default;
  TmaTileOrder(const AwqGemmParams& p, int tokens, int outputs)
      : rows(static_cast<unsigned>((p.m + tokens - 1) / tokens)),
        columns(static_cast<unsigned>((p.outputs + outputs - 1) / outputs)),
        count(rows * columns * static_cast<unsigned>(p.batch)),
        by_batch(rows * columns),
        by_band(kTileRaster * columns),
        by_last_height(rows % kTileRaster == 0 ? kTileRaster : rows % kTileRaster) {}

  __device__ void Find(unsigned tile, unsigned* batch, unsigned* row, unsigned* column) const {
    *batch = by_batch.Quotient(tile);
    tile = by_batch.Remainder(tile);
    const unsigned band = by_band.Quotient(tile);
    tile = by_band.Remainder(tile);
    const bool whole = (band + 1) * kTileRaster <= rows;
    *column = whole ? tile / kTileRaster : by_last_height.Quotient(tile);
    *row = band * kTileRaster + (whole ? tile % kTileRaster : by_last_height.Remainder(tile));
  }

  unsigned rows, columns, count;
  Divider by_batch, by_band, by_last_height;
};

// All that CTAs need to know of it, counted by the host.
//
// Stream-K (Osama et al., 2023): of the tiles that would not fill a wave, and those of the wave
// before, all CTAs share the steps equally, so that a tile's sum is divided among neighbours.
// Whoever has its last steps finishes it, with what the CTAs before have left of it in the
// workspace. The division depends on shapes and processors alone.
struct TmaSchedule {
  TmaSchedule() = default;
  // `members` CTAs have tiles side by side, and of each of these as many have a part as there are
  // splits; `groups` of such CTAs are launched.
  TmaSchedule(const AwqGemmParams& p, int tokens, int outputs, int depth, int members,
              int64_t groups, bool stream_k)
      : order(p, tokens, outputs * members),
        steps(static_cast<unsigned>((p.contraction + depth - 1) / depth)),
        groups(static_cast<unsigned>(groups)),
        whole(order.count),
        split{steps / p.splits, steps % p.splits},
        by_ctas(p.splits * members),
        by_splits(p.splits),
        by_groups(this->groups),
        by_steps(steps) {
    if (stream_k) {
      whole = static_cast<unsigned>(WholeTiles(order.count, groups));
      const unsigned shared = (order.count - whole) * steps;
      tail = {shared / this->groups, shared % this->groups};
    }
  }

  TmaTileOrder order;
  unsigned steps, groups;
  unsigned whole;         // tiles that are not shared among all CTAs
  Share::Even split;      // of the steps of a tile
  Share::Even tail = {};  // of the steps of the tiles that are shared
  Divider by_ctas, by_splits, by_groups, by_steps;
};

// What a CTA works on, one item after the other: a tile, and which steps of its sum.
class TmaWork {
 public:
  // Only `persistent` CTAs have more than one item.
  __device__ TmaWork(const TmaSchedule& s, bool persistent)
      : split(s.by_splits.Remainder(blockIdx.x)),
        schedule_(s),
        group_(s.by_ctas.Quotient(blockIdx.x)),
        next_(group_),
        share_(s.split, split),
        tail_(s.tail, group_) {
    if (!persistent) return;
    items = s.whole > next_ ? s.by_groups.Quotient(s.whole - next_ + s.groups - 1) : 0;
    if (tail_.count > 0) {
      items +=
          s.by_steps.Quotient(tail_.first + tail_.count - 1) - s.by_steps.Quotient(tail_.first) + 1;
    }
  }

  // To be called `items` times: with a loop that ends when there is no more, the compiler does not
  // keep the sums in registers. A share of the tail is done from its end on: what others wait for
  // comes first.
  __device__ void Next() {
    const bool whole = next_ < schedule_.whole;
    const unsigned end = tail_.first + tail_.count;
    const unsigned tail_tile = schedule_.by_steps.Quotient(end - 1);
    const unsigned start = tail_tile * schedule_.steps;
    const unsigned first = max(static_cast<unsigned>(tail_.first), start);
    tile = whole ? next_ : schedule_.whole + tail_tile;
    share.first = whole ? share_.first : first - start;
    share.count = whole ? share_.count : end - first;
    leaves = !whole && end - start < schedule_.steps;
    parts = 0;
    for (int missing = whole || leaves ? 0 : first - start; missing > 0;) {
      missing -= Share(schedule_.tail, group_ - ++parts).count;
    }
    next_ += whole ? schedule_.groups : 0;
    tail_.count -= whole ? 0 : end - first;
  }

  const unsigned split;  // of the sum of each tile, where it is divided among CTAs
  unsigned items = 1;
  unsigned tile;
  Share share{0, 0, 1};
  bool leaves;  // these sums to the CTA that has the last steps of the tile
  int parts;    // that the groups of CTAs before this one have left of the tile

 private:
  const TmaSchedule& schedule_;
  const unsigned group_;
  unsigned next_;
  Share share_, tail_;
};

// What CTAs leave for each other of shared tiles (TmaSchedule): sums in the order in which a part
// passes through the pipeline, a stage's x at a time, and how many warps have left theirs.
struct TailParts {
  char* sums;
  uint32_t* counts;

  template <typename Tile>
  __device__ void Leave(unsigned cta, int warp,
                        const float (&acc)[Tile::kTiles][Tile::kTokens / 2]) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    float4* to = reinterpret_cast<float4*>(sums + int64_t{cta} * Tile::kPartBytes) +
                 (warp * Tile::kPartFours * 32 + threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 8 * Tile::kTiles; ++i) {
      const float* v = acc[i % Tile::kTiles] + i / Tile::kTiles * 4;
      to[i / Tile::kPartFours * (Tile::kPartStageBytes / 16) + i % Tile::kPartFours * 32] =
          make_float4(v[0], v[1], v[2], v[3]);
    }
    FenceProxyAsyncGlobal();  // the copy engine will read them
    CountUp(counts + cta);
#endif
  }
};

// Whose turn it is to finish what a warp has of a tile, and where that goes; and what the warp
// itself finishes. Members and then warps take turns at the units of a tile; a member has all parts
// of its slot i, its i-th unit, side by side in its inbox.
template <typename Tile>
struct TmaTurns {
  using Lane = TmaLane<Tile>;
  using Unit = typename Tile::Unit;

  TmaTurns() = default;
  __device__ __forceinline__ TmaTurns(const EpilogueParams& epilogue, unsigned members,
                                      unsigned rank, unsigned warp, int64_t output0, int64_t token0)
      : owner(warp), slot(0) {
    while (owner >= members) owner -= members, ++slot;
    const unsigned unit = rank + warp * members;  // the first that this warp finishes
    const int of_warp = unit % Tile::kTeamWarps;  // lanes of all warps are alike
    token = unit / Tile::kTeamWarps * Unit::kTokens;
    outputs = UnitOutputs<Unit>(
        epilogue, output0 + 8 * Lane::Word(of_warp) + 4 * Lane::Byte(of_warp), token0 + token);
  }

  unsigned owner, slot;  // of this warp's first unit
  unsigned token;        // the first that this warp finishes
  UnitOutputs<Unit> outputs;
};

}  // namespace jax_awq
