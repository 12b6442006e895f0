#!/usr/bin/env bash
# gptjax on Cloud TPU VMs, one host or a whole slice, from your own machine.
#
#   deploy/tpu_vm.sh [--dry-run] COMMAND [flags of launch.py]
#
#   create   asks Google for the slice        run FLAGS     starts launch.py FLAGS on all workers
#   setup    puts this commit on all workers  resume FLAGS  the same, on a new slice if need be
#   logs     follows the first worker's log   stop          SIGTERM on all workers: saves and ends
#   status   the slice's state                delete        gives the slice back
#
# --dry-run prints the gcloud commands and runs none. Settings, from the environment:
#   TPU_NAME      name of the slice (gptjax)
#   ZONE          zone (us-west4-a)
#   ACCELERATOR   type and chips (v5litepod-16)
#   RUNTIME       image of the VMs (v2-alpha-tpuv5-lite)
#   PROJECT       Google Cloud project (gcloud's own setting)
#   SPOT          1: spot capacity, cheaper, may be taken away (0)
#
# The workers find each other by themselves. Their disks go with the slice, so that --workdir must
# be a bucket: gs://BUCKET/RUN.
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

# The command as it could be pasted into a shell.
show() {
  printf '%q' "$1"
  [ $# -lt 2 ] || printf ' %q' "${@:2}"
  printf '\n'
}

tpu() { # COMMAND ARGUMENTS...: gcloud compute tpus tpu-vm COMMAND ... in our zone and project
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
  # shellcheck disable=SC2064  # the folder of now, not of later
  trap "rm -rf '$folder'" EXIT
  [ "$dry_run" = 1 ] || git -C "$root" archive --format=tar.gz --output="$folder/$archive" HEAD
  tpu scp "$folder/$archive" "$TPU_NAME:$archive" --worker=all
  # The images have an older Python than gptjax needs; uv brings its own.
  on_workers all "set -e; mkdir -p gptjax; tar -xzf $archive -C gptjax; cd gptjax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --clear --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt -r requirements-remote.txt
.venv/bin/python -c 'import jax; print(jax.__version__)'"
}

start() { # FLAGS...
  local flags
  flags=$(show "$@")
  # A second start of a run that is under way does nothing. The run outlives this connection.
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

state() { # READY, PREEMPTED, ..., or MISSING
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
    # A slice that was taken away can only be deleted.
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
