#!/usr/bin/env bash
# Compiles the CUDA kernels with nvcc alone, without torch, for every architecture, so that they cannot rot on machines
# without a GPU. Usage: csrc/cuda/compile_check.sh [architectures...]   (default: 80 90 100)
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${NVCC:-$(command -v nvcc || true)}
if [ -z "$nvcc" ]; then
  echo "nvcc was not found; set NVCC" >&2
  exit 2
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
gencode=()
for arch in "${@:-80 90 100}"; do
  for one in $arch; do gencode+=(-gencode "arch=compute_$one,code=sm_$one"); done
done
for source in cuda/*.cu; do
  "$nvcc" -std=c++20 -O3 -I. "${gencode[@]}" -Xcompiler -fPIC,-Wall -Werror all-warnings -Xptxas -v -c "$source" \
    -o "$out/$(basename "$source").o" 2> "$out/log" || { cat "$out/log" >&2; exit 1; }
  # A word or two outside the loops costs nothing; more means an array indexed at run time or too many registers.
  if grep -E "([2-9][0-9]|1[7-9]|[0-9]{3,}) bytes (spill|stack)" "$out/log"; then
    echo "$source: registers spill to local memory" >&2
    exit 1
  fi
  echo "$source: $(grep -c 'Compiling entry' "$out/log") kernels compiled"
done
