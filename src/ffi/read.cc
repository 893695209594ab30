// For benchmarks alone: reads three buffers and does nothing with them.

#include "ffi/status.h"
#include "kernels/memory.h"
#include "xla/ffi/api/ffi.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "read";

ffi::Error Read(Stream stream, int32_t device_ordinal, ffi::AnyBuffer a, ffi::AnyBuffer b,
                ffi::AnyBuffer c, ffi::Result<ffi::Buffer<ffi::U32>> y, int64_t shape) {
  if (shape < 0 || shape >= kMemoryShapes) {
    return InvalidArgument(kOp, ": shape must be below ", kMemoryShapes, ", got ", shape);
  }
  if (y->element_count() != 1) return InvalidArgument(kOp, ": y must have one element");
  ReadProblem p = {};
  int part = 0;
  for (const ffi::AnyBuffer* buffer : {&a, &b, &c}) {
    p.parts[part] = buffer->untyped_data();
    p.bytes[part++] = static_cast<int64_t>(buffer->size_bytes()) / 16 * 16;
  }
  p.shape = static_cast<int>(shape);
  p.y = y->typed_data();
  return Launched(kOp, LaunchRead(p, DescribeDevice(device_ordinal).sm_count, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadHandler, Read,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<int64_t>("shape"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
