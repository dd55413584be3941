#!/usr/bin/env bash
# Everything that README.md and docs/benchmarks.md show of a CPU: measures (about 25 minutes on two quiet
# cores), draws, renders.
#
#   bench/on_cpu.sh [NAME ...]        some of: logits linear modes sweeps grad_dot geffect gram geffect_sweeps overhead
#                                     profiles pages; default: all of them
#
# PYTHON chooses the interpreter. Results of steps that fail stay as they were, or as far as the step got.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wanted=${*:-logits linear modes sweeps grad_dot geffect gram geffect_sweeps overhead profiles pages}
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

# bench NAME SCRIPT [ARGUMENTS...]: bench/SCRIPT.py, if NAME is wanted
bench() {
  local name=$1 script=$2 start=$SECONDS
  shift 2
  if [[ " $wanted " != *" $name "* ]]; then return; fi
  echo "== $name: $script $*"
  if "$python" "bench/$script.py" "$@"; then
    echo "== $name took $((SECONDS - start)) s"
  else
    echo "== $name FAILED"
    failed=$((failed + 1))
  fi
}

head=(--shapes smollm2-135m --dtypes bf16)
# torch's chunked head takes seconds a call on a CPU: it is in the step linear only
lines=gfast,floor,open_unlearning,eager,trl
effects='g_effect(GA);g_effect(WGA);pg_effect;token_effect;gram_effect;clone loop, WGA;published way'
grown='g_effect(WGA);pg_effect;token_effect;gram_effect;clone loop, WGA;published way'
cut=(--shape smollm2-135m --providers "$grown" --repetitions 3 --budget 2)

bench logits losses --ops logits --shapes small --objectives wga,npo --dtypes bf16 --budget 3 --json losses_cpu.json
bench logits losses --ops logits --shapes small --objectives wga --dtypes fp32 --budget 3 --json losses_cpu_fp32.json
bench linear losses --ops linear "${head[@]}" --objectives wga,nll --budget 3 --json losses_cpu_linear.json
bench modes losses --ops linear "${head[@]}" --objectives wga --modes train,frozen,nograd --batches tofu \
  --providers gfast,floor,eager,trl --budget 3 --json losses_cpu_modes.json
bench sweeps losses --sweep rows --values 128,256,512,1024 --ops linear "${head[@]}" --objectives nll --providers "$lines" \
  --budget 1 --json losses_cpu_sweep_rows.json
bench sweeps losses --sweep vocab --values 16384,32768,65536,131072 --ops linear "${head[@]}" --rows 256 \
  --objectives nll --providers "$lines" --budget 1 --json losses_cpu_sweep_vocab.json
bench grad_dot grad_dot --repetitions 9 --json grad_dot_cpu.json
bench geffect geffect --batch 4 --tokens 72 --budget 8 --json geffect_cpu.json \
  --providers "$effects;published way, padded;sample loop;kronfluence, identity;bergson"
bench gram geffect --batch 8 --tokens 72 --budget 12 --providers 'g_effect(WGA);gram_effect' --no-memory \
  --json geffect_cpu_gram.json
bench geffect_sweeps geffect --sweep length --values 32,64,128 --layers 4 --batch 4 "${cut[@]}" \
  --json geffect_cpu_sweep_length.json
bench geffect_sweeps geffect --sweep depth --values 2,4,8 --batch 2 --tokens 48 "${cut[@]}" \
  --json geffect_cpu_sweep_depth.json
bench overhead overhead --batch 2 --tokens 48 --rounds 1 --json overhead_cpu.json
bench profiles profile_losses --shape smollm2-135m --rows 512 --json profile_losses_cpu.json
bench profiles profile_geffect --json profile_geffect_cpu.json
bench pages plots
bench pages render

echo "$failed failed"
exit "$failed"
