"""Held-out metrics: the loss and all that training reports of it, over a whole data set at once.

`python -m daajax.evaluate --workdir=DIR [--step=N] [--output=FILE] [--config.eval_data.path=FILE …]` evaluates a run's
checkpoint; step 0 is the initial policy. With `--output` each example's own log-probs are written too, as JSON lines.
Training calls the same `Evaluation` every `eval.every` updates.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from daajax import bucket, checkpoint, command, folder, inputs, policy, processes, run, sharding
from daajax.config import Config, losses
from daajax.console import Progress, say
from daajax.data.ahead import made_ahead
from daajax.data.batches import Batches
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.gradient import NOTHING, Beside, Live, sums_under
from daajax.loss import Counts, State, Sums, loss_of
from daajax.losses.scores import Responses
from daajax.losses.terms import Needs, Term, bind
from daajax.models import lora
from daajax.models.decoder import Params
from daajax.models.families import read_architecture
from daajax.output import append, as_json, check, write_rows
from daajax.record import Record
from daajax.scoring import Batch, Scorer

_EVALUATIONS = "evaluations.jsonl"


@runtime_checkable
class Advancing(Protocol):
    """What is told of every batch, such as `daajax.console.Progress`."""

    def advance(self) -> None:
        """A batch is scored."""
        ...


class Evaluation:
    """Evaluates parameters on one data set, the same way at every call.

    Every example is scored once, in rows as in training; the loss is then taken of all of them together, so that it is
    that of one update over the whole set, whatever the batches were. An objective coupled over an update sees them all.

    Args:
        scorer: The policy's.
        terms: The loss.
        data: The examples.
        batches: Of these examples, each of them once.
        mesh: The mesh.
        reference_scorer: Scores rows under a live reference; None: none is.
    """

    def __init__(
        self,
        scorer: Scorer,
        terms: Sequence[Term],
        data: TokenizedData,
        batches: Batches,
        mesh: Any,
        reference_scorer: Scorer | None = None,
    ):
        needs = Needs.of(terms)

        def sums(params: Params, beside: Beside, part: Batch, keys: int) -> Sums:
            live = None if reference_scorer is None else Live.beside(scorer, reference_scorer, beside)
            return sums_under(scorer, lora.joined(params, beside.frozen), part, needs, keys=keys, live=live)[0]

        self._sums = jax.jit(sums, static_argnums=3, out_shardings=sharding.replicated(mesh))
        self._metrics = jax.jit(functools.partial(_metrics_of, terms=terms))
        self._data, self._batches, self._mesh = data, batches, mesh

    def __call__(
        self, params: Params, state: State, beside: Beside = NOTHING, progress: Advancing | None = None
    ) -> dict[str, float]:
        """Metrics by name, such as `eval/loss`; by source too, `eval/<source>/loss`, where there are several.

        Args:
            params: The policy's.
            state: What the objectives keep; it is read as an update would, and not changed.
            beside: The policy's that are frozen, and those of a live reference.
            progress: Goes on with every batch.
        """
        return self.report(*self.score(params, beside, progress), state)

    def report(self, sums: Sums, examples: Batch, state: State) -> dict[str, float]:
        """The metrics of what `score` returned."""
        found = {}
        for prefix, mask in self._groups():
            values = jax.device_get(self._metrics(sums, examples, mask, jax.device_get(state)))
            found |= {f"{prefix}/{name}": float(value) for name, value in values.items()}
        return found

    def score(self, params: Params, beside: Beside = NOTHING, progress: Advancing | None = None) -> tuple[Sums, Batch]:
        """Scores every example.

        Args:
            params: The policy's.
            beside: The policy's that are frozen, and those of a live reference.
            progress: Goes on with every batch.

        Returns:
            Sums over each response, nats, `[examples, K]`, and what the loss reads besides of each example; both in the
            order of the data.
        """
        found, read, ids = [], [], []
        plan = self._batches.plan
        with contextlib.closing(made_ahead(self._batches.__getitem__, range(plan.updates))) as batches:
            for update, batch in enumerate(batches):
                for n in range(plan.micro_batches):
                    part = {name: value[n] for name, value in batch.items()}
                    placed = sharding.place(self._mesh, part, ("rows",))
                    sums = jax.device_get(self._sums(params, beside, placed, plan.shape(update).keys))
                    real = part["ids"] >= 0
                    found.append(jax.tree.map(lambda x, real=real: x[real], sums))
                    read.append({name: part[name][real] for name in ("weights", *Responses._fields) if name in part})
                    ids.append(part["ids"][real])
                if progress is not None:
                    progress.advance()
        order = np.argsort(np.concatenate(ids))
        return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)[order]), found[0], *found[1:]), {
            name: jnp.asarray(np.concatenate([part[name] for part in read])[order]) for name in read[0]
        }

    def _groups(self) -> list[tuple[str, Bool[np.ndarray, " examples"]]]:
        """Prefix of the metrics' names, and which examples they are of."""
        everywhere = np.arange(len(self._data.weights))
        groups = [("eval", np.ones(len(everywhere), bool))]
        if len(by_source := self._data.by_source()) > 1:
            groups += [(f"eval/{name}", np.isin(everywhere, members)) for name, members in by_source.items()]
        return groups


def _metrics_of(
    sums: Sums, examples: Batch, mask: Bool[Array, " examples"], state: State, *, terms: Sequence[Term]
) -> dict[str, Float[Array, ""]]:
    """The loss of the examples in a mask, and what is logged of it."""
    places = jnp.where(mask, jnp.arange(len(mask)), -1)
    chosen = {**examples, "places": places}
    _, (logged, _) = loss_of(sums, chosen, terms, Counts.of(chosen), state)
    return logged.values()


def evaluate(config: Config, workdir: str, step: int | None = None, output: str | None = None) -> None:
    """Evaluates a checkpoint on held-out data; prints the metrics and adds them to the run's `evaluations.jsonl`.

    Args:
        config: The run's, with what the command line changes.
        workdir: Its folder.
        step: Update of the checkpoint; 0 is the initial policy, None the latest.
        output: File for one JSON line an example: `id`, and by response `logps`, `log_ratios` and whatever else the
            loss sums, nats.

    Raises:
        UserError: If there is no such checkpoint, no held-out data, the data do not fit, or a file cannot be written.
    """
    if config.eval_data.path is None:
        raise UserError("the run has no held-out data; name some with --config.eval_data.path=….")
    file = None if output is None else bucket.path_of(output, "--output")
    if file is not None:
        processes.first_alone(lambda: check(file))
    where = bucket.path_of(workdir, "--workdir")
    terms = bind(losses(config))
    config, _ = run.fetch_models(config, folder.read_revisions(where))
    architecture = read_architecture(config.model.path, length=config.max_length)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    saved = checkpoint.Checkpoints(where)
    step = saved.choose(step)
    data, plan = inputs.load_held_out(config, architecture, terms, mesh)
    scorer = policy.make_scorer(config, architecture, mesh, adapters=policy.lora_of(config, architecture))
    live, columns, initial, reference = bool(run.why_live(config, terms)), {}, None, {}
    reference_scorer = run.make_reference_scorer(config, scorer, terms, mesh)
    if config.reference.mode != "none":
        initial = policy.load_initial_params(config, scorer, mesh)
        found = run.load_reference(config, [(data, plan)], scorer, reference_scorer, initial, terms, mesh)
        (columns,) = found.columns
        if not (step and config.reference.mode == "ema"):  # else it is in the checkpoint
            reference = found.live
        origin = Record(data="", model=found.policy, reference=found.digest)
        saved.check_origin(step, origin, forced=config.resume == "force")
        del found
    if step != 0 and scorer.model.lora is None:
        initial = None  # before the others come
    state, frozen = policy.state_at(config, saved, step, scorer, terms, mesh, initial=initial)
    progress = Progress("evaluate", plan.updates, "batch")
    batches = inputs.make_batches(config, data, plan, columns, terms, sweep=True)
    evaluation = Evaluation(scorer, terms, data, batches, mesh, reference_scorer if live else None)
    sums, examples = evaluation.score(state.params, Beside(frozen, reference).following(state.reference), progress)
    progress.close()
    if file is not None:
        processes.first_alone(lambda: write_rows(file, _rows(data.ids, sums)))
        say(f"the log-probs of {len(data.ids)} examples are in {file}")
    values = evaluation.report(sums, examples, state.objectives)
    for name, value in values.items():
        say(f"{name}: {value:.6g}")
    line = as_json({"step": step, "data": config.eval_data.path, "examples": len(data.weights), **values})
    processes.first_alone(lambda: _append(where / _EVALUATIONS, line))
    say(f"{len(data.weights)} examples under the policy of update {step}; added to {where / _EVALUATIONS}")


def _append(file: bucket.Path, line: str) -> None:
    try:
        append(file, line)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); the metrics are printed above.") from None


def _rows(ids: Sequence[str], sums: Sums) -> list[dict[str, Any]]:
    """What each example's responses were given."""
    found = {"logps": sums.logps, "log_ratios": sums.log_ratios, **sums.further}
    columns = {name: np.asarray(values).tolist() for name, values in found.items() if values is not None}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{"id": name, **row} for name, row in zip(ids, rows, strict=True)]


if __name__ == "__main__":
    command.run_at(evaluate, "evaluate", step=int, output=str)
