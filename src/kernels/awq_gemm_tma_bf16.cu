// The TMA kernel in its own translation unit per dtype: they take minutes to compile.
#include "kernels/awq_gemm_tma.cuh"

namespace jax_awq {
template cudaError_t LaunchAwqGemmTma<__nv_bfloat16>(const AwqGemmProblem&, const AwqGemmPlan&,
                                                     const AwqGemmBuffers&, cudaStream_t);
}  // namespace jax_awq
