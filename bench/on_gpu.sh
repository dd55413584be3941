#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call, without a network: build with CUDA, doctor, all tests,
# compute-sanitizer over the kernels' tests, benchmarks.
#
#   bench/on_gpu.sh [output folder]          default: bench/results/gpu
#
# A failing step does not stop the others; the exit status is the number of failed steps. PYTHON chooses the interpreter
# (it needs torch with CUDA, cmake, ninja, pytest), GFAST_GPU_SECONDS the total time (default 530), GFAST_GPU_STEPS the
# steps (default: all, as listed at the end of this file).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GFAST_GPU_SECONDS:-530}))
wanted=${GFAST_GPU_STEPS:-}
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
: > "$out/summary.txt"

say() { echo "$@" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: runs the command within its own limit and what is left of the total; logs to NAME.log
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS rc=0
  shift 2
  if [ -n "$wanted" ] && [[ " $wanted " != *" $name "* ]]; then return; fi
  if [ "$left" -lt 5 ]; then
    say "SKIPPED $name: no time left"
    failed=$((failed + 1))
    return
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" > "$out/$name.log" 2>&1 || rc=$?
  if [ "$rc" -eq 0 ]; then
    say "ok      $name ($((SECONDS - start)) s)"
  else
    say "FAILED  $name (exit $rc after $((SECONDS - start)) s); the end of $name.log:"
    tail -n 25 "$out/$name.log" | tee -a "$out/summary.txt"
    failed=$((failed + 1))
  fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "no CUDA device for $python's torch"
  exit 1
fi
# The extension of this interpreter alone, for this GPU alone, beside the sources.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
sanitize=(compute-sanitizer --error-exitcode 86 --launch-timeout 60 --target-processes all)
few='test_few_rows or test_weight_families or test_logp_rows_and_grad or test_kl_rows or test_scale'

step build 150 env GFAST_CUDA=1 GFAST_CUDA_ARCH="$arch" "$python" setup.py build_ext --inplace
step doctor 60 "$python" -m gfast.doctor
step tests_grad_dot 90 "$python" -m pytest -q -ra tests/test_grad_dot.py
step bench_grad_dot 80 "$python" bench/grad_dot.py --device cuda --json "$out/grad_dot_cuda.json"
step bench_losses 150 "$python" bench/losses.py --device cuda --shapes small --json "$out/losses_cuda.json"
step bench_geffect 90 "$python" bench/geffect.py --device cuda --json "$out/geffect_cuda.json"
step tests 240 "$python" -m pytest -q -ra "${workers[@]}" --ignore tests/test_packaging.py tests
step sanitize_grad_dot 100 "${sanitize[@]}" "$python" -m pytest -q -x -m cuda -k "hundreds or layout or any_number" \
  tests/test_grad_dot.py
step race_grad_dot 60 "${sanitize[@]}" --tool racecheck "$python" -m pytest -q -x -m cuda -k hundreds \
  tests/test_grad_dot.py
step sanitize_triton 120 "${sanitize[@]}" "$python" -m pytest -q -x -k "$few" tests/test_triton.py

say "$failed failed; logs in $out"
exit "$failed"
