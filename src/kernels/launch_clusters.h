// Launch of a kernel in thread block clusters.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace jax_awq {

// Launches with `cluster` CTAs along x in a thread block cluster. One that `overlaps` starts while
// the kernel before it on the stream still runs, and has to WaitForKernelBefore.
template <typename Params>
cudaError_t LaunchClusters(void (*kernel)(Params), const std::remove_const_t<Params>& params,
                           int cluster, dim3 grid, int threads, int shared_bytes,
                           cudaStream_t stream, bool overlaps = false) {
  if (shared_bytes > 48 * 1024) {
    // Sets a property of the kernel on the current device: cheap, and no stream work.
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             shared_bytes)) {
      return e;
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace jax_awq
