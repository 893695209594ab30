// jax_awq._ext: what Python needs of the compiled half.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/awq_gemm.h"
#include "kernels/awq_gemm_w4a8.h"
#include "kernels/int8_matmul.h"

#ifdef JAX_AWQ_CUDA
#include <cuda_runtime_api.h>

#include "xla/ffi/api/c_api.h"

#define JAX_AWQ_OP(name, handler) extern "C" XLA_FFI_Error* handler(XLA_FFI_CallFrame*);
#include "ffi/ops.def"
#undef JAX_AWQ_OP
#endif

extern const char* const kSourceHash;

namespace nb = nanobind;
using namespace nb::literals;

namespace jax_awq {
namespace {

nb::dict Registrations() {
  nb::dict handlers;
#ifdef JAX_AWQ_CUDA
#define JAX_AWQ_OP(name, handler) \
  handlers["jax_awq." #name] = nb::capsule(reinterpret_cast<void*>(handler));
#include "ffi/ops.def"
#undef JAX_AWQ_OP
#endif
  return handlers;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_AWQ_VERSION;
#ifdef JAX_AWQ_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  // Ends in nullptr because a build without CUDA has none.
  static constexpr const char* kArchitectures[] = {JAX_AWQ_ARCHITECTURE_NAMES nullptr};
  nb::list architectures;
  for (const char* const* name = kArchitectures; *name != nullptr; ++name) {
    architectures.append(*name);
  }
  info["architectures"] = architectures;
  info["nvcc"] = JAX_AWQ_NVCC_VERSION;
  info["jaxlib_headers"] = JAX_AWQ_JAXLIB_VERSION;
  info["source_hash"] = kSourceHash;
  return info;
}

std::string CudaVersion(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// `driver` and `toolkit` as CUDA writes its versions, 13000 for 13.0; `driver` is 0 where there is
// none. `ptx_arch` is the compute capability of a device that would run PTX of this build, or 0.
std::string DriverProblemOf(int driver, int toolkit, int ptx_arch) {
  // A driver runs machine code of any toolkit of its own major version, and of older ones, but
  // compiles no PTX of a newer one.
  const bool older_major = driver / 1000 < toolkit / 1000;
  if (driver == 0 || driver >= toolkit || (!older_major && ptx_arch == 0)) return "";
  const std::string problem = "the NVIDIA driver supports CUDA " + CudaVersion(driver) +
                              ", but jax_awq was built with CUDA " + CudaVersion(toolkit);
  if (older_major) {
    return problem + ": update the driver, or build jax_awq with a toolkit the driver supports";
  }
  const std::string arch = std::to_string(ptx_arch);
  // Plain sm_90 has no wgmma.
  return problem + " and has only PTX for the GPU's sm_" + arch +
         ", which the driver is too old to compile: update the driver, or build jax_awq with "
         "JAX_AWQ_CUDA_ARCHITECTURES=" +
         arch + (ptx_arch == 90 ? "a" : "") + "-real";
}

std::string DriverProblem() {
#ifdef JAX_AWQ_CUDA
  int driver = 0;
  int devices = 0;
  cudaDriverGetVersion(&driver);
  cudaGetDeviceCount(&devices);
  int ptx_arch = 0;
  for (int ordinal = 0; ordinal < devices; ++ordinal) {
    const int arch = ComputeCapability(ordinal);
    if (RunsFromPtx(arch)) ptx_arch = arch;
  }
  return DriverProblemOf(driver, CUDART_VERSION, ptx_arch);
#else
  return "";
#endif
}

DType ParseDType(const std::string& name) {
  if (name == "float16") return DType::kF16;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float32") return DType::kF32;
  throw std::invalid_argument("unknown dtype " + name);
}

// "gemv" is here because its kernel sees it as oc_major, once scales and zeros are rearranged.
Layout ParseLayout(const std::string& name) {
  if (name == "gemm") return Layout::kGemm;
  if (name == "oc_major" || name == "gemv") return Layout::kOcMajor;
  throw std::invalid_argument("unknown layout " + name);
}

nb::dict RefusedDict(const std::vector<std::pair<std::string, std::string>>& refused) {
  nb::dict reasons;
  for (const auto& [name, reason] : refused) reasons[name.c_str()] = reason;
  return reasons;
}

template <typename Plan>
nb::dict PlanDict(const Plan& plan) {
  nb::dict result;
  result["variant"] = plan.variant;
  result["tile"] = nb::make_tuple(plan.tile_tokens, plan.tile_outputs);
  result["split_k"] = plan.split_k;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["refused"] = RefusedDict(plan.refused);
  return result;
}

nb::dict PlanGemm(int64_t m, int64_t n, int64_t k, int64_t batch, int64_t group_size,
                  const std::string& layout, const std::string& x_dtype,
                  const std::string& scales_dtype, const std::string& out_dtype, bool has_zeros,
                  bool has_activation, bool transpose, int64_t split_k, bool batch_invariant,
                  const std::string& variant, int arch, int sm_count) {
  AwqGemmProblem problem;
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.batch = batch;
  problem.group_size = group_size;
  problem.layout = ParseLayout(layout);
  problem.x_dtype = ParseDType(x_dtype);
  problem.scales_dtype = ParseDType(scales_dtype);
  problem.out_dtype = ParseDType(out_dtype);
  problem.has_zeros = has_zeros;
  problem.has_activation = has_activation;
  problem.transpose = transpose;
  problem.split_k = split_k;
  problem.batch_invariant = batch_invariant;
  problem.variant = variant;
  const AwqGemmPlan plan = PlanAwqGemm(problem, Device{EffectiveArch(arch), sm_count});
  nb::dict result = PlanDict(plan);
  result["microseconds"] = plan.microseconds;
  return result;
}

nb::dict PlanInt8(int64_t m, int64_t n, int64_t k, int64_t batch, int64_t a_batch, bool packed,
                  const std::string& variant, int arch, int sm_count) {
  Int8MatmulProblem problem;
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.batch = batch;
  problem.a_batch = a_batch;
  problem.packed = packed;
  problem.variant = variant;
  return PlanDict(PlanInt8Matmul(problem, Device{EffectiveArch(arch), sm_count}));
}

nb::dict PlanW4A8(int64_t m, int64_t n, int64_t k, int64_t batch, int64_t x_batch,
                  int64_t scale_batch, int64_t group_size, const std::string& layout,
                  const std::string& x_dtype, const std::string& scales_dtype,
                  const std::string& out_dtype, bool has_zeros, bool has_activation,
                  const std::string& codes, const std::string& scale, const std::string& variant,
                  int arch, int sm_count) {
  AwqGemmW4A8Problem problem;
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.batch = batch;
  problem.x_batch = x_batch;
  problem.scale_batch = scale_batch;
  problem.group_size = group_size;
  problem.layout = ParseLayout(layout);
  problem.x_dtype = x_dtype == "int8" ? DType::kS8 : ParseDType(x_dtype);
  problem.scales_dtype = ParseDType(scales_dtype);
  problem.out_dtype = ParseDType(out_dtype);
  problem.has_zeros = has_zeros;
  problem.has_activation = has_activation;
  const auto known_codes = CodesFromName(codes);
  if (!known_codes) throw std::invalid_argument("unknown codes " + codes);
  problem.codes = *known_codes;
  if (scale == "row") problem.scale = GivenScale::kForEachRow;
  if (scale == "one") problem.scale = GivenScale::kOne;
  problem.variant = variant;
  const AwqGemmW4A8Plan plan = PlanAwqGemmW4A8(problem, Device{EffectiveArch(arch), sm_count});

  nb::dict result = PlanDict(plan.gemm);
  result["variant"] = plan.variant;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["refused"] = RefusedDict(plan.refused);
  result["reason"] = plan.reason;
  result["as_floats"] = SizeOf(plan.problem.x_dtype) == 2;
  return result;
}

}  // namespace
}  // namespace jax_awq

NB_MODULE(_ext, m) {
  m.doc() = "The compiled half of jax_awq.";
  m.def("registrations", &jax_awq::Registrations,
        "FFI target name -> handler, for platform CUDA; empty in a build without CUDA.");
  m.def("build_info", &jax_awq::BuildInfo, "What this extension was built from.");
  m.def("driver_problem", &jax_awq::DriverProblem,
        "Why the CUDA driver cannot run this build; empty if it can, or if there is none.");
  m.def("driver_problem_of", &jax_awq::DriverProblemOf, nb::kw_only(), "driver"_a, "toolkit"_a,
        "ptx_arch"_a, "`driver_problem` of a driver, a toolkit and a GPU that is not here.");
  m.def("runs_from_ptx", &jax_awq::RunsFromPtx, "arch"_a,
        "Whether a GPU would run PTX of this build, for want of machine code.");
  m.def("plan_awq_gemm", &jax_awq::PlanGemm, nb::kw_only(), "m"_a, "n"_a, "k"_a, "batch"_a,
        "group_size"_a, "layout"_a, "x_dtype"_a, "scales_dtype"_a, "out_dtype"_a, "has_zeros"_a,
        "has_activation"_a, "transpose"_a, "split_k"_a, "batch_invariant"_a = false, "variant"_a,
        "arch"_a, "sm_count"_a,
        "Which kernel would run an awq_gemm. Raises ValueError for a forced one that cannot.");
  m.def("plan_awq_gemm_w4a8", &jax_awq::PlanW4A8, nb::kw_only(), "m"_a, "n"_a, "k"_a, "batch"_a,
        "x_batch"_a, "scale_batch"_a, "group_size"_a, "layout"_a, "x_dtype"_a, "scales_dtype"_a,
        "out_dtype"_a, "has_zeros"_a, "has_activation"_a, "codes"_a, "scale"_a, "variant"_a,
        "arch"_a, "sm_count"_a,
        "Which kernel would run an awq_gemm_w4a8, and on which codes. Raises ValueError for a "
        "forced one that cannot.");
  m.def(
      "plan_int8_matmul", &jax_awq::PlanInt8, nb::kw_only(), "m"_a, "n"_a, "k"_a, "batch"_a,
      "a_batch"_a, "packed"_a, "variant"_a, "arch"_a, "sm_count"_a,
      "Which kernel would run an int8_matmul, or an int4_matmul where operands are packed. Raises "
      "ValueError for a forced one that cannot.");
}
