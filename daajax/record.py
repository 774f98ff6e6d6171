"""What a checkpoint says of itself: what it was made with, and every leaf of its state with a digest."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from daajax import sharding
from daajax.console import say
from daajax.errors import UserError, one_line
from daajax.models.digest import digests_of
from daajax.step import TrainState

ITEMS = ("params", "optimizer", "objectives", "reference")  # parts of a state, each of which can be restored alone


class DamagedError(Exception):
    """A checkpoint that cannot be used; its text is the reason."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself.

    Attributes:
        data: Digest of the training data.
        model: Digest of the weights that training started from; empty where nobody asked.
        reference: Digest of the reference's weights; empty where there is none.
        metrics: Of an evaluation at this update.
        leaves: Shape, dtype and digest of every leaf of the state, by path; filled in when it is saved.
    """

    data: str
    model: str
    reference: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def sealed(self) -> dict[str, str]:
        """As JSON that is kept, with its digest."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return {"content": content, "sha256": sha256(content)}

    @classmethod
    def opened(cls, kept: Any) -> "Record":
        """From what `sealed` gave.

        Raises:
            DamagedError: If it is not that.
        """
        try:
            if sha256(kept["content"]) != kept["sha256"]:
                raise DamagedError("its record is not what was saved")
            return cls(**json.loads(kept["content"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"its record cannot be read: {one_line(error)}") from None


def check_origin(before: Record, now: Record, *, forced: bool) -> None:
    """Refuses other data, initial weights or reference than a checkpoint was made with; what is empty is not compared.

    Args:
        before: Of the checkpoint.
        now: Of this run.
        forced: Say it and go on all the same.

    Raises:
        UserError: If they differ.
    """
    for what, old, new in (
        ("data", before.data, now.data),
        ("weights of the model", before.model, now.model),
        ("weights of the reference", before.reference, now.reference),
    ):
        if old and new and old != new:
            line = f"the {what} changed since the checkpoint was made: digest {old[:12]} then, {new[:12]} now"
            if not forced:
                raise UserError(f"{line}; restore them, or go on all the same with --config.resume=force.")
            say(f"{line} (forced)")


def items_of(state: TrainState) -> dict[str, Any]:
    """The parts of a state that there is anything of, by name."""
    return {name: getattr(state, name) for name in ITEMS if jax.tree.leaves(getattr(state, name))}


def leaves_of(items: Mapping[str, Any]) -> dict[str, str]:
    """Shape, dtype and digest of every leaf, by path; where leaves are abstract, without the digest."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(dict(items))
    }
    arrays = {n: leaf for n, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    offloaded = {n: leaf for n, leaf in arrays.items() if sharding.is_in_host_memory(leaf.sharding)}
    digests = digests_of({n: leaf for n, leaf in arrays.items() if n not in offloaded})
    for name, leaf in offloaded.items():  # one after another: together they have no room on the devices
        digests |= digests_of({name: sharding.to_device_memory(leaf, leaf.sharding)})
    return {
        name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}] {digests.get(name, '')}" for name, leaf in leaves.items()
    }


def check_fits(record: Record, abstract: TrainState, item: str, place: str) -> None:
    """Refuses an item of another model or optimizer before Orbax reads it.

    Args:
        record: Of the checkpoint.
        abstract: The state that it is to become: shapes and dtypes.
        item: One of `ITEMS`.
        place: Of the checkpoint, for the message.

    Raises:
        UserError: If a leaf has another shape or dtype, or is in one of the two alone.
    """
    before, now = (
        {name: text.split()[0] for name, text in leaves.items() if name.startswith(f"{item}/")}
        for leaves in (record.leaves, leaves_of(items_of(abstract)))
    )
    what = {"objectives": "loss", "reference": "model or reference.mode"}.get(item, "model or optimizer")
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"checkpoint {place} is of another {what}: {name} is {before.get(name, 'not there')}, needed is "
                f"{now.get(name, 'nothing of that name')}; name another --workdir, or the {what} that the run was "
                "made with."
            )


def check_leaves(record: Record, found: Mapping[str, str]) -> None:
    """Compares what was restored with what was saved.

    Args:
        record: Of the checkpoint.
        found: As `leaves_of` gives it.

    Raises:
        DamagedError: If a leaf differs.
    """
    for name, text in found.items():
        if record.leaves.get(name) != text:
            raise DamagedError(f"{name} is not what was saved")


def sha256(text: str) -> str:
    """The digest of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
