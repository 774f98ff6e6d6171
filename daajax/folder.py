"""A run's folder: what may begin there, and what says that it is finished."""

import json
import os
import pathlib
import shutil

from daajax.config import Config
from daajax.console import say
from daajax.errors import UserError


def is_finished(folder: pathlib.Path, config: Config) -> bool:
    """Whether the folder holds this very run, finished; False where it may begin.

    Raises:
        UserError: If the folder holds anything else, or nothing can be written there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        above = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={folder}: {above} cannot be written; name another folder.")
        return False
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"--workdir={folder} exists and is not a run's folder; name another one.")
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged; name another --workdir, or remove the folder.") from None
    now = json.loads(_text(config))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        was, is_now = (json.dumps(content.get(changed[0])) for content in (before, now))
        raise UserError(
            f"--workdir={folder} holds a run of another config: {changed[0]} was {was}, is {is_now}; name another one."
        )
    if (folder / "model").is_dir():
        return True
    say(f"{folder} holds this run, unfinished: it begins again from update 1")
    return False


def begin(folder: pathlib.Path, config: Config) -> None:
    """Makes the run's folder with its `config.json`; what an unfinished run of the same config left there is removed.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "config.json").write_text(_text(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written ({error.strerror}); name another folder.") from None


def _text(config: Config) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"
