#!/usr/bin/env bash
# Trains on this machine: launch/local.sh --config=configs/dpo_llama.py [--workdir=DIR] [--config.key=value ...]
# With --processes, --devices, --restarts, --smoke, --dry-run or --help it is launch/local.py that starts it.
# JAX_NUM_CPU_DEVICES=N splits the CPU into N devices (default 1). PYTHON names another interpreter than the checkout's own.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "there is no $python; run \`make setup\` in $root, or set PYTHON" >&2
  exit 1
fi

set -a # what is read from here on is passed on
# shellcheck source=/dev/null
. "${ENV_FILE:-$root/launch/env/cpu.env}"
JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}
set +a

for argument in "$@"; do
  case $argument in
    --processes* | --devices* | --restarts* | --smoke | --dry-run | --help | -h) exec "$python" "$root/launch/local.py" "$@" ;;
  esac
done
# exec: signals reach Python, and its exit code reaches the caller.
exec "$python" -m daajax.train "$@"
