#!/usr/bin/env bash
# One job on a TPU slice of GKE: build and push the image, fill in gke_jobset.yaml, start it, follow the log, fetch the results.
#
#   launch/gke.sh run       [--dry-run]   everything above; a job that runs already is followed again
#   launch/gke.sh fetch     [--dry-run]   results so far
#   launch/gke.sh delete    [--dry-run]   the job and its keys, also while it runs; what is in the bucket stays
#
# Needs docker and kubectl, logged in to a registry and to a cluster that has JobSet and a node pool of the slice. The service
# account may write to the bucket (workload identity, roles/storage.objectUser). Variables, from the environment or edited here:
: "${IMAGE:=}"                                 # REGION-docker.pkg.dev/PROJECT/REPOSITORY/trace_jax:TAG
: "${WORKDIR:=}"                               # gs://BUCKET/run
: "${NAME:=trace-jax}"
: "${NAMESPACE:=default}"
: "${SERVICE_ACCOUNT:=default}"
: "${USER_ID:=1000}"                            # the process's; 0 where the nodes give their TPUs to root alone
: "${ACCELERATOR:=tpu-v5-lite-podslice}"       # and TOPOLOGY: the node pool's; here v5e:4x4
: "${TOPOLOGY:=4x4}"
: "${HOSTS:=4}"                                # of the slice
: "${CHIPS:=4}"                                # of a host
: "${CONFIG:=configs/gemma9b.py:full}"
: "${FLAGS:=}"                                 # more flags, as in --config.seed=3; quotes in it are passed on as they are
: "${SECRETS:=GEMINI_API_KEY HF_TOKEN}"        # become the Secret NAME-keys where they are set here, over stdin, in no command line
: "${RESTARTS:=20}"                            # after a preemption or a failure
: "${WAIT:=30}"                                # seconds between two looks at something that is not there yet
: "${OUT:=runs/$NAME}"                         # where fetched results go

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  { echo "this needs bash 4.4 or newer, and here is $BASH_VERSION; on a Mac: brew install bash" >&2 && exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
}

say() { echo "$*" >&2; }

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

cluster() { kubectl --namespace="$NAMESPACE" "$@"; }

# The program's arguments as a JSON list, which is YAML as well.
arguments() {
  local flags word list=""
  read -r -d '' -a flags <<<"$FLAGS" || true
  for word in --config="$CONFIG" --workdir="$WORKDIR" --distributed "${flags[@]}"; do
    word=${word//\\/\\\\}
    list+=,\"${word//\"/\\\"}\"
  done
  echo "[${list#,}]"
}

manifest() {
  local text name value
  text=$(cat launch/gke_jobset.yaml)
  for name in NAME USER_ID SERVICE_ACCOUNT ACCELERATOR TOPOLOGY HOSTS CHIPS IMAGE RESTARTS ARGS; do
    if [ "$name" = ARGS ]; then value=$(arguments); else value=${!name}; fi
    text=${text//"\${$name}"/"$value"}
  done
  grep -v '^#' <<<"$text"
}

# Lines NAME=value of the secrets that are set here.
secrets() {
  local name
  for name in $SECRETS; do
    if [ -n "${!name:-}" ]; then printf '%s=%s\n' "$name" "${!name}"; fi
  done
}

# Keys that are set here replace those that are there; without any the Secret, if there is one, stays.
keys() {
  if [ -z "$(secrets)" ]; then return; fi
  run kubectl --namespace="$NAMESPACE" delete secret "$NAME-keys" --ignore-not-found
  run kubectl --namespace="$NAMESPACE" create secret generic "$NAME-keys" --from-env-file=/dev/stdin < <(secrets)
}

# none, running, Completed or Failed. Fails where the cluster does not answer.
state() {
  local found
  found=$(cluster get jobset "$NAME" --ignore-not-found --output=jsonpath='{.metadata.name}:{.status.terminalState}') || return
  case "$found" in
    "" | :) echo none ;;
    *:) echo running ;;
    *) echo "${found##*:}" ;;
  esac
}

# Nothing is taken from a job that runs; one that has ended makes room, as JobSets cannot be changed.
start() {
  local found=none theirs
  $DRY_RUN || found=$(state)
  if [ "$found" = running ]; then
    theirs=$(cluster get jobset "$NAME" --output=jsonpath='{.spec.replicatedJobs[0].template.spec.template.spec.containers[0].args}')
    if [ "$theirs" != "$(arguments)" ]; then
      say "$NAME runs with other arguments, $theirs: launch/gke.sh delete ends it, NAME=other starts one beside it"
      exit 2
    fi
    say "$NAME runs already; this is its log"
    return
  fi
  run docker build --platform=linux/amd64 --file=launch/Dockerfile --tag="$IMAGE" .
  run docker push "$IMAGE"
  keys
  if [ "$found" != none ]; then run kubectl --namespace="$NAMESPACE" delete jobset "$NAME"; fi
  if $DRY_RUN; then manifest; fi
  run kubectl --namespace="$NAMESPACE" apply --filename=- < <(manifest)
}

# The pod of the first host that was started last.
first_pod() {
  cluster get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" \
    --field-selector=status.phase!=Pending --sort-by=.metadata.creationTimestamp --output=name | tail -n 1
}

# Why pods that are not at work are not, a line each reason; nothing where none says.
waits() {
  cluster get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=jsonpath='{range .items[*]}'\
'{.status.conditions[?(@.type=="PodScheduled")].message}{" "}{.status.containerStatuses[*].state.waiting.reason}{" "}'\
'{.status.containerStatuses[*].state.waiting.message}{"\n"}{end}' | awk 'NF { $1 = $1; if (!said[$0]++) print }'
}

# The log of a pod after SHOWN, the time of its last line that was shown, until it or the connection ends.
log() { # POD
  local line at from=$SHOWN
  while IFS= read -r line; do
    at=${line%% *}
    case "$at" in [0-9]*T*) ;; *) say "$line" && continue ;; esac # kubectl's own words
    if [[ "$at" > "$from" ]]; then
      SHOWN=$at
      printf '%s\n' "${line#* }"
    fi
  done < <(cluster logs --follow --timestamps "$1" ${from:+--since-time="$from"}) # which is cut to seconds
  wait $! || say "the connection broke; the job goes on"
}

# The log of the first process, through restarts and broken connections, until the JobSet has ended.
follow() {
  local pod="" last="" found reasons="" said=none
  while true; do
    pod=$(first_pod) || pod=$last
    if [ "$pod" != "$last" ]; then SHOWN="" said=none; fi
    if [ -n "$pod" ]; then
      log "$pod"
    else
      reasons=$(waits) || reasons=$said
      if [ "$reasons" != "$said" ]; then say "the pods are not at work yet${reasons:+: $reasons}"; fi
      said=$reasons
    fi
    last=$pod
    found=$(state) || found=unknown
    case "$found" in
      Completed) return 0 ;;
      Failed) return "$(why)" ;;
      none) say "$NAME was deleted" && return 1 ;;
    esac
    sleep "$WAIT"
  done
}

# Says why the JobSet failed; 2 where the program refused its input, else 1.
why() {
  local codes
  cluster get jobset "$NAME" --output=jsonpath='{.status.conditions[?(@.type=="Failed")].message}{"\n"}' >&2 || true
  codes=$(cluster get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" \
    --output=jsonpath='{.items[*].status.containerStatuses[*].state.terminated.exitCode}') || true
  case " $codes " in *" 2 "*) echo 2 ;; *) echo 1 ;; esac
}

fetch() {
  run mkdir -p "$OUT"
  run gcloud storage rsync --recursive "$WORKDIR" "$OUT"
}

needed() {
  case "$WORKDIR" in gs://*) ;; *) say "WORKDIR=$WORKDIR has to be in a bucket, gs://BUCKET/run: a pod's disk goes with it" && exit 2 ;; esac
  if [ -z "$IMAGE" ]; then say "IMAGE is empty: give the name to push to, REGION-docker.pkg.dev/PROJECT/REPOSITORY/trace_jax:TAG" && exit 2; fi
}

main() {
  needed
  start
  if $DRY_RUN; then return; fi
  trap 'say "the job goes on: the same command follows it again, launch/gke.sh delete ends it"; exit 130' INT TERM
  follow
  fetch
}

case "$ACTION" in
  run) main ;;
  fetch) needed && fetch ;;
  delete)
    run kubectl --namespace="$NAMESPACE" delete jobset "$NAME" --ignore-not-found
    run kubectl --namespace="$NAMESPACE" delete secret "$NAME-keys" --ignore-not-found
    ;;
  *) usage ;;
esac
