#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, for one short window without a network:
#
#   bench/on_gpu.sh OUT               the first call; OUT/all.tar.gz and OUT/summary.txt, whole after every step
#   bench/on_gpu.sh OUT --second      the rest: all tests, everyone at more shapes, the memory and race checkers
#   bench/on_gpu.sh OUT --third       other heads, sweeps, live effects, soft targets and margins, profiles
#   bench/on_gpu.sh OUT --dry         on any machine: the same order, archive and limits with stubs for the steps
#
# What a step finds out is in the archive within seconds, so a call may be cut at any moment. A step that fails, hangs
# or cannot run here stops no other; the exit status is the number of those that failed or were cut. For the pages:
#
#   tar -xzf OUT/all.tar.gz -C bench results && python bench/report.py
#
# PYTHON chooses the interpreter (it needs torch with CUDA, triton, cmake, ninja, pytest, transformers). Without nvcc
# everything but the CUDA kernels is measured. Other projects are measured where they can be imported, or from a folder
# of wheels: --wheels FOLDER. GFAST_COMMIT is what the results call the code where there is no git repository,
# GFAST_BENCH_DEVICE what they call the GPU. --steps NAME,NAME runs some, --seconds changes the 540 of a call.
#
# The first call by seconds: when a step is over at the latest. It may take what earlier ones left over.
#
# plan:begin
#   75  build                   the extension, with CUDA where nvcc is found
#  105  kernel_* (10 at once)   a test a kernel
#  125  rows                    from logits: WGA and KL
#  150  build_cpu               the same without CUDA, if that failed
#  180  linear                  from hidden states: WGA
#  195  scoring                 from hidden states, no gradient
#  215  grad_dot                group dots of a 7B model's tensors
#  275  tests_* (2 at once)     every test that needs a GPU; every test of a Triton kernel, compiled
#  305  counters                DRAM bytes and L2 hits of the kernels
#  325  tiles                   tiles of the row kernel
#  345  peer_liger              beside liger
#  360  peer_liger_cute         beside liger_cute
#  385  peer_quack              beside quack
#  405  peer_cce                beside cce
#  425  peer_trl                beside trl
#  435  peer_torch_chunked_rows beside torch_chunked_rows
#  465  1b                      effects of a 1B model
#  505  7b                      effects of a 7B model
#  540  overhead                training with GEffectCallback
# plan:end
set -euo pipefail
export GFAST_HELD_ROWS="${GFAST_HELD_ROWS:-1}"  # the CUDA row kernel is measured here; "auto" takes Triton's elsewhere
exec "${PYTHON:-python3}" "$(dirname "$0")/on_gpu.py" "$@"
