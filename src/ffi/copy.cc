// For benchmarks alone: copies a buffer.

#include "ffi/status.h"
#include "kernels/memory.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "copy";

ffi::Error Copy(Stream stream, int32_t device_ordinal, ffi::AnyBuffer x,
                ffi::Result<ffi::AnyBuffer> y, int64_t shape) {
  if (shape < 0 || shape >= kMemoryShapes) {
    return InvalidArgument(kOp, ": shape must be below ", kMemoryShapes, ", got ", shape);
  }
  CopyProblem p = {};
  p.bytes = static_cast<int64_t>(x.size_bytes());
  if (p.bytes % 16) {
    return InvalidArgument(kOp, ": x must be a multiple of 16 bytes, got ", p.bytes);
  }
  if (y->size_bytes() != x.size_bytes()) {
    return InvalidArgument(kOp, ": y must have ", p.bytes, " bytes as x, got ", y->size_bytes());
  }
  p.x = x.untyped_data();
  p.y = y->untyped_data();
  p.shape = static_cast<int>(shape);
  return Launched(kOp, LaunchCopy(p, DescribeDevice(device_ordinal).sm_count, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CopyHandler, Copy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("shape"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
