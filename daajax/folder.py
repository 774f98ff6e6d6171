"""A run's folder: what may begin there, and what says that it is finished."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from daajax.config import Config
from daajax.console import say
from daajax.errors import UserError

_CONFIG = "config.json"
_PARTIAL = "config.json.partial"  # until it is whole
_NAMED = 3  # differences


def is_finished(folder: pathlib.Path, config: Config) -> bool:
    """Whether the folder holds this very run, finished; False where it may begin.

    Raises:
        UserError: If the folder holds anything else, or nothing can be written there.
    """
    if not folder.exists() or (folder.is_dir() and not any(path.name != _PARTIAL for path in folder.iterdir())):
        above = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={folder}: {above} cannot be written; name another folder.")
        return False
    changed = list(differences(_read(folder), json.loads(_text(config))))
    if changed:
        further = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise UserError(
            f"--workdir={folder} holds a run of another config: {'; '.join(changed[:_NAMED])}{further}; "
            "name another one."
        )
    if (folder / "model").is_dir():
        return True
    say(f"{folder} holds this run, unfinished: it begins again from update 1")
    return False


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two configs read from JSON, option by option, such as `loss.beta was 0.1, is 0.2`.

    Args:
        before: A config or a part of it.
        now: The same of the other one.
        name: Of the part.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


def begin(folder: pathlib.Path, config: Config) -> None:
    """Makes the run's folder with its `config.json`; what an unfinished run of the same config left there is removed.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / _PARTIAL).write_text(_text(config), encoding="utf-8")
        (folder / _PARTIAL).replace(folder / _CONFIG)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written ({error.strerror}); name another folder.") from None


def _read(folder: pathlib.Path) -> dict[str, Any]:
    """The config of the run that a folder holds."""
    file = folder / _CONFIG
    if not file.is_file():
        raise UserError(f"--workdir={folder} exists and is not a run's folder; name another one.")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged; name another --workdir, or remove the folder.") from None


def _text(config: Config) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
