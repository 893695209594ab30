// XLA buffers and attributes -> AwqGemmW4A8Problem, for awq_gemm_w4a8 and awq_gemm_w4a4. Checked
// again: an exported module comes here without passing through Python.

#include "kernels/awq_gemm_w4a8.h"

#include "ffi/buffers.h"
#include "ffi/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "awq_gemm_w4a8";

// `scale` (0) stands for none: scales are found for each row then.
ffi::Error AwqGemmW4A8(Stream stream, int32_t device_ordinal, ffi::AnyBuffer x,
                       ffi::Buffer<ffi::S32> qweight, ffi::AnyBuffer scales,
                       ffi::Buffer<ffi::S32> qzeros, ScaleBuffer scale, ffi::AnyBuffer bias,
                       ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::Buffer<ffi::U8>> workspace,
                       int64_t group_size, std::string_view layout, std::string_view activation,
                       std::string_view codes, std::string_view variant) {
  const auto known_activation = ActivationFromName(activation);
  if (!known_activation) return InvalidArgument(kOp, ": unknown activation ", activation);
  const auto known_codes = CodesFromName(codes);
  if (!known_codes) return InvalidArgument(kOp, ": unknown codes ", codes);

  OperandChecker check(kOp);
  AwqGemmW4A8Buffers buffers = {};
  AwqWeight& weight = buffers.weight;
  JAX_AWQ_RETURN_IF_ERROR(check.Weight(qweight, scales, qzeros, group_size, layout, &weight));
  AwqGemmW4A8Problem p;
  p.n = weight.n;
  p.k = weight.k;
  p.group_size = group_size;
  p.layout = weight.layout;
  p.scales_dtype = weight.scales_dtype;
  p.has_zeros = weight.qzeros != nullptr;
  p.has_activation = *known_activation != Activation::kNone;
  p.codes = *known_codes;
  p.variant = std::string(variant);

  std::vector<int64_t> dims;
  bool batched;
  JAX_AWQ_RETURN_IF_ERROR(check.Dimensions("x", x, 2, &dims, &batched));
  p.m = dims[0];
  JAX_AWQ_RETURN_IF_ERROR(check.Shape("x", x, {p.m, p.k}, &buffers.x_stride));
  bool each = false;
  JAX_AWQ_RETURN_IF_ERROR(
      check.Scales("scale", scale, p.m, &buffers.scale, &buffers.scale_stride, &each));
  if (buffers.scale) p.scale = each ? GivenScale::kForEachRow : GivenScale::kOne;
  if (x.element_type() == ffi::DataType::S8) {
    if (p.codes == Codes::kFloat8) return InvalidArgument(kOp, ": x of int8 has no float8 codes");
    if (!buffers.scale && p.m > 0) return InvalidArgument(kOp, ": x of int8 needs a scale");
    p.x_dtype = DType::kS8;
  } else {
    JAX_AWQ_RETURN_IF_ERROR(check.Float("x", x, &p.x_dtype));
  }
  JAX_AWQ_RETURN_IF_ERROR(check.Bias(bias, p.n, &buffers));
  JAX_AWQ_RETURN_IF_ERROR(check.Result("y", *y, {p.m, p.n}));
  JAX_AWQ_RETURN_IF_ERROR(check.Float("y", *y, &p.out_dtype));
  p.batch = check.batch();
  p.x_batch = buffers.x_stride != 0 ? p.batch : 1;
  p.scale_batch = buffers.scale_stride != 0 ? p.batch : 1;
  if (y->element_count() == 0) return ffi::Error::Success();

  buffers.x = x.untyped_data();
  buffers.y = y->untyped_data();
  buffers.workspace = workspace->untyped_data();
  buffers.activation = *known_activation;
  // Only codes that are given may be read where they are: others go into the workspace first.
  const void* codes_given = p.x_dtype == DType::kS8 ? buffers.x : nullptr;
  if (!Aligned({codes_given, weight.qweight, weight.scales, weight.qzeros, buffers.y})) {
    p.variant = "simt";
  }
  return PlanAndLaunch(
      kOp,
      [&] { return PlanAwqGemmW4A8(p, DescribeDevice(device_ordinal), workspace->size_bytes()); },
      [](const AwqGemmW4A8Plan& plan) { return plan.reason; },
      [&](const AwqGemmW4A8Plan& plan) { return LaunchAwqGemmW4A8(p, plan, buffers, stream); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AwqGemmW4a8Handler, AwqGemmW4A8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ScaleBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("layout")
                                  .Attr<std::string_view>("activation")
                                  .Attr<std::string_view>("codes")
                                  .Attr<std::string_view>("variant"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
