// Which kernel runs which problem. Pure host code, so that it can be asked without a GPU.

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "kernels/int8_matmul.h"
#include "kernels/planning.h"

namespace jax_awq {
namespace {

constexpr int64_t kMaxGridYz = 65535;

struct Variant {
  const char* name;
  Int8MatmulKernel kernel;
  int tokens;
  int outputs;
  int cluster;      // CTAs that share their rows of a
  int step_clocks;  // of a CTA for 128 indices of K; 0: not for the cost model
  const char* (*unsupported)(const Int8MatmulProblem&, const Device&);
};

const char* AnyUnsupported(const Int8MatmulProblem& p, const Device& device) {
  if (device.arch == 0) return "this build has no code for the GPU's architecture";
  if (p.batch > kMaxGridYz) return "more than 65535 batch entries";
  if (CeilDiv(p.n, 128) > kMaxGridYz) return "N is not below 8388481";
  if (std::max(p.m, p.k) > INT32_MAX) return "a dimension exceeds 32 bits";
  return nullptr;
}

const char* MmaUnsupported(const Int8MatmulProblem& p, const Device& device) {
  if (const char* why = AnyUnsupported(p, device)) return why;
  return device.arch < 80 ? "needs compute capability 8.0" : nullptr;
}

const char* TmaUnsupported(const Int8MatmulProblem& p, const Device& device) {
  if (const char* why = AnyUnsupported(p, device)) return why;
  if (device.arch != 90 || !kHasSm90a) return "needs code for sm_90a";
  if (p.n % 16) return "rows of b are not 16-byte aligned";
  if (p.k == 0) return "K is 0";
  if (p.m == 0 && (p.packed || p.k % 16)) {
    return "the workspace for a depends on its rows, whose number is not known";
  }
  return nullptr;
}

// In the order in which they are tried. The clocks, at 1.98 GHz, are those that an H200 took; large
// products make it slow its clock, which is in them.
constexpr Variant kVariants[] = {
    {"tma_64", Int8MatmulKernel::kTma, 64, 128, 1, 480, TmaUnsupported},
    {"tma_128", Int8MatmulKernel::kTma, 128, 128, 2, 745, TmaUnsupported},
    {"tma_256", Int8MatmulKernel::kTma, 256, 128, 2, 1350, TmaUnsupported},
    {"mma", Int8MatmulKernel::kMma, 64, 128, 1, 0, MmaUnsupported},
    {"dp4a", Int8MatmulKernel::kDp4a, 64, 128, 1, 0, AnyUnsupported},
};

constexpr int kStep = 128;
constexpr int kMaxSplit = 8;

const Variant* Find(const std::string& name) {
  for (const Variant& v : kVariants) {
    if (name == v.name) return &v;
  }
  return nullptr;
}

int64_t PaddedK(const Int8MatmulProblem& p) { return CeilDiv(p.k, 16) * 16; }
bool Widens(const Int8MatmulProblem& p) { return p.packed || p.k % 16 != 0; }

size_t WidenedBytes(const Int8MatmulProblem& p) {
  return Widens(p) ? static_cast<size_t>(p.a_batch) * p.m * PaddedK(p) : 0;
}

size_t SumBytes(const Int8MatmulProblem& p, int split) {
  return split > 1 ? size_t{4} * split * p.batch * p.m * p.n : 0;
}

// Clocks that a TMA variant takes, to compare them: steps of the busiest processor and what starts
// and ends a tile, but no less than reading b takes; for splits the second kernel and its sums.
double Clocks(const Int8MatmulProblem& p, const Device& device, const Variant& v, int split) {
  constexpr double kTile = 1500;
  constexpr double kReadBytesPerClock = 2080;
  constexpr double kSecondKernel = 4500;
  constexpr double kSumBytesPerClock = 1900;
  const int64_t m = p.m == 0 ? 1 : p.m;
  const int64_t tiles =
      CeilDiv(m, v.tokens) * CeilDiv(p.n, int64_t{v.outputs} * v.cluster) * p.batch * split;
  const int64_t waves = CeilDiv(tiles, std::max(1, device.sm_count / v.cluster));
  const int64_t steps = CeilDiv(CeilDiv(p.k, kStep), split);
  const double read = static_cast<double>(p.b_rows()) * p.n / kReadBytesPerClock;
  const double sums = split > 1 ? kSecondKernel + 2 * SumBytes(p, split) / kSumBytesPerClock : 0;
  return std::max(waves * (steps * v.step_clocks + kTile), read) + sums;
}

int BestSplit(const Int8MatmulProblem& p, const Device& device, const Variant& v, size_t limit) {
  int best = 1;
  if (v.kernel != Int8MatmulKernel::kTma || p.m == 0) return best;
  for (int split = 2; split <= kMaxSplit && split <= CeilDiv(p.k, kStep); ++split) {
    if (WidenedBytes(p) + SumBytes(p, split) > limit) break;
    if (Clocks(p, device, v, split) < Clocks(p, device, v, best)) best = split;
  }
  return best;
}

const Variant* Choose(const Int8MatmulProblem& p, const Device& device, size_t limit) {
  const Variant* best = nullptr;
  double best_clocks = 0;
  for (const Variant& v : kVariants) {
    if (v.unsupported(p, device)) continue;
    if (v.step_clocks == 0) {
      if (best == nullptr) best = &v;
      continue;
    }
    if (WidenedBytes(p) > limit) continue;
    const double clocks = Clocks(p, device, v, BestSplit(p, device, v, limit));
    if (best == nullptr || clocks < best_clocks) best = &v, best_clocks = clocks;
  }
  return best;
}

}  // namespace

Int8MatmulPlan PlanInt8Matmul(const Int8MatmulProblem& p, const Device& device, size_t limit) {
  const std::string op = p.packed ? "int4_matmul" : "int8_matmul";
  Int8MatmulPlan plan;
  for (const Variant& v : kVariants) {
    if (const char* why = v.unsupported(p, device)) plan.refused.emplace_back(v.name, why);
  }
  const Variant* v = p.variant.empty() ? Choose(p, device, limit) : Find(p.variant);
  if (v == nullptr) {
    if (!p.variant.empty()) throw std::invalid_argument(op + ": unknown variant " + p.variant);
    plan.variant = "reference";
    return plan;
  }
  if (const char* why = v->unsupported(p, device)) {
    throw std::invalid_argument(op + ": variant " + p.variant + " cannot run: " + why);
  }
  plan.variant = v->name;
  plan.kernel = v->kernel;
  plan.tile_tokens = v->tokens;
  plan.tile_outputs = v->outputs;
  plan.sm_count = device.sm_count;
  if (v->kernel != Int8MatmulKernel::kTma) return plan;

  plan.cluster = v->cluster;
  plan.padded_k = PaddedK(p);
  plan.widen = Widens(p);
  plan.widened_bytes = WidenedBytes(p);
  if (plan.widened_bytes > limit) {
    throw std::invalid_argument(op + ": variant " + plan.variant + " needs " +
                                std::to_string(plan.widened_bytes) + " bytes of workspace");
  }
  plan.split_k = BestSplit(p, device, *v, limit);
  plan.workspace_bytes = plan.widened_bytes + SumBytes(p, plan.split_k);
  return plan;
}

}  // namespace jax_awq
