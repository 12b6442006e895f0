#!/usr/bin/env bash
# Runs gptjax on Cloud TPU VMs, one host or a whole slice, from your own machine.
#
#   deploy/tpu_vm.sh [--dry-run] COMMAND [flags of launch.py]
#
#   create        creates the slice
#   setup         copies this commit to all workers and installs the packages
#   run FLAGS     starts launch.py with these flags on all workers
#   resume FLAGS  the same, and first replaces a slice that was taken away
#   logs          shows the first worker's log, and follows it
#   stop          sends SIGTERM on all workers, and waits until the run is saved and has ended
#   status        prints the slice's state
#   delete        deletes the slice
#
# --dry-run prints the gcloud commands and runs none. Settings, with their defaults in brackets, are
# environment variables:
#   TPU_NAME      name of the slice (gptjax)
#   ZONE          zone (us-west4-a)
#   ACCELERATOR   type and number of chips (v5litepod-16)
#   RUNTIME       image of the VMs (v2-alpha-tpuv5-lite)
#   PROJECT       Google Cloud project (gcloud's own setting)
#   SPOT          1 means spot capacity, which is cheaper and may be taken away (0)
#
# The workers find each other by themselves. Their disks are deleted with the slice. Therefore
# --workdir must be in a bucket: gs://BUCKET/RUN.
set -euo pipefail

TPU_NAME=${TPU_NAME:-gptjax}
ZONE=${ZONE:-us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
PROJECT=${PROJECT:-}
SPOT=${SPOT:-0}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=0
place=("--zone=$ZONE")
[ -z "$PROJECT" ] || place+=("--project=$PROJECT")

fail() {
  echo "error: $1" >&2
  exit 2
}

# Prints a command in a form that can be pasted into a shell.
show() {
  printf '%q' "$1"
  [ $# -lt 2 ] || printf ' %q' "${@:2}"
  printf '\n'
}

tpu() { # COMMAND ARGUMENTS...: runs gcloud compute tpus tpu-vm COMMAND in the zone and project
  if [ "$dry_run" = 1 ]; then
    show gcloud compute tpus tpu-vm "$@" "${place[@]}"
  else
    gcloud compute tpus tpu-vm "$@" "${place[@]}"
  fi
}

on_workers() { # WORKERS COMMAND: runs COMMAND in a shell of these workers
  tpu ssh "$TPU_NAME" "--worker=$1" "--command=$2"
}

create() {
  local more=()
  [ "$SPOT" = 0 ] || more+=(--spot)
  tpu create "$TPU_NAME" "--accelerator-type=$ACCELERATOR" "--version=$RUNTIME" "${more[@]}"
}

setup() {
  local archive=gptjax.tar.gz folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the value of $folder at this line, not at the exit
  trap "rm -rf '$folder'" EXIT
  [ "$dry_run" = 1 ] || git -C "$root" archive --format=tar.gz --output="$folder/$archive" HEAD
  tpu scp "$folder/$archive" "$TPU_NAME:$archive" --worker=all
  # The Python of the images is too old for gptjax. uv downloads a newer one.
  on_workers all "set -e; mkdir -p gptjax; tar -xzf $archive -C gptjax; cd gptjax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --clear --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt -r requirements-remote.txt
.venv/bin/python -c 'import jax; print(jax.__version__)'"
}

start() { # FLAGS...
  local flags
  flags=$(show "$@")
  # If the run is under way, a second start does nothing. The run continues when this connection ends.
  on_workers all "set -e; cd gptjax
if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then echo 'runs already'; exit 0; fi
nohup setsid .venv/bin/python launch.py $flags >>run.log 2>&1 </dev/null &
echo \$! >run.pid"
}

check_flags() { # FLAGS...
  local flag
  for flag in "$@"; do
    case $flag in
      --workdir=gs://?* | -workdir=gs://?*) return ;;
    esac
  done
  fail "give --workdir=gs://BUCKET/RUN: the disks of the workers go with them"
}

state() { # Prints READY, PREEMPTED, ..., or MISSING
  local answer
  if answer=$(tpu describe "$TPU_NAME" "--format=value(state)" 2>&1); then
    echo "${answer##*$'\n'}"
  else
    case $answer in
      *NOT_FOUND*) echo MISSING ;;
      *) fail "gcloud does not say how $TPU_NAME is: ${answer##*$'\n'}" ;;
    esac
  fi
}

resume() { # FLAGS...
  local now
  if [ "$dry_run" = 1 ]; then
    tpu describe "$TPU_NAME" "--format=value(state)"
    echo "# if that says PREEMPTED or TERMINATED:"
    now=PREEMPTED
  else
    now=$(state)
  fi
  case $now in
    READY) ;;
    # A slice that was taken away cannot be started again, only deleted.
    PREEMPTED | TERMINATED)
      tpu delete "$TPU_NAME" --quiet
      create
      setup
      ;;
    MISSING)
      create
      setup
      ;;
    *) fail "$TPU_NAME is $now; wait until it is READY (if it was stopped, start it), or delete it" ;;
  esac
  start "$@"
}

if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
command=${1:-}
[ $# = 0 ] || shift
case $command in
  run | resume) check_flags "$@" ;;
  create | setup | logs | stop | status | delete)
    [ $# = 0 ] || fail "$command takes no flags, got $1" ;;
  *) fail "COMMAND '$command' must be one of create, setup, run, resume, logs, stop, status, delete" ;;
esac
case $command in
  create) create ;;
  setup) setup ;;
  run) start "$@" ;;
  resume) resume "$@" ;;
  logs) on_workers 0 "tail -n 100 -F gptjax/run.log" ;;
  stop) on_workers all "cd gptjax && kill -TERM \"\$(cat run.pid)\" && while kill -0 \"\$(cat run.pid)\" 2>/dev/null; do sleep 1; done" ;;
  status) tpu describe "$TPU_NAME" "--format=value(state)" ;;
  delete) tpu delete "$TPU_NAME" --quiet ;;
esac
