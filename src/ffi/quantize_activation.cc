// XLA buffers and attributes -> QuantizeActivationProblem.

#include "kernels/quantize_activation.h"

#include "ffi/buffers.h"
#include "ffi/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "quantize_activation";

// `scale` (0, 1) stands for none: then `row_scale` is found; it is unused where one is given, as
// `group_sums` is without a group size.
ffi::Error QuantizeActivation(Stream stream, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> scale,
                              ffi::Result<ffi::Buffer<ffi::S8>> q,
                              ffi::Result<ffi::Buffer<ffi::F32>> row_scale,
                              ffi::Result<ffi::Buffer<ffi::S32>> group_sums, int64_t bits,
                              int64_t group_size) {
  OperandChecker check(kOp);
  QuantizeActivationProblem p = {};
  JAX_AWQ_RETURN_IF_ERROR(check.Matrix("x", x, &p.rows, &p.k));
  JAX_AWQ_RETURN_IF_ERROR(check.Float("x", x, &p.x_dtype));
  if (p.k > INT32_MAX) return InvalidArgument(kOp, ": K=", p.k, " must be below 2^31");
  if (bits != 8 && bits != 4) return InvalidArgument(kOp, ": bits must be 8 or 4, got ", bits);
  p.bits = static_cast<int>(bits);
  int64_t stride;
  JAX_AWQ_RETURN_IF_ERROR(check.Shape("q", *q, {p.rows, bits == 4 ? (p.k + 1) / 2 : p.k}, &stride));
  p.q = q->untyped_data();
  p.x = x.untyped_data();
  JAX_AWQ_RETURN_IF_ERROR(check.Scale(scale, p.rows, p.k, &p.scale_columns, &p.rows_per_scale));
  if (p.rows_per_scale > 0) {
    p.scale = scale.typed_data();
  } else {
    JAX_AWQ_RETURN_IF_ERROR(check.Shape("row_scale", *row_scale, {p.rows}, &stride));
    p.row_scale = row_scale->typed_data();
  }
  p.group_size = group_size;
  if (group_size != 0) {
    const bool known = group_size == 32 || group_size == 64 || group_size == 128;
    if (group_size < 0 || (!known && group_size != p.k) || p.k % group_size) {
      return InvalidArgument(kOp, ": group_size must be 32, 64, 128 or K and divide K=", p.k,
                             ", got ", group_size);
    }
    JAX_AWQ_RETURN_IF_ERROR(
        check.Shape("group_sums", *group_sums, {p.rows, p.k / group_size}, &stride));
    p.group_sums = group_sums->typed_data();
  }
  if (check.batch() != 1) return InvalidArgument(kOp, ": rows of a batch must be folded");
  return Launched(kOp, LaunchQuantizeActivation(p, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeActivationHandler, QuantizeActivation,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
