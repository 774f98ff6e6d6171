"""Data in a bucket, `data.path=gs://bucket/pairs.jsonl`, copied to a cache of this machine before they are read.

Each state of the files is copied to a folder of its own, which is there whole or not at all; so a run that goes on, and
the processes of one host, find it.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator

from daajax import bucket, copies
from daajax.console import say
from daajax.errors import UserError

CACHE = pathlib.Path("~/.cache/daajax/data")


def fetch(address: str, option: str) -> str:
    """Where data lie on this machine.

    Args:
        address: A file or a folder, in a bucket or not, or another name that a source knows, which is returned as it
            is.
        option: Which names it, such as `data.path`, for messages.

    Raises:
        UserError: If the address is not understood, or what it names is not there or out of reach.
    """
    if "://" not in address:
        return address
    path = bucket.path_of(address, option)
    assert isinstance(path, bucket.BucketPath)
    files = _files(path)
    if not files:
        raise UserError(f"{option}={address} holds nothing that you may list; check the name, or {bucket.LOG_IN}.")
    generations = {name: bucket.read(path / name if name else path, slice(0, 0)).stamp.generation for name in files}
    said = json.dumps([str(path), {name: generation.hex() for name, generation in generations.items()}])

    def read(name: str) -> Iterator[bytes]:
        own = name if name in generations else ""
        return bucket.parts(path / own if own else path, generations[own])

    home = CACHE.expanduser() / str(path).removeprefix("gs://").replace("/", "--")
    copy = home / hashlib.sha256(said.encode()).hexdigest()[:40]
    try:
        with copies.alone(home):
            if not copy.is_dir():
                copies.make(copy, [name or path.name for name in files], read, f"fetch {path}")
    except OSError as error:
        raise UserError(f"{option}={address} cannot be copied to {home} ({error.strerror}); make room there.") from None
    say(f"{option}: {address} is in {copy}")
    return str(copy if "" not in files else copy / path.name)


def _files(path: bucket.BucketPath) -> list[str]:
    """The names of the files in a folder, hidden ones left out; an empty one if it is a file itself."""
    if bucket.is_object(path):
        return [""]
    names = bucket.names(path)
    return [name for name in names if not any(part.startswith(".") for part in name.split("/")) and name[-1] != "/"]
