// Division by a number that only the host has to divide by: a kernel would wait for each division
// of integers before its first copy.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace jax_awq {

// Exact for numerators below 2^31 (Granlund, Montgomery: Division by Invariant Integers using
// Multiplication, 1994).
class Divider {
 public:
  constexpr Divider() = default;
  constexpr explicit Divider(uint32_t divisor) : divisor_(divisor) {
    int bits = 0;
    while (uint64_t{1} << bits < divisor) ++bits;
    shift_ = 31 + bits;
    multiplier_ = static_cast<uint32_t>((uint64_t{1} << shift_) / divisor + 1);
  }

  JAX_AWQ_HOST_DEVICE constexpr uint32_t Quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * multiplier_ >> shift_);
  }
  JAX_AWQ_HOST_DEVICE constexpr uint32_t Remainder(uint32_t n) const {
    return n - Quotient(n) * divisor_;
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = (uint32_t{1} << 31) + 1;
  uint32_t shift_ = 31;
};

namespace divider_internal {
constexpr bool ExactAt(uint32_t divisor, uint32_t n) {
  return Divider(divisor).Quotient(n) == n / divisor &&
         Divider(divisor).Remainder(n) == n % divisor;
}
// At multiples of the divisor and right before them, near both ends.
constexpr bool Exact(uint32_t divisor) {
  constexpr uint32_t kLast = INT32_MAX;
  const uint32_t last = kLast / divisor * divisor;
  return ExactAt(divisor, 0) && ExactAt(divisor, divisor) && ExactAt(divisor, divisor - 1) &&
         ExactAt(divisor, last) && ExactAt(divisor, last - 1) && ExactAt(divisor, kLast);
}
static_assert(Exact(1) && Exact(2) && Exact(3) && Exact(5) && Exact(7) && Exact(132) &&
              Exact(641) && Exact(65535) && Exact(65537) && Exact(1u << 30) &&
              Exact((1u << 30) + 1) && Exact(INT32_MAX - 1) && Exact(INT32_MAX));
}  // namespace divider_internal

}  // namespace jax_awq
