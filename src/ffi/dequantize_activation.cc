// XLA buffers and attributes -> DequantizeActivationProblem.

#include "kernels/dequantize_activation.h"

#include "ffi/buffers.h"
#include "ffi/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "dequantize_activation";

ffi::Error DequantizeActivation(Stream stream, ffi::Buffer<ffi::S8> q, ffi::Buffer<ffi::F32> scale,
                                ffi::Result<ffi::AnyBuffer> x, int64_t bits) {
  OperandChecker check(kOp);
  DequantizeActivationProblem p = {};
  JAX_AWQ_RETURN_IF_ERROR(check.Matrix("x", *x, &p.rows, &p.k));
  JAX_AWQ_RETURN_IF_ERROR(check.Float("x", *x, &p.x_dtype));
  if (p.k > INT32_MAX) return InvalidArgument(kOp, ": K=", p.k, " must be below 2^31");
  if (bits != 8 && bits != 4) return InvalidArgument(kOp, ": bits must be 8 or 4, got ", bits);
  p.bits = static_cast<int>(bits);
  int64_t stride;
  JAX_AWQ_RETURN_IF_ERROR(check.Shape("q", q, {p.rows, bits == 4 ? (p.k + 1) / 2 : p.k}, &stride));
  JAX_AWQ_RETURN_IF_ERROR(check.Scale(scale, p.rows, p.k, &p.scale_columns, &p.rows_per_scale));
  if (check.batch() != 1) return InvalidArgument(kOp, ": rows of a batch must be folded");
  if (x->element_count() == 0) return ffi::Error::Success();
  if (p.rows_per_scale == 0) return InvalidArgument(kOp, ": scale must not be empty");
  p.q = q.untyped_data();
  p.scale = scale.typed_data();
  p.x = x->untyped_data();
  return Launched(kOp, LaunchDequantizeActivation(p, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DequantizeActivationHandler, DequantizeActivation,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
