"""Holds the compiler's report on every sm_90a kernel against limits: no spill, no serialized wgmma.

python .ci/check_kernels.py   # needs nvcc on PATH or in CUDA_HOME, no GPU
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
# Source -> most bytes that any kernel of it may spill.
SOURCES = {
    "awq_gemm_decode.cu": 0,
    "awq_gemm_few.cu": 0,
    "awq_gemm_mma_bf16.cu": 0,
    "awq_gemm_mma_f16.cu": 0,
    "awq_gemm_simt.cu": 0,
    "awq_gemm_tma_bf16.cu": 0,
    "awq_gemm_tma_e4m3.cu": 0,
    "awq_gemm_tma_f16.cu": 0,
    "awq_gemm_tma_s8.cu": 0,
    "awq_gemm_w4a8.cu": 0,
    "awq_gemm_wgmma_bf16.cu": 0,
    "awq_gemm_wgmma_f16.cu": 0,
    "awq_dequantize.cu": 0,
    "dequantize_activation.cu": 0,
    "int8_matmul.cu": 0,
    "int8_matmul_mma.cu": 0,
    "int8_matmul_tma.cu": 0,
    "memory.cu": 0,
    "quantize_activation.cu": 0,
}
TENSOR_CORES = ("few", "mma", "tma", "wgmma")  # in which sources every kernel has to use them,
CLEAR = "ClearCountsKernel"  # but the one that gets memory ready


def main() -> int:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        print("check_kernels: no nvcc on PATH or in CUDA_HOME; not checked")
        return 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [p for found in pool.map(lambda s: check(nvcc, s), SOURCES) for p in found]
    print("\n".join(problems) or f"check_kernels: {len(SOURCES)} sources within their limits")
    return 1 if problems else 0


def check(nvcc: str, source: str) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        ptx = pathlib.Path(directory) / "kernels.ptx"
        options = ["-O3", "-std=c++17", f"-I{ROOT / 'src'}"]
        file = str(ROOT / "src/kernels" / source)
        for command in (
            [nvcc, *options, "-arch=compute_90a", "-ptx", file, "-o", str(ptx)],
            [nvcc, "-arch=sm_90a", "-Xptxas=-v", "-cubin", str(ptx), "-o", os.devnull],
        ):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                return [f"{source}: {run.stderr.strip()}"]
        return judge(source, run.stdout + run.stderr, ptx.read_text())


def judge(source: str, report: str, ptx: str) -> list[str]:
    """What is wrong with a source, by ptxas's report and its PTX."""
    problems = [f"{source}: {line}" for line in report.splitlines() if "(C75" in line]
    spills = re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores", report)
    if not spills:
        problems.append(f"{source}: no kernel in the compiler's report")
    for kernel, size in spills:
        if int(size) > SOURCES[source]:
            problems.append(f"{source}: {kernel} spills {size} bytes, allowed {SOURCES[source]}")
    if any(f"awq_gemm_{word}" in source for word in TENSOR_CORES):
        for kernel in ptx.split(".entry ")[1:]:
            name = kernel.partition("(")[0].strip()
            if CLEAR in name:
                continue
            if "wgmma.mma_async" not in kernel and "mma.sync" not in kernel:
                problems.append(f"{source}: {name} has no tensor core instruction")
    return problems


if __name__ == "__main__":
    sys.exit(main())
