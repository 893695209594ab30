#include "ffi/int8_matmul.h"

namespace jax_awq {
namespace {

namespace ffi = xla::ffi;

ffi::Error Int8Matmul(Stream stream, int32_t device_ordinal, Int8Buffer a, Int8Buffer b,
                      ScaleBuffer scale_a, ScaleBuffer scale_b, ScaleBuffer scale_c,
                      ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                      ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t k,
                      std::string_view activation, std::string_view variant) {
  return RunInt8Matmul("int8_matmul", /*packed=*/false,
                       {stream, device_ordinal, a, b, scale_a, scale_b, scale_c, bias, *y,
                        *workspace, k, activation, variant});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Int8MatmulHandler, Int8Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<Int8Buffer>()
                                  .Arg<Int8Buffer>()
                                  .Arg<ScaleBuffer>()
                                  .Arg<ScaleBuffer>()
                                  .Arg<ScaleBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("k")
                                  .Attr<std::string_view>("activation")
                                  .Attr<std::string_view>("variant"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_awq
