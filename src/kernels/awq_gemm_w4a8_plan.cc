// What the kernel of awq_gemm gets: codes of one byte, or the same codes as floats of 16 bits,
// which are exact. Pure host code, so that it can be asked without a GPU.

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "kernels/awq_gemm_w4a8.h"

namespace jax_awq {
namespace {

constexpr char kOp[] = "awq_gemm_w4a8";

// Up to so many rows reading the weight takes longer than multiplying, as floats, too.
constexpr int64_t kFewRows = 16;
// Rows of x up to which the kernel without tensor cores is better than none.
constexpr int64_t kSimtRows = 32;

bool StartsWith(const std::string& text, std::string_view start) {
  return text.compare(0, start.size(), start) == 0;
}

bool TakesBytes(const std::string& variant) { return StartsWith(variant, "w4a8_"); }

// Whether a kernel of awq_gemm multiplies codes of the weight and then scales the sums of a group.
// Others round (q - z) * s to 16 bits first, which the sums of integers are not to see.
bool KeepsGroupSums(const std::string& variant) {
  return TakesBytes(variant) || StartsWith(variant, "decode_") || StartsWith(variant, "few_");
}

size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

AwqGemmProblem Product(const AwqGemmW4A8Problem& p, DType x_dtype) {
  AwqGemmProblem product;
  product.m = p.m;
  product.n = p.n;
  product.k = p.k;
  product.batch = p.batch;
  product.group_size = p.group_size;
  product.layout = p.layout;
  product.x_dtype = x_dtype;
  product.scales_dtype = p.scales_dtype;
  product.out_dtype = p.out_dtype;
  product.has_zeros = p.has_zeros;
  product.has_activation = p.has_activation;
  product.variant = p.variant;
  product.fused_only = true;
  return product;
}

// Floats of 16 bits that codes can be: kernels want scales to be of them, too, or float16.
DType FloatsFor(const AwqGemmW4A8Problem& p) {
  return p.scales_dtype == DType::kBF16 ? DType::kBF16 : DType::kF16;
}

// The plan for codes as `x_dtype`; its variant is "reference" where no kernel takes them.
AwqGemmW4A8Plan PlanFor(const AwqGemmW4A8Problem& p, DType x_dtype, const Device& device,
                        size_t workspace_limit) {
  AwqGemmW4A8Plan plan;
  plan.problem = Product(p, x_dtype);
  const bool codes_are_x = p.x_dtype == DType::kS8;
  // Where codes and their scales are given, a batch of scales needs no batch of anything.
  const bool own_scales = !codes_are_x || !p.has_row_scales();
  plan.code_batch = std::max(p.x_batch, own_scales ? p.scale_batch : 1);
  plan.copies_codes = !codes_are_x || SizeOf(x_dtype) == 2;
  const size_t rows = static_cast<size_t>(plan.code_batch) * p.m;
  plan.row_scale_at = Aligned(plan.copies_codes ? rows * p.k * SizeOf(x_dtype) : 0);
  plan.chunk_sums_at = plan.row_scale_at + Aligned(p.has_row_scales() ? 0 : rows * sizeof(float));
  plan.gemm_at =
      plan.chunk_sums_at + Aligned(SizeOf(x_dtype) == 2 ? 0 : rows * ChunkSumColumns(p.k) * 2);
  if (plan.gemm_at > workspace_limit) {
    plan.variant = "reference";
    plan.reason = "the workspace has less than " + std::to_string(plan.gemm_at) + " bytes";
    return plan;
  }
  plan.gemm = PlanAwqGemm(plan.problem, device, workspace_limit - plan.gemm_at);
  plan.variant = plan.gemm.variant;
  plan.workspace_bytes = plan.gemm_at + plan.gemm.workspace_bytes;
  if (plan.gemm.kernel == AwqGemmKernel::kNone ||
      TakesBytes(plan.variant) != (SizeOf(x_dtype) == 1)) {
    plan.variant = "reference";
    plan.reason = plan.gemm.refused.empty() ? "" : plan.gemm.refused.back().second;
  }
  return plan;
}

// Why a plan for codes as floats is not taken unless it is forced, or nullptr.
const char* FloatsUnwanted(const AwqGemmW4A8Problem& p, const AwqGemmW4A8Plan& plan) {
  if (KeepsGroupSums(plan.variant)) return nullptr;
  if (plan.problem.x_dtype == DType::kBF16 && p.out_dtype != DType::kBF16) {
    return "it rounds weights to bfloat16, and the result has more bits";
  }
  if (SizeOf(p.out_dtype) != 2) {
    return "it rounds weights to float16, and the result is float32";
  }
  if (plan.gemm.kernel == AwqGemmKernel::kSimt && p.m > kSimtRows) {
    return "more than 32 rows of x for a kernel without tensor cores";
  }
  return nullptr;
}

const char* WhyFloats(const AwqGemmW4A8Problem& p) {
  if (!p.variant.empty()) return "codes are multiplied as 16-bit floats: the variant is forced";
  if (p.m <= kFewRows) {
    return "codes are multiplied as 16-bit floats: for up to 16 rows of x the weight decides the "
           "time";
  }
  if (p.group_size == 32 || p.group_size == 64) {
    return "codes are multiplied as 16-bit floats: to scale the sums of groups below 128 would "
           "cost more than tensor cores of one byte save";
  }
  return "codes are multiplied as 16-bit floats: no kernel takes them as they are";
}

}  // namespace

std::optional<Codes> CodesFromName(std::string_view name) {
  if (name == "int8") return Codes::kInt8;
  if (name == "int4") return Codes::kInt4;
  if (name == "float8_e4m3fn") return Codes::kFloat8;
  return std::nullopt;
}

AwqGemmW4A8Plan PlanAwqGemmW4A8(const AwqGemmW4A8Problem& p, const Device& device,
                                size_t workspace_limit) {
  const DType byte = p.codes == Codes::kFloat8 ? DType::kE4M3 : DType::kS8;
  AwqGemmW4A8Plan none;
  none.variant = "reference";
  if (p.m == 0) {
    none.reason = "the number of rows is not known when the program is lowered";
    return none;
  }
  if (!p.variant.empty()) {
    const bool bytes = TakesBytes(p.variant);
    AwqGemmW4A8Plan plan = PlanFor(p, bytes ? byte : FloatsFor(p), device, workspace_limit);
    if (plan.variant == "reference") {
      throw std::invalid_argument(std::string(kOp) + ": variant " + p.variant +
                                  " cannot run: " + plan.reason);
    }
    if (!bytes) plan.reason = WhyFloats(p);
    plan.refused = plan.gemm.refused;
    return plan;
  }

  AwqGemmW4A8Plan bytes = PlanFor(p, byte, device, workspace_limit);
  AwqGemmW4A8Plan floats = PlanFor(p, FloatsFor(p), device, workspace_limit);
  // Of each kernel what it says to the codes it is made for.
  for (const auto& refusal : bytes.gemm.refused) {
    if (TakesBytes(refusal.first)) none.refused.push_back(refusal);
  }
  for (const auto& refusal : floats.gemm.refused) {
    if (!TakesBytes(refusal.first)) none.refused.push_back(refusal);
  }
  const bool can_bytes = bytes.variant != "reference";
  bool can_floats = floats.variant != "reference";
  if (!can_floats) none.reason = floats.reason;
  if (can_floats) {
    if (const char* why = FloatsUnwanted(p, floats)) {
      none.refused.emplace_back(floats.variant, why);
      none.reason = why;
      can_floats = false;
    }
  }
  const bool few = can_floats && p.m <= kFewRows && KeepsGroupSums(floats.variant);
  AwqGemmW4A8Plan plan = can_bytes && !few ? bytes : can_floats ? floats : none;
  if (can_floats && (few || !can_bytes)) plan.reason = WhyFloats(p);
  plan.refused = std::move(none.refused);
  return plan;
}

}  // namespace jax_awq
