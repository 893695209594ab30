// Which CTA of the TMA kernel computes what, and in which order.
#pragma once

#include "device/epilogue.cuh"
#include "kernels/awq_gemm_launch.cuh"

namespace jax_awq {

// Where a tile lies. Tiles of up to kRaster rows of tiles go together, so that the CTAs at work
// at one time share their rows of x and their columns of the weight in the L2.
struct TmaTileOrder {
  static constexpr unsigned kRaster = 8;

  __device__ TmaTileOrder(const AwqGemmParams& p, int tokens, int outputs)
      : rows(static_cast<unsigned>((p.m + tokens - 1) / tokens)),
        columns(static_cast<unsigned>((p.outputs + outputs - 1) / outputs)),
        count(rows * columns * static_cast<unsigned>(p.batch)) {}

  __device__ void Find(unsigned tile, unsigned* batch, unsigned* row, unsigned* column) const {
    *batch = tile / (rows * columns);
    tile -= *batch * rows * columns;
    const unsigned band = tile / (kRaster * columns);
    tile -= band * kRaster * columns;
    const unsigned height = min(kRaster, rows - band * kRaster);
    *column = tile / height;
    *row = band * kRaster + tile % height;
  }

  unsigned rows, columns, count;
};

// The tail of a grid whose tiles do not come out even: all CTAs share its steps equally, so that a
// tile's sum is divided among neighbours, which leave their parts in the workspace. The division
// depends on shapes and processors alone.
struct StreamK {
  __device__ StreamK(unsigned tiles, unsigned steps, unsigned ctas)
      : ctas(ctas), steps(steps), whole(tiles / ctas * ctas), total((tiles - whole) * steps) {}

  __device__ Share Of(unsigned cta) const { return Share(total, cta, ctas); }
  // Of the part that a CTA has of a tile of the tail: both only ever grow.
  __device__ static int Slot(unsigned cta, unsigned tail_tile) { return cta + tail_tile; }
  // The first CTA that has a part of this tile of the tail.
  __device__ unsigned FirstOf(unsigned tail_tile) const {
    const unsigned unit = tail_tile * steps;
    const unsigned longer = total % ctas, least = total / ctas;
    return unit < longer * (least + 1) ? unit / (least + 1)
                                       : longer + (unit - longer * (least + 1)) / least;
  }

  unsigned ctas, steps;
  unsigned whole;  // tiles before the tail
  unsigned total;  // steps of the tail
};

// What a CTA works on, one item after the other: a tile, and which steps of its sum.
class TmaWork {
 public:
  // `ctas` work on a tile, or on as many side by side where its sum is not split.
  __device__ TmaWork(int ctas, int splits, unsigned tiles, unsigned steps, bool stream_k)
      : steps_(steps),
        next_(blockIdx.x / ctas),
        stride_(gridDim.x / ctas),
        whole_(tiles),
        share_(steps, blockIdx.x % splits, splits),
        tail_(0, 0, 1) {
    if (stream_k) {
      const StreamK stream(tiles, steps, gridDim.x);
      whole_ = stream.whole;
      tail_ = stream.Of(blockIdx.x);
    }
    items = whole_ > next_ ? (whole_ - next_ + stride_ - 1) / stride_ : 0;
    if (tail_.count > 0) ++items;
    if (tail_.first % steps + tail_.count > steps) ++items;  // never three: a share is less
  }

  // To be called `items` times: with a loop that ends when there is no more, the compiler does not
  // keep the sums in registers.
  __device__ void Next() {
    const bool whole = next_ < whole_;
    const unsigned tail_tile = tail_.first / steps_;
    const int first = tail_.first - tail_tile * steps_;
    const int count = min(tail_.count, static_cast<int>(steps_) - first);
    tile = whole ? next_ : whole_ + tail_tile;
    slot = whole ? -1 : StreamK::Slot(blockIdx.x, tail_tile);
    share.first = whole ? share_.first : first;
    share.count = whole ? share_.count : count;
    next_ += whole ? stride_ : 0;
    tail_.first += whole ? 0 : count;
    tail_.count -= whole ? 0 : count;
  }

  unsigned items;
  unsigned tile;
  Share share{0, 0, 1};
  int slot;  // of the workspace, where this is part of a tile; otherwise -1

 private:
  unsigned steps_, next_, stride_, whole_;
  Share share_, tail_;
};

}  // namespace jax_awq
