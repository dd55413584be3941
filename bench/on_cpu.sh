#!/usr/bin/env bash
# Everything that README.md and docs/performance.md show of a CPU: measures, draws, renders.
#
#   bench/on_cpu.sh [STEP ...]        some of: logits objectives linear modes long shapes grad_dot geffect gram
#                                     geffect_1b sweeps geffect_sweeps overhead profiles geffect_peers geffect_small
#                                     pages; default: all of them
#
# Results go to bench/results/DEVICE, a name made from the CPU (GFAST_BENCH_DEVICE chooses another). PYTHON chooses the
# interpreter. Results of steps that fail stay as they were, or as far as the step got. geffect_1b needs about
# 17 GB of memory. After GFAST_CPU_SECONDS (default 7200) no further benchmark starts: the most telling come first.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wanted=${*:-logits objectives linear modes long shapes grad_dot geffect gram geffect_1b sweeps geffect_sweeps overhead profiles geffect_peers geffect_small pages}
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

# step STEP COMMAND...: the command, if STEP is wanted
step() {
  local name=$1 start=$SECONDS
  shift
  if [[ " $wanted " != *" $name "* ]]; then return; fi
  if [ "$name" != pages ] && [ "$SECONDS" -gt "${GFAST_CPU_SECONDS:-7200}" ]; then
    echo "== $name SKIPPED, no time left: $*"
    failed=$((failed + 1))
    return
  fi
  echo "== $name: $*"
  if "$python" "$@"; then
    echo "== $name took $((SECONDS - start)) s"
  else
    echo "== $name FAILED"
    failed=$((failed + 1))
  fi
}

# bench STEP BENCHMARK [ARGUMENTS...]
bench() { step "$1" bench/run.py "${@:2}"; }

# Who takes long is called a few times only, but always once before the calls that count, if that is within its budget:
# the seconds a case that a provider may take (--peer-budget for others). torch's chunked head takes many seconds a call
# on a CPU: it is in the step linear only, in fp32.
head=(--ops linear --heads smollm2-135m --peer-budget 6)
few=gfast,floor,eager,trl
lines=gfast,floor,open_unlearning,eager,trl
everyone=gfast,floor,open_unlearning,eager,upcast,compile,torch_chunked,torch_chunked_rows,liger,cce,cce_exact,cce_torch,trl
some=gfast,gfast_inplace,floor,open_unlearning,eager,compile
effects='g_effect(GA);g_effect(WGA);g_effect(4 objectives);g_effect(4 objectives), gram;pg_effect;token_effect;gram_effect'
effects+=';clone loop, WGA;published way'
pairs='g_effect(WGA);g_effect(GA), gram;g_effect(WGA), gram;g_effect(4 objectives), gram;gram_effect'
grown='g_effect(WGA);pg_effect;token_effect;gram_effect;published way'
cut=(--model smollm2-135m --providers "$grown" --repetitions 3 --budget 8)

bench logits losses --ops logits --heads small --objectives wga --dtypes bf16,fp16,fp32 --budget 1 --json losses_logits.json
bench objectives losses --ops logits --heads small --objectives tnpo,npo,nll --dtypes bf16,fp16,fp32 --providers "$some" \
  --budget 1 --no-memory --json losses_objectives.json
bench linear losses "${head[@]}" --objectives wga,nll --dtypes fp32 --providers "$everyone" --budget 10 --repetitions 31 \
  --json losses_linear.json
bench linear losses "${head[@]}" --objectives wga,nll --dtypes bf16 --providers "$lines" --budget 10 --repetitions 31 \
  --json losses_linear_bf16.json
bench linear losses "${head[@]}" --objectives tnpo --dtypes fp32,bf16 --providers gfast,floor,eager --budget 10 --repetitions 31 \
  --json losses_linear_tnpo.json
bench modes losses "${head[@]}" --objectives wga,nll --dtypes fp32,bf16 --modes train,forward,frozen,nograd --batches tofu \
  --providers gfast,gfast_logp,floor,eager --budget 8 --repetitions 31 \
  --json losses_modes.json
bench long losses "${head[@]}" --rows 2048 --objectives wga,npo --dtypes fp32 --batches long --providers gfast,floor,eager \
  --budget 40 --repetitions 31 --json losses_long.json
bench shapes losses --ops linear --heads all --rows 256 --objectives wga --dtypes fp32 --providers "$few" \
  --budget 30 --repetitions 3 --peer-budget 15 --json losses_shapes.json
bench shapes losses --ops linear --heads llama-3.2-1b --rows 256 --objectives wga --dtypes bf16 --providers "$few" \
  --budget 30 --repetitions 3 --peer-budget 15 --json losses_shapes_bf16.json
bench grad_dot grad_dot --repetitions 5 --json grad_dot.json
bench geffect geffect --batch 4 --tokens 72 --budget 40 --providers "$effects" --json geffect.json
bench geffect geffect --layers 8 --batch 4 --tokens 72 --budget 40 --json geffect_token.json \
  --providers 'g_effect(WGA);token_effect;g_effect(WGA), token;pg_effect;clone loop, WGA'
bench geffect geffect --batch 4 --tokens 72 --budget 80 --no-memory --providers 'pg_effect;pg_effect, directions given' \
  --json geffect_given.json
bench gram geffect --batch 8 --tokens 72 --budget 48 --providers "$pairs" --no-memory --json geffect_gram.json
bench geffect_1b geffect --model llama-3.2-1b --batch 8 --tokens 48 --budget 50 --providers 'g_effect(GA);gram_effect' \
  --json geffect_1b.json
bench sweeps losses "${head[@]}" --sweep rows --values 128,256,512,1024 --objectives nll --dtypes fp32 --providers "$few" \
  --budget 6 --json losses_sweep_rows.json
bench sweeps losses "${head[@]}" --sweep vocab --values 16384,32768,65536,131072 --rows 256 --objectives nll --dtypes fp32 \
  --providers "$few" --budget 6 --json losses_sweep_vocab.json
bench geffect_sweeps geffect --sweep batch --values 2,4,8 --layers 4 --tokens 48 "${cut[@]}" --json geffect_sweep_batch.json
bench geffect_sweeps geffect --sweep length --values 32,64,128 --layers 4 --batch 4 "${cut[@]}" \
  --json geffect_sweep_length.json
bench geffect_sweeps geffect --sweep depth --values 2,4,8 --batch 2 --tokens 48 "${cut[@]}" \
  --json geffect_sweep_depth.json
bench overhead overhead --batch 2 --tokens 48 --rounds 2 --json overhead.json
bench profiles losses --profile --ops linear,logits --heads smollm2-135m --rows 512 --objectives wga --dtypes fp32 \
  --json profile_losses.json
bench profiles geffect --profile --batch 4 --json profile_geffect.json
bench geffect_peers geffect --batch 4 --tokens 72 --budget 20 --json geffect_peers.json \
  --providers "g_effect(WGA);pg_effect;published way, padded;published way, micro-batches;sample loop;kronfluence, identity;bergson"
bench geffect_small geffect --model smollm2-135m --layers 2 --batch 4 --tokens 48 --budget 6 --json geffect_small.json \
  --providers 'g_effect(WGA);pg_effect;token_effect;gram_effect;clone loop, WGA;sample loop;vmap(grad);kronfluence, identity;bergson'
step pages bench/report.py

echo "$failed failed"
exit "$failed"
