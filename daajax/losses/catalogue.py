"""The objectives as a table in Markdown: `python -m daajax.losses.catalogue`.

Everything is read off the code: formula and paper from the docstring, needs from `OBJECTIVES`, defaults from the
signature. The README holds this table, and a test that they are the same.
"""

import inspect
import re
import sys

from daajax.losses.objective import Objective
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.sums import SUMS

_HEADER = ("name", "what it is", "paper", "needs", "defaults")


def table() -> str:
    """The table, one objective a line, in the order of `OBJECTIVES`."""
    rows = [_HEADER, ("---",) * len(_HEADER)]
    rows += [_row(name, objective) for name, objective in OBJECTIVES.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def needs(objective: Objective) -> str:
    """What an objective with its default hyper-parameters needs of data and model, in words."""
    count = {1: "single responses", 2: "pairs", None: "2 or more responses"}[objective.responses]
    if "labels" in objective.reads:
        count = "labelled responses (or pairs)"
    parts = [count]
    parts += ["the reference's model" if any(SUMS[name].live for name in objective.sums) else "a reference"] * (
        objective.reference
    )
    parts += ["scores"] * ("scores" in objective.reads)
    parts += ["the whole update at once"] * objective.coupled
    return ", ".join(parts)


def _row(name: str, objective: Objective) -> tuple[str, ...]:
    documentation = inspect.getdoc(objective.function) or ""
    what = documentation.split("\n\n")[0].replace("\n", " ").rstrip(".").replace("|", "\\|")
    _, _, sources = documentation.partition("References:")
    links = re.findall(r"https?://[^\s,;)]+", sources)
    paper = f"[{_short(links[0])}]({links[0]})" if links else " ".join(sources.split())
    parameters = list(inspect.signature(objective.function).parameters.values())[1:]
    defaults = ", ".join(f"{parameter.name}={parameter.default}" for parameter in parameters)
    return f"`{name}`", what, paper, needs(objective), f"`{defaults}`" if defaults else ""


def _short(link: str) -> str:
    """A link as it is shown: arXiv's number, or the name of the site."""
    number = re.search(r"arxiv\.org/abs/([\d.]+)", link)
    return number[1] if number else link.split("/")[2]


if __name__ == "__main__":
    sys.stdout.write(table())
