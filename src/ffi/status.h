// Errors as XLA sees them. Every text starts with the op's name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_awq {

template <typename... Parts>
xla::ffi::Error InvalidArgument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return xla::ffi::Error::InvalidArgument(text.str());
}

// `error` is what a launcher returned.
inline xla::ffi::Error Launched(const char* op, const char* error) {
  if (error) return xla::ffi::Error::Internal(std::string(op) + ": " + error);
  return xla::ffi::Error::Success();
}

// Launches what `make_plan` says; `why` tells from a plan why no kernel takes the call.
template <typename MakePlan, typename Why, typename Launch>
xla::ffi::Error PlanAndLaunch(const char* op, MakePlan make_plan, Why why, Launch launch) {
  try {
    const auto plan = make_plan();
    if (plan.variant == "reference") {
      return InvalidArgument(op, ": no kernel takes this call: ", why(plan));
    }
    return Launched(op, launch(plan));
  } catch (const std::invalid_argument& e) {
    return xla::ffi::Error::InvalidArgument(e.what());
  }
}

}  // namespace jax_awq

#define JAX_AWQ_RETURN_IF_ERROR(expression)            \
  do {                                                 \
    ::xla::ffi::Error jax_awq_error = (expression);    \
    if (jax_awq_error.failure()) return jax_awq_error; \
  } while (false)
