"""Data in a bucket, `data.path=gs://bucket/pairs.jsonl`, copied to a cache of this machine before they are read.

Each state of the files is copied to a folder of its own, which is there whole or not at all; so a run that goes on, and
the processes of one host, find it.
"""

import hashlib
import json
import pathlib

from daajax import bucket, output
from daajax.console import Progress, say
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
    home = CACHE.expanduser() / str(path).removeprefix("gs://").replace("/", "--")
    copy = home / hashlib.sha256(said.encode()).hexdigest()[:40]
    try:
        with bucket.alone(home):
            if not copy.is_dir():
                _make(path, generations, copy)
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


def _make(path: bucket.BucketPath, generations: dict[str, bytes], copy: pathlib.Path) -> None:
    """Copies files of these generations; those that an interrupted copy has made are not copied again."""
    partial = copy.with_name(f"{copy.name}.partial")
    progress = Progress(f"fetch {path}", len(generations), "file")
    for name, generation in generations.items():
        file = partial / (name or path.name)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with output.replacing(file) as scratch, scratch.open("wb") as target:
                for part in bucket.parts(path / name if name else path, generation):
                    target.write(part)
        progress.advance()
    progress.close()
    wanted = {partial / (name or path.name) for name in generations}
    for left in set(partial.rglob("*.partial")) - wanted:  # by a copy that was killed
        if left.is_file():
            left.unlink()
    partial.rename(copy)
