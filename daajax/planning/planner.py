"""The command `python -m daajax.plan`: from its flags to a plan, or to the fastest layout that fits."""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from daajax import bucket, command, inputs, output, run
from daajax.config import Config, losses
from daajax.console import say
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.losses.terms import Term, bind
from daajax.models.architecture import Architecture, for_length
from daajax.models.families import architecture_of, read_architecture
from daajax.planning import assumed, report, topologies
from daajax.planning.compiling import CACHE, Cache, Result, compile_for
from daajax.planning.layouts import Layout, Subject, make_layout, with_options
from daajax.planning.report import Planned
from daajax.planning.search import Candidate, Counted, Found, count, search
from daajax.planning.shapes import SHAPES

TRIES = 8  # layouts that a search compiles at most
ASSUMED = "assumed"  # in place of data.path where there are no data
OPTIONS: dict[str, type] = {
    "topology": str,
    "slices": int,
    "model": str,
    "lengths": str,
    "search": bool,
    "tries": int,
    "cache": str,
    "output": str,
}
USAGE = f"""usage: python -m daajax.plan --config=configs/RECIPE.py[:ARGUMENT] --topology=NAME [--config.key=value …]
  --topology=v5e:4x4   machines: {", ".join([*topologies.TPUS, *topologies.GPUS])}; h200:8x8 is 8 hosts of 8
  --slices=1           of TPUs of that topology, over the data-centre network
  --model=NAME         a published shape in place of config.model.path: {", ".join(SHAPES)}
  --lengths=P,C,R      tokens of prompt and responses that are assumed, in place of config.data; {assumed.DEFAULT} where
                       the recipe's data are not here
  --search             finds the fastest layout that fits, over mesh, remat, micro_batches, packing.rows and head
  --tries={TRIES}            layouts that it compiles at most
  --cache=DIR          where results are kept; {CACHE}
  --output=FILE        the plan as JSON too
Every option with its meaning is in configs/base.py."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process."""
    command.end(plan, USAGE, argv)


def plan(argv: Sequence[str]) -> None:
    """Plans the run that a command line describes.

    Args:
        argv: Arguments, program name first.

    Raises:
        UserError: If anything the user can mend stands in the way.
    """
    names_data = any(word.startswith("--config.data.path") for word in argv)
    config, values = command.parse_options(
        argv, "plan", OPTIONS, lambda config, values: _completed(config, values, names_data)
    )
    if not values["topology"]:
        raise UserError("no machines: name them with --topology=v5e:4x4, h200:8, …; --help has the kinds.")
    if values["slices"] is not None and values["slices"] < 1:
        raise UserError(f"--slices={values['slices']}: at least one is needed.")
    if values["tries"] is not None and values["tries"] < 1:
        raise UserError(f"--tries={values['tries']}: at least one layout must be tried.")
    path = None if values["output"] is None else bucket.path_of(values["output"], "--output")
    if path is not None:
        output.check(path)
    cache = Cache(values["cache"] or CACHE)
    topology = topologies.describe(values["topology"], slices=values["slices"] or 1)
    terms = bind(losses(config))
    config, architecture, name = _model(config, values["model"])
    data = _data(config, values["lengths"], architecture, terms)
    subject = Subject(architecture, terms, data, topology, name)
    if values["search"]:
        planned = _searched(subject, config, cache, values["tries"] or TRIES)
    else:
        planned = compiled(make_layout(subject, config), cache)
        for line in report.lines(planned):
            say(line)
    if path is not None and planned is not None:
        output.write_rows(path, [report.as_values(planned)])
    elif path is not None:
        say(f"{path} is not written: nothing fits")


def _completed(config: Config, values: Mapping[str, Any], names_data: bool) -> Config:
    """A config that has what a plan can do without: a model, data, and as many updates as they give."""
    changes: dict[str, Any] = {}
    if values["model"] is not None:
        if values["model"] not in SHAPES:
            raise UserError(
                f"--model={values['model']} is not among the published shapes, {', '.join(SHAPES)}; a directory with a "
                "config.json is named with --config.model.path."
            )
        changes["model.path"] = values["model"]
    path = config.data.path
    is_address = path is not None and "://" in path  # what a recipe names is not fetched for a plan
    is_here = path is not None and (
        names_data or config.data.name == "hub" or (not is_address and pathlib.Path(path).exists())
    )
    if values["lengths"] is not None or not is_here:
        if path is not None and values["lengths"] is None:
            why = "is fetched if --config.data.path names it" if is_address else "is not here"
            say(f"data: {path} {why}: --lengths={','.join(map(str, assumed.DEFAULT))} are assumed")
        changes |= {"data.path": ASSUMED, "data.extra": (), "data.weight": None, "steps": 1, "epochs": None}
    return with_options(config, changes)


def _model(config: Config, shape: str | None) -> tuple[Config, Architecture, str]:
    """The config with local model directories, the policy's architecture, and its name."""
    if shape is not None:
        return config, for_length(architecture_of(SHAPES[shape]), config.max_length), shape
    local, _ = run.fetch_models(config, with_weights=False)
    return local, read_architecture(local.model.path, length=config.max_length), config.model.path


def _data(config: Config, lengths: str | None, architecture: Architecture, terms: tuple[Term, ...]) -> TokenizedData:
    """What is learned from, or assumed to be."""
    if config.data.path != ASSUMED:
        return inputs.load_data(config, config.data, architecture, terms)
    text = lengths or ",".join(map(str, assumed.DEFAULT))
    found = assumed.for_loss(assumed.parse_lengths(text, config.max_length), config.batch_size, terms)
    say(f"data: {config.batch_size} examples of {', '.join(map(str, found.lengths[0]))} tokens are assumed")
    return found


def compiled(layout: Layout, cache: Cache) -> Planned:
    """A layout with its programs compiled."""
    topology, told = layout.subject.topology, {"told": layout.config.compiler_options}
    say(f"compiling the update for {topology.name}: seconds for GPUs, minutes for TPUs")
    update = compile_for(layout.lower_update(), topology, cache, told)
    _say_compiled("the update", update)
    lowered = layout.lower_reference_pass()
    if lowered is None or not report.fits(update, layout):
        return Planned(layout, update)
    reference_pass = compile_for(lowered, topology, cache, told)
    _say_compiled("the reference pass", reference_pass)
    return Planned(layout, update, reference_pass)


def _say_compiled(what: str, result: Result) -> None:
    done = "is refused" if result.refused else f"needs {report.amount(result.peak)}"
    say(f"{what} {done} ({result.seconds:.1f} s to compile, {result.program[:12]})")


def _searched(subject: Subject, config: Config, cache: Cache, tries: int) -> Planned | None:
    """The fastest layout that fits, said on the way."""
    began = time.perf_counter()

    def compile_candidate(candidate: Candidate) -> tuple[bool, Planned]:
        say(
            f"trying {report.pasted(candidate.options)}: {candidate.time.seconds:.3g} s at least, by "
            f"{candidate.time.limit}; at least {report.amount(candidate.memory)}"
        )
        planned = compiled(make_layout(subject, with_options(config, candidate.options)), cache)
        return planned.fits, planned

    counted = count(subject, config)
    found = search(counted.candidates, subject.topology.memory, compile_candidate, tries=tries)
    for line in _search_lines(counted, found, time.perf_counter() - began):
        say(line)
    if found.best is None:
        if found.tried:
            for line in report.verdict(found.tried[-1].outcome):
                say(line)
        return None
    for line in report.lines(found.best.outcome):
        say(line)
    say(f"recommended: {report.pasted(found.best.candidate.options)}")
    return found.best.outcome


def _search_lines(counted: Counted, found: Found, seconds: float) -> list[str]:
    """What was tried."""
    lines = [
        f"search: {len(counted.candidates)} layouts counted, {found.too_large} need more memory whatever the compiler "
        f"does, {len(found.tried)} compiled, {found.left} not tried; {seconds:.0f} s"
    ]
    lines += [f"search: {number} could not be laid out: {why}" for why, number in counted.refused.items()]
    if found.best is None and found.left:
        lines.append("search: none of those that were compiled fits; raise --tries")
    elif found.best is None:
        lines.append("search: nothing fits: take more devices, lora.rank, or optimizer.mu_dtype=bfloat16")
    return lines
