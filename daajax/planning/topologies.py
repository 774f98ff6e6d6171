"""Machines that need not be there, as their compilers know them: `v5e:4x4`, `h200:8`, `h200:8x8`.

TPUs are compiled for by libtpu, GPUs by JAX's CUDA plugin, both on any CPU. A new TPU is a line in `TPUS`, a new GPU
one in `GPUS`; `daajax.chips` has what they can do.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from daajax.chips import Chip, chip_of
from daajax.errors import UserError, one_line

# Of a GPU's memory, what a program may have if XLA_PYTHON_CLIENT_MEM_FRACTION says so, and what JAX takes unless told.
GPU_SHARE, GPU_SHARE_UNTOLD = 0.92, 0.75


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A kind of TPU.

    Attributes:
        memory: Bytes of a device that its compiler lets a program have; what it refuses a larger one with says so.
        dimensions: Of its torus.
        cores: How its compiler is told to see the chip's TensorCores; None: as it does by itself.
    """

    memory: int
    dimensions: int
    cores: str | None = None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as XLA's own descriptions have it (xla/backends/gpu/target_config/specs).

    Attributes:
        name: Which JAX gives it.
        memory: Bytes that the driver reports.
        bandwidth: Of its memory, bytes/s.
        capability: CUDA's compute capability.
        cores: Multiprocessors.
        lanes: Floating-point units of each.
        clock: GHz.
        shared_of_block: Bytes of shared memory that a block may ask for.
        shared_of_core: Bytes of it that a multiprocessor has.
        cache: Bytes of the L2 cache.
    """

    name: str
    memory: int
    bandwidth: int
    capability: int
    cores: int
    lanes: int
    clock: float
    shared_of_block: int
    shared_of_core: int
    cache: int

    def text(self) -> str:
        """What XLA is told of it."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_of_core}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_of_block}
  cuda_compute_capability {{ major: {self.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{self.name}"
"""


TPUS = {  # a device of a TPU7x is one of the chip's two TensorCores; jax makes no mesh of those of a v4
    "v4": Tpu(31488 * 2**20, 3, "megacore"),
    "v5e": Tpu(16128 * 2**20, 2),
    "v5p": Tpu(98038 * 2**20, 3),
    "v6e": Tpu(32000 * 2**20, 2),
    "tpu7x": Tpu(97024 * 2**20, 3),
}
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000, 8, 108, 64, 1.41, 166912, 167936, 41943040
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 84942979072, 3352320000000, 9, 132, 128, 1.98, 232448, 233472, 52428800
    ),
    "h200": Gpu("NVIDIA H200", 150754820096, 4800000000000, 9, 132, 128, 1.98, 232448, 233472, 52428800),
}  # fmt: skip
EXTRAS = {"tpu": "tpu", "gpu": "cuda13"}
MOST_OF_A_HOST = 16  # GPUs that are wired to each other


@dataclasses.dataclass(frozen=True)
class Topology:
    """Machines that need not be there.

    Attributes:
        name: As it was asked for.
        devices: What a mesh is made of.
        memory: Bytes of a device that a program may have.
        chip: What they are.
        share: Of a chip that a device is.
        of_host: Devices that reach each other without a network: of a host of GPUs, or a slice of TPUs.
        compiler_options: What their compiler must be told.
        compiler: Its name and version.
    """

    name: str
    devices: Sequence[Any]
    memory: int
    chip: Chip
    share: float
    of_host: int
    compiler_options: Mapping[str, Any]
    compiler: str

    @property
    def chips(self) -> float:
        """How many chips the devices are."""
        return len(self.devices) * self.share

    @property
    def slices(self) -> int:
        """Slices that TPUs are of; 1 for others."""
        return len(self.devices) // self.of_host if self.platform == "tpu" else 1

    @property
    def platform(self) -> str:
        """Of the devices: gpu, tpu."""
        return self.devices[0].platform


def describe(name: str, *, slices: int = 1) -> Topology:
    """The machines of a name.

    Args:
        name: A TPU and its topology, `v5e:4x4`, `v5p:4x4x4`; or a GPU, hosts and GPUs of each, `h200:8x8`, where one
            number is that of a single host's, `h200:8`.
        slices: So many of a TPU's topology, which reach each other over the data-centre network.

    Raises:
        UserError: If there is no such kind or topology, or its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in TPUS and kind not in GPUS:
        raise UserError(
            f"--topology={name}: there is no kind {kind!r}; there are {', '.join([*TPUS, *GPUS])}, such as v5e:4x4 or "
            "h200:8x8."
        )
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", shape):
        raise UserError(
            f"--topology={name}: {shape!r} is no topology; write a TPU's as v5e:4x4 or v5p:4x4x4, GPUs as h200:8, or "
            "h200:8x8 for 8 hosts of 8."
        )
    sizes = [int(size) for size in shape.split("x")]
    if slices > 1 and kind not in TPUS:
        raise UserError(f"--slices={slices} are of TPUs; hosts of GPUs are written as {kind}:{slices}x{sizes[-1]}.")
    return _tpus(name, kind, sizes, slices) if kind in TPUS else _gpus(name, kind, sizes)


def _tpus(name: str, kind: str, sizes: Sequence[int], slices: int) -> Topology:
    tpu = TPUS[kind]
    if len(sizes) != tpu.dimensions:
        raise UserError(
            f"--topology={name}: chips of {kind} form a torus of {tpu.dimensions} dimensions, such as "
            f"{kind}:{'x'.join(['4'] * tpu.dimensions)}."
        )
    _need_compiler("libtpu", "tpu", name)
    told: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    told |= {"chip_config_name": tpu.cores} if tpu.cores else {}
    told |= {"num_slices": slices} if slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **told).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: libtpu does not describe it ({one_line(error)}).") from None
    found = _topology(name, devices, tpu.memory, len(devices) // slices, {}, "libtpu")
    if slices > 1 and not found.chip.network:
        raise UserError(f"--slices={slices}: of the network between slices of {kind} nothing is known; plan one.")
    return dataclasses.replace(found, name=f"{slices} slices of {name}") if slices > 1 else found


def _gpus(name: str, kind: str, sizes: Sequence[int]) -> Topology:
    hosts, of_host = (1, *sizes)[-2:]
    if len(sizes) > 2 or of_host > MOST_OF_A_HOST:
        raise UserError(
            f"--topology={name}: GPUs are written as hosts × GPUs of each, at most {MOST_OF_A_HOST} of those: "
            f"{kind}:8, {kind}:8x8."
        )
    if not any(importlib.util.find_spec(package) for package in ("jax_cuda13_plugin", "jax_cuda12_plugin")):
        _need_compiler("jax_cuda13_plugin", "gpu", name)
    gpu = GPUS[kind]
    found = topologies.get_topology_desc(platform="cuda", target_config=gpu.text(), topology=f"1x{hosts}x{of_host}")
    tuning = {"xla_gpu_autotune_level": "0"}  # which would run kernels
    plugin = "jax_cuda13_plugin" if importlib.util.find_spec("jax_cuda13_plugin") else "jax_cuda12_plugin"
    return _topology(name, found.devices, int(gpu.memory * GPU_SHARE), of_host, tuning, plugin)


def _topology(
    name: str, devices: Sequence[Any], memory: int, of_host: int, options: Mapping[str, Any], package: str
) -> Topology:
    chip, share = chip_of(devices[0])
    if chip is None:
        raise UserError(f"--topology={name}: nothing is known of {devices[0].device_kind}; add it to daajax/chips.py.")
    compiler = f"{package} {importlib.metadata.version(package)}"
    return Topology(name, devices, memory, chip, share, of_host, options, compiler)


def _need_compiler(package: str, platform: str, name: str) -> None:
    """Refuses to go on without the compiler of a platform."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--topology={name} needs the compiler of such chips, {package}, which runs on any CPU: "
            f"pip install 'daajax[{EXTRAS[platform]}]', or `make setup-ahead` in a checkout."
        )
