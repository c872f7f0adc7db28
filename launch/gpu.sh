#!/usr/bin/env bash
# One job on the GPUs of this machine: installs what .venv lacks, and starts again what was interrupted.
#
#   launch/gpu.sh [--dry-run]
#
# Needs an NVIDIA driver. Variables, from the environment or edited here:
: "${CONFIG:=configs/llama8b.py:lora}"
: "${WORKDIR:=runs/llama8b}"
: "${FLAGS:=}"          # more flags, as in --config.policy.new=policy.yaml; quotes in it are passed on as they are
: "${GPUS:=}"           # 0,1: these alone; empty: all
: "${ATTEMPTS:=5}"      # starts, the first included

set -euo pipefail
cd "$(dirname "$0")/.."

DRY_RUN=false
case "${1:-}" in
  "") ;;
  --dry-run) DRY_RUN=true ;;
  *)
    sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//'
    exit 2
    ;;
esac

show() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

run() {
  show "$@"
  $DRY_RUN || "$@"
}

# A child in a process group of its own: what this script is told it gets once, also from Ctrl-C, and its exit code is waited for.
start() {
  local code
  show "$@"
  if $DRY_RUN; then return; fi
  set -m
  "$@" &
  set +m
  while true; do
    heard=false code=0
    wait "$!" || code=$?
    $heard || return "$code"
  done
}

told=false
# shellcheck disable=SC2329  # the traps do
pass_on() { # SIGNAL, to the program; all but TERM to its whole group, as a terminal does
  local group=-
  told=true heard=true
  if [ "$1" = TERM ]; then group=; fi
  kill -s "$1" -- "$group${!:-}" 2>/dev/null || true
}

# Asked in a process that ends, since jax keeps a GPU's memory for as long as it lives.
sees_gpu() {
  .venv/bin/python -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null
}

if [ -n "$GPUS" ]; then export CUDA_VISIBLE_DEVICES="$GPUS"; fi
if [ ! -x .venv/bin/python ]; then run python3 -m venv .venv; fi
# A .venv that `make quickstart` made has the JAX for CPUs alone.
if [ ! -x .venv/bin/python ] || ! sees_gpu; then
  run .venv/bin/pip install -q -c constraints.txt -e '.[cuda]'
  if ! $DRY_RUN && ! sees_gpu; then
    echo "the JAX in .venv sees no GPU, and a run would start on the CPU: check that nvidia-smi lists one, that GPUS=$GPUS names \
one of them, and that JAX_PLATFORMS is not set to cpu" >&2
    exit 2
  fi
fi
read -r -d '' -a flags <<<"$FLAGS" || true
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on HUP' HUP
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  code=0
  start .venv/bin/python -m trace_jax.launch --config="$CONFIG" --workdir="$WORKDIR" "${flags[@]}" || code=$?
  if $told; then exit "$code"; fi
  case "$code" in
    0) exit 0 ;;
    2 | 130) exit "$code" ;; # wrong input; stopped by hand
  esac
  echo "attempt $attempt ended with $code; the job goes on from its last checkpoint" >&2
done
exit 1
