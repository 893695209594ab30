// The sm_90a kernel in its own translation unit per dtype: they take minutes to compile.
#include "kernels/awq_gemm_wgmma.cuh"

namespace jax_awq {
template cudaError_t LaunchAwqGemmWgmma<__nv_bfloat16>(const AwqGemmProblem&, const AwqGemmPlan&,
                                                       const AwqGemmBuffers&, cudaStream_t);
}  // namespace jax_awq
