#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call, without a network: build with CUDA, doctor, benchmarks, all tests,
# profiles, compute-sanitizer over the kernels' tests; the most telling first.
#
#   bench/on_gpu.sh [output folder]          default: runs/gpu
#
# Results are DEVICE/KIND*.json, DEVICE a name made from the GPU (GFAST_BENCH_DEVICE chooses another), logs NAME.log,
# traces in traces/. Benchmarks write after every case, beside the result of an earlier call, which is replaced by a whole
# one only: a step that fails or runs out of time loses nothing (what it had is partial/KIND*.json, and becomes the result
# where there was none). For README and docs/performance.md copy the folder DEVICE to bench/results, then run
# bench/report.py.
#
# A failing step does not stop the others; the exit status is the number of failed steps. PYTHON chooses the interpreter
# (it needs torch with CUDA, cmake, ninja, pytest; the projects of bench/requirements.txt are measured where they are
# importable), GFAST_GPU_SECONDS the total time (default 530), GFAST_GPU_STEPS the steps (default: all,
# as listed at the end of this file), GFAST_COMMIT what the results call the code where there is no git repository.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out/partial"
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
  if [ -n "$wanted" ] && [[ " $wanted " != *" $name "* ]]; then return 0; fi
  if [ "$left" -lt 5 ]; then
    say "SKIPPED $name: no time left"
    failed=$((failed + 1))
    return 1
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" > "$out/$name.log" 2>&1 || rc=$?
  if [ "$rc" -eq 0 ]; then
    say "ok      $name ($((SECONDS - start)) s)"
  else
    say "FAILED  $name (exit $rc after $((SECONDS - start)) s); the end of $name.log:"
    tail -n 25 "$out/$name.log" | tee -a "$out/summary.txt"
    failed=$((failed + 1))
  fi
  return "$rc"
}

# bench NAME SECONDS RESULT BENCHMARK [ARGUMENTS...]: a benchmark on the GPU whose result is $results/RESULT.json
bench() {
  local name=$1 limit=$2 result=$3.json benchmark=$4 whole=1
  shift 4
  rm -f "$out/partial/$result"
  step "$name" "$limit" "$python" bench/run.py "$benchmark" --device cuda "$@" --json "$out/partial/$result" || whole=0
  if [ -f "$out/partial/$result" ] && { [ "$whole" -eq 1 ] || [ ! -f "$results/$result" ]; }; then
    mv "$out/partial/$result" "$results/$result"
  fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "no CUDA device for $python's torch"
  exit 1
fi
device=$("$python" bench/harness.py cuda) || exit 1
results=$out/$device
mkdir -p "$results"
# The extension of this interpreter alone, for this GPU alone, beside the sources.
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
# Workers share the cores: left alone, each would start as many threads as there are.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
few_threads=(env "OMP_NUM_THREADS=$(($(nproc) / 6 > 0 ? $(nproc) / 6 : 1))")
sanitizer=compute-sanitizer
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do # it comes with the toolkit, often not on the PATH
  command -v "$sanitizer" > /dev/null || { [ -x "$home/bin/compute-sanitizer" ] && sanitizer=$home/bin/compute-sanitizer; }
done
# torch's own pool of memory would hide reads beyond the end of a tensor
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --error-exitcode 86 --launch-timeout 60
  --target-processes all)
on_gpu='tests/test_triton.py tests/test_row_dot.py tests/test_grad_dot.py tests/test_linear_head.py'
on_gpu+=' tests/test_ops_losses.py tests/test_gpu.py'
few='test_few_rows or test_weight_families or test_logp_rows_and_grad or test_kl_rows or test_scale'
all=gfast,gfast_inplace,floor,fresh_copy,open_unlearning,eager,upcast,compile,liger,cce,cce_exact,trl,torch_chunked
all+=,torch_chunked_rows
fast=gfast,gfast_logp,floor,eager,compile,liger,cce,cce_exact,trl,torch_chunked_rows
lines=gfast,floor,eager,compile,liger,cce,trl,torch_chunked
effects='g_effect(GA);g_effect(WGA);g_effect(4 objectives);g_effect(WGA), sample;g_effect(GA), gram'
effects+=';g_effect(WGA), gram;g_effect(4 objectives), gram;g_effect(WGA), token;pg_effect'
effects+=';pg_effect, directions given;token_effect;gram_effect;clone loop, WGA;sample loop;published way'
effects+=';published way, padded;kronfluence, identity;bergson'
large=(--heads llama-3.1-8b --rows 8192 --dtypes bf16 --budget 2)

step build 150 env GFAST_CUDA=1 GFAST_CUDA_ARCH="$arch" "$python" setup.py build_ext --inplace
step doctor 60 "$python" -m gfast.doctor
bench losses 170 losses losses "${large[@]}" --objectives wga,nll --providers "$all"
bench grad_dot 80 grad_dot grad_dot
bench losses_4096 60 losses_4096 losses --heads llama-3.1-8b --rows 4096 --ops linear --dtypes bf16 --objectives nll \
  --budget 1 --providers "$fast"
bench geffect 120 geffect geffect --model llama-3.2-1b --dtype bf16 --batch 8 --tokens 256 --budget 6 \
  --providers "$effects"
bench geffect_small 60 geffect_small geffect --model smollm2-135m --layers 2 --dtype bf16 --batch 8 --tokens 256 --budget 2
# shellcheck disable=SC2086 # a list of files
step tests_gpu 200 "${few_threads[@]}" "$python" -m pytest -q -ra "${workers[@]}" $on_gpu
step tests 240 "${few_threads[@]}" "$python" -m pytest -q -ra "${workers[@]}" --ignore tests/test_packaging.py tests
bench geffect_7b 200 geffect_7b geffect --model llama-2-7b --dtype bf16 --batch 4 --tokens 256 --budget 8 \
  --repetitions 3 --providers 'g_effect(GA);g_effect(WGA);pg_effect;token_effect;gram_effect;clone loop, WGA;published way'
bench losses_modes 120 losses_modes losses "${large[@]}" --ops linear --objectives wga,nll \
  --modes frozen,nograd,forward --providers "$fast"
bench losses_batches 90 losses_batches losses "${large[@]}" --ops linear --objectives wga,npo \
  --batches tofu,long --providers "$fast"
bench losses_shapes 150 losses_shapes losses --heads all --rows 8192 --dtypes bf16 --objectives wga --budget 1 \
  --providers "$fast"
bench overhead 80 overhead overhead --models tiny,smollm2-135m --dtype bf16 --rounds 3
bench sweep_rows 90 losses_sweep_rows losses --sweep rows --values 512,1024,2048,4096,8192,16384 \
  --heads llama-3.2-1b --dtypes bf16 --objectives wga --budget 1 --providers "$lines"
bench sweep_vocab 90 losses_sweep_vocab losses --sweep vocab --heads llama-3.2-1b --rows 4096 --dtypes bf16 \
  --objectives wga --budget 1 --providers "$lines"
for sweep in batch length depth; do
  bench "sweep_$sweep" 60 "geffect_sweep_$sweep" geffect --sweep "$sweep" --model smollm2-135m --dtype bf16 \
    --budget 1 --repetitions 5
done
bench profile_losses 60 profile_losses losses --profile --ops linear,logits --heads llama-3.1-8b --rows 8192 \
  --objectives wga --dtypes bf16 --traces "$out/traces"
bench profile_geffect 60 profile_geffect geffect --profile --model llama-3.2-1b --dtype bf16 --batch 8 \
  --tokens 256 --traces "$out/traces"
step micro 60 "$python" -m pytest -q bench --benchmark-only --benchmark-json "$out/micro.json"
step sanitize_grad_dot 100 "${sanitize[@]}" "$python" -m pytest -q -x -m cuda -k "hundreds or layout or any_number" \
  tests/test_grad_dot.py
step race_grad_dot 60 "${sanitize[@]}" --tool racecheck "$python" -m pytest -q -x -m cuda -k hundreds \
  tests/test_grad_dot.py
step sanitize_triton 120 "${sanitize[@]}" "$python" -m pytest -q -x -k "$few" tests/test_triton.py
step sanitize_products 90 "${sanitize[@]}" "$python" -m pytest -q -x -k "test_shapes or fused_gpu_forward" \
  tests/test_row_dot.py tests/test_linear_head.py

say "$failed failed; logs in $out, results in $results"
exit "$failed"
