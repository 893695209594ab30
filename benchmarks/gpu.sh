#!/usr/bin/env bash
# What is run on a machine with a GPU. Its results are files in OUT; the installation goes to
# build/gpu, not into the environment.
#
#     benchmarks/gpu.sh OUT [build | WHEEL.whl] [test] [sanitize] [ptx]
#                           [bench] [shapes] [models] [quantize] [int8] [w4a8]
#
#   build     builds and installs the kernels for the GPU of this machine
#   WHEEL     installs that wheel
#   test      gpu_tests.json
#   sanitize  sanitizers.json: compute-sanitizer with each of its tools
#   ptx       gpu_tests_ptx75.json, gpu_tests_ptx80.json: the kernels of older GPUs, as PTX alone
#   bench     awq_gemm.json, awq_dequantize.json; DTYPES=float16 for one of the two dtypes
#   shapes    adds other weights, group sizes and gradients to awq_gemm.json, which is in OUT
#   models    decode.json, generate.json
#   quantize  quantize_activation.json
#   int8      int8_matmul.json, int4_matmul.json
#   w4a8      awq_gemm_w4a8.json, verify.json
#
# SITE=<folder with jax_awq and its extension> takes another installation, WORKERS=<n> as many
# test processes, PTX_WHEELS=<folder> wheels for ptx that are in its 75/ and 80/, PTX_ARCHS=80 one
# of the two.
set -uo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,23s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(realpath "$1")
shift
for word in "$@"; do
  if [[ $word == *.whl ]]; then wheel=$(realpath "$word"); fi
done
cd "$(dirname "$0")/.."
SITE=${SITE:-$PWD/build/gpu/site}
WORKERS=${WORKERS:-4}
DTYPES=${DTYPES:-float16 bfloat16}
PTX_WHEELS=${PTX_WHEELS:-}
PTX_ARCHS=${PTX_ARCHS:-75 80}
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONSAFEPATH=1 # the installed package, not the Python files here without their kernels
export PYTHONPATH=$SITE
status=0

install_to() { # directory, then what pip is told
  local site=$1
  shift
  python3 -m pip install -q --no-deps --no-build-isolation --upgrade --target "$site" "$@"
}

see_gpu() { # site; rather than fail in every test: JAX drops the GPU when it refuses the extension
  PYTHONPATH=$1 python3 -c 'import jax_awq, jax; assert jax.default_backend() == "gpu", jax.devices()'
}

record_tests() { # file, then what pytest is told; there are enough processes without BLAS's threads
  OPENBLAS_NUM_THREADS=1 python3 benchmarks/record_gpu_tests.py "$OUT/$1" -q -n "$WORKERS" --dist loadgroup "${@:2}"
}

sanitize() { # tools and parts side by side: their instrumentation takes most of the time
  local tool part name errors code
  local failed=0 results=() parts=4 tools=(memcheck racecheck initcheck synccheck)
  for tool in "${tools[@]}"; do
    local options=(--tool "$tool" --error-exitcode 99)
    # XLA asks the driver for things that it may not have, and goes on without.
    if [ "$tool" = memcheck ]; then options+=(--report-api-errors no --padding 256); fi
    for ((part = 0; part < parts; part++)); do
      name=$OUT/$tool.$part
      rm -f "$name".{log,code,counts} # of another run
      (
        compute-sanitizer "${options[@]}" python3 benchmarks/sanitize.py --part "$part/$parts" \
          --counts "$name.counts" >"$name.log" 2>&1
        echo $? >"$name.code"
      ) &
    done
  done
  wait
  for tool in "${tools[@]}"; do
    for ((part = 0; part < parts; part++)); do
      name=$OUT/$tool.$part
      code=$(cat "$name.code" 2>/dev/null || echo 137)
      errors=$(sed -nE 's/.*(ERROR|RACECHECK) SUMMARY: ([0-9]+) .*/\2/p' "$name.log" | tail -1)
      echo "$tool, part $part: ${errors:-no summary,} errors, exit code $code"
      results+=("$tool=${errors:-null},$code")
      if [ "$code" -ne 0 ] || [ "${errors:-1}" -ne 0 ]; then
        failed=1
        tail -20 "$name.log"
      fi
    done
    python3 benchmarks/sanitize.py --check "$OUT/$tool".*.counts || failed=1
  done
  python3 - "$OUT/sanitizers.json" "${results[@]}" <<'EOF'
import json, pathlib, sys
from jax_awq.bench.report import environment

path, tools, ran = pathlib.Path(sys.argv[1]), {}, {}  # ran: tool -> op -> variant -> how often
for result in sys.argv[2:]:
    tool, numbers = result.split("=")
    errors, code = json.loads(f"[{numbers}]")
    parts, ops = tools.setdefault(tool, []), ran.setdefault(tool, {})
    counts = path.with_name(f"{tool}.{len(parts)}.counts")
    for op, variants in json.loads(counts.read_text()).items() if counts.exists() else ():
        total = ops.setdefault(op, {})
        for variant, count in variants.items():
            total[variant] = total.get(variant, 0) + count
    parts.append({"errors": errors, "exit_code": code})
command = "compute-sanitizer benchmarks/sanitize.py"
result = environment() | {"command": command, "tools": tools, "ran": ran}
path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
EOF
  return $failed
}

for word in "$@"; do
  echo "== $word"
  case $word in
    build | *.whl | ptx) ;;
    *) see_gpu "$SITE" || exit ;;
  esac
  case $word in
    build) install_to "$SITE" . || exit ;;
    *.whl) install_to "$SITE" "$wheel" || exit ;;
    test) record_tests gpu_tests.json ;;
    sanitize) sanitize ;;
    bench)
      # shellcheck disable=SC2086
      python3 -m jax_awq.bench awq_gemm --dtypes $DTYPES --json "$OUT/awq_gemm.json" &&
        python3 -m jax_awq.bench awq_dequantize --dtypes $DTYPES --json "$OUT/awq_dequantize.json"
      ;;
    models)
      python3 -m jax_awq.bench decode --layers unrolled --steps-per-call 1 16 --json "$OUT/decode.json" &&
        XLA_PYTHON_CLIENT_PREALLOCATE=true \
          python3 -m jax_awq.bench generate --json "$OUT/generate.json"
      ;;
    int8)
      for op in int8_matmul int4_matmul; do
        python3 -m jax_awq.bench $op --dtypes float16 --json "$OUT/$op.json" \
          --shapes 2048x2048 4096x4096 14336x4096 8192x28672 --m 1 16 64 256 1024 2048 4096 || exit
      done
      ;;
    w4a8)
      w4a8() {
        python3 -m jax_awq.bench awq_gemm_w4a8 --dtypes float16 --json "$OUT/awq_gemm_w4a8.json" "$@"
      }
      w4a8 &&
        w4a8 --merge --m 1024 2048 4096 --group-size -1 &&
        w4a8 --merge --m 64 1024 --group-size 64 &&
        python3 -m jax_awq verify --awq-model-path tests/golden/llama-awq-gemm-g128 \
          --json "$OUT/verify.json"
      ;;
    shapes)
      more() { python3 -m jax_awq.bench awq_gemm --json "$OUT/awq_gemm.json" --merge "$@"; }
      more --dtypes float16 --impls jax_awq xla_dense read --m 1 16 32 64 128 256 512 1024 2048 \
        --shapes 4096x6144 8192x10240 28672x8192 5120x5120 11008x4096 &&
        for group in 64 32; do
          more --dtypes float16 --impls jax_awq read --m 1 16 64 256 1024 \
            --shapes 4096x4096 8192x28672 --group-size $group || exit
        done &&
        more --dtypes float16 --impls jax_awq_dx xla_dense_dx --m 256 1024 4096 \
          --shapes 4096x4096 4096x28672
      ;;
    quantize)
      python3 -m jax_awq.bench quantize_activation --dtypes float16 --json "$OUT/quantize_activation.json"
      ;;
    ptx)
      for arch in $PTX_ARCHS; do
        site=$PWD/build/gpu/ptx$arch
        source=(. -C "cmake.define.JAX_AWQ_CUDA_ARCHITECTURES=$arch-virtual")
        if [ -n "$PTX_WHEELS" ]; then source=("$PTX_WHEELS/$arch/"*.whl); fi
        install_to "$site" "${source[@]}" && see_gpu "$site" &&
          PYTHONPATH=$site record_tests "gpu_tests_ptx$arch.json" tests/gpu || status=1
      done
      ;;
    *) echo "gpu.sh: unknown word $word" >&2 && exit 2 ;;
  esac || status=1
done
exit $status
