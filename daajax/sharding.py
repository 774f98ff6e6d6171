"""Where arrays live: the only file that names a mesh axis or touches `jax.sharding`.

Arrays declare logical axes; `RULES` maps every one of them to mesh axes. An axis that is not in the table is a
ValueError, so that nothing is replicated by accident.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from daajax.data.batches import axes_behind_rows
from daajax.errors import UserError

AXES = (
    "data",
    "fsdp",
    "tensor",
    "context",
)  # replicas of the model · its parameters cut up, gathered layer by layer · heads and MLP cut up · rows' length cut up
WHOLE_ROWS = AXES[:-1]  # axes that leave a row on one device
NEAREST = ("context", "tensor")  # axes whose devices are neighbours, the nearest last: sums over `tensor` send the most

HOST = "pinned_host"  # the kind of a host's memory that its devices read by themselves

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations and batches
    "micro_batches": None,
    "rows": ("data", "fsdp"),
    "length": "context",
    "scored": "context",
    "tokens": ("data", "fsdp", "context"),  # of rows whose length is cut up
    "slots": None,
    "responses": None,
    "head_dim": None,
    # parameters
    "layers": None,
    "embed": ("fsdp", "context"),
    "norm": None,
    "vocab": "tensor",
    "mlp": "tensor",
    "experts": "tensor",
    "expert_mlp": None,
    "router": None,
    "lora": None,
    "positions": None,
    # both
    "heads": "tensor",
    "kv_heads": "tensor",
}

Axes = tuple[str | None, ...]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
        sizes: Devices on each axis of `AXES`, 1 on those that are not named; -1 on one of them takes the rest.
        devices: Those to spread over; they need not be there: `jax.experimental.topologies` describes such as are not.
            None: all that are visible.

    Raises:
        UserError: If the axes do not multiply to the number of devices, or slices of TPUs do not divide `data`.
    """
    there = jax.devices() if devices is None else list(devices)
    slices, count = slices_of(there), len(there)
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    known = math.prod(size for size in shape.values() if size != -1)
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"mesh {shape}: sizes must be positive, and at most one of them -1.")
    if free and count % known == 0:
        shape[free[0]] = count // known
    needed = math.prod(shape.values())
    if needed != count:
        least = "a multiple of " if free else ""
        raise UserError(
            f"mesh {shape} needs {least}{known} devices but {count} are visible; "
            "set config.mesh or use -1 for one axis."
        )
    if shape["data"] % len(slices):
        raise UserError(
            f"mesh {shape}: the devices are of {len(slices)} slices, which reach each other over the data-centre "
            f"network alone, and mesh.data={shape['data']} is no multiple of that; set mesh.data to {len(slices)}, "
            "so that nothing but gradients goes over it."
        )
    of_slice = shape | {"data": shape["data"] // len(slices)}
    found = np.concatenate([_laid_out(of_slice, each) for each in slices], axis=AXES.index("data"))
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by what they are wired to: those of a slice of TPUs each, all others together."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        place = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        found.setdefault(place, []).append(device)
    return [found[place] for place in sorted(found)]


def _laid_out(shape: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices that are wired to each other by the axes of a mesh, neighbours on those of `NEAREST`."""
    order = (*(axis for axis in AXES if axis not in NEAREST), *NEAREST)
    types, spread = (AxisType.Auto,) * len(AXES), tuple(shape[axis] for axis in order)
    try:
        found = jax.make_mesh(spread, order, axis_types=types, devices=devices).devices
    except NotImplementedError:
        # An axis is not the product of some of the torus's: it shares one of these with another.
        found = mesh_utils.create_device_mesh(spread, devices, allow_split_physical_axes=True)
    return found.transpose([order.index(axis) for axis in AXES])


def device_of(mesh: Mesh) -> Any:
    """One of its devices, which stands for all; it need not be there."""
    return mesh.devices.flat[0]


def row_multiple(mesh: Mesh) -> int:
    """Devices that the rows of a batch are spread over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def length_parts(mesh: Mesh) -> int:
    """Devices that the length of a row is cut over."""
    return mesh.shape["context"]


def check_divides(mesh: Mesh, axis: str, size: int, what: str) -> None:
    """Refuses to cut `size` things along a logical axis into unequal parts.

    Raises:
        UserError: If the devices on the logical axis do not divide `size`.
    """
    parts, cut = _parts(mesh, spec((axis,))[0]), _mesh_axes(spec((axis,))[0])
    if size % parts:
        names = " × ".join(repr(name) for name in cut if mesh.shape[name] > 1)
        raise UserError(
            f"{what}: {size} do not divide over {parts} devices of mesh axis {names}; "
            "choose a mesh whose sizes divide the model's."
        )


def _parts(mesh: Mesh, mesh_axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(mesh_axes))


def _mesh_axes(mesh_axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()


def spec(axes: Axes) -> PartitionSpec:
    """Maps logical axes to mesh axes; None stands for an axis that is never cut.

    Raises:
        ValueError: If an axis is not in `RULES`.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axes {unknown} are not in the sharding table; it has {sorted(RULES)}.")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    """Where an array with these logical axes lives."""
    return NamedSharding(mesh, spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Where every parameter lives.

    Args:
        mesh: The mesh.
        shapes: Tree of arrays or shapes.
        axes: The same tree of logical axes, each a PartitionSpec of their names.

    Raises:
        UserError: If an axis of a parameter does not divide evenly over its devices.
    """

    def one(path: Any, shape: Any, names: PartitionSpec) -> NamedSharding:
        parameter = jax.tree_util.keystr(path, simple=True, separator="/")
        for size, name in zip(shape.shape, names, strict=True):
            if name is not None:
                check_divides(mesh, name, size, f"parameter {parameter}, axis {name!r}")
        return sharding(mesh, tuple(names))

    return jax.tree.map_with_path(one, shapes, axes)


def describe(shapes: Any, shardings: Any) -> list[str]:
    """Lines of a table: every array's path, shape, dtype, spec, and what of it lies on each device, in bytes.

    Args:
        shapes: Tree of arrays or shapes.
        shardings: The same tree of shardings.
    """
    rows = [("parameter", "shape", "dtype", "spec", "bytes a device")]
    total = 0
    for (path, shape), where in zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True):
        size = math.prod(where.shard_shape(shape.shape)) * shape.dtype.itemsize
        total += size
        cuts = ", ".join(" × ".join(_mesh_axes(axes)) or "-" for axes in where.spec)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, " × ".join(map(str, shape.shape)), str(shape.dtype), f"({cuts})", f"{size:,}"))
    rows.append(("all", "", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place == len(row) - 1 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def optimizer_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, shapes: Any, shardings: Any, *, offload: bool = False
) -> Any:
    """Optimizer state lives where its parameters live; what has another shape, such as a count, is on every device.

    Args:
        mesh: The mesh.
        optimizer: Whose state.
        shapes: Of the parameters.
        shardings: Of the parameters.
        offload: Whether what is as large as a parameter lies in the memory of the device's host, cut up alike.

    Raises:
        UserError: If there is no such memory.
    """
    state = jax.eval_shape(optimizer.init, shapes)
    whole = replicated(mesh)
    if offload:
        _check_host_memory(mesh.devices.flat[0])
        shardings = jax.tree.map(lambda where: where.with_memory_kind(HOST), shardings)
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, shape, where: where if leaf.shape == shape.shape else whole,
        state,
        shapes,
        shardings,
        transform_non_params=lambda _: whole,
    )


def _check_host_memory(device: Any) -> None:
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:  # nor is any known of GPUs that are described and not there
        raise UserError(
            f"config.optimizer.offload=True needs memory of the kind {HOST!r}, but {device.device_kind} names "
            f"{', '.join(kinds) or 'none'}; leave it False."
        )


def is_in_host_memory(where: Any) -> bool:
    """Whether an array, or what stands for one, lies in the memory of its devices' hosts."""
    return where.memory_kind == HOST


def to_device_memory(tree: Any, shardings: Any) -> Any:
    """Arrays in the memory of their devices, also under jit; those that are there stay as they are.

    Args:
        tree: The arrays.
        shardings: The same tree, where each is.
    """

    def one(x: Any, where: NamedSharding) -> Any:
        return jax.device_put(x, where.with_memory_kind("device")) if is_in_host_memory(where) else x

    return jax.tree.map(one, tree, shardings)


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's rows the devices of this process hold: their numbers, ascending, int [own]."""
    held = sharding(mesh, ("rows",)).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held.values()]))


def batch_shardings(
    mesh: Mesh, batch: Iterable[str], leading: Axes = ("micro_batches", "rows")
) -> dict[str, NamedSharding]:
    """Where every array of a batch lives, by its name; one that is not of `daajax.data.batches` is cut by rows alone.

    Args:
        mesh: The mesh.
        batch: Names of the arrays.
        leading: Leading axes of every array, up to its rows.
    """
    return {name: sharding(mesh, (*leading, *axes_behind_rows(name))) for name in batch}


def place(
    mesh: Mesh,
    batch: Mapping[str, np.ndarray],
    leading: Axes = ("micro_batches", "rows"),
    *,
    rows: int | None = None,
) -> dict[str, jax.Array]:
    """Makes global arrays of a host batch; each process fills in the parts its devices hold.

    Args:
        mesh: The mesh.
        batch: The rows of `own_rows`, or all of them; each of these is whole.
        leading: Leading axes of every array, up to its rows.
        rows: How many there are in all processes; None: as many as in `batch`.
    """
    shardings, axis = batch_shardings(mesh, batch, leading), leading.index("rows")
    own = None if rows is None else own_rows(mesh, rows)

    def placed(value: np.ndarray, where: NamedSharding) -> jax.Array:
        shape = list(value.shape)
        shape[axis] = rows or shape[axis]

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[axis].indices(shape[axis])  # a device's rows lie beside one another, here too
            here = begin if own is None else int(np.searchsorted(own, begin))
            return value[(*index[:axis], slice(here, here + end - begin), *index[axis + 1 :])]

        return jax.make_array_from_callback(tuple(shape), where, part)

    return {key: placed(value, shardings[key]) for key, value in batch.items()}


def fetch(x: jax.Array) -> np.ndarray:
    """An array on the host, whole in every process; all of them ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    where: Any = x.sharding
    return np.asarray(jax.jit(_same, out_shardings=replicated(where.mesh))(x))


def _same(x: jax.Array) -> jax.Array:
    return x


def abstract(shapes: Any, shardings: Any) -> Any:
    """What arrays of these shapes would be where the same tree of shardings puts them, without making them."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def homes(tree: Any) -> Any:
    """Where every leaf of a tree lives, of arrays that there are or of abstract ones."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def constrain(mesh: Mesh, axes: Axes) -> Callable[[jax.Array], jax.Array]:
    """A function that says where its argument lives, for use under jit."""
    where = sharding(mesh, axes)
    return lambda x: jax.lax.with_sharding_constraint(x, where)


def local(function: Callable[..., Any], mesh: Mesh, in_axes: Sequence[Any], out_axes: Any) -> Callable[..., Any]:
    """Runs a function on each device's part of its arguments.

    It may communicate through `MeshDevices` only. What does so by `gather` and `exchange` alone is differentiable:
    gradients of what was gathered are summed and each device keeps its part of the sum, and those of what is whole on
    several devices are summed over them.

    Args:
        function: Single-device code.
        mesh: The mesh.
        in_axes: Leading logical axes of each argument; for a tree, of all its leaves, or a tree like it of theirs.
        out_axes: Likewise of every output, or of each of several.
    """
    several = any(isinstance(axes, tuple) for axes in out_axes)
    out_specs = tuple(spec(axes) for axes in out_axes) if several else spec(out_axes)
    # Without check_vma: loops inside start from constants, which the check would call unvarying and refuse.
    return jax.shard_map(
        function, mesh=mesh, in_specs=tuple(map(_specs, in_axes)), out_specs=out_specs, check_vma=False
    )


def _specs(axes: Any) -> Any:
    """Of axes, or of a tree of them."""
    return jax.tree.map(spec, axes, is_leaf=lambda one: type(one) is tuple)


@dataclasses.dataclass(frozen=True)
class MeshDevices:
    """The devices of a mesh, as `daajax.ops.devices` has operations see them."""

    mesh: Mesh

    def local(self, function: Callable[..., Any], in_axes: Sequence[Any], out_axes: Any) -> Callable[..., Any]:
        """See `local`."""
        return local(function, self.mesh, in_axes, out_axes)

    def parts(self, axis: str) -> int:
        """How many parts a logical axis is cut into."""
        return _parts(self.mesh, spec((axis,))[0])

    def index(self, axis: str) -> jax.Array:
        """Which of them this device has; inside `local`."""
        return jax.lax.axis_index(spec((axis,))[0])

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """The sum over the parts; inside `local`."""
        return jax.lax.psum(x, spec((axis,))[0])

    def sum_cut(self, x: jax.Array, axis: str, place: int, along: str) -> jax.Array:
        """The sum over the parts, of which each device keeps what it has of another axis; inside `local`."""
        kept = _mesh_axes(spec((along,))[0])
        return jax.lax.psum_scatter(self.sum_others(x, axis, along), kept, scatter_dimension=place, tiled=True)

    def sum_others(self, x: jax.Array, axis: str, but: str) -> jax.Array:
        """The sum over the parts of `axis` that are one part of `but`; inside `local`."""
        over, kept = (_mesh_axes(spec((name,))[0]) for name in (axis, but))
        return jax.lax.psum(x, tuple(name for name in over if name not in kept))

    def gather(self, x: jax.Array, axis: str, place: int) -> jax.Array:
        """What all parts have, one after another along the array's axis `place`; inside `local`."""
        return jax.lax.all_gather(x, spec((axis,))[0], axis=place, tiled=True) if self.parts(axis) > 1 else x

    def exchange(self, x: jax.Array, axis: str, split: int, joined: int) -> jax.Array:
        """Of the axis `split`, each part's piece of every part, along the axis `joined`; inside `local`."""
        return jax.lax.all_to_all(x, spec((axis,))[0], split, joined, tiled=True) if self.parts(axis) > 1 else x

    def max(self, x: jax.Array, axis: str) -> jax.Array:
        """The maximum over the parts; inside `local`."""
        return jax.lax.pmax(x, spec((axis,))[0])

    def keep(self, x: jax.Array, axes: Axes) -> jax.Array:
        """The same array, which stays where these axes put it until it is used."""
        return constrain(self.mesh, axes)(x)
