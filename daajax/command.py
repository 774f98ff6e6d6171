"""The command line: `--config=RECIPE[:ARGUMENT] [--workdir=DIR] [--config.key=value …]`, and how a command ends."""

import difflib
import io
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags, logging
from ml_collections import config_dict, config_flags

from daajax import bucket, folder, memory, processes
from daajax.config import Config, every_option, has_adapters, resolve, restored
from daajax.console import say
from daajax.errors import OutageError, UserError, one_line

_USAGE = """usage: python -m daajax.{name} --config=configs/RECIPE.py[:ARGUMENT] [--workdir=DIR] [--config.key=value …]
Every option with its meaning is in configs/base.py."""
_USAGE_AT = """usage: python -m daajax.{name} --workdir=DIR{options} [--config.key=value …]
DIR is a run's folder. Every option with its meaning is in configs/base.py."""


def run(main: Callable[[Config, str], None], name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command that starts from a config; see `end`.

    Args:
        main: Takes the resolved config and the run's folder.
        name: Of the command.
        argv: Arguments, program name first; None takes the process's.
    """

    def act(arguments: Sequence[str]) -> None:
        config, workdir = parse(arguments, name)
        _check_same(config, workdir)
        main(config, workdir)

    end(act, _USAGE.format(name=name), argv, joins=True, stops=True)


def run_at(main: Callable[..., None], name: str, argv: Sequence[str] | None = None, **options: type) -> None:
    """Runs a command that starts from a run's folder; see `end`.

    Args:
        main: Takes the run's config, its folder, and by name those of its options that are given.
        name: Of the command.
        argv: Arguments, program name first; None takes the process's.
        **options: Its options and their types.
    """
    usage = _USAGE_AT.format(name=name, options="".join(f" [--{option}=…]" for option in options))

    def act(arguments: Sequence[str]) -> None:
        config, workdir, values = parse_at(arguments, name, options)
        _check_same(config, workdir, values)
        main(config, workdir, **{option: value for option, value in values.items() if value is not None})

    end(act, usage, argv, joins=True)


def end(
    main: Callable[[Sequence[str]], None],
    usage: str,
    argv: Sequence[str] | None = None,
    *,
    remedies: str = memory.REMEDIES,
    joins: bool = False,
    stops: bool = False,
) -> NoReturn:
    """Runs a command and ends the process.

    Exit codes: 0 done, 1 a clear error, 42 stopped by the platform after saving, 43 another process is gone, the
    runtime of one of several has failed, or a bucket does not answer, 130 stopped from the keyboard.

    Args:
        main: Takes the arguments, program name first.
        usage: What `--help` prints.
        argv: The arguments; None takes the process's.
        remedies: What helps when memory runs out.
        joins: Whether a process that was started with these arguments joins the others of its job.
        stops: Whether `main` saves what it has done when the platform wants it to stop.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    logging.set_verbosity(logging.FATAL)  # libraries log pages of what is then raised, and said here in one line
    arguments = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "-help"} & set(arguments):
        sys.stdout.write(usage + "\n")
        sys.exit(0)
    try:
        if joins and argv is None:
            processes.join(stops=stops)
        main(arguments)
    except OutageError as error:
        _fail(f"error: {error}", processes.STUCK)
    except UserError as error:
        _fail(f"error: {error}")
    except processes.StoppedError as stopped:
        say(f"stopped by the platform: {stopped}; the same command goes on")
        processes.leave_together(processes.STOPPED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(f"error: out of memory ({one_line(error)}); {remedies}.")
        _fall(error)
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.write("stopped\n")
        processes.leave(130)  # an orderly end would tear down a computation that still runs
    except Exception as error:
        _fall(error)
    sys.exit(0)


def _check_same(*parsed: Any) -> None:
    """Refuses processes that were not told the same: they would compute apart, or wait for ever."""
    processes.check_same(repr(parsed), "the command lines")


def _fail(line: str, code: int = 1) -> NoReturn:
    """Ends the process with a line: of several processes that fail alike, the first one's."""
    sys.stdout.flush()
    if processes.says(line):
        sys.stderr.write(f"{line}\n")
    if processes.are_several():
        processes.leave(code)
    sys.exit(code)


def _fall(error: Exception) -> NoReturn:
    """Ends the process as an error does that nobody foresaw, or for want of the others."""
    if processes.is_lost(error):
        sys.stdout.flush()
        sys.stderr.write(f"error: another process is gone ({one_line(error)}); start the job again.\n")
        processes.leave(processes.STUCK)
    if processes.are_several():
        traceback.print_exception(error)
        # A device that fails is nothing that the user has to mend: the job may start again.
        processes.leave(processes.STUCK if isinstance(error, jax.errors.JaxRuntimeError) else 1)
    raise error


def parse(argv: Sequence[str], name: str) -> tuple[Config, str]:
    """From arguments, program name first, to the resolved config and the run's folder.

    Raises:
        UserError: If anything on the line is not understood.
    """
    config, values = parse_options(argv, name, {"workdir": str})
    file, _, argument = _taken("config", argv)[0].partition(":")
    if values["workdir"] == "":
        raise UserError("--workdir= is empty; name a folder, or leave it out.")
    stem = pathlib.Path(file).stem + (f"-{argument.replace('/', '_')}" if argument else "")
    return config, values["workdir"] or str(pathlib.Path("runs") / stem)


def parse_options(
    argv: Sequence[str],
    name: str,
    options: Mapping[str, type],
    complete: Callable[[Config, Mapping[str, Any]], Config] = lambda config, values: config,
) -> tuple[Config, dict[str, Any]]:
    """From arguments, program name first, to the resolved config and the command's own options.

    Args:
        argv: The arguments.
        name: Of the command, for messages.
        options: Its flags and their types; None is the value of one that is not given.
        complete: From the config that the line describes, not yet resolved, and its options to the one that is meant.

    Raises:
        UserError: If anything on the line is not understood.
    """
    recipe, argv = _taken("config", argv)
    if not recipe:
        flags_of = " ".join(f"[--{option}=…]" for option in options)
        raise UserError(
            f"no recipe: python -m daajax.{name} --config=configs/dpo_llama.py {flags_of} [--config.key=value …]"
        )
    file, _, argument = recipe.partition(":")
    return _overridden(_load(file, argument), argv, options, complete)


def parse_at(argv: Sequence[str], name: str, options: Mapping[str, type]) -> tuple[Config, str, dict[str, Any]]:
    """From arguments, program name first, to the config of a run, its folder and the command's own options.

    Args:
        argv: The arguments.
        name: Of the command, for messages.
        options: Its flags and their types; None is the value of one that is not given.

    Raises:
        UserError: If anything on the line is not understood, or there is no run.
    """
    workdir, argv = _taken("workdir", argv)
    if not workdir:
        raise UserError(f"no run: python -m daajax.{name} --workdir=DIR, the folder of a run.")
    if _taken("config", argv)[0]:
        raise UserError(f"daajax.{name} reads the config of the run in --workdir; give it --config.key=value alone.")
    config = restored(folder.read_config(bucket.path_of(workdir, "--workdir")))
    trained = config.to_dict()
    config, values = _overridden(config, argv, options)
    _check_adapters(workdir, dict(every_option(trained)), config)
    return config, workdir, values


def _check_adapters(workdir: str, wanted: Mapping[str, Any], config: Config) -> None:
    """Refuses options that would make another model of the adapters of a run, which has those that are wanted."""
    found = dict(every_option(config.to_dict()))
    for name in [name for name in found if name.startswith("lora.")] + ["model.dtype"] * has_adapters(config):
        if found[name] != wanted[name]:
            raise UserError(
                f"config.{name}={found[name]}: the run in {workdir} was made with {wanted[name]}, and its adapters are "
                "another model with anything else; leave it out."
            )


def _overridden(
    config: Config,
    argv: Sequence[str],
    options: Mapping[str, type],
    complete: Callable[[Config, Mapping[str, Any]], Config] = lambda config, values: config,
) -> tuple[Config, dict[str, Any]]:
    """A config with what the command line changes, resolved, and the values of the command's own options."""
    for option in filter(None, (re.match(r"--?(?:no)?config\.([^=]*)", a) for a in argv)):
        _place(config, option[1])
    for option, value in (a.removeprefix("--config.").split("=", 1) for a in argv if re.match(r"--config\.[^=]*=", a)):
        place, key = _place(config, option)
        if isinstance(place[key], config_dict.ConfigDict) and not value.lstrip().startswith("{") and value != "None":
            keys = ", ".join(f"config.{option}.{name}" for name in place[key])
            raise UserError(f"config.{option}={value} sets several options at once and needs a dict; there are {keys}.")
    latest = {a.partition("=")[0]: a for a in argv if a.startswith("--config.") and "=" in a}
    unset = [option for option, a in latest.items() if a == f"{option}=None"]
    argv = [a for a in argv if a.partition("=")[0] not in unset and not re.fullmatch(r"--config\..*=None", a)]
    values = flags.FlagValues()
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, bool: flags.DEFINE_boolean}
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        for option, kind in options.items():
            define[kind](option, None, "", flag_values=values)
        rest = values(argv)
    except Exception as error:  # from another library, of several kinds: whatever it is, the line is at fault
        raise UserError(said_by(error)) from None
    for option in unset:
        place, key = _place(config, option.removeprefix("--config."))
        if isinstance(place[key], config_dict.ConfigDict):
            raise UserError(f"{option}=None unsets several options; unset them one by one.")
        place[key] = None  # a flag of the option's type would refuse it
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not understood; options look like --config.key=value.")
    found = {option: values[option].value for option in options}
    return resolve(complete(config, found)), found


def _taken(flag: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """What a flag says, `--flag=VALUE` or `--flag VALUE`, empty if it is not there; the other arguments."""
    found, others = "", []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            found = value or ("" if "=" in word else next(words, ""))
        else:
            others.append(word)
    return found, others


def _load(file: str, argument: str) -> Config:
    """Runs a recipe's `get_config`."""
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={file}: there is no such file; recipes are in configs/, run from the repository's folder."
        )
    try:
        recipe = runpy.run_path(file)
        if "get_config" not in recipe:
            raise UserError(f"{file} defines no get_config(); a recipe does, as configs/stories.py shows.")
        config = recipe["get_config"](*[argument] if argument else [])
    except UserError:
        raise
    except Exception as error:  # a recipe is a program: whatever it raises is the recipe's
        where = ":".join([file, *_line(error, file)])
        raise UserError(f"{where}: {type(error).__name__}: {said_by(error)}") from None
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"{file}: get_config() returns a {type(config).__name__}; it must return base.get_config(), changed."
        )
    return config


def _line(error: Exception, file: str) -> list[str]:
    """Number of the recipe's line that an error comes from, if it is one of its lines."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return [str(error.lineno)]
    return [str(frame.lineno) for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file][-1:]


def _place(config: Config, option: str) -> tuple[Config, str]:
    """The dict that an option lies in, and its key there."""
    place, path = config, "config"
    value: Any = config
    for key in option.split("."):
        place = value
        known = list(place) if isinstance(place, config_dict.ConfigDict) else []
        if key not in known:
            close = [f"{path}.{name}" for name in difflib.get_close_matches(key, known, 1)]
            close += [f"config.{name}" for name, _ in every_option(config.to_dict()) if name.rpartition(".")[2] == key]
            there = f"did you mean {close[0]}?" if close else f"{path} has {', '.join(known) or 'no keys'}."
            raise UserError(f"config.{option} is not an option; {there}")
        path, value = f"{path}.{key}", place[key]
    return place, option.rpartition(".")[2]


def said_by(error: Exception) -> str:
    """What an error says, without what ml_collections adds to it: the whole config."""
    text: Any = error.msg if isinstance(error, SyntaxError) else error
    while isinstance(text, AttributeError | KeyError) and text.args:  # the second would say it in quotes
        text = text.args[0]
    text = re.sub(r"Other fields present: .*?(?=Did you mean |$)", "", str(text), flags=re.DOTALL)
    return " ".join(text.split())
