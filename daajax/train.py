"""A run, top to bottom.

`python -m daajax.train --config=configs/dpo_llama.py [--workdir=DIR] [--config.key=value …]`
"""

import collections
import contextlib
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from daajax import command, first_loss, folder, metrics, run, sharding, step
from daajax.config import Config, hyperparameters, losses
from daajax.console import Progress, say
from daajax.data.batches import Batches
from daajax.data.packing import Plan
from daajax.data.windows import describe
from daajax.errors import UserError
from daajax.losses.terms import bind
from daajax.models import weights
from daajax.models.decoder import parameter_count
from daajax.models.families import read_architecture
from daajax.optimizer import make_optimizer, make_schedule

IN_FLIGHT = 2  # updates that may be queued on the device; more would only hold their batches in memory
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm")  # beside the progress


def train(config: Config, workdir: str) -> None:
    """Trains a model as a config says.

    Args:
        config: From `daajax.config.resolve`.
        workdir: Folder of the run; its `model/` is the result.

    Raises:
        UserError: If anything the user can mend stands in the way.
    """
    where = pathlib.Path(workdir)
    if folder.is_finished(where, config):
        say(f"{where} is finished: the model is in {where / 'model'}")
        return

    # ------------------------------------------------------------------ what is trained, on what, where
    terms = bind(losses(config))
    architecture = read_architecture(config.model.path)
    if config.reference.path is not None:  # before minutes are spent on the data
        read_architecture(config.reference.path, "reference.path")
    mesh = sharding.make_mesh(config.mesh.to_dict())
    say(f"devices: {jax.device_count()} {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    data = run.load_data(config, architecture, terms)
    plan = run.make_plan(config, data, mesh)
    for line in [describe(plan.updates, plan.batch_size, len(data.weights)), *plan.report()]:
        say(f"plan: {line}")
    schedule = make_schedule(
        learning_rate=config.optimizer.learning_rate,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        updates=plan.updates,
    )
    optimizer = make_optimizer(
        config.optimizer.name,
        schedule,
        max_grad_norm=config.optimizer.max_grad_norm,
        hyperparameters=hyperparameters(config),
    )
    scorer = run.make_scorer(config, architecture, mesh)
    params, param_shardings = run.load_params(
        config.model.path, scorer, mesh, random_seed=config.seed if config.model.random_init else None
    )
    say(
        f"model: {parameter_count(architecture):,} parameters of {config.model.path}, {config.model.param_dtype}, "
        f"computing in {config.model.dtype}; attention {scorer.attention}, remat {config.remat}"
    )

    # ------------------------------------------------------------------ reference, then its weights are gone
    reference = None
    if config.reference.mode != "none":
        reference = run.load_reference(config, data, plan, scorer, params, mesh)
    batches = Batches(data, plan, None if reference is None else reference.logps)

    # ------------------------------------------------------------------ the state and the compiled update
    whole = sharding.replicated(mesh)
    moments = sharding.optimizer_shardings(mesh, optimizer, params, param_shardings)
    state = step.TrainState(
        step=jax.device_put(jnp.int32(0), whole),
        params=params,
        optimizer=jax.jit(optimizer.init, out_shardings=moments)(params),
    )
    update = step.Update(
        scorer,
        terms,
        optimizer,
        schedule,
        batch_size=plan.batch_size,
        state_shardings=step.TrainState(whole, param_shardings, moments),
        batch_sharding=sharding.sharding(mesh, ("micro_batches", "rows")),
        replicated=whole,
    )
    del params  # donated with the state
    first = sharding.place(mesh, batches[0])
    began = time.perf_counter()
    update.compile(state, first, keys=plan.shape(0).keys)
    say(f"compiled the update in {time.perf_counter() - began:.1f} s")
    expected, why_not = None, first_loss.why_not_checked(config, reference)
    if why_not:
        say(f"first loss: not checked, {why_not}")
    else:
        expected = first_loss.expect(first, terms, batch_size=plan.batch_size, dtype=config.model.dtype)
    del first

    # ------------------------------------------------------------------ the updates
    progress = Progress("train", plan.updates, "update")
    clock = _Clock(plan, data.lengths)
    queued: collections.deque[jax.Array] = collections.deque()
    earliest, latest = {}, {}
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        writer = None
        for t in range(plan.updates):
            batch = sharding.place(mesh, batches[t])
            state, logged = update(state, batch, keys=plan.shape(t).keys)
            queued.append(logged["loss"])
            if len(queued) > IN_FLIGHT:
                queued.popleft().block_until_ready()
            if (t + 1) % config.log.every and t not in (0, plan.updates - 1):
                progress.advance()
                continue
            latest = {name: float(value) for name, value in jax.device_get(logged).items()}
            if t == 0 and expected is not None:
                expected.check(latest)
            if not math.isfinite(latest["loss"]) or not math.isfinite(latest["grad_norm"]):
                raise UserError(
                    f"update {t + 1}: loss is {latest['loss']}, grad_norm {latest['grad_norm']}; lower "
                    "optimizer.learning_rate, or check the model's weights and dtype. No model was written."
                )
            latest |= clock.read(t)
            if writer is None:  # the first update is sound: from here on there is something to keep
                folder.begin(where, config)
                writer = stack.enter_context(contextlib.closing(metrics.Writer(where)))
                earliest = latest
            writer.write(t + 1, latest)
            progress.advance({name: latest[name] for name in SHOWN if name in latest})

    # ------------------------------------------------------------------ the result
    if not jax.jit(step.all_finite)(state.params):
        raise UserError(
            "the last update made parameters that are not finite; lower optimizer.learning_rate. No model was written."
        )
    weights.save(
        str(where / "model"),
        state.params,
        architecture,
        model_path=config.model.path,
        tokenizer_path=run.tokenizer_path(config),
    )
    for name in SHOWN:
        if name in earliest:
            say(f"{name}: {earliest[name]:.6g} at update 1, {latest[name]:.6g} at update {plan.updates}")
    say(f"the model is in {where / 'model'}, the metrics in {where / 'metrics.jsonl'}")


class _Clock:
    """What is known of an update from the plan and the wall clock."""

    def __init__(self, plan: Plan, lengths: np.ndarray):
        self._plan, self._examples = plan, len(lengths)
        tokens = np.where(plan.windows >= 0, lengths.sum(axis=1)[plan.windows], 0).sum(axis=1)
        self._tokens = np.concatenate([[0], np.cumsum(tokens)])
        self._at, self._time = 0, time.perf_counter()

    def read(self, t: int) -> dict[str, float]:
        """Numbers of the updates since the last call, including update t, which the device has finished."""
        now, done = time.perf_counter(), t + 1
        seconds, updates = now - self._time, done - self._at
        tokens = int(self._tokens[done] - self._tokens[self._at])
        self._at, self._time = done, now
        return {
            "epoch": done * self._plan.batch_size / self._examples,
            "num_tokens": int(self._tokens[done]),
            "update_seconds": seconds / updates,
            "pairs_per_second": updates * self._plan.batch_size / seconds,
            "tokens_per_second": tokens / seconds,
            "packing_efficiency": self._plan.efficiency["length"],
        }


if __name__ == "__main__":
    command.run(train, "train")
