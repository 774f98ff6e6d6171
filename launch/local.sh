#!/usr/bin/env bash
# Trains on this machine, in one process: launch/local.sh --config=configs/dpo_llama.py [--workdir=DIR] [--config.key=value ...]
# JAX_NUM_CPU_DEVICES=N splits the CPU into N devices (default 1). PYTHON names another interpreter than the checkout's own.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "there is no $python; run \`make setup\` in $root, or set PYTHON" >&2
  exit 1
fi

# Huge pages for large arrays, a third off a CPU step; glibc reads this before Python starts.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}

# exec: signals reach Python, and its exit code (0 done, 1 an error, 130 stopped) reaches the caller.
exec "$python" -m daajax.train "$@"
