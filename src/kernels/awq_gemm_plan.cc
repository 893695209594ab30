// Which kernel runs which problem. Pure host code, so that it can be asked without a GPU.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "kernels/awq_gemm.h"
#include "kernels/planning.h"

namespace jax_awq {
namespace {

constexpr int kMaxGridYZ = 65535;

struct Variant {
  const char* name;
  AwqGemmKernel kernel;
  int tokens;  // of one tile; 0: no tile
  int outputs;
  int depth;        // a split of K is a multiple of this
  int ctas_per_sm;  // resident at once
  bool splits;      // can divide the contraction among CTAs
  double step_us;   // of one CTA for 64 indices of the contraction; 0: not for the cost model
  const char* (*unsupported)(const AwqGemmProblem&, const Device&);
};

bool IsCodes(const AwqGemmProblem& p) {
  return p.x_dtype == DType::kS8 || p.x_dtype == DType::kE4M3;
}

const char* AnyKernelUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (device.arch == 0) return "this build has no code for the GPU's architecture";
  if (p.x_dtype == DType::kF32) return "x is float32";
  if (p.scales_dtype == DType::kF32) return "scales are float32";
  if (p.batch > kMaxGridYZ) return "more than 65535 batch entries";
  if (p.group_size != p.k && p.group_size != 32 && p.group_size != 64 && p.group_size != 128) {
    return "group_size is not 32, 64, 128 or K";
  }
  return nullptr;
}

const char* TensorCoreUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = AnyKernelUnsupported(p, device)) return why;
  if (IsCodes(p)) return "x is codes of one byte";
  if (device.arch < 80) return "needs compute capability 8.0";
  if (p.contraction() % 8) return "rows of x are not 16-byte aligned";
  // Rounding a bfloat16 scale to float16 first would round subnormal products twice.
  if (p.x_dtype == DType::kF16 && p.scales_dtype == DType::kBF16) {
    return "x is float16 and scales are bfloat16";
  }
  return nullptr;
}

template <int kTokens>
const char* TooManyRows(const AwqGemmProblem& p) {
  static_assert(kTokens == 8 || kTokens == 16);
  if (p.m <= kTokens) return nullptr;
  return kTokens == 8 ? "more than 8 rows of x" : "more than 16 rows of x";
}

template <int kTokens>
const char* DecodeUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = TooManyRows<kTokens>(p)) return why;
  if (const char* why = TensorCoreUnsupported(p, device)) return why;
  if (p.layout != Layout::kGemm || p.transpose) return "weight is not packed along the outputs";
  if (p.k % 32 || p.n % 16) return "K is not a multiple of 32 or N not of 16";
  return nullptr;
}

const char* WgmmaUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = TensorCoreUnsupported(p, device)) return why;
  if (device.arch != 90 || !kHasSm90a) return "needs code for sm_90a";
  return nullptr;
}

const char* TmaUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = WgmmaUnsupported(p, device)) return why;
  if (p.layout != Layout::kGemm || p.transpose) return "weight is not packed along the outputs";
  if (p.n % 32) return "rows of qweight are not 16-byte aligned";
  if (std::max({p.m, p.n, p.k}) > INT32_MAX) return "a dimension exceeds 32 bits";
  return nullptr;
}

// Two CTAs share a processor's registers, and these products need two for a pair of scales.
const char* TightTmaUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = TmaUnsupported(p, device)) return why;
  if (p.x_dtype != p.scales_dtype) return "x and scales have different dtypes";
  return nullptr;
}

template <int kTokens>
const char* FewUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = TooManyRows<kTokens>(p)) return why;
  if (CeilDiv(p.n, 256) > kMaxGridYZ) return "N exceeds 16776960";
  return TmaUnsupported(p, device);
}

const char* StreamUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = TmaUnsupported(p, device)) return why;
  if (p.has_activation) return "there is an activation";
  if (p.split_k > 0) return "split_k_iters asks for another division of K";
  if (p.m == 0) return "the number of rows is not known when the program is lowered";
  return nullptr;
}

// Codes of one byte are multiplied with codes, and sums of groups with their scales: below 128 rows
// to a group that takes longer than the tensor cores save.
const char* CodesUnsupported(const AwqGemmProblem& p, const Device& device) {
  constexpr int64_t kMaxDepth = 1 << 17;  // of a sum in 32 bits: 2^31 / (127 * 128)
  if (const char* why = AnyKernelUnsupported(p, device)) return why;
  if (!IsCodes(p)) return "x is not codes of one byte";
  if (device.arch != 90 || !kHasSm90a) return "needs code for sm_90a";
  if (p.layout != Layout::kGemm || p.transpose) return "weight is not packed along the outputs";
  if (p.n % 32) return "rows of qweight are not 16-byte aligned";
  if (p.k % 16) return "rows of x are not 16-byte aligned";
  if (p.group_size != 128 && p.group_size != p.k) return "group_size is below 128";
  if (p.k > kMaxDepth) return "K exceeds 131072";
  if (std::max(p.m, p.n) > INT32_MAX) return "a dimension exceeds 32 bits";
  return nullptr;
}

const char* CodesSingleUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = CodesUnsupported(p, device)) return why;
  return p.group_size != p.k ? "there are several groups" : nullptr;
}

const char* SimtUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = AnyKernelUnsupported(p, device)) return why;
  return IsCodes(p) ? "x is codes of one byte" : nullptr;
}

const char* DequantizeDotUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = AnyKernelUnsupported(p, device)) return why;
  if (IsCodes(p)) return "x is codes of one byte";
  if (p.fused_only) return "only a fused kernel was asked for";
  if (p.m == 0) return "the number of rows is not known when the program is lowered";
  if (p.split_k > 0) return "split_k_iters asks for a fused kernel";
  return nullptr;
}

// In the order in which they are tried.
constexpr Variant kVariants[] = {
    {"decode_8", AwqGemmKernel::kDecode, 8, 128, 32, 3, true, 0, DecodeUnsupported<8>},
    {"decode_16", AwqGemmKernel::kDecode, 16, 128, 32, 2, true, 0, DecodeUnsupported<16>},
    {"few_8x256", AwqGemmKernel::kFew, 8, 256, 128, 1, true, 0.229, FewUnsupported<8>},
    {"few_16x256", AwqGemmKernel::kFew, 16, 256, 128, 1, true, 0.263, FewUnsupported<16>},
    {"tma_32x128", AwqGemmKernel::kTma, 32, 128, 64, 2, true, 0.226, TmaUnsupported},
    {"tma_32x256", AwqGemmKernel::kTma, 32, 256, 64, 2, true, 0.41, TmaUnsupported},
    {"tma_48x256", AwqGemmKernel::kTma, 48, 256, 64, 2, true, 0.44, TightTmaUnsupported},
    {"tma_64x128", AwqGemmKernel::kTma, 64, 128, 64, 2, true, 0.276, TmaUnsupported},
    {"tma_64x256", AwqGemmKernel::kTma, 64, 256, 64, 1, true, 0.47, TmaUnsupported},
    {"tma_96x128", AwqGemmKernel::kTma, 96, 128, 64, 2, true, 0.334, TmaUnsupported},
    {"tma_96x256", AwqGemmKernel::kTma, 96, 256, 64, 1, true, 0.567, TmaUnsupported},
    {"tma_128x128", AwqGemmKernel::kTma, 128, 128, 64, 1, true, 0.373, TmaUnsupported},
    {"tma_128x256", AwqGemmKernel::kTma, 128, 256, 64, 1, true, 0.676, TmaUnsupported},
    {"tma_160x128", AwqGemmKernel::kTma, 160, 128, 64, 1, true, 0.45, TmaUnsupported},
    {"tma_192x128", AwqGemmKernel::kTma, 192, 128, 64, 1, true, 0.51, TmaUnsupported},
    {"tma_224x128", AwqGemmKernel::kTma, 224, 128, 64, 1, true, 0.572, TmaUnsupported},
    {"tma_256x128", AwqGemmKernel::kTma, 256, 128, 64, 1, true, 0.66, TmaUnsupported},
    {"tma_288x128", AwqGemmKernel::kTma, 288, 128, 64, 1, true, 0.75, TmaUnsupported},
    {"tma_320x128", AwqGemmKernel::kTma, 320, 128, 64, 1, true, 0.845, TmaUnsupported},
    {"stream_96x256", AwqGemmKernel::kTma, 96, 256, 64, 1, false, 0.567, StreamUnsupported},
    {"stream_128x128", AwqGemmKernel::kTma, 128, 128, 64, 1, false, 0.373, StreamUnsupported},
    {"stream_128x256", AwqGemmKernel::kTma, 128, 256, 64, 1, false, 0.676, StreamUnsupported},
    {"stream_160x128", AwqGemmKernel::kTma, 160, 128, 64, 1, false, 0.45, StreamUnsupported},
    {"stream_192x128", AwqGemmKernel::kTma, 192, 128, 64, 1, false, 0.51, StreamUnsupported},
    {"stream_224x128", AwqGemmKernel::kTma, 224, 128, 64, 1, false, 0.572, StreamUnsupported},
    {"stream_256x128", AwqGemmKernel::kTma, 256, 128, 64, 1, false, 0.66, StreamUnsupported},
    {"stream_288x128", AwqGemmKernel::kTma, 288, 128, 64, 1, false, 0.75, StreamUnsupported},
    {"stream_320x128", AwqGemmKernel::kTma, 320, 128, 64, 1, false, 0.845, StreamUnsupported},
    {"w4a8_32x256", AwqGemmKernel::kTma, 32, 256, 128, 1, true, 0.22, CodesUnsupported},
    {"w4a8_64x256", AwqGemmKernel::kTma, 64, 256, 128, 1, true, 0.34, CodesUnsupported},
    {"w4a8_128x128", AwqGemmKernel::kTma, 128, 128, 128, 1, true, 0.26, CodesUnsupported},
    {"w4a8_256x128", AwqGemmKernel::kTma, 256, 128, 128, 1, true, 0.38, CodesSingleUnsupported},
    {"wgmma_16", AwqGemmKernel::kWgmma, 16, 256, 64, 2, true, 0, WgmmaUnsupported},
    {"wgmma_32", AwqGemmKernel::kWgmma, 32, 256, 64, 1, true, 0, WgmmaUnsupported},
    {"wgmma_64", AwqGemmKernel::kWgmma, 64, 256, 64, 1, true, 0, WgmmaUnsupported},
    {"wgmma_128", AwqGemmKernel::kWgmma, 128, 256, 64, 1, true, 0, WgmmaUnsupported},
    {"mma_32", AwqGemmKernel::kMma, 32, 128, 64, 3, true, 0, TensorCoreUnsupported},
    {"mma_64", AwqGemmKernel::kMma, 64, 128, 64, 2, true, 0, TensorCoreUnsupported},
    {"mma_128", AwqGemmKernel::kMma, 128, 128, 64, 2, true, 0, TensorCoreUnsupported},
    {"dequantize_dot", AwqGemmKernel::kNone, 0, 0, 0, 0, false, 0, DequantizeDotUnsupported},
    {"simt", AwqGemmKernel::kSimt, 32, 64, 32, 4, false, 0, SimtUnsupported},
};

bool IsStream(const Variant& v) { return v.unsupported == StreamUnsupported; }

// Whether the cost model covers it.
bool IsTma(const Variant& v) {
  return v.kernel == AwqGemmKernel::kTma || v.kernel == AwqGemmKernel::kFew;
}

// Whether a row has the same sums in every such tile of its kernel, and in every place of a tile.
bool BatchInvariant(const Variant& v) {
  switch (v.kernel) {
    case AwqGemmKernel::kTma:  // the kernel for few rows sums groups apart
      return !IsStream(v);
    case AwqGemmKernel::kWgmma:
    case AwqGemmKernel::kMma:  // in larger tiles no warps share the depth of a stage
      return v.tokens <= 64;
    case AwqGemmKernel::kSimt:
      return true;
    default:
      return false;
  }
}

const char* Unsupported(const Variant& v, const AwqGemmProblem& p, const Device& device) {
  if (const char* why = v.unsupported(p, device)) return why;
  if (p.batch_invariant && !BatchInvariant(v)) return "its sums depend on the number of rows";
  return nullptr;
}

const Variant* Find(const std::string& name) {
  for (const Variant& v : kVariants) {
    if (name == v.name) return &v;
  }
  return nullptr;
}

bool Runs(const char* name, const AwqGemmProblem& p, const Device& device) {
  return Unsupported(*Find(name), p, device) == nullptr;
}

// CTA clusters of `size` that run at once: one more would cost a second wave. A cluster lives in
// one GPC, so that some processors are left over; the counts are those that
// cudaOccupancyMaxActiveClusters gives on an H200.
int64_t ResidentClusters(const Device& device, int ctas_per_sm, int size) {
  constexpr int kSms = 132;
  constexpr int kClusters[3][kMaxCluster] = {{132, 66, 39, 30, 22, 17, 15, 15},
                                             {264, 132, 79, 62, 47, 39, 32, 30},
                                             {396, 198, 124, 92, 69, 62, 47, 45}};
  if (device.arch < 90) return device.sm_count * ctas_per_sm / size;
  return kClusters[std::min(ctas_per_sm, 3) - 1][size - 1] * device.sm_count / kSms;
}

// The constants from here on are fits to an H100 (benchmarks/NOTES.md); the right tile and split
// follow from them for shapes nobody has timed.
constexpr double kLaunch = 1.0;
constexpr double kFill = 2.05;  // until the first step, and after the last

// Microseconds of a step of each of `ctas` at work at once. The clock falls under load, and memory
// gives less in narrow rows; rows of tiles after the first find the weight in the L2.
double StepMicroseconds(const AwqGemmProblem& p, const Device& device, const Variant& v,
                        int64_t ctas, double share = 1.0) {
  constexpr double kPower = 0.142;
  const double rate = v.outputs == 256 ? 3.03e6 : 2.44e6;  // bytes a microsecond
  const double busy = std::min(1.0, static_cast<double>(ctas) / device.sm_count);
  const double us = v.step_us * (1.0 + kPower * std::max(0.0, busy - 0.5)) * share;
  return p.m > v.tokens ? us : std::max(us, ctas * v.outputs * 33.3 / rate);
}

// Microseconds of storing the tiles of all processors at once, before their next ones.
double StoreMicroseconds(const Variant& v) {
  constexpr double kElements = 10.1e3;  // a microsecond, of a tile
  return v.tokens * v.outputs / kElements;
}

int64_t Tiles(const AwqGemmProblem& p, const Variant& v) {
  return CeilDiv(p.m, v.tokens) * CeilDiv(p.outputs(), v.outputs) * p.batch;
}

// Microseconds that a TMA variant takes, to compare them: what does not depend on the work, the
// steps of the busiest processor, and for splits the sums that members of a cluster write to each
// other.
double TmaMicroseconds(const AwqGemmProblem& p, const Device& device, const Variant& v, int split) {
  constexpr double kRemoteBytes = 25.8e3;  // a microsecond, that a processor writes to others
  const bool few = v.kernel == AwqGemmKernel::kFew;
  const double fill = few ? 0.74 : kFill;
  const double first_exchange = few ? 1.73 : 0.04;
  const int64_t tiles = Tiles(p, v);
  const bool alone = tiles <= ResidentClusters(device, 1, split);
  const int64_t waves = alone ? 1 : CeilDiv(tiles, ResidentClusters(device, v.ctas_per_sm, split));
  const bool shared = !alone && v.ctas_per_sm > 1;
  // How much longer steps of two CTAs on a processor take, more where they do little but multiply.
  const bool multiply = p.m > v.tokens || (v.tokens > 48 && split == 1);
  const double share = !shared ? 1.0 : multiply ? 1.9 : 1.6;
  const int64_t steps = CeilDiv(CeilDiv(p.contraction(), v.depth), split) * (v.depth / 64);
  const int64_t ctas =
      waves > 1 ? ResidentClusters(device, v.ctas_per_sm, split) * split : tiles * split;
  const double step_us = StepMicroseconds(p, device, v, ctas, share);
  // Without splits the next tile's copies begin while this one's results are stored, but all
  // processors store at once.
  if (split == 1) {
    return kLaunch + fill + waves * steps * step_us + (waves - 1) * StoreMicroseconds(v);
  }
  const double tile_bytes = 4.0 * std::min<int64_t>(p.m, v.tokens) * v.outputs * (1 + shared);
  const double exchange = first_exchange + tile_bytes * (split - 1) / split / kRemoteBytes;
  return kLaunch + waves * (fill + steps * step_us + exchange);
}

// How stream_k divides the tiles.
struct StreamShares {
  StreamShares(const AwqGemmProblem& p, const Device& device, const Variant& v)
      : ctas(device.sm_count * v.ctas_per_sm),
        whole(WholeTiles(Tiles(p, v), ctas)),
        shared(Tiles(p, v) - whole),
        tile_bytes(int64_t{4} * v.tokens * v.outputs) {}

  int64_t ctas;
  int64_t whole;   // tiles that a CTA computes alone
  int64_t shared;  // the others
  int64_t tile_bytes;
  // A CTA leaves sums of one tile at most, and a count.
  int64_t workspace_bytes() const { return shared == 0 ? 0 : ctas * (tile_bytes + 4); }
};

// Of shares that begin anywhere in K, each step reads other rows of x and of the weight, and what
// does not fit the L2 comes from memory again. All tiles of a row need x, so that it stays first.
double SharedStepMicroseconds(const AwqGemmProblem& p, const Device& device, const Variant& v,
                              const StreamShares& stream) {
  constexpr int64_t kRaster = 8;          // rows of tiles that go together, as in TmaTileOrder
  constexpr double kCacheBytes = 25e6;    // of an L2 of 50 MB
  constexpr double kMemoryBytes = 3.1e6;  // a microsecond
  const int64_t tiles = std::min(stream.shared, 2 * stream.ctas);  // of one time
  const int64_t all_rows = CeilDiv(p.m, v.tokens);
  const int64_t columns =
      std::min(CeilDiv(tiles, std::min(all_rows, kRaster)), CeilDiv(p.outputs(), v.outputs));
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

double StreamMicroseconds(const AwqGemmProblem& p, const Device& device, const Variant& v) {
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

// The split that few rows and many share: the one with the least product of their times.
int BatchInvariantTmaSplit(const AwqGemmProblem& p, const Device& device) {
  AwqGemmProblem few = p, many = p;
  few.m = 32, many.m = 1024;
  few.batch = many.batch = 1;
  const Variant& few_tile = *Find("tma_32x256");
  const Variant& many_tile = *Find("tma_256x128");
  auto product = [&](int split) {
    return TmaMicroseconds(few, device, few_tile, split) *
           TmaMicroseconds(many, device, many_tile, split);
  };
  int best = 1;
  for (int split = 2; split <= std::min<int64_t>(kMaxCluster, CeilDiv(p.k, 64)); ++split) {
    if (product(split) < product(best)) best = split;
  }
  return best;
}

int BestTmaSplit(const AwqGemmProblem& p, const Device& device, const Variant& v) {
  int best = 1;
  double best_us = TmaMicroseconds(p, device, v, 1);
  for (int split = 2; split <= kMaxCluster; ++split) {
    if (split > CeilDiv(p.contraction(), v.depth)) break;
    const double us = TmaMicroseconds(p, device, v, split);
    if (us < best_us) best = split, best_us = us;
  }
  return best;
}

// Microseconds of writing the weight in x's dtype and multiplying with the library's dense kernel,
// which takes what its operations take or reading the weight, whichever is more.
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

const char* ChooseTma(const AwqGemmProblem& p, const Device& device) {
  const Variant* best = nullptr;
  double best_us = 0;
  const int shared_split = p.batch_invariant ? BatchInvariantTmaSplit(p, device) : 0;
  for (const Variant& v : kVariants) {
    if (!IsTma(v) || Unsupported(v, p, device)) continue;
    const int split = p.split_k > 0       ? 1
                      : p.batch_invariant ? shared_split
                                          : BestTmaSplit(p, device, v);
    const double us =
        IsStream(v) ? StreamMicroseconds(p, device, v) : TmaMicroseconds(p, device, v, split);
    if (best == nullptr || us < best_us) best = &v, best_us = us;
  }
  // The library's rate is that of a processor under load, the constants here of one that is not.
  constexpr double kLoad = 1.1;
  if (Runs("dequantize_dot", p, device) && DequantizeDotMicroseconds(p, device) < kLoad * best_us) {
    return "dequantize_dot";
  }
  return best->name;
}

const char* Choose(const AwqGemmProblem& p, const Device& device) {
  const int64_t m = p.m == 0 ? 1 : p.m;
  if (IsCodes(p)) {
    if (CodesUnsupported(p, device)) return "reference";
    return p.m == 0 ? "w4a8_64x256" : ChooseTma(p, device);
  }
  if (!TmaUnsupported(p, device)) {
    if (p.m == 0) return "tma_64x256";
    return ChooseTma(p, device);
  }
  const bool tensor_cores = !TensorCoreUnsupported(p, device);
  // Rows of x from which dequantizing once and multiplying with the library's dense kernel wins.
  if (m > (tensor_cores ? 256 : 32) && Runs("dequantize_dot", p, device)) return "dequantize_dot";
  if (!tensor_cores) return SimtUnsupported(p, device) ? "reference" : "simt";
  for (const char* few : {"decode_8", "decode_16"}) {
    if (p.m > 0 && Runs(few, p, device)) return few;
  }
  // An unknown number of rows takes the tile that is never far from the best.
  if (!WgmmaUnsupported(p, device)) {
    if (p.m == 0) return "wgmma_64";
    if (m > 64 && Runs("wgmma_128", p, device)) return "wgmma_128";
    return m <= 16 ? "wgmma_16" : m <= 32 ? "wgmma_32" : "wgmma_64";
  }
  if (p.m == 0) return "mma_64";
  if (m > 64 && Runs("mma_128", p, device)) return "mma_128";
  return m <= 32 ? "mma_32" : "mma_64";
}

int ChooseSplit(const AwqGemmProblem& p, const Device& device, const Variant& v) {
  if (!v.splits) return 1;
  const int64_t depth_tiles = CeilDiv(p.contraction(), v.depth);
  if (p.split_k > 0) return static_cast<int>(std::min(p.split_k, depth_tiles));
  int64_t m = p.m == 0 ? 1 : p.m, batch = p.batch;
  int tokens = v.tokens, ctas_per_sm = v.ctas_per_sm;
  if (p.batch_invariant) {
    if (IsTma(v)) return BatchInvariantTmaSplit(p, device);
    // Parts that meet in the workspace would take as much of it for many rows as for few.
    if (device.arch < 90) return 1;
    m = 256, batch = 1, tokens = 64, ctas_per_sm = 1;  // whatever rows and tile there are
  }
  if (IsTma(v)) return p.m == 0 ? 1 : BestTmaSplit(p, device, v);
  const int64_t ctas = CeilDiv(m, tokens) * CeilDiv(p.outputs(), v.outputs) * batch;
  int split =
      static_cast<int>(std::min<int64_t>(kMaxCluster, std::max<int64_t>(1, depth_tiles / 4)));
  while (split > 1 && ctas > ResidentClusters(device, ctas_per_sm, split)) --split;
  return split;
}

}  // namespace

AwqGemmPlan PlanAwqGemm(const AwqGemmProblem& p, const Device& device, size_t workspace_limit) {
  AwqGemmPlan plan;
  for (const Variant& v : kVariants) {
    if (const char* why = Unsupported(v, p, device)) plan.refused.emplace_back(v.name, why);
  }
  plan.variant = p.variant.empty() ? Choose(p, device) : p.variant;
  if (plan.variant == "reference") return plan;
  const Variant* v = Find(plan.variant);
  if (v == nullptr) throw std::invalid_argument("awq_gemm: unknown variant " + plan.variant);
  if (const char* why = Unsupported(*v, p, device)) {
    throw std::invalid_argument("awq_gemm: variant " + plan.variant + " cannot run: " + why);
  }
  plan.kernel = v->kernel;
  plan.resident_ctas = device.sm_count * v->ctas_per_sm;
  plan.tile_tokens = v->tokens;
  plan.tile_outputs = v->outputs;
  if (v->tokens == 0) {
    plan.microseconds = DequantizeDotMicroseconds(p, device);
    return plan;
  }
  if (IsStream(*v)) {
    plan.microseconds = StreamMicroseconds(p, device, *v);
    const size_t bytes = StreamShares(p, device, *v).workspace_bytes();
    plan.stream_k = bytes > 0 && bytes <= workspace_limit;
    plan.workspace_bytes = plan.stream_k ? bytes : 0;
    return plan;
  }

  plan.split_k = ChooseSplit(p, device, *v);
  plan.cluster = plan.split_k > 1 && plan.split_k <= kMaxCluster && device.arch >= 90;
  if (IsTma(*v) && plan.split_k <= kMaxCluster && p.m > 0) {
    plan.microseconds = TmaMicroseconds(p, device, *v, plan.split_k);
  }
  if (plan.split_k > 1 && !plan.cluster) {
    const size_t partial = static_cast<size_t>(p.batch) * p.m * p.outputs() * sizeof(float);
    if (p.m > 0) {
      plan.split_k = static_cast<int>(std::min<size_t>(plan.split_k, workspace_limit / partial));
    }
    if (p.batch_invariant && p.m == 0) {
      throw std::invalid_argument("awq_gemm: batch_invariant with split_k_iters " +
                                  std::to_string(plan.split_k) +
                                  " needs the number of rows when the program is lowered");
    }
    if (plan.split_k <= 1 || p.m == 0) plan.split_k = 1;
    if (plan.split_k > 1) plan.workspace_bytes = plan.split_k * partial;
  }
  return plan;
}

int EffectiveArch(int arch) {
#ifdef JAX_AWQ_REAL_ARCHS
  // Machine code runs within its major version, PTX on anything later.
  constexpr int kReal[] = {JAX_AWQ_REAL_ARCHS 0};
  constexpr int kVirtual[] = {JAX_AWQ_VIRTUAL_ARCHS 0};
  int best = 0;
  for (int real : kReal) {
    if (real <= arch && real / 10 == arch / 10) best = std::max(best, real);
  }
  if (best > 0) return best;
  for (int ptx : kVirtual) {
    if (ptx <= arch) best = std::max(best, ptx);
  }
  return best;
#else
  return arch;
#endif
}

}  // namespace jax_awq
