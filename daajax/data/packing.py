"""The plan: which example lies in which row of which update.

`daajax.data.windows` says which examples an update consumes; `pack` lays them out in rows, evens the rows out, and
fixes the static capacities that make every update the same shape. It needs the lengths of the examples only.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from daajax.data.dealing import deal, totals
from daajax.data.parts import LENGTH_MULTIPLE, SCORED_MULTIPLE, length_multiple, scored_of_rows
from daajax.data.sizes import Sizes
from daajax.errors import UserError

_SPARE = 0.16  # share, of an example, of a row's scored tokens and keys that it may have beyond its fair share


Windows = Int[np.ndarray, "updates batch_size"]
Needs = dict[str, Int[np.ndarray, "updates rows"]]  # what the examples of each row add up to, by capacity


@dataclasses.dataclass(frozen=True)
class Shape:
    """The four static capacities of a row: what every row of an update has room for, filled or not.

    Attributes:
        length: Tokens of examples lying one behind the other; a multiple of `LENGTH_MULTIPLE` in each part.
        slots: Examples.
        scored: Tokens with a log-prob, over all its examples; a multiple of `SCORED_MULTIPLE` in each part.
        keys: Tokens that attention gathers as keys: each response behind its prompt, so that a prompt counts once for
            each of its responses; a multiple of `LENGTH_MULTIPLE`.
    """

    length: int
    slots: int
    scored: int
    keys: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every example of every update lies.

    Attributes:
        windows: Example index by update and place; -1 where a last, ragged window has none.
        row_of: Row, counted through all micro-batches, by update and place; -1 likewise. Within a row, order of place.
        shapes: Capacities, each once; one per compiled step.
        shape_of: Index into `shapes` by update.
        micro_batches: Parts an update is computed in.
        rows: Rows of one micro-batch.
        parts: Devices that the length of a row is cut over, see `daajax.data.parts`.
        prefix_sharing: Whether the prompt lies in the row once.
        efficiency: Real share of each capacity; 1 is perfect.
        most_tokens: Row positions that the largest window takes.
        notices: Lines worth saying.
    """

    windows: Windows
    row_of: Windows
    shapes: tuple[Shape, ...]
    shape_of: Int[np.ndarray, " updates"]
    micro_batches: int
    rows: int
    parts: int
    prefix_sharing: bool
    efficiency: dict[str, float]
    most_tokens: int
    notices: tuple[str, ...]

    @property
    def updates(self) -> int:
        """Number of updates."""
        return len(self.windows)

    @property
    def batch_size(self) -> int:
        """Examples an update, on all hosts."""
        return self.windows.shape[1]

    def shape(self, update: int) -> Shape:
        """The capacities of this update's rows."""
        return self.shapes[self.shape_of[update]]

    def largest_update(self) -> int:
        """An update of the longest rows."""
        return int(np.argmax([self.shapes[shape].length for shape in self.shape_of]))

    def report(self) -> list[str]:
        """Readable lines: the layout, and how much of each capacity is real."""
        shapes = ", ".join(
            f"{s.length} tokens × {s.slots} slots, {s.scored} scored, {s.keys} keys" for s in self.shapes
        )
        used = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.efficiency.items())
        cut = "" if self.parts == 1 else f", each cut over {self.parts} devices"
        return [f"rows: {self.micro_batches} × {self.rows} of {shapes}{cut}", f"rows in use: {used}", *self.notices]


def pack(
    windows: Windows,
    sizes: Sizes,
    *,
    packing: bool,
    micro_batches: int,
    row_multiple: int,
    parts: int = 1,
    rows: int | None = None,
    row_length: int | None = None,
    shapes: int = 1,
    names: Sequence[str] | None = None,
) -> Plan:
    """Lays every window out in `micro_batches × rows` rows of the same capacities.

    Args:
        windows: Example index by update and place, -1 for none.
        sizes: What each example needs.
        packing: False gives every example a row of its own.
        micro_batches: Parts an update is computed in.
        row_multiple: Devices that rows are sharded over; a micro-batch has a multiple of it.
        parts: Devices that the length of each row is cut over.
        rows: Rows of a micro-batch; None takes as few as the mesh, or `row_length`, allows.
        row_length: Tokens of a row, a multiple of 128 (see `parse_row_length`); None takes the smallest that holds
            every window.
        shapes: How many shapes updates of similar length may be sorted into; those that come out the same are one.
        names: Of the examples, for error messages; None: their index.

    Raises:
        UserError: If `rows` or `row_length` does not fit the mesh, or an example or a window does not fit the rows
            asked for.
    """
    multiple = length_multiple(parts)
    _check_rows(windows, sizes, row_multiple, multiple, rows, row_length, names)
    if packing:
        row_of, count = _share_rows(windows, sizes, micro_batches, row_multiple, multiple, rows, row_length, shapes)
    else:
        row_of, count = _give_one_each(windows, micro_batches, row_multiple, rows)
    takes = {"length": sizes.length, "slots": np.ones_like(sizes.length), "scored": sizes.scored, "keys": sizes.keys}
    needs = {name: _add_up(windows, row_of, each, micro_batches * count) for name, each in takes.items()}
    chosen, shape_of = _choose_shapes(needs, shapes, row_length, parts, sizes.predicted)
    return Plan(
        windows=windows,
        row_of=row_of,
        shapes=chosen,
        shape_of=shape_of,
        micro_batches=micro_batches,
        rows=count,
        parts=parts,
        prefix_sharing=sizes.prefix_sharing,
        efficiency=_efficiency(needs, chosen, shape_of, micro_batches),
        most_tokens=int(needs["length"].sum(axis=1).max()),
        notices=_notices(needs, packing, windows.shape[1], micro_batches * row_multiple),
    )


def parse_row_length(option: str | int) -> int | None:
    """Tokens of a row from the option `packing.row_length`; None for "auto", the smallest that holds every window.

    Args:
        option: "auto", or a positive multiple of 128, also as text: so it comes from the command line.

    Raises:
        UserError: If it is neither.
    """
    if option == "auto":
        return None
    length = int(option) if re.fullmatch("[0-9]{1,9}", str(option)) else 0
    if length < 1 or length % LENGTH_MULTIPLE:
        raise UserError(
            f"config.packing.row_length={option!r} must be a positive multiple of {LENGTH_MULTIPLE}, or auto for the "
            "smallest that holds every update."
        )
    return length


def _check_rows(
    windows: Windows,
    sizes: Sizes,
    row_multiple: int,
    multiple: int,
    rows: int | None,
    row_length: int | None,
    names: Sequence[str] | None,
) -> None:
    """Refuses rows that do not fit the mesh or cannot hold one of the examples."""
    if rows is not None and (rows < 1 or rows % row_multiple):
        raise UserError(
            f"packing.rows={rows} must be a positive multiple of {row_multiple}, the devices on the mesh's axes data "
            "and fsdp."
        )
    if row_length is not None and row_length % multiple:
        raise UserError(
            f"packing.row_length={row_length} must be a multiple of {multiple}: {LENGTH_MULTIPLE} tokens on each of "
            f"mesh.context={multiple // LENGTH_MULTIPLE} devices; round it, or leave it auto."
        )
    used = windows[windows >= 0]
    if row_length is not None and sizes.length[used].max() > row_length:
        worst = int(used[np.argmax(sizes.length[used])])
        name = worst if names is None else names[worst]
        raise UserError(
            f"example {name} takes {sizes.length[worst]} tokens of a row but packing.row_length={row_length}; "
            "raise packing.row_length or lower max_length."
        )


def _share_rows(
    windows: Windows,
    sizes: Sizes,
    micro_batches: int,
    row_multiple: int,
    multiple: int,
    rows: int | None,
    row_length: int | None,
    shapes: int,
) -> tuple[Windows, int]:
    """Row of each place, and rows of a micro-batch: as asked for, or as few as the mesh and `row_length` allow."""
    largest = np.where(windows >= 0, sizes.length[windows], 0).sum(axis=1).max()
    least = math.ceil(largest / (micro_batches * row_multiple * (row_length or largest))) * row_multiple
    most = max(least, math.ceil(windows.shape[1] / (micro_batches * row_multiple)) * row_multiple)
    longest = 0
    for count in [rows] if rows else range(least, most + 1, row_multiple):
        row_of = _deal_rows(windows, sizes, micro_batches * count, multiple, row_length, shapes)
        longest = int(_add_up(windows, row_of, sizes.length, micro_batches * count).max())
        if row_length is None or longest <= row_length:
            return row_of, count
    raise UserError(
        f"a row would need {longest} tokens but packing.row_length={row_length}; "
        "raise packing.rows, packing.row_length or micro_batches."
    )


def _give_one_each(windows: Windows, micro_batches: int, row_multiple: int, rows: int | None) -> tuple[Windows, int]:
    """Likewise where every example has a row of its own."""
    batch_size = windows.shape[1]
    least = math.ceil(batch_size / (micro_batches * row_multiple)) * row_multiple
    if rows is not None and rows < least:
        raise UserError(
            f"packing.enabled=False gives each of {batch_size} examples a row, but packing.rows={rows} × "
            f"micro_batches={micro_batches} are fewer; raise packing.rows or leave it unset."
        )
    return np.where(windows >= 0, np.arange(batch_size)[None], -1), rows or least


def _choose_shapes(
    needs: Needs, count: int, row_length: int | None, parts: int, predicted: int
) -> tuple[tuple[Shape, ...], Int[np.ndarray, " updates"]]:
    """Capacities for groups of updates of similar length, each once, and which of them each update has."""
    longest = needs["length"].max(axis=1)
    multiples = dict(length=length_multiple(parts), slots=1, scored=SCORED_MULTIPLE, keys=LENGTH_MULTIPLE)
    chosen, group_of = [], np.zeros(len(longest), np.int32)
    for group in np.array_split(np.argsort(longest, kind="stable"), min(count, len(longest))):
        shape = {name: _round_up(int(needs[name][group].max()), multiple) for name, multiple in multiples.items()}
        group_of[group] = len(chosen)
        chosen.append(Shape(**shape))
    if row_length is not None:
        chosen[-1] = dataclasses.replace(chosen[-1], length=row_length)
    chosen = [
        dataclasses.replace(one, scored=scored_of_rows(one.scored, one.length, one.slots, parts, predicted))
        for one in chosen
    ]
    shapes = tuple(dict.fromkeys(chosen))
    return shapes, np.array([shapes.index(shape) for shape in chosen], np.int32)[group_of]


def _efficiency(
    needs: Needs, shapes: tuple[Shape, ...], shape_of: Int[np.ndarray, " updates"], micro_batches: int
) -> dict[str, float]:
    """Real share of each capacity, and of the scored slots that the head visits."""
    updates, rows = needs["length"].shape
    capacity = {name: sum(getattr(shapes[s], name) for s in shape_of.tolist()) * rows for name in needs}
    efficiency = {name: float(needs[name].sum() / capacity[name]) for name in needs}
    # The head's loop ends after the last scored token of a micro-batch: what lies behind it costs nothing.
    visited = needs["scored"].reshape(updates, micro_batches, -1)
    efficiency["scored visited"] = float(visited.sum() / (visited.max(axis=2).sum() * visited.shape[2]))
    return efficiency


def _notices(needs: Needs, packing: bool, batch_size: int, parts: int) -> tuple[str, ...]:
    notices = []
    if packing and batch_size < 4 * parts:
        notices.append(
            f"rows pack badly: {batch_size / parts:g} examples a device and micro-batch; at least 4 pack well "
            f"(batch_size {4 * parts}, fewer micro_batches, or a smaller mesh)"
        )
    empty = float((needs["slots"] == 0).mean())
    if empty:
        notices.append(f"{100 * empty:.1f} % of the rows are empty")
    return tuple(notices)


def _round_up(value: int, multiple: int) -> int:
    return max(1, math.ceil(value / multiple)) * multiple


def _add_up(
    windows: Windows, row_of: Windows, values: Int[np.ndarray, " examples"], rows: int
) -> Int[np.ndarray, "updates rows"]:
    """Totals of the examples in each row."""
    return totals(row_of, values[windows], rows).astype(np.int64)


def _deal_rows(
    windows: Windows, sizes: Sizes, rows: int, multiple: int, row_length: int | None, shapes: int
) -> Windows:
    """Deals each window into rows that are no fuller than the capacities which it, or the largest window, needs.

    The head visits as many scored slots as an update's fullest row has: those are evened out update by update.
    """
    measures = np.stack([sizes.length, sizes.scored, sizes.keys], axis=1).astype(np.float64)
    real = (windows >= 0)[..., None]
    fair = np.where(real, measures[windows], 0).sum(axis=1) / rows
    largest = np.where(real, measures[windows], 0).max(axis=1)
    spare = 1 + _SPARE * rows / windows.shape[1]
    most = np.maximum(fair * [1, spare, spare], largest)
    for measure, whole in ((0, multiple), (2, LENGTH_MULTIPLE)):
        if shapes == 1:
            most[:, measure] = most[:, measure].max()
        most[:, measure] = np.maximum(np.ceil(most[:, measure] / whole), 1) * whole
    if row_length is not None:
        most[:, 0] = row_length
    most[:, 1] = np.maximum(most[:, 1], 1)
    return deal(windows, measures, rows, most)
