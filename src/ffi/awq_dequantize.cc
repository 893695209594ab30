// XLA buffers and attributes -> AwqDequantizeProblem.

#include "kernels/awq_dequantize.h"

#include "ffi/buffers.h"
#include "ffi/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "awq_dequantize";

ffi::Error AwqDequantize(Stream stream, ffi::Buffer<ffi::S32> qweight, ffi::AnyBuffer scales,
                         ffi::Buffer<ffi::S32> qzeros, ffi::Result<ffi::AnyBuffer> w,
                         int64_t group_size, std::string_view layout) {
  OperandChecker check(kOp);
  AwqDequantizeProblem p = {};
  JAX_AWQ_RETURN_IF_ERROR(check.Weight(qweight, scales, qzeros, group_size, layout, &p.weight));
  JAX_AWQ_RETURN_IF_ERROR(check.Result("w", *w, {p.weight.k, p.weight.n}));
  JAX_AWQ_RETURN_IF_ERROR(check.Float("w", *w, &p.out_dtype));
  p.batch = check.batch();
  if (w->element_count() == 0) return ffi::Error::Success();
  if (p.batch > 65535) return InvalidArgument(kOp, ": more than 65535 batch entries");
  p.w = w->untyped_data();
  return Launched(kOp, LaunchAwqDequantize(p, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AwqDequantizeHandler, AwqDequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("layout"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
