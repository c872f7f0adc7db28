#!/usr/bin/env bash
# One job on a Cloud TPU slice: create or reuse it, install, start on all workers, follow the log, fetch the results.
#
#   launch/tpu_pod.sh run     [--dry-run]   everything above; a preempted job is started again
#   launch/tpu_pod.sh fetch   [--dry-run]   results so far
#   launch/tpu_pod.sh delete  [--dry-run]   the slice, after asking
#
# Needs gcloud, logged in. Variables, from the environment or edited here:
: "${PROJECT:=$(gcloud config get-value project 2>/dev/null)}"
: "${ZONE:=us-west4-a}"
: "${NAME:=trace-jax}"
: "${ACCELERATOR:=v5litepod-8}"                # one host of 8 chips, v5e:2x4; v5litepod-16 is v5e:4x4 on four hosts
: "${RUNTIME:=v2-alpha-tpuv5-lite}"
: "${QUEUED:=false}"                           # true: a queued resource, which waits for its turn
: "${SPOT:=false}"                             # true: cheaper, may be taken away at any time; needs a WORKDIR that stays: gs://
: "${CONFIG:=configs/gemma9b.py:lora}"
: "${WORKDIR:=/tmp/trace_jax/run}"             # several hosts, or SPOT: gs://BUCKET/run, which the TPU's service account may write
: "${FLAGS:=}"                                 # more flags, as in --config.policy.new=policy.yaml
: "${OVERLAP:=false}"                          # true: full fine-tuning gathers parameters while it computes, for more memory (docs/running.md)
: "${SECRETS:=GEMINI_API_KEY HF_TOKEN}"        # passed on from this shell where they are set, over stdin, in no command line
: "${ATTEMPTS:=20}"                            # starts, the first included
: "${OUT:=runs/$NAME}"                         # where fetched results go

set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
}

[ $# -ge 1 ] || usage
ACTION=$1
DRY_RUN=false
case "${2:-}" in
  "") ;;
  --dry-run) DRY_RUN=true ;;
  *) usage ;;
esac

# Prints a command, and runs it unless it is a dry run.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  $DRY_RUN || "$@"
}

tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" "$@"
}

state() {
  gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format='value(state)' 2>/dev/null || true
}

create() {
  local spot=()
  if [ "$SPOT" = true ]; then spot=(--spot); fi
  if ! $DRY_RUN; then
    case "$(state)" in
      READY) echo "$NAME is there and ready"; return ;;
      PREEMPTED | TERMINATED | STOPPED) tpu delete --quiet ;;
    esac
  fi
  if [ "$QUEUED" = true ]; then
    run gcloud compute tpus queued-resources create "$NAME-queue" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${spot[@]}"
    if ! $DRY_RUN; then
      until [ "$(state)" = READY ]; do
        echo "waiting for $NAME-queue"
        sleep 60
      done
    fi
  else
    tpu create --accelerator-type="$ACCELERATOR" --version="$RUNTIME" "${spot[@]}"
  fi
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  run git archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$NAME:trace_jax.tar.gz" --worker=all
  tpu ssh --worker=all --command="rm -rf trace_jax && mkdir trace_jax && tar -xzf trace_jax.tar.gz -C trace_jax \
&& cd trace_jax && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[gcs,tpu]'"
  rm -f "$archive"
}

# Lines NAME=value of the secrets that are set here; read on the workers into the environment, never written.
secrets() {
  local name
  for name in $SECRETS; do
    if [ -n "${!name:-}" ]; then printf '%s=%s\n' "$name" "${!name}"; fi
  done
}

workers() {
  gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format='value(networkEndpoints.ipAddress)' |
    tr ';' '\n' | grep -c .
}

# Starts the job on every worker, each with the secrets on its own stdin, and stays with it. Exit code 75 is a job that
# was preempted, saved itself and wants to be started again.
start() {
  local overlap=()
  if [ "$OVERLAP" = true ]; then
    overlap=(LIBTPU_INIT_ARGS="'--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true'")
  fi
  local job="cd trace_jax && while IFS= read -r line; do export \"\$line\"; done; \
exec env ${overlap[*]} .venv/bin/python -m trace_jax.launch --config=$CONFIG --workdir=$WORKDIR --distributed $FLAGS"
  if $DRY_RUN; then
    tpu ssh --worker=all --command="$job"
    return
  fi
  local n worker pid code=0 pids=()
  n=$(workers)
  for ((worker = 0; worker < n; worker++)); do
    secrets | gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$worker" --command="$job" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
  done
  return "$code"
}

fetch() {
  run mkdir -p "$OUT"
  case "$WORKDIR" in
    gs://*) run gcloud storage rsync --recursive "$WORKDIR" "$OUT" ;;
    *) tpu scp --recurse --worker=0 "$NAME:$WORKDIR" "$OUT" ;;
  esac
}

main() {
  local attempt code
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    create
    install
    code=0
    start || code=$?
    if [ "$code" = 0 ]; then
      fetch
      echo "done; launch/tpu_pod.sh delete takes the slice down"
      return
    fi
    if [ "$code" = 2 ]; then
      echo "the job refused its input; see the line above" >&2
      return 2
    fi
    echo "attempt $attempt ended with $code; the job goes on from its last checkpoint" >&2
    sleep 30
  done
  return 1
}

case "$ACTION" in
  run) main ;;
  fetch) fetch ;;
  delete)
    if ! $DRY_RUN; then
      read -r -p "delete $NAME in $ZONE, with everything on it? [y/N] " answer
      [ "$answer" = y ] || exit 0
    fi
    tpu delete --quiet
    if [ "$QUEUED" = true ]; then
      run gcloud compute tpus queued-resources delete "$NAME-queue" --project="$PROJECT" --zone="$ZONE" --quiet
    fi
    ;;
  *) usage ;;
esac
