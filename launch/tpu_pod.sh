#!/usr/bin/env bash
# One job on a Cloud TPU slice: create or reuse it, install, start on all workers, follow the log, fetch the results.
#
#   launch/tpu_pod.sh run     [--dry-run]   everything above; a preempted job is started again, a running one followed again
#   launch/tpu_pod.sh fetch   [--dry-run]   results so far
#   launch/tpu_pod.sh stop    [--dry-run]   the job saves its step and ends, and nobody starts it again; the slice stays
#   launch/tpu_pod.sh delete  [--dry-run]   the slice, after asking
#
# Needs gcloud, logged in. What goes to the slice is the last commit of this checkout (git archive HEAD): data, policies and
# changes that are not committed stay behind, so name them as gs://. Variables, from the environment or edited here:
: "${PROJECT:=$(gcloud config get-value project 2>/dev/null)}"
: "${ZONE:=us-west4-a}"
: "${NAME:=trace-jax}"
: "${ACCELERATOR:=v5litepod-8}"                # one host of 8 chips, v5e:2x4; v5litepod-16 is v5e:4x4 on four hosts
: "${RUNTIME:=v2-alpha-tpuv5-lite}"
: "${QUEUED:=false}"                           # true: a queued resource, NAME-queue, which waits for its turn
: "${SPOT:=false}"                             # true: cheaper, may be taken away at any time, with its disk: WORKDIR on gs://
: "${CONFIG:=configs/gemma9b.py:lora}"
: "${WORKDIR:=/var/tmp/trace_jax/run}"         # several hosts, or SPOT: gs://BUCKET/run, which the TPU's service account may write
: "${FLAGS:=}"                                 # more flags, as in --config.seed=3; quotes in it are passed on as they are
: "${OVERLAP:=false}"                          # true: full fine-tuning gathers parameters while it computes, for more memory (docs/running.md)
: "${SECRETS:=GEMINI_API_KEY HF_TOKEN}"        # passed on from this shell where they are set, over stdin, in no command line
: "${ATTEMPTS:=20}"                            # on a slice, the first included; until the job was on one, also without
: "${WAIT:=30}"                                # seconds between two looks at something that is not there yet
: "${OUT:=runs/$NAME}"                         # where fetched results go

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  { echo "this needs bash 4.4 or newer, and here is $BASH_VERSION; on a Mac: brew install bash" >&2 && exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//' && exit 2; }
say() { echo "$*" >&2; }
refuse() { say "$*" && exit 2; }

ACTION=${1:-}
DRY_RUN=false
case "$ACTION" in run | fetch | stop | delete) ;; *) usage ;; esac
case "${2:-}" in "") ;; --dry-run) DRY_RUN=true ;; *) usage ;; esac
$DRY_RUN || command -v gcloud >/dev/null || refuse "gcloud is not installed here: https://cloud.google.com/sdk/docs/install"
[ -n "$PROJECT" ] || refuse "PROJECT is empty: PROJECT=ID launch/tpu_pod.sh $ACTION, or gcloud config set project ID"
case "$WORKDIR" in
  gs://* | /*) ;;
  *) refuse "WORKDIR=$WORKDIR would lie in the checkout, which every start replaces: give a path from / on, or gs://BUCKET/run" ;;
esac
if [ "$SPOT" = true ] && [ "${WORKDIR#gs://}" = "$WORKDIR" ]; then
  say "warning: a spot slice that is taken away takes $WORKDIR with it, and the job begins again; WORKDIR=gs://BUCKET/run stays"
fi

# Prints a command, and runs it unless it is a dry run.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  $DRY_RUN || "$@"
}

cloud() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; } # KIND VERB ARGUMENT...

# --- before anything is made, and paid for ---

read -r -d '' -a GIVEN <<<"$FLAGS" || true

# Says what of this checkout stays here, and refuses a run that names a file which the slice would not have.
check_sent() {
  local changed count word path
  if ! git rev-parse --quiet --verify HEAD >/dev/null 2>&1; then
    say "the last commit is what goes to the slice, and here is none: start from a git clone"
    $DRY_RUN || exit 2
    return 0
  fi
  changed=$(git status --porcelain | cut -c4-)
  if [ -n "$changed" ]; then
    count=$(grep -c . <<<"$changed")
    say "warning: not committed, so not on the slice as here ($count): $(head -n 10 <<<"$changed" | paste -sd ' ' -)$( ((count <= 10)) || echo ' ...')"
  fi
  for word in --config="${CONFIG%%:*}" "${GIVEN[@]}"; do
    path=${word#*=}
    case "$word" in --config=* | --config.policy.*=* | --config.*path=* | --config.triage.overrides=*) ;; *) continue ;; esac
    case "$path" in gs://* | /*) continue ;; esac # those from / on are the slice's own
    if [ -e "$path" ] && ! git cat-file -e "HEAD:./$path" 2>/dev/null; then
      refuse "$word is not committed, so the slice would not have it: commit it, or copy it to a bucket and give gs://BUCKET/$(basename "$path")"
    fi
  done
}

# Asks the program whether it would take the config, where it is installed here.
check_config() {
  local python said
  case " ${GIVEN[*]}" in *" --config.parent="*) return 0 ;; esac # which is where the slice is
  for python in .venv/bin/python python3; do
    if "$python" -c 'import trace_jax.launch' 2>/dev/null; then
      said=$(PYTHONPATH=. "$python" launch/check_config.py --config="$CONFIG" "${GIVEN[@]}" 2>/dev/null) || [ $? -ne 2 ] || refuse "$said"
      return 0
    fi
  done
}

# --- the slice ---

# The state of the slice or of its queued resource, empty where there is none. Fails where Google Cloud cannot be asked:
# what is not known to be gone is never made anew. STATE is the field that holds it.
state() { # KIND NAME STATE
  gcloud compute tpus "$1" list --project="$PROJECT" --zone="$ZONE" --format="value(name.basename(), $3)" |
    awk -v name="$2" '$1 == name { print $2 }'
}
slice_state() { state tpu-vm "$NAME" state; }
queue_state() { state queued-resources "$NAME-queue" state.state; }

# Until the slice is ready. Fails where another try may help; ends the script where a person has to decide.
create() {
  local found
  if $DRY_RUN; then order; return; fi
  while true; do
    found=$(slice_state) || return
    case "$found" in
      READY) return ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | UNHIDING | STOPPING | DELETING) wait_for "$NAME is $found" ;;
      STOPPED) start_slice ;;
      PREEMPTED | TERMINATED)
        say "$NAME was taken away, and its disk with it: a new one is made; what is in gs:// stays"
        remove || return
        ;;
      "")
        order || return
        found=$(slice_state) || return
        [ -n "$found" ] || wait_for "$NAME is not there yet"
        ;;
      *) refuse "$NAME is $found: look at it in the console; launch/tpu_pod.sh delete takes it down, NAME=other makes another" ;;
    esac
  done
}

wait_for() { say "$*; waiting" && sleep "$WAIT"; }

# A stopped slice has its disk, so it is never deleted here.
start_slice() {
  cloud tpu-vm start "$NAME" ||
    refuse "$NAME is stopped and could not be started (see above; spot slices and slices of several hosts cannot be). All that \
is on its disk is still there. Try again later, or NAME=other for another slice, or launch/tpu_pod.sh delete, which \
deletes the slice with its disk"
}

# Asks for a slice where there is none: directly, or by a place in the queue, which may be there from before.
order() {
  local spot=()
  if [ "$SPOT" = true ]; then spot=(--spot); fi
  if [ "$QUEUED" != true ]; then
    cloud tpu-vm create "$NAME" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" "${spot[@]}"
    return
  fi
  local found=""
  $DRY_RUN || found=$(queue_state) || return
  case "$found" in
    "")
      cloud queued-resources create "$NAME-queue" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
        --runtime-version="$RUNTIME" "${spot[@]}"
      ;;
    FAILED)
      cloud queued-resources describe "$NAME-queue" --format="yaml(state)"
      say "$NAME-queue failed, see above; it is asked for again"
      remove && return 1
      ;;
    SUSPENDED) remove ;; # its slice is gone
    ACTIVE)              # so is it here, if it did not come this very moment
      found=$(slice_state) || return
      [ -n "$found" ] || remove
      ;;
    *) say "$NAME-queue is $found" ;;
  esac
}

# A queued resource goes together with its slice; neither can be deleted well without the other.
remove() {
  local found=""
  $DRY_RUN || found=$(queue_state) || return
  if [ -n "$found" ] || { $DRY_RUN && [ "$QUEUED" = true ]; }; then
    cloud queued-resources delete "$NAME-queue" --force
  else
    cloud tpu-vm delete "$NAME"
  fi
}

# --- the workers; what they do is in tpu_worker.sh ---

worker() { # WORKER|all COMMAND...
  local which=$1
  shift
  cloud tpu-vm ssh "$NAME" --worker="$which" --ssh-flag=-oServerAliveInterval=30 --command="bash tpu_worker.sh $(printf '%q ' "$@")"
}

copy() { cloud tpu-vm scp "$@"; }

# FUNCTION WORKER ARGUMENT... for every worker from FIRST on, all at once; succeeds where all do.
at_once() { # FIRST FUNCTION ARGUMENT...
  local worker task tasks=() failed=false
  for ((worker = $1; worker < WORKERS; worker++)); do
    set -m # a process group of its own, so that none tries on once this script has ended
    "$2" "$worker" "${@:3}" &
    set +m
    tasks+=($!)
    OTHERS+=("-$!")
  done
  for task in "${tasks[@]}"; do
    wait "$task" || failed=true
  done
  OTHERS=()
  ! $failed
}

# By number: gcloud refuses to copy to all where an ssh-agent lacks its key. The first one alone: gcloud may have to make that key.
copy_to_all() { # FILE NAME
  copy_to 0 "$@" && at_once 1 copy_to "$@"
}
copy_to() { copy "$2" "$NAME:$3" --worker="$1"; } # WORKER FILE NAME

count_workers() {
  WORKERS=1
  $DRY_RUN && return
  WORKERS=$(gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(networkEndpoints.ipAddress)' | tr ';' '\n' | grep -c .)
}

# Sets JOB to: none, running, ended, or unknown where not every worker answers; and ID (of all workers, or "several") and CODE.
look() {
  local said
  JOB=unknown ID="" CODE=""
  said=$(worker all look </dev/null 2>/dev/null | sed -n 's/^job: //p') || return 0
  [ "$(grep -c . <<<"$said")" = "$WORKERS" ] || return 0
  case "$said" in
    *running*) JOB=running ;;
    *ended*) JOB=ended ;;
    *) JOB=none ;;
  esac
  ID=$(awk '{ print $NF }' <<<"$said" | sort -u)
  case "$ID" in *$'\n'*) ID=several ;; esac
  CODE=$(awk '$1 == "ended" { print ($2 == 2 ? 0 : $2 == 130 ? 1 : $2 ? 2 : 3), $2 }' <<<"$said" | sort -n | awk 'NR == 1 { print $2 }')
}

install() {
  local archive code=0
  archive=$(mktemp)
  run git archive --format=tar.gz --output="$archive" HEAD &&
    copy_to_all "$archive" trace_jax.tar.gz &&
    worker all install </dev/null || code=$?
  rm -f "$archive"
  return "$code"
}

# Lines NAME=value of the secrets that are set here, and the dot that ends them.
secrets() {
  local name
  for name in $SECRETS; do
    if [ -n "${!name:-}" ]; then printf '%s=%s\n' "$name" "${!name}"; fi
  done
  echo .
}

# Sets COMMAND, and the NAME of it that tells this job from others on the slice.
describe_job() {
  COMMAND=()
  if [ "$OVERLAP" = true ]; then
    COMMAND=(env LIBTPU_INIT_ARGS="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true")
  fi
  COMMAND+=(.venv/bin/python -m trace_jax.launch --config="$CONFIG" --workdir="$WORKDIR" --distributed "${GIVEN[@]}")
  JOB_NAME=$(printf '%s\n' "${COMMAND[@]}" | cksum | cut -d' ' -f1)
}

# All workers at once, since they wait for each other only so long; each on its own, because each has the secrets on its own
# stdin. All of them, or none.
STARTS=0
start() {
  local id
  id=$JOB_NAME-$(date +%s).$$.$((++STARTS)) # a job may end within the second in which it began
  SEEN=()
  at_once 0 start_one "$id" || {
    say "not every worker started; the others stop"
    worker all stop "$id" </dev/null || true
    return 1
  }
}

start_one() { # WORKER ID
  local tries
  for tries in 1 2 3; do
    if worker "$1" start "$2" "${COMMAND[@]}" < <(secrets); then return; fi
    say "worker $1 did not start (try $tries of 3)"
    sleep "$WAIT"
  done
  return 1
}

# Prints the log of a worker from where it was left until the connection or the job ends; succeeds where the job has ended.
SEEN=() # lines, by worker
follow() { # WORKER
  local line number from=${SEEN[$1]:-0} mark=""
  if ((WORKERS > 1)); then mark="[$1] "; fi
  while IFS= read -r line; do
    if [ "$line" = end ]; then return; fi
    number=${line%%:*}
    case "$number" in "" | *[!0-9]*) continue ;; esac
    if ((from + number > ${SEEN[$1]:-0})); then
      SEEN[$1]=$((from + number))
      printf '%s%s\n' "$mark" "${line#*:}"
    fi
  done < <(worker "$1" follow "$((from + 1))" </dev/null 2>/dev/null)
  return 1
}

# Stays with the job until it has ended everywhere, through broken connections. Returns its exit code, or 75 where the slice is gone.
stay() {
  local worker found
  for ((worker = 1; worker < WORKERS; worker++)); do
    set -m # a process group of its own, to end it with all its connections
    (until follow "$worker"; do sleep "$WAIT"; done) &
    set +m
    OTHERS+=("-$!")
  done
  while true; do
    follow 0 || true
    look
    case "$JOB" in
      ended) break ;;
      none) CODE=75 && break ;; # another slice of this name
      unknown)
        found=$(slice_state) || found=unknown
        case "$found" in "" | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) CODE=75 && break ;; esac
        say "$NAME does not answer (it is $found); the job goes on there, trying again"
        ;;
    esac
    sleep "$WAIT"
  done
  leave_others
  return "$CODE"
}

OTHERS=() # process groups that start workers, or follow 1, 2, ...
leave_others() {
  ((${#OTHERS[@]})) || return 0
  sleep 1 # what they said last
  kill -- "${OTHERS[@]}" 2>/dev/null || true
  OTHERS=()
}

fetch() {
  run mkdir -p "$OUT"
  case "$WORKDIR" in
    gs://*) run gcloud storage rsync --recursive "$WORKDIR" "$OUT" ;;
    *) copy --recurse --worker=0 "$NAME:$WORKDIR" "$OUT" ;;
  esac
}

# --- all of it ---

READY=false AT_WORK=false STARTED=false # whether this attempt had a slice, and the job at work; whether any had

# One slice with the job on it, from wherever the last try left them. Returns the job's exit code, or 75 to try again.
attempt() {
  create || return 75
  READY=true
  count_workers || return 75
  if ((WORKERS > 1)) && [ "${WORKDIR#gs://}" = "$WORKDIR" ]; then
    refuse "$NAME has $WORKERS workers, each with a disk of its own, and WORKDIR=$WORKDIR: give WORKDIR=gs://BUCKET/run (the slice stays, \
and costs, until launch/tpu_pod.sh delete)"
  fi
  copy_to_all launch/tpu_worker.sh tpu_worker.sh || return 75
  JOB=none
  $DRY_RUN || look
  case "$JOB" in
    unknown) say "not every worker of $NAME answers" && return 75 ;;
    running)
      [ "$ID" != several ] || { say "only some workers have the job" && worker all stop </dev/null || true; return 75; }
      [ "${ID%-*}" = "$JOB_NAME" ] || refuse "$NAME runs another job (other CONFIG, WORKDIR or FLAGS): launch/tpu_pod.sh stop ends it"
      say "$NAME runs this job already; this is its log"
      ;;
    *)
      install || return 75
      start || return 75
      ;;
  esac
  AT_WORK=true STARTED=true
  $DRY_RUN || stay
}

main() {
  local try=0 code
  check_sent
  check_config
  describe_job
  trap 'say "the job on $NAME, if it was started, goes on: the same command follows it again, launch/tpu_pod.sh stop ends it"; exit 130' INT TERM
  trap leave_others EXIT
  while ((try < ATTEMPTS)); do
    code=0 READY=false AT_WORK=false
    attempt || code=$?
    case "$code" in
      0)
        fetch || { say "the job is done, but its results did not come: launch/tpu_pod.sh fetch" && return 1; }
        echo "done; launch/tpu_pod.sh delete takes the slice down"
        return
        ;;
      2) say "the job ended with 2, see above; it is not started again" && return 2 ;;
      130) say "the job was stopped by hand; the same command starts it again, from its last checkpoint" && return 130 ;;
    esac
    if $AT_WORK; then
      say "attempt $((++try)) of $ATTEMPTS ended with $code; the job goes on from its last checkpoint"
    elif $STARTED && ! $READY; then
      say "no slice with the job on it yet, see above; trying again, which does not count as an attempt"
    else
      say "attempt $((++try)) of $ATTEMPTS ended with $code, see above; no job was started$($STARTED || echo ' yet')"
    fi
    $DRY_RUN || sleep "$WAIT"
  done
  return 1
}

case "$ACTION" in
  run) main ;;
  fetch) fetch ;;
  stop) worker all stop by-hand </dev/null ;;
  delete)
    if ! $DRY_RUN; then
      read -r -p "delete $NAME in $ZONE, with everything on it? [y/N] " answer
      [ "$answer" = y ] || exit 0
    fi
    remove
    ;;
  *) usage ;;
esac
