#!/usr/bin/env bash
# What launch/tpu_vm.sh has done on each host of a TPU: set-up · start MODULE ARGUMENTS... · follow LINE · code.
# The training outlives the connection that started it; ~/daajax-run has its log, process and exit code.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=${RUN_FOLDER:-$HOME/daajax-run}
lock=${TPU_LOCK_FILE:-/tmp/libtpu_lockfile}

metadata=${METADATA_URL:-http://metadata.google.internal/computeMetadata/v1/instance/attributes}

running() { [[ -f $run/process ]] && kill -0 "$(<"$run/process")" 2>/dev/null; }

case ${1:-} in
  set-up) # Python 3.11, which the images lack, and the pinned versions
    cd "$root"
    if ! python3.11 -c 'import ensurepip, venv' 2>/dev/null || ! command -v make >/dev/null; then
      sudo add-apt-repository -y ppa:deadsnakes/ppa
      sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y -qq make python3.11 python3.11-venv
    fi
    make setup PYTHON=python3.11 ACCEL=tpu
    ;;
  start)
    shift
    mkdir -p "$run"
    if running; then # what is left of a run whose other hosts died
      kill -KILL -- "-$(<"$run/process")" || true
    fi
    rm -f "$run/code"
    if [[ -e $lock ]]; then
      echo "removing $lock, which a killed process left: it would keep this one from the TPU"
      rm -f "$lock" 2>/dev/null || sudo rm -f "$lock"
    fi
    cd "$root"
    set -a
    # shellcheck source=/dev/null
    . launch/env/tpu.env
    set +a
    # Which of the hosts this is: a trial asks before JAX can say.
    DAAJAX_HOST=$(curl -sf --max-time 5 -H 'Metadata-Flavor: Google' "$metadata/agent-worker-number" || echo 0)
    export DAAJAX_HOST
    # shellcheck disable=SC2016
    setsid nohup bash -c '"${@:2}"; echo $? >"$1.new"; mv "$1.new" "$1"' - "$run/code" \
      "${PYTHON:-.venv/bin/python}" -m "$@" >"$run/log" 2>&1 </dev/null &
    echo $! >"$run/process"
    ;;
  follow) # the log from behind that line on, to the end of the training; the last line is its exit code
    if [[ ! -f $run/process ]]; then
      echo "exit code NONE"
      exit
    fi
    tail -n "+$((${2:-0} + 1))" --pid="$(<"$run/process")" --sleep-interval=1 -f "$run/log"
    if [[ -f $run/code ]]; then
      echo "exit code $(<"$run/code")"
    else
      echo "exit code 137" # not even its shell is there: killed, or the host was started anew
    fi
    ;;
  code) # how the training ended, if it has
    [[ ! -f $run/code ]] || echo "exit code $(<"$run/code")"
    ;;
  *)
    echo "launch/tpu_worker.sh: set-up, start MODULE ARGUMENTS..., follow LINE or code, not ${1:-nothing}" >&2
    exit 1
    ;;
esac
