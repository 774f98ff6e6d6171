"""The command line: `--config=RECIPE[:ARGUMENT] [--workdir=DIR] [--config.key=value …]`, and how a command ends."""

import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from daajax.config import Config, resolve
from daajax.errors import UserError

_USAGE = """usage: python -m daajax.{name} --config=configs/RECIPE.py[:ARGUMENT] [--workdir=DIR] [--config.key=value …]
Every option with its meaning is in configs/base.py."""


def run(main: Callable[[Config, str], None], name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process: 0 done, 1 a clear error in one line, 2 wrong usage of Python itself never.

    Args:
        main: Takes the resolved config and the run's folder.
        name: Of the command.
        argv: Arguments; None takes the process's.
    """
    arguments = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "-help"} & set(arguments):
        sys.stdout.write(_USAGE.format(name=name) + "\n")
        sys.exit(0)
    try:
        main(*parse(arguments, name))
    except UserError as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    sys.exit(0)


def parse(argv: Sequence[str], name: str) -> tuple[Config, str]:
    """From arguments, program name first, to the resolved config and the run's folder.

    Raises:
        UserError: If anything on the line is not understood.
    """
    unset = [a.partition("=")[0] for a in argv if a.startswith("--config.") and a.endswith("=None")]
    overrides = [a for a in argv if a.partition("=")[0] not in unset]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Recipe.", flag_values=values, sys_argv=overrides)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    recipe = _recipe(argv)
    if not recipe:
        raise UserError(
            f"no recipe: python -m daajax.{name} --config=configs/dpo_llama.py [--workdir=DIR] [--config.key=value …]"
        )
    file, _, argument = recipe.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={file}: there is no such file; recipes are in configs/, run from the repository's folder."
        )
    try:
        rest = values(overrides)
        config = values.config
        for option in unset:
            _unset(config, option.removeprefix("--config."))
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        raise UserError(f"there is no such option: {_one_line(error)}; configs/base.py has them all.") from None
    except Exception as error:  # a recipe is a program: whatever it raises is the recipe's
        raise UserError(f"{recipe}: {type(error).__name__}: {_one_line(error)}") from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not understood; options look like --config.key=value.")
    stem = pathlib.Path(file).stem + (f"-{argument.replace('/', '_')}" if argument else "")
    return resolve(config), values.workdir or str(pathlib.Path("runs") / stem)


def _unset(config: Config, name: str) -> None:
    """Sets an option to None, which a flag of its type would refuse."""
    *folders, last = name.split(".")
    for folder in folders:
        config = config[folder]
    config[last]  # raises where there is no such option
    config[last] = None


def _recipe(argv: Sequence[str]) -> str:
    """What `--config` names, `--config=RECIPE` or `--config RECIPE`; empty if it is not there."""
    for index, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value or next(iter(argv[index + 1 : index + 2]), "")
    return ""


def _one_line(error: BaseException) -> str:
    text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "'").strip("\"' ")
    if "Traceback (most recent call last)" in text:  # of a recipe; its last line says what is wrong
        text = text.strip().splitlines()[-1]
    return " ".join(text.split())
