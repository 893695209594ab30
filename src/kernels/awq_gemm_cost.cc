#include "kernels/awq_gemm_cost.h"

#include <algorithm>
#include <cmath>

#include "kernels/planning.h"

namespace jax_awq {
namespace {

constexpr double kLaunch = 1.0;

// Until the first step, and after the last.
constexpr double kFill = 2.1;

// Microseconds of a step of each of `ctas` at work at once. The clock falls under load, and rows of
// tiles after the first find the weight in the L2.
double StepMicroseconds(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v,
                        int64_t ctas, double share = 1.0) {
  constexpr double kPower = 0.142;
  // Of codes, a scale and a zero point for each output and 64 indices of groups of 128.
  constexpr double kOutputBytes = 64 * (0.5 + 2.5 / 128);
  // Bytes a microsecond: less where a tile's rows of words are few of them, or begin within a
  // sector of memory.
  const double rate = v.outputs == 224 ? 3.88e6 : v.outputs == 128 ? 4.05e6 : 4.2e6;
  const double busy = std::min(1.0, static_cast<double>(ctas) / device.sm_count);
  const double us = v.step_us * (1.0 + kPower * std::max(0.0, busy - 0.5)) * share;
  return p.m > v.tokens ? us : std::max(us, ctas * v.outputs * kOutputBytes / rate);
}

// Microseconds of storing the tiles of all processors at once, before their next ones.
double StoreMicroseconds(const AwqGemmVariant& v) {
  constexpr double kElements = 10.1e3;  // a microsecond, of a tile
  return v.tokens * v.outputs / kElements;
}

int64_t Tiles(const AwqGemmProblem& p, const AwqGemmVariant& v) {
  return CeilDiv(p.m, v.tokens) * CeilDiv(p.outputs(), v.outputs) * p.batch;
}

// Of a wave of so many clusters: the steps of its CTAs, and for splits the sums that members of a
// cluster write to each other, with what of a wave does not depend on the work.
double WaveMicroseconds(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v,
                        int split, int64_t clusters) {
  constexpr double kMeet = 0.04;
  constexpr double kRemoteBytes = 29e3;  // a microsecond, that a processor writes to others
  const bool shared = v.ctas_per_sm > 1 && clusters > ResidentClusters(device, 1, split);
  // How much longer steps of two CTAs on a processor take, more where they mostly multiply.
  const bool multiply = p.m > v.tokens || (v.tokens > 48 && split == 1);
  const double share = !shared ? 1.0 : multiply ? 1.9 : v.tokens > 64 ? 1.7 : 1.55;
  const int64_t steps = CeilDiv(CeilDiv(p.contraction(), v.depth), split) * (v.depth / 64);
  const double us = steps * StepMicroseconds(p, device, v, clusters * split, share);
  if (split == 1) return us;
  const double tile_bytes = 4.0 * std::min<int64_t>(p.m, v.tokens) * v.outputs * (1 + shared);
  return us + kFill + kMeet + tile_bytes * (split - 1) / split / kRemoteBytes;
}

// Of shares that begin anywhere in K, each step reads other rows of x and of the weight, and what
// does not fit the L2 comes from memory again. All tiles of a row need x, so that it stays first.
double SharedStepMicroseconds(const AwqGemmProblem& p, const Device& device,
                              const AwqGemmVariant& v, const StreamShares& stream) {
  constexpr double kCacheBytes = 25e6;    // of an L2 of 50 MB
  constexpr double kMemoryBytes = 3.1e6;  // a microsecond

  const int64_t tiles = std::min(stream.shared, 2 * stream.ctas);  // of one time
  const int64_t all_rows = CeilDiv(p.m, v.tokens);
  const int64_t columns = std::min(CeilDiv(tiles, std::min<int64_t>(all_rows, kTileRaster)),
                                   CeilDiv(p.outputs(), v.outputs));
  const int64_t rows = std::min(CeilDiv(tiles, columns), all_rows);
  const double x_bytes = 2.0 * v.tokens;                       // for an index of K and a tile
  const double weight_bytes = rows > 1 ? 0.5 * v.outputs : 0;  // read once otherwise
  auto missed = [&](double bytes) {
    return std::max(0.0, 1.0 - kCacheBytes / (bytes * p.contraction()));
  };
  const double missed_bytes = missed(rows * x_bytes) * x_bytes +
                              missed(rows * x_bytes + columns * weight_bytes) * weight_bytes;
  const double read_us = stream.ctas * 64 * missed_bytes / kMemoryBytes;
  // The two hide each other in part.
  return std::cbrt(std::pow(StepMicroseconds(p, device, v, stream.ctas), 3) + std::pow(read_us, 3));
}

}  // namespace

int64_t ResidentClusters(const Device& device, int ctas_per_sm, int size) {
  constexpr int kSms = 132;
  constexpr int kClusters[3][kMaxCluster] = {{132, 66, 39, 30, 22, 17, 15, 15},
                                             {264, 132, 79, 62, 47, 39, 32, 30},
                                             {396, 198, 124, 92, 69, 62, 47, 45}};
  if (device.arch < 90) return device.sm_count * ctas_per_sm / size;
  return kClusters[std::min(ctas_per_sm, 3) - 1][size - 1] * device.sm_count / kSms;
}

StreamShares::StreamShares(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v)
    : ctas(device.sm_count * v.ctas_per_sm),
      whole(WholeTiles(Tiles(p, v), ctas)),
      shared(Tiles(p, v) - whole),
      tile_bytes(int64_t{4} * v.tokens * v.outputs) {}

double TmaMicroseconds(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v,
                       int split) {
  const int64_t tiles = Tiles(p, v);
  const bool alone = tiles <= ResidentClusters(device, 1, split);
  const int64_t resident = ResidentClusters(device, alone ? 1 : v.ctas_per_sm, split);
  const int64_t full = CeilDiv(tiles, resident) - 1;  // waves before the last
  const double us = kLaunch + full * WaveMicroseconds(p, device, v, split, resident) +
                    WaveMicroseconds(p, device, v, split, tiles - full * resident);
  if (split > 1) return us;
  // Without splits the next tile's copies begin while this one's results are stored, but all
  // processors store at once.
  return us + kFill + full * StoreMicroseconds(v);
}

int BestTmaSplit(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v) {
  int best = 1;
  double best_us = TmaMicroseconds(p, device, v, 1);
  for (int split = 2; split <= kMaxCluster; ++split) {
    if (split > CeilDiv(p.contraction(), v.depth)) break;
    const double us = TmaMicroseconds(p, device, v, split);
    if (us < best_us) best = split, best_us = us;
  }
  return best;
}

// The library's kernel takes what its operations take or reading the weight, whichever is more.
double DequantizeDotMicroseconds(const AwqGemmProblem& p, const Device& device) {
  constexpr double kDequantizeLaunch = 2.0;
  constexpr double kBytes = 3.7e6;  // a microsecond, read and written
  constexpr double kDenseLaunch = 9.0;
  constexpr double kDenseBytes = 4.4e6;
  constexpr double kOperations = 5.2e6;  // a microsecond and processor
  const double weights = static_cast<double>(p.k) * p.n * p.batch;
  return kDequantizeLaunch + 2.5 * weights / kBytes +
         std::hypot(2.0 * p.m * weights / (kOperations * device.sm_count),
                    kDenseLaunch + 2.0 * weights / kDenseBytes);
}

double StreamMicroseconds(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v) {
  constexpr double kClear = 2.8;       // the launch that clears counts
  constexpr double kPartBytes = 98e3;  // a microsecond and processor, written or read
  const StreamShares stream(p, device, v);
  const int64_t steps = CeilDiv(p.contraction(), v.depth);
  const double whole_us =
      steps * StepMicroseconds(p, device, v, stream.ctas) + StoreMicroseconds(v);
  const double us = kLaunch + kFill + stream.whole / stream.ctas * whole_us;
  if (stream.shared == 0) return us;
  // One of its own, and those of all others that have a part of the tile that it finishes.
  const int64_t parts = 1 + CeilDiv(stream.ctas, stream.shared);
  const double shared_us =
      CeilDiv(stream.shared * steps, stream.ctas) * SharedStepMicroseconds(p, device, v, stream) +
      (stream.shared > stream.ctas ? StoreMicroseconds(v) : 0) +
      parts * stream.tile_bytes / kPartBytes;
  return us + kClear + shared_us;
}

}  // namespace jax_awq
