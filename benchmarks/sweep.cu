// Times every variant and split of awq_gemm over many shapes without JAX, for the heuristics of
// src/kernels/awq_gemm_cost.cc: CUDA graphs over distinct weights that exceed the L2 together.
//
//     nvcc -O3 -std=c++17 -Isrc -gencode=arch=compute_90a,code=sm_90a benchmarks/sweep.cu
//         src/kernels/*.cu src/kernels/*.cc -o sweep
//     ./sweep "4096,4096 14336,4096" "1 16 64" "tma_64x256:4 few_8x256 decode_8"
//     [f16|bf16|s8|e4m3|round-s8|round-e4m3] [G] [transposed|product] [SECONDS]
//
// One line a measurement: K N G M dtype variant split us error, the error against the simt kernel
// relative to the largest result. A variant without a split takes the plan's,
// and "auto" its variant too. With SECONDS each is timed after so long of itself: the clock falls
// where the power limit is reached. With s8 and e4m3 x is such codes, and the simt kernel has them
// as f16. With round-* the call is awq_gemm_w4a8's: float16 is rounded to such codes first, and the
// error is that of the rounding, too; splits are the plan's.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/awq_gemm.h"
#include "kernels/awq_gemm_w4a8.h"

using namespace jax_awq;

#define CHECK(call)                                                                       \
  do {                                                                                    \
    const cudaError_t error = (call);                                                     \
    if (error != cudaSuccess) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error)); \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (0)

namespace {

__device__ uint32_t Hash(uint64_t i, uint32_t seed) {
  uint64_t z = i * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull + 0x1234567;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(z >> 32);
}

__global__ void FillWords(uint32_t* to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = Hash(i, seed);
  }
}

template <typename T>
__global__ void FillFloats(T* to, size_t count, uint32_t seed, float low, float high) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = T(low + (high - low) * (Hash(i, seed) * 0x1p-32f));
  }
}

// Codes of random activations and the same as float16.
__global__ void FillCodes(uint8_t* codes, __half* as_float, size_t count, bool float8) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float v = (Hash(i, 4) * 0x1p-31f - 1.0f) * (float8 ? 448 : 127);
    if (float8) {
      const __nv_fp8_e4m3 code(v);
      codes[i] = code.__x;
      as_float[i] = __half(float(code));
    } else {
      const int code = __float2int_rn(v);
      codes[i] = static_cast<uint8_t>(code);
      as_float[i] = __half(float(code));
    }
  }
}

// As AwqGemmBuffers wants them; a block has a row.
__global__ void SumChunks(const __half* x, __nv_bfloat16* sums, int64_t k) {
  const int64_t columns = ChunkSumColumns(k);
  for (int64_t c = threadIdx.x; c < columns / 4; c += blockDim.x) {
    float sum = 0;
    for (int64_t i = c * kSumChunk; i < min(k, (c + 1) * kSumChunk); ++i) {
      sum += float(x[blockIdx.x * k + i]);
    }
    __nv_bfloat16* to = sums + blockIdx.x * columns + 4 * c;
    to[0] = to[2] = __float2bfloat16_rn(sum);
    to[1] = to[3] = __float2bfloat16_rn(sum - float(to[0]));
  }
}

std::vector<std::string> Words(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

float ToFloat(__half v) { return __half2float(v); }
float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
void Sweep(const std::vector<std::string>& shapes, const std::vector<std::string>& ms,
           const std::vector<std::string>& variants, DType dtype, DType x_dtype, int64_t group,
           bool transpose, double load_seconds, const Codes* rounded) {
  constexpr size_t kPool = size_t{1} << 30;
  constexpr double kColdBytes = 240e6;
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const Device device = DescribeDevice(0);
  char* pool;
  T* x;
  T* y;
  T* expected;
  char* workspace;
  const size_t kElements = size_t{8192} * 32768;
  const size_t kWorkspace = size_t{1} << 30;
  CHECK(cudaMalloc(&pool, kPool));
  CHECK(cudaMalloc(&x, kElements * 2));
  CHECK(cudaMalloc(&y, kElements * 2));
  CHECK(cudaMalloc(&expected, kElements * 2));
  CHECK(cudaMalloc(&workspace, kWorkspace));
  FillWords<<<1024, 256>>>(reinterpret_cast<uint32_t*>(pool), kPool / 4, 1);
  FillFloats<<<1024, 256>>>(x, kElements, 2, -1.0f, 1.0f);
  const bool codes = x_dtype != dtype;
  uint8_t* x_codes = nullptr;
  __nv_bfloat16* sums = nullptr;
  float* row_scale = nullptr;
  if (codes) {
    CHECK(cudaMalloc(&x_codes, kElements));
    CHECK(cudaMalloc(&sums, kElements / 8));
    CHECK(cudaMalloc(&row_scale, 8192 * 4));
    FillCodes<<<1024, 256>>>(x_codes, reinterpret_cast<__half*>(x), kElements,
                             x_dtype == DType::kE4M3);
    FillFloats<<<64, 256>>>(row_scale, 8192, 5, 0.001f, 0.01f);
  }
  T* scales;
  CHECK(cudaMalloc(&scales, kPool / 8));
  FillFloats<<<1024, 256>>>(scales, kPool / 16, 3, 0.002f, 0.01f);
  CHECK(cudaDeviceSynchronize());

  for (const std::string& shape : shapes) {
    int64_t k, n;
    if (std::sscanf(shape.c_str(), "%ld,%ld", &k, &n) != 2) std::exit(2);
    const int64_t g = group == -1 ? k : group;
    const size_t code_bytes = k * n / 2, zero_bytes = k / g * n / 2, scale_bytes = k / g * n * 2;
    const size_t bytes = (code_bytes + zero_bytes + 255) / 256 * 256;
    const int copies = std::max(3, static_cast<int>(std::ceil(kColdBytes / (bytes + scale_bytes))));
    for (const std::string& m : ms) {
      AwqGemmProblem p;
      p.m = std::stol(m);
      p.n = n;
      p.k = k;
      p.group_size = g;
      p.x_dtype = p.scales_dtype = p.out_dtype = dtype;
      p.has_zeros = true;
      p.fused_only = true;
      p.transpose = transpose;
      auto buffers = [&](int copy, T* to) {
        AwqGemmBuffers b = {};
        b.weight.k = k;
        b.weight.n = n;
        b.weight.group_shift = g == k ? kSingleGroup : g == 128 ? 7 : g == 64 ? 6 : 5;
        b.weight.layout = Layout::kGemm;
        b.weight.scales_dtype = dtype;
        b.weight.qweight = pool + copy * bytes;
        b.weight.qzeros = pool + copy * bytes + code_bytes;
        b.weight.scales = scales + copy * scale_bytes / 2;
        b.x = x;
        b.y = to;
        b.row_scale = row_scale;
        b.chunk_sums = sums;
        b.workspace = workspace;
        return b;
      };
      const size_t outputs = p.m * p.outputs();
      auto launch = [&](const AwqGemmProblem& problem, const AwqGemmPlan& plan, int copy, T* to) {
        AwqGemmBuffers b = buffers(copy, to);
        if (problem.x_dtype == x_dtype && codes) b.x = x_codes;
        if (const char* error = LaunchAwqGemm(problem, plan, b, stream)) {
          std::fprintf(stderr, "%s: %s\n", plan.variant.c_str(), error);
          std::exit(1);
        }
      };
      if (codes) {
        SumChunks<<<static_cast<unsigned>(p.m), 256, 0, stream>>>(reinterpret_cast<__half*>(x),
                                                                  sums, k);
      }
      p.variant = "simt";
      const size_t checked = std::min<size_t>(outputs, size_t{1} << 22);
      std::vector<T> want(checked), got(checked);
      launch(p, PlanAwqGemm(p, device), 0, expected);
      CHECK(cudaMemcpyAsync(want.data(), expected, checked * 2, cudaMemcpyDefault, stream));
      CHECK(cudaStreamSynchronize(stream));
      for (const std::string& word : variants) {
        AwqGemmProblem q = p;
        const size_t colon = word.find(':');
        q.variant = word.substr(0, colon);
        // A variant of another x is the same problem with float16 codes.
        const bool of_codes = codes && q.variant.rfind("w4a8", 0) == 0;
        if (of_codes) q.x_dtype = x_dtype;
        if (q.variant == "auto") q.variant.clear();
        q.split_k = colon == std::string::npos ? 0 : std::stol(word.substr(colon + 1));
        AwqGemmPlan plan;
        AwqGemmW4A8Problem rounding;
        AwqGemmW4A8Plan rounding_plan;
        try {
          if (rounded) {
            rounding.m = p.m;
            rounding.n = n;
            rounding.k = k;
            rounding.group_size = g;
            rounding.has_zeros = true;
            rounding.codes = *rounded;
            rounding.variant = q.variant;
            rounding_plan = PlanAwqGemmW4A8(rounding, device, kWorkspace);
            plan = rounding_plan.gemm;
          } else {
            plan = PlanAwqGemm(q, device, kWorkspace);
          }
        } catch (const std::exception&) {
          continue;
        }
        auto call = [&](int copy) {
          if (!rounded) return launch(q, plan, copy, y);
          AwqGemmW4A8Buffers b = {};
          b.weight = buffers(copy, y).weight;
          b.x = x;
          b.y = y;
          b.workspace = workspace;
          if (const char* error = LaunchAwqGemmW4A8(rounding, rounding_plan, b, stream)) {
            std::fprintf(stderr, "%s: %s\n", plan.variant.c_str(), error);
            std::exit(1);
          }
        };
        CHECK(cudaMemsetAsync(y, 0xff, outputs * 2, stream));
        call(0);
        CHECK(cudaMemcpyAsync(got.data(), y, checked * 2, cudaMemcpyDefault, stream));
        CHECK(cudaStreamSynchronize(stream));
        double error = 0, largest = 0;
        for (size_t i = 0; i < checked; ++i) {
          const double difference = std::abs(ToFloat(got[i]) - ToFloat(want[i]));
          error = difference <= error ? error : difference;
          largest = std::max<double>(largest, std::abs(ToFloat(want[i])));
        }
        const int calls = std::max(copies, 20 / copies * copies);
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        for (int i = 0; i < calls; ++i) call(i % copies);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        cudaEvent_t start, end;
        CHECK(cudaEventCreate(&start));
        CHECK(cudaEventCreate(&end));
        std::vector<float> times;
        const auto begin = std::chrono::steady_clock::now();
        while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() <
               load_seconds) {
          for (int i = 0; i < 50; ++i) CHECK(cudaGraphLaunch(exec, stream));
          CHECK(cudaStreamSynchronize(stream));
        }
        for (int i = 0; i < 8; ++i) {
          CHECK(cudaEventRecord(start, stream));
          CHECK(cudaGraphLaunch(exec, stream));
          CHECK(cudaEventRecord(end, stream));
          CHECK(cudaStreamSynchronize(stream));
          float ms_taken;
          CHECK(cudaEventElapsedTime(&ms_taken, start, end));
          if (i > 0) times.push_back(ms_taken * 1e3f / calls);
        }
        std::sort(times.begin(), times.end());
        CHECK(cudaGraphExecDestroy(exec));
        CHECK(cudaGraphDestroy(graph));
        std::printf("%ld %ld %ld %ld %s %s %d %.2f %.1e\n", k, n, group, p.m,
                    rounded ? *rounded == Codes::kInt8 ? "round-s8" : "round-e4m3"
                    : q.x_dtype == DType::kF16  ? "f16"
                    : q.x_dtype == DType::kBF16 ? "bf16"
                    : q.x_dtype == DType::kS8   ? "s8"
                                                : "e4m3",
                    plan.variant.c_str(), plan.split_k, times[times.size() / 2], error / largest);
        std::fflush(stdout);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string dtype = argc > 4 ? argv[4] : "f16";
  const int64_t group = argc > 5 ? std::stol(argv[5]) : 128;
  const bool transpose = argc > 6 && argv[6] == std::string("transposed");
  const double load_seconds = argc > 7 ? std::atof(argv[7]) : 0;
  const auto rounded = dtype == "round-s8"     ? std::make_optional(Codes::kInt8)
                       : dtype == "round-e4m3" ? std::make_optional(Codes::kFloat8)
                                               : std::nullopt;
  const auto sweep = [&](auto type, DType scales, DType x) {
    Sweep<decltype(type)>(Words(argv[1]), Words(argv[2]), Words(argv[3]), scales, x, group,
                          transpose, load_seconds, rounded ? &*rounded : nullptr);
  };
  if (dtype == "bf16") {
    sweep(__nv_bfloat16(), DType::kBF16, DType::kBF16);
  } else {
    sweep(__half(), DType::kF16,
          dtype == "s8"     ? DType::kS8
          : dtype == "e4m3" ? DType::kE4M3
                            : DType::kF16);
  }
}
