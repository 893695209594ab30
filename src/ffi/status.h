// Errors as XLA sees them. Every text starts with the op's name.
#pragma once

#include <sstream>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_awq {

template <typename... Parts>
xla::ffi::Error InvalidArgument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return xla::ffi::Error::InvalidArgument(text.str());
}

}  // namespace jax_awq

#define JAX_AWQ_RETURN_IF_ERROR(expression)            \
  do {                                                 \
    ::xla::ffi::Error jax_awq_error = (expression);    \
    if (jax_awq_error.failure()) return jax_awq_error; \
  } while (false)
