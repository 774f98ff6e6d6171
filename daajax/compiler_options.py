"""Options of XLA's compilers, given with each compilation and never through XLA_FLAGS, where an unknown one aborts.

All are off unless asked for: what helps depends on the model, the mesh and the compiler's version, so measure. To add a
set, add it to `SETS` under its platform; `tests/test_ahead_of_time.py` shows every one to the compilers.
"""

from collections.abc import Sequence
from typing import Any

import jax

from daajax import sharding
from daajax.errors import UserError, one_line

Options = dict[str, str | bool]

SETS: dict[str, dict[str, Options]] = {  # platform: name of a set: options
    "tpu": {
        # collectives run beside the arithmetic of several steps
        "async_collectives": {
            "xla_enable_async_all_gather": True,
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
        },
        # on-chip memory that one operation may have, KiB; v6e and later have 128 MiB of it
        "scoped_vmem": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
        # collectives run on the SparseCores of v6e and TPU7x
        "sparsecore": {
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
            "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
        },
        # gradients are summed across slices while the backward pass goes on
        "across_slices": {
            "xla_tpu_data_parallel_opt_different_sized_ops": True,
            "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        },
    },
    "gpu": {
        # orders operations so that collectives run beside arithmetic
        "latency_hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
        # the next layer's parameters are gathered during this one
        "pipelined_collectives": {
            "xla_gpu_enable_pipelined_all_gather": True,
            "xla_gpu_enable_pipelined_all_reduce": True,
            "xla_gpu_enable_pipelined_reduce_scatter": True,
            "xla_gpu_enable_while_loop_double_buffering": True,
        },
        # small collectives become one of at most so many bytes
        "combined_collectives": {
            "xla_gpu_all_gather_combine_threshold_bytes": str(2**30),
            "xla_gpu_all_reduce_combine_threshold_bytes": str(2**27),
            "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**27),
        },
    },
    "cpu": {},
}


def check(given: Sequence[Any]) -> None:
    """Refuses what is neither a set of some platform nor an option with its value.

    Raises:
        UserError: If there is such a one.
    """
    for one in given:
        if not isinstance(one, str) or not ("=" in one or any(one in sets for sets in SETS.values())):
            known = "; ".join(f"{platform}: {', '.join(sets)}" for platform, sets in SETS.items() if sets)
            raise UserError(
                f"config.compiler_options holds {one!r}, which is no set ({known}) and no option with a value, such as "
                "'xla_gpu_enable_latency_hiding_scheduler=true'."
            )


def chosen(given: Sequence[str], mesh: Any) -> Options:
    """The options by name, of sets and of those given by themselves; each is shown to the compiler by itself.

    Args:
        given: Names of sets and `option=value`; where two say different things of an option, the later one holds.
        mesh: Whose devices are compiled for; they need not be there.

    Raises:
        UserError: If one is of another platform, or the compiler does not know it.
    """
    check(given)
    platform, options = sharding.device_of(mesh).platform, Options()
    for one in given:
        name, equals, value = one.removeprefix("--").partition("=")
        others = [other for other in SETS if other != platform]
        if not equals and name in SETS[platform]:
            options |= SETS[platform][name]
        elif not equals or name.startswith(tuple(f"xla_{other}_" for other in others)):
            own = ", ".join(SETS[platform]) or "none"
            raise UserError(
                f"config.compiler_options holds {one!r}, which is of another platform than {platform}; its sets: {own}."
            )
        else:
            options[name] = {"true": True, "false": False}.get(value.lower(), value)
    _probe(options, mesh)
    return options


def _probe(options: Options, mesh: Any) -> None:
    """Compiles a program of one number with each option."""
    if not options:
        return
    lowered = jax.jit(lambda: 0.0, out_shardings=sharding.replicated(mesh)).lower()
    for name, value in options.items():
        try:
            lowered.compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"config.compiler_options: this compiler refuses {name}={value} ({one_line(error)}); leave it out."
            ) from None
