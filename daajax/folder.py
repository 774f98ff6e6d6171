"""A run's folder: what may begin there, and what says that it did."""

import json
import os
import pathlib

from daajax.config import Config
from daajax.errors import UserError


def is_finished(folder: pathlib.Path, config: Config) -> bool:
    """Whether the folder holds this very run, finished.

    Raises:
        UserError: If it holds anything else, or nothing can be written there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        above = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={folder}: {above} cannot be written; name another folder.")
        return False
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"--workdir={folder} exists and is not a run's folder; name another one.")
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is damaged; name another --workdir.") from None
    if not (folder / "model").is_dir():
        raise UserError(f"{folder} holds a run that did not finish; remove the folder or name another --workdir.")
    now = json.loads(_config_text(config))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{folder} holds a finished run of another config: {changed[0]} was {json.dumps(before.get(changed[0]))}, "
            f"is {json.dumps(now.get(changed[0]))}; name another --workdir."
        )
    return True


def begin_folder(folder: pathlib.Path, config: Config) -> None:
    """Makes the run's folder with its `config.json`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(_config_text(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written ({error.strerror}); name another folder.") from None


def _config_text(config: Config) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
