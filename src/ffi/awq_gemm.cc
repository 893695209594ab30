// XLA buffers and attributes -> AwqGemmProblem, checked again: an exported module comes here
// without passing through Python.

#include "kernels/awq_gemm.h"

#include "ffi/buffers.h"
#include "ffi/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "awq_gemm";

ffi::Error AwqGemm(Stream stream, int32_t device_ordinal, ffi::AnyBuffer x,
                   ffi::Buffer<ffi::S32> qweight, ffi::AnyBuffer scales,
                   ffi::Buffer<ffi::S32> qzeros, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t group_size,
                   std::string_view layout, std::string_view activation, int64_t split_k,
                   bool transpose, bool batch_invariant, std::string_view variant) {
  const auto known_activation = ActivationFromName(activation);
  if (!known_activation) return InvalidArgument(kOp, ": unknown activation ", activation);
  if (split_k < 0) return InvalidArgument(kOp, ": split_k must not be negative, got ", split_k);

  OperandChecker check(kOp);
  AwqGemmBuffers buffers = {};
  AwqWeight& weight = buffers.weight;
  JAX_AWQ_RETURN_IF_ERROR(check.Weight(qweight, scales, qzeros, group_size, layout, &weight));
  AwqGemmProblem p;
  p.n = weight.n;
  p.k = weight.k;
  p.group_size = group_size;
  p.layout = weight.layout;
  p.scales_dtype = weight.scales_dtype;
  p.has_zeros = weight.qzeros != nullptr;
  p.has_activation = *known_activation != Activation::kNone;
  p.transpose = transpose;
  p.split_k = split_k;
  p.variant = std::string(variant);
  p.batch_invariant = batch_invariant;
  p.fused_only = true;

  std::vector<int64_t> dims;
  bool batched;
  JAX_AWQ_RETURN_IF_ERROR(check.Dimensions("x", x, 2, &dims, &batched));
  p.m = dims[0];
  JAX_AWQ_RETURN_IF_ERROR(check.Shape("x", x, {p.m, p.contraction()}, &buffers.x_stride));
  JAX_AWQ_RETURN_IF_ERROR(check.Float("x", x, &p.x_dtype));
  JAX_AWQ_RETURN_IF_ERROR(check.Bias(bias, p.outputs(), &buffers));
  JAX_AWQ_RETURN_IF_ERROR(check.Result("y", *y, {p.m, p.outputs()}));
  JAX_AWQ_RETURN_IF_ERROR(check.Float("y", *y, &p.out_dtype));
  p.batch = check.batch();
  if (y->element_count() == 0) return ffi::Error::Success();

  buffers.x = x.untyped_data();
  buffers.y = y->untyped_data();
  buffers.workspace = workspace->untyped_data();
  buffers.activation = *known_activation;
  // Shapes imply the alignment that the tensor core kernels count on, unless a caller other than
  // XLA passes an odd base.
  if (!Aligned({buffers.x, weight.qweight, weight.scales, weight.qzeros, buffers.y})) {
    p.variant = "simt";
  }
  return PlanAndLaunch(
      kOp, [&] { return PlanAwqGemm(p, DescribeDevice(device_ordinal), workspace->size_bytes()); },
      [](const AwqGemmPlan& plan) { return plan.refused.back().second; },
      [&](const AwqGemmPlan& plan) { return LaunchAwqGemm(p, plan, buffers, stream); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AwqGemmHandler, AwqGemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("layout")
                                  .Attr<std::string_view>("activation")
                                  .Attr<int64_t>("split_k")
                                  .Attr<bool>("transpose")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<std::string_view>("variant"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
