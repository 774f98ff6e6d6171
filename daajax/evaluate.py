"""Held-out metrics: the loss and all that training reports of it, over a whole data set at once.

`python -m daajax.evaluate --workdir=DIR [--step=N] [--output=FILE] [--config.eval_data.path=FILE …]` evaluates a run's
checkpoint; step 0 is the initial policy. With `--output` each example's own log-probs are written too, as JSON lines.
Training calls the same `Evaluation` every `eval.every` updates.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from daajax import checkpoint, command, run, sharding
from daajax.config import Config, losses
from daajax.console import Progress, say
from daajax.data.batches import Batches
from daajax.data.packing import Plan
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.losses.terms import Term, bind
from daajax.models.decoder import Params
from daajax.models.families import read_architecture
from daajax.output import as_json, check, write_rows
from daajax.scoring import Batch, Scorer
from daajax.step import Counts, Sums, loss_of, sums_of

_EVALUATIONS = "evaluations.jsonl"


class Evaluation:
    """Evaluates parameters on one data set, the same way at every call.

    Every example is scored once, in rows as in training; the loss is then taken of all of them together, so that it is
    that of one update over the whole set, whatever the batches were. An objective coupled over an update sees them all.

    Args:
        scorer: The policy's.
        terms: The loss.
        data: The examples.
        plan: Visits each of them once.
        reference: Reference log-prob of each of the data's tokens, nats; None without a reference.
        mesh: The mesh.
    """

    def __init__(
        self,
        scorer: Scorer,
        terms: Sequence[Term],
        data: TokenizedData,
        plan: Plan,
        reference: Float[np.ndarray, " total"] | None,
        mesh: Any,
    ):
        def sums(params: Params, part: Batch, keys: int) -> Sums:
            return sums_of(scorer.token_logps(params, part, keys=keys), part, reference=reference is not None)

        self._sums = jax.jit(sums, static_argnums=2, out_shardings=sharding.replicated(mesh))
        self._metrics = jax.jit(functools.partial(_metrics_of, terms=terms))
        self._batches, self._mesh = Batches(data, plan, reference), mesh
        self._data, self._responses = data, data.lengths.shape[1] - 1
        self._has_reference = reference is not None

    def __call__(self, params: Params, progress: Progress | None = None) -> dict[str, float]:
        """Metrics by name, such as `eval/loss`; by source too, `eval/<source>/loss`, where there are several."""
        return self.report(self.score(params, progress))

    def report(self, sums: Sums) -> dict[str, float]:
        """The metrics of what `score` returned."""
        examples = {"lengths": self._data.scored_lengths(), "weights": self._data.weights}
        found = {}
        for prefix, mask in self._groups():
            values = jax.device_get(self._metrics(sums, examples, mask))
            found |= {f"{prefix}/{name}": float(value) for name, value in values.items()}
        return found

    def score(self, params: Params, progress: Progress | None = None) -> Sums:
        """Sums over each response of every example, nats, `[examples, K]` in the order of the data."""
        shape = (len(self._data.weights), self._responses)
        logps, log_ratios = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        plan = self._batches.plan
        for update in range(plan.updates):
            batch = self._batches[update]
            for n in range(plan.micro_batches):
                part = {name: value[n] for name, value in batch.items()}
                placed = sharding.place(self._mesh, part, ("rows",))
                sums = jax.device_get(self._sums(params, placed, plan.shape(update).keys))
                real = part["ids"] >= 0
                logps[part["ids"][real]] = sums.logps[real]
                if sums.log_ratios is not None:
                    log_ratios[part["ids"][real]] = sums.log_ratios[real]
            if progress is not None:
                progress.advance()
        return Sums(jnp.asarray(logps), jnp.asarray(log_ratios) if self._has_reference else None)

    def _groups(self) -> list[tuple[str, Bool[np.ndarray, " examples"]]]:
        """Prefix of the metrics' names, and which examples they are of."""
        everywhere = np.arange(len(self._data.weights))
        groups = [("eval", np.ones(len(everywhere), bool))]
        if len(by_source := self._data.by_source()) > 1:
            groups += [(f"eval/{name}", np.isin(everywhere, members)) for name, members in by_source.items()]
        return groups


def _metrics_of(
    sums: Sums, examples: Batch, mask: Bool[Array, " examples"], *, terms: Sequence[Term]
) -> dict[str, Float[Array, ""]]:
    """The loss of the examples in a mask, and what is logged of it."""
    places = jnp.where(mask, jnp.arange(len(mask)), -1)
    lengths = jnp.where(mask[:, None], examples["lengths"], 0)
    counts = Counts.of({"places": places, "lengths": lengths})
    _, logged = loss_of(sums, {**examples, "places": places}, terms, counts)
    return logged.values()


def evaluate(config: Config, workdir: str, step: int | None = None, output: str | None = None) -> None:
    """Evaluates a checkpoint on held-out data; prints the metrics and adds them to the run's `evaluations.jsonl`.

    Args:
        config: The run's, with what the command line changes.
        workdir: Its folder.
        step: Update of the checkpoint; 0 is the initial policy, None the latest.
        output: File for one JSON line an example: `id`, and by response `logps` and `log_ratios`, nats.

    Raises:
        UserError: If there is no such checkpoint, no held-out data, the data do not fit, or a file cannot be written.
    """
    if config.eval_data.path is None:
        raise UserError("the run has no held-out data; name some with --config.eval_data.path=….")
    if output is not None:
        check(pathlib.Path(output))
    where = pathlib.Path(workdir)
    terms = bind(losses(config))
    architecture = read_architecture(config.model.path)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    saved = checkpoint.Checkpoints(where)
    step = saved.choose(step)
    data, plan = run.load_held_out(config, architecture, terms, mesh)
    scorer = run.make_scorer(config, architecture, mesh)
    params, reference = None, None
    if config.reference.mode != "none":
        params = run.load_initial_params(config, scorer, mesh)
        found = run.load_reference(config, [(data, plan)], scorer, params, mesh)
        (reference,) = found.columns
        origin = checkpoint.Record(data="", model=found.policy, reference=found.digest)
        saved.check_origin(step, origin, forced=config.resume == "force")
        if step != 0:
            params = None  # before the others come
    if params is None:
        params = run.params_at(config, saved, step, scorer, mesh)
    progress = Progress("evaluate", plan.updates, "batch")
    evaluation = Evaluation(scorer, terms, data, plan, reference, mesh)
    sums = evaluation.score(params, progress)
    progress.close()
    if output is not None:
        write_rows(pathlib.Path(output), _rows(data.ids, sums))
        say(f"the log-probs of {len(data.ids)} examples are in {output}")
    values = evaluation.report(sums)
    for name, value in values.items():
        say(f"{name}: {value:.6g}")
    line = as_json({"step": step, "data": config.eval_data.path, "examples": len(data.weights), **values})
    try:
        with (where / _EVALUATIONS).open("a", encoding="utf-8") as report:
            report.write(line)
    except OSError as error:
        raise UserError(
            f"{where / _EVALUATIONS} cannot be written ({error.strerror}); the metrics are printed above."
        ) from None
    say(f"{len(data.weights)} examples under the policy of update {step}; added to {where / _EVALUATIONS}")


def _rows(ids: Sequence[str], sums: Sums) -> list[dict[str, Any]]:
    """What each example's responses were given."""
    columns = {name: np.asarray(values).tolist() for name, values in sums._asdict().items() if values is not None}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{"id": name, **row} for name, row in zip(ids, rows, strict=True)]


if __name__ == "__main__":
    command.run_at(evaluate, "evaluate", step=int, output=str)
