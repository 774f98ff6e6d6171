"""What a run needs on machines that are not there: memory, arithmetic, what is sent, whether it fits.

    python -m daajax.plan --config=configs/dpo_llama.py --model=llama-3.1-8b --topology=v5e:4x4 [--config.key=value …]
    python -m daajax.plan --config=configs/dpo_llama.py --model=llama-3.1-70b --topology=h200:8x8 --search

Compiles the update and the reference pass of the run that a config describes, for TPUs (`pip install 'daajax[tpu]'`)
or NVIDIA GPUs (`daajax[cuda13]`), on any CPU; no weights are read, and no data need be there. This module only prepares
the process; `daajax.planning.planner` is the command.
"""

import os
import pathlib
import sys

AHEAD = pathlib.Path(sys.prefix, "ahead")  # where `make setup-ahead` puts compilers

# What libtpu asks for on standard error where it is not set, and how much of that is said; no program depends on it.
QUIET = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3"}


def prepare() -> None:
    """Sets what jax and the compilers read when they are imported: above all that no chip is looked for."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # or it would look for the chips whose compilers are installed
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is taken, so several plans may be made at once
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # which makes another program
    if AHEAD.is_dir() and str(AHEAD) not in sys.path:
        sys.path.append(str(AHEAD))


def main() -> None:
    """Runs the command."""
    prepare()
    from daajax.planning import planner  # here: jax reads the environment when it is imported

    planner.main()


if __name__ == "__main__":
    main()
