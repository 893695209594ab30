// Which kernel runs which problem. Pure host code, so that it can be asked without a GPU.

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "kernels/awq_gemm.h"
#include "kernels/awq_gemm_cost.h"
#include "kernels/planning.h"

namespace jax_awq {
namespace {

constexpr int kMaxGridYZ = 65535;

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
  static_assert(kTokens % 8 == 0 && kTokens <= 24);
  constexpr const char* kWhy[] = {"more than 8 rows of x", "more than 16 rows of x",
                                  "more than 24 rows of x"};
  return p.m <= kTokens ? nullptr : kWhy[kTokens / 8 - 1];
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

const char* TransposedUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = WgmmaUnsupported(p, device)) return why;
  if (p.layout != Layout::kGemm || !p.transpose) return "weight is packed along the outputs";
  if (p.n % 32) return "rows of qweight are not 16-byte aligned";
  if (p.k % 8) return "K is not a multiple of 8";
  if (std::max({p.m, p.n, p.k}) > INT32_MAX) return "a dimension exceeds 32 bits";
  return nullptr;
}

template <int kTokens>
const char* FewUnsupported(const AwqGemmProblem& p, const Device& device) {
  if (const char* why = TooManyRows<kTokens>(p)) return why;
  if (CeilDiv(p.n, 128) > kMaxGridYZ) return "N exceeds 8388480";
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
constexpr AwqGemmVariant kVariants[] = {
    {"decode_8", AwqGemmKernel::kDecode, 8, 128, 32, 3, true, 0, DecodeUnsupported<8>},
    {"decode_16", AwqGemmKernel::kDecode, 16, 128, 32, 2, true, 0, DecodeUnsupported<16>},
    {"few_8x128", AwqGemmKernel::kFew, 8, 128, 128, 1, true, 0.1035, FewUnsupported<8>},
    {"few_8x192", AwqGemmKernel::kFew, 8, 192, 128, 1, true, 0.16, FewUnsupported<8>},
    {"few_8x224", AwqGemmKernel::kFew, 8, 224, 128, 1, true, 0.2005, FewUnsupported<8>},
    {"few_8x256", AwqGemmKernel::kFew, 8, 256, 128, 1, true, 0.208, FewUnsupported<8>},
    {"few_16x128", AwqGemmKernel::kFew, 16, 128, 128, 1, true, 0.127, FewUnsupported<16>},
    {"few_16x192", AwqGemmKernel::kFew, 16, 192, 128, 1, true, 0.197, FewUnsupported<16>},
    {"few_16x224", AwqGemmKernel::kFew, 16, 224, 128, 1, true, 0.237, FewUnsupported<16>},
    {"few_16x256", AwqGemmKernel::kFew, 16, 256, 128, 1, true, 0.271, FewUnsupported<16>},
    {"few_24x128", AwqGemmKernel::kFew, 24, 128, 128, 1, true, 0.169, FewUnsupported<24>},
    {"few_24x192", AwqGemmKernel::kFew, 24, 192, 128, 1, true, 0.261, FewUnsupported<24>},
    {"few_24x224", AwqGemmKernel::kFew, 24, 224, 128, 1, true, 0.313, FewUnsupported<24>},
    {"tma_32x128", AwqGemmKernel::kTma, 32, 128, 64, 2, true, 0.239, TmaUnsupported},
    {"tma_32x192", AwqGemmKernel::kTma, 32, 192, 64, 1, true, 0.297, TmaUnsupported},
    {"tma_32x256", AwqGemmKernel::kTma, 32, 256, 64, 2, true, 0.406, TmaUnsupported},
    {"tma_64x128", AwqGemmKernel::kTma, 64, 128, 64, 2, true, 0.29, TmaUnsupported},
    {"tma_64x192", AwqGemmKernel::kTma, 64, 192, 64, 1, true, 0.334, TmaUnsupported},
    {"tma_64x256", AwqGemmKernel::kTma, 64, 256, 64, 1, true, 0.438, TmaUnsupported},
    {"tma_96x128", AwqGemmKernel::kTma, 96, 128, 64, 2, true, 0.331, TmaUnsupported},
    {"tma_96x192", AwqGemmKernel::kTma, 96, 192, 64, 1, true, 0.427, TmaUnsupported},
    {"tma_96x256", AwqGemmKernel::kTma, 96, 256, 64, 1, true, 0.58, TmaUnsupported},
    {"tma_128x128", AwqGemmKernel::kTma, 128, 128, 64, 1, true, 0.363, TmaUnsupported},
    {"tma_128x192", AwqGemmKernel::kTma, 128, 192, 64, 1, true, 0.521, TmaUnsupported},
    {"tma_128x256", AwqGemmKernel::kTma, 128, 256, 64, 1, true, 0.67, TmaUnsupported},
    {"tma_160x128", AwqGemmKernel::kTma, 160, 128, 64, 1, true, 0.427, TmaUnsupported},
    {"tma_192x128", AwqGemmKernel::kTma, 192, 128, 64, 1, true, 0.506, TmaUnsupported},
    {"tma_192x192", AwqGemmKernel::kTma, 192, 192, 64, 1, true, 0.735, TmaUnsupported},
    {"tma_224x128", AwqGemmKernel::kTma, 224, 128, 64, 1, true, 0.572, TmaUnsupported},
    {"tma_256x128", AwqGemmKernel::kTma, 256, 128, 64, 1, true, 0.66, TmaUnsupported},
    {"tma_288x128", AwqGemmKernel::kTma, 288, 128, 64, 1, true, 0.75, TmaUnsupported},
    {"tma_320x128", AwqGemmKernel::kTma, 320, 128, 64, 1, true, 0.845, TmaUnsupported},
    {"stream_64x256", AwqGemmKernel::kTma, 64, 256, 64, 1, false, 0.438, StreamUnsupported},
    {"stream_96x256", AwqGemmKernel::kTma, 96, 256, 64, 1, false, 0.58, StreamUnsupported},
    {"stream_128x128", AwqGemmKernel::kTma, 128, 128, 64, 1, false, 0.363, StreamUnsupported},
    {"stream_128x256", AwqGemmKernel::kTma, 128, 256, 64, 1, false, 0.67, StreamUnsupported},
    {"stream_160x128", AwqGemmKernel::kTma, 160, 128, 64, 1, false, 0.427, StreamUnsupported},
    {"stream_192x128", AwqGemmKernel::kTma, 192, 128, 64, 1, false, 0.506, StreamUnsupported},
    {"stream_224x128", AwqGemmKernel::kTma, 224, 128, 64, 1, false, 0.572, StreamUnsupported},
    {"stream_256x128", AwqGemmKernel::kTma, 256, 128, 64, 1, false, 0.66, StreamUnsupported},
    {"stream_288x128", AwqGemmKernel::kTma, 288, 128, 64, 1, false, 0.75, StreamUnsupported},
    {"stream_320x128", AwqGemmKernel::kTma, 320, 128, 64, 1, false, 0.845, StreamUnsupported},
    {"w4a8_32x128", AwqGemmKernel::kTma, 32, 128, 128, 1, true, 0.132, CodesUnsupported},
    {"w4a8_32x256", AwqGemmKernel::kTma, 32, 256, 128, 1, true, 0.236, CodesUnsupported},
    {"w4a8_64x128", AwqGemmKernel::kTma, 64, 128, 128, 1, true, 0.171, CodesUnsupported},
    {"w4a8_64x192", AwqGemmKernel::kTma, 64, 192, 128, 1, true, 0.236, CodesUnsupported},
    {"w4a8_64x256", AwqGemmKernel::kTma, 64, 256, 128, 1, true, 0.33, CodesUnsupported},
    {"w4a8_128x128", AwqGemmKernel::kTma, 128, 128, 128, 1, true, 0.26, CodesUnsupported},
    {"w4a8_256x128", AwqGemmKernel::kTma, 256, 128, 128, 1, true, 0.38, CodesSingleUnsupported},
    {"transposed_128x128", AwqGemmKernel::kTma, 128, 128, 128, 1, true, 0.40,
     TransposedUnsupported},
    {"transposed_256x128", AwqGemmKernel::kTma, 256, 128, 128, 1, true, 0.70,
     TransposedUnsupported},
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

bool IsStream(const AwqGemmVariant& v) { return v.unsupported == StreamUnsupported; }

// Whether the cost model covers it.
bool IsTma(const AwqGemmVariant& v) {
  return v.kernel == AwqGemmKernel::kTma || v.kernel == AwqGemmKernel::kFew;
}

// Whether a row has the same sums in every such tile of its kernel, and in every place of a tile.
bool BatchInvariant(const AwqGemmVariant& v) {
  switch (v.kernel) {
    case AwqGemmKernel::kTma:  // the kernel for few rows sums groups apart
      return !IsStream(v) && v.unsupported != TransposedUnsupported;
    case AwqGemmKernel::kWgmma:
    case AwqGemmKernel::kMma:  // in larger tiles no warps share the depth of a stage
      return v.tokens <= 64;
    case AwqGemmKernel::kSimt:
      return true;
    default:
      return false;
  }
}

const char* Unsupported(const AwqGemmVariant& v, const AwqGemmProblem& p, const Device& device) {
  if (const char* why = v.unsupported(p, device)) return why;
  if (p.batch_invariant && !BatchInvariant(v)) return "its sums depend on the number of rows";
  return nullptr;
}

const AwqGemmVariant* Find(const std::string& name) {
  for (const AwqGemmVariant& v : kVariants) {
    if (name == v.name) return &v;
  }
  return nullptr;
}

bool Runs(const char* name, const AwqGemmProblem& p, const Device& device) {
  return Unsupported(*Find(name), p, device) == nullptr;
}

// The split that few rows and many share: the one with the least product of their times.
int BatchInvariantTmaSplit(const AwqGemmProblem& p, const Device& device) {
  AwqGemmProblem few = p, many = p;
  few.m = 32, many.m = 1024;
  few.batch = many.batch = 1;
  const AwqGemmVariant& few_tile = *Find("tma_32x256");
  const AwqGemmVariant& many_tile = *Find("tma_256x128");
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

const char* ChooseTma(const AwqGemmProblem& p, const Device& device) {
  const AwqGemmVariant* best = nullptr;
  double best_us = 0;
  const int shared_split = p.batch_invariant ? BatchInvariantTmaSplit(p, device) : 0;
  for (const AwqGemmVariant& v : kVariants) {
    if (!IsTma(v) || Unsupported(v, p, device)) continue;
    // More vector instructions for a product than tiles of 256 rows, and so more power: with many
    // rows that is what counts, and these times are of a processor at rest.
    constexpr int kMostRowsOfTwelveWarps = 512;
    if (v.kernel == AwqGemmKernel::kTma && v.outputs == 192 && p.m > kMostRowsOfTwelveWarps) {
      continue;
    }
    // With one row of tiles its steps take a quarter longer than this model has them.
    if (IsCodes(p) && v.outputs == 192 && p.m <= v.tokens) continue;
    const int split = p.split_k > 0       ? 1
                      : p.batch_invariant ? shared_split
                                          : BestTmaSplit(p, device, v);
    const double us =
        IsStream(v) ? StreamMicroseconds(p, device, v) : TmaMicroseconds(p, device, v, split);
    if (best == nullptr || us < best_us) best = &v, best_us = us;
  }
  // The library's rate is that of a processor under load, the constants here of one that is not.
  constexpr double kLoad = 1.07;
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
  // Below, its smallest tile is too large.
  constexpr int kMinTransposedRows = 17;
  if (m >= kMinTransposedRows && !p.batch_invariant && !TransposedUnsupported(p, device)) {
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

int ChooseSplit(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v) {
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

// With codes of one byte x has to be read once for two CTAs to come in time. Otherwise that saves
// power, which under load is speed, but neighbours wait for each other: it has to be worth it.
int Members(const AwqGemmProblem& p, const Device& device, const AwqGemmVariant& v, int split) {
  const int64_t columns = CeilDiv(p.outputs(), v.outputs);
  if (v.kernel != AwqGemmKernel::kTma || v.outputs > 128 || split > 1 || columns < 2) return 1;
  if (IsCodes(p)) return 2;
  const bool one_wave = CeilDiv(p.m, v.tokens) * columns * p.batch <= device.sm_count;
  return !p.transpose && v.tokens >= 160 && columns % 2 == 0 && (IsStream(v) || !one_wave) ? 2 : 1;
}

}  // namespace

AwqGemmPlan PlanAwqGemm(const AwqGemmProblem& p, const Device& device, size_t workspace_limit) {
  AwqGemmPlan plan;
  for (const AwqGemmVariant& v : kVariants) {
    if (const char* why = Unsupported(v, p, device)) plan.refused.emplace_back(v.name, why);
  }
  plan.variant = p.variant.empty() ? Choose(p, device) : p.variant;
  if (plan.variant == "reference") return plan;
  const AwqGemmVariant* v = Find(plan.variant);
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
    plan.members = Members(p, device, *v, 1);
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
  plan.members = Members(p, device, *v, plan.split_k);
  return plan;
}

namespace {

#ifdef JAX_AWQ_REAL_ARCHS
constexpr int kReal[] = {JAX_AWQ_REAL_ARCHS 0};
constexpr int kVirtual[] = {JAX_AWQ_VIRTUAL_ARCHS 0};

// Machine code runs within its major version, PTX on anything later. 0 where there is none.
int NewestMachineCode(int arch) {
  int best = 0;
  for (int real : kReal) {
    if (real <= arch && real / 10 == arch / 10) best = std::max(best, real);
  }
  return best;
}

int NewestPtx(int arch) {
  int best = 0;
  for (int ptx : kVirtual) {
    if (ptx <= arch) best = std::max(best, ptx);
  }
  return best;
}
#else
int NewestMachineCode(int arch) { return arch; }
int NewestPtx(int) { return 0; }
#endif

}  // namespace

int EffectiveArch(int arch) {
  const int machine_code = NewestMachineCode(arch);
  return machine_code > 0 ? machine_code : NewestPtx(arch);
}

bool RunsFromPtx(int arch) { return EffectiveArch(arch) != NewestMachineCode(arch); }

}  // namespace jax_awq
