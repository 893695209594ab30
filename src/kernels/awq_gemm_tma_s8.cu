// The TMA kernel where x is codes, in its own translation unit per dtype.
#include "kernels/awq_gemm_tma.cuh"

namespace jax_awq {
template cudaError_t LaunchAwqGemmTma<int8_t>(const AwqGemmProblem&, const AwqGemmPlan&,
                                              const AwqGemmBuffers&, cudaStream_t);
}  // namespace jax_awq
