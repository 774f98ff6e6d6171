"""What differs for checkpoints whose folder is in a bucket.

A checkpoint counts once Orbax has written `commit_success.txt` into it, since no folder can be renamed there. Orbax's
manager would ask Google's own library about the bucket, so its checkpointer is used without it, and what is old or was
left behind by an interrupted save is removed here.
"""

from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp

from daajax import bucket, output

_WHOLE = "commit_success.txt"


class Saver(ocp.AsyncCheckpointer):
    """Saves checkpoints as a manager does.

    Args:
        folder: Of all checkpoints of a run.
    """

    def __init__(self, folder: bucket.BucketPath):
        super().__init__(ocp.CompositeCheckpointHandler())
        self._folder = folder

    def save(self, step: int, *, args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begins to save a checkpoint."""
        super().save(self._folder / str(step), args=args)


def whole(names: Sequence[str]) -> list[int]:
    """Of the names of all objects in the folder, the updates whose checkpoint is whole."""
    folders = (name.removesuffix(f"/{_WHOLE}") for name in names if name.endswith(f"/{_WHOLE}"))
    return [int(folder) for folder in folders if folder.isdecimal()]


def remove_partial(folder: bucket.BucketPath) -> None:
    """Removes checkpoints that are not whole."""
    names = bucket.names(folder)
    sound = {str(step) for step in whole(names)}
    folders = {name: name.partition("/")[0] for name in names}
    bucket.remove(folder, [name for name, step in folders.items() if step.isdecimal() and step not in sound])


def remove(checkpoint: bucket.BucketPath) -> None:
    """Removes a checkpoint, which is not whole from the first moment on."""
    output.void(checkpoint, _WHOLE)
