#!/usr/bin/env bash
# What tpu_pod.sh asks of each worker of a slice: a job that outlives the connection that started it.
#
#   tpu_worker.sh look                   one line: none, running ID, or ended CODE ID
#   tpu_worker.sh install                trace_jax.tar.gz into trace_jax/, with a virtual environment
#   tpu_worker.sh start ID COMMAND...    in trace_jax/; NAME=value lines for its environment on stdin, up to a lone dot
#   tpu_worker.sh follow LINE            the log from that line on, as NUMBER:TEXT, then "end" once the job has ended
#   tpu_worker.sh stop [ID | by-hand]    SIGTERM: it saves its step and ends. ID: where it is that job; by-hand: and ended with 130
#
# Each may come twice, because gcloud repeats a command whose connection broke.

# shellcheck disable=SC2329  # the first argument names the function
set -euo pipefail
SELF=$(realpath "$0")
cd
JOB=$PWD/trace_jax_job # of the last job: id, pid, log, code, by-hand; the lock is held as long as any of its processes lives
mkdir -p "$JOB"

running() { ! flock --nonblock "$JOB/lock" true; }

look() {
  local id=none code=137 # killed with all its processes, or the machine was started anew
  if [ -f "$JOB/id" ]; then id=$(cat "$JOB/id"); fi
  if running; then
    echo "job: running $id"
  elif [ "$id" = none ]; then
    echo "job: none"
  else
    if [ -f "$JOB/code" ]; then code=$(cat "$JOB/code"); fi
    if [ "$code" != 0 ] && [ -f "$JOB/by-hand" ]; then code=130; fi
    echo "job: ended $code $id"
  fi
}

# The first Python that trace_jax runs on. Ubuntu 22.04, of which the runtimes are made, comes with 3.10 and has 3.11 to install.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  sudo apt-get -qq update >&2
  sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install python3.11 python3.11-venv >&2
  echo python3.11
}

install() {
  local python
  exec 8>"$JOB/installing"
  flock 8 # one that came twice waits for the other
  if running; then
    echo "a job runs here; nothing is installed under it" >&2
    return 3
  fi
  python=$(find_python)
  mkdir -p trace_jax
  find trace_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf trace_jax.tar.gz -C trace_jax
  cd trace_jax
  "$python" -m venv .venv
  .venv/bin/pip install -q -c constraints.txt -e '.[gcs,tpu]'
}

start() {
  local id=$1 line=
  shift
  if [ "$(cat "$JOB/id" 2>/dev/null)" = "$id" ]; then return; fi
  while IFS= read -r line && [ "$line" != . ]; do
    export "${line?}"
  done
  if [ "$line" != . ]; then
    echo "the connection broke before all of the environment was here; not started" >&2
    return 3
  fi
  flock "$JOB/installing" true
  exec 9>"$JOB/lock"
  if ! flock --nonblock 9; then
    echo "another job runs here" >&2
    return 3
  fi
  rm -f "$JOB/code" "$JOB/by-hand"
  echo "$id" >"$JOB/id"
  setsid nohup bash "$SELF" work "$@" >"$JOB/log" 2>&1 </dev/null &
  echo $! >"$JOB/pid"
}

# The job itself. bash waits for it also after a SIGTERM, which both get from `stop` and from a machine that goes down.
work() {
  local code=0
  trap : TERM
  (cd trace_jax && exec "$@") || code=$?
  echo "$code" >"$JOB/code.new"
  mv "$JOB/code.new" "$JOB/code"
}

follow() {
  local more=()
  if running; then more=(-f --pid="$(cat "$JOB/pid")"); fi
  tail -n "+$1" "${more[@]}" "$JOB/log" | grep -a -n --line-buffered '' || true
  running || echo end
}

stop() {
  if ! running; then return; fi
  case "${1:-}" in
    "") ;;
    by-hand) touch "$JOB/by-hand" ;;
    *) [ "$1" = "$(cat "$JOB/id")" ] || return 0 ;;
  esac
  kill -TERM -- "-$(cat "$JOB/pid")"
}

"$@"; exit # on one line: a newer copy of this file may come while `work` runs
