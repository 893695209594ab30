// Facts about the CUDA device and driver.

#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "kernels/types.h"

namespace jax_awq {

int ComputeCapability(int ordinal) {
  int major = 0;
  int minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  return 10 * major + minor;
}

Device DescribeDevice(int ordinal) {
  constexpr int kMaxDevices = 64;
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<Device, kMaxDevices> devices;
  if (ordinal < 0 || ordinal >= kMaxDevices) return {0, 0};
  std::call_once(once[ordinal], [ordinal] {
    int sm_count = 0;
    cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, ordinal);
    devices[ordinal] = {EffectiveArch(ComputeCapability(ordinal)), sm_count};
  });
  return devices[ordinal];
}

}  // namespace jax_awq
