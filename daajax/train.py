"""A run, top to bottom.

`python -m daajax.train --config=configs/dpo_llama.py [--workdir=DIR] [--config.key=value …]`
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from daajax import (
    bucket,
    checkpoint,
    command,
    first_loss,
    folder,
    gradient,
    inputs,
    memory,
    metrics,
    policy,
    processes,
    run,
    sharding,
    step,
)
from daajax.config import Config, losses, tokenizer_path
from daajax.console import Progress, say
from daajax.data.ahead import made_ahead
from daajax.errors import UserError, one_line
from daajax.evaluate import Evaluation
from daajax.losses.terms import Needs, bind
from daajax.models import directory, lora, peft, weights
from daajax.models.architecture import describe_rope
from daajax.models.families import read_architecture
from daajax.models.parameters import parameter_count
from daajax.record import Record, check_origin
from daajax.shortage import Shortage
from daajax.trace import Trace
from daajax.watchdog import Watchdog

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
    where = bucket.path_of(workdir, "--workdir")
    with folder.claimed(where, config) as found:
        if found == "finished":
            say(f"{where} is finished: the model is in {where / 'model'}")
        else:
            _train(config, where, found)


def _train(config: Config, where: bucket.Path, found: folder.State) -> None:
    """A run in a folder that no other one works in."""
    # ------------------------------------------------------------------ what is trained, on what, where
    terms = bind(losses(config))
    asked = config
    config, revisions = run.fetch_models(asked, folder.read_revisions(where))
    architecture = read_architecture(config.model.path, length=config.max_length)
    if config.reference.path is not None:  # before minutes are spent on the data
        read_architecture(config.reference.path, "reference.path", length=config.max_length)
    adapters = policy.lora_of(config, architecture)
    if config.model.router_aux_loss_coef and architecture.experts is None:
        raise UserError(
            f"config.model.router_aux_loss_coef={config.model.router_aux_loss_coef} but {config.model.path} has no "
            "experts to balance; leave it at 0."
        )
    mesh = sharding.make_mesh(config.mesh.to_dict())
    say(f"devices: {jax.device_count()} {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    sets = inputs.load_sets(config, architecture, terms, mesh)
    data, plan = sets[0]
    saved = checkpoint.Checkpoints(where, keep=config.checkpoint.keep, best=config.checkpoint.best)
    if (done := max(saved.steps, default=0)) > plan.updates:
        raise UserError(f"{where} holds update {done} but this run ends at {plan.updates}; raise steps or epochs.")
    profile = config.profile
    numbers = dict(first=profile.start, steps=profile.steps, updates=plan.updates)
    trace = Trace(where / "profile", **numbers, is_made=processes.is_first())
    scorer = policy.make_scorer(config, architecture, mesh, adapters=adapters)
    reference_scorer = run.make_reference_scorer(config, scorer, terms, mesh)
    is_live, follows = bool(run.why_live(config, terms)), config.reference.mode == "ema"
    shapes, param_shardings = policy.param_layout(scorer, mesh)
    update = run.make_update(config, scorer, reference_scorer, terms, updates=plan.updates)
    homes = sharding.homes(update.state)
    if not config.model.random_init:
        weights.check(config.model.path, architecture, policy.base_layout(scorer, mesh)[0])
    say(
        f"model: {parameter_count(architecture):,} parameters of {asked.model.path}, "
        f"{config.model.param_dtype if adapters is None else config.model.dtype}, computing in {config.model.dtype}; "
        f"attention {scorer.attention.name} ({scorer.attention.why}), remat {config.remat}"
    )
    if adapters is not None:
        count = sum(leaf.size for leaf in jax.tree.leaves(update.state.params))
        kept = f", projections in {adapters.quantization}" if adapters.quantization else ""
        say(f"lora: {count:,} parameters are trained, the others stay{kept}")
    for line in [*describe_rope(architecture), *sharding.describe(shapes, param_shardings)]:
        say(f"model: {line}")

    # ------------------------------------------------------------------ the compiled update, before minutes are spent
    processes.stop_if_asked("no update was done since it started")
    began, largest = time.perf_counter(), plan.largest_update()
    unknown = {} if is_live else {name: np.zeros(len(data.tokens), np.float32) for name in Needs.of(terms).of_reference}
    shaped = inputs.make_batches(config, data, plan, unknown, terms).shaped(largest)
    chosen = update.head_for(shaped)
    say(f"head: {chosen.report()}")
    for shape in plan.shapes:
        if (other := update.head_of(plan.micro_batches, shape.scored)).form != chosen.form:
            say(f"head: rows of {shape.length} tokens: {other.report()}")
    shortage = Shortage(config, mesh, {"state": update.state, "beside": update.beside}, head=chosen.form)
    with shortage.explained("compiling the update"):
        compiled = update.compile(shaped, keys=plan.shape(largest).keys)
    compile_seconds = time.perf_counter() - began
    say(f"compiled the update in {compile_seconds:.1f} s")
    if fits := memory.check(compiled, "the update", shortage.advice):
        say(f"memory: {fits}")
    del compiled
    processes.stop_if_asked("no update was done since it started")

    # ------------------------------------------------------------------ reference, then its weights are gone
    resumes = done > 0
    params, reference, live, columns = {}, None, {}, [{}] * len(sets)
    if config.reference.mode != "none" or not resumes or adapters is not None:
        params = policy.load_initial_params(config, scorer, mesh)
    if config.reference.mode != "none":
        reference = run.load_reference(config, sets, scorer, reference_scorer, params, terms, mesh)
        columns = reference.columns
        if not follows:  # what follows is part of the state
            live = reference.live
            if reference_scorer is scorer and not resumes:  # the policy's are donated
                live = jax.tree.map(jnp.copy, live)
        reference = dataclasses.replace(reference, live={})
    own = sharding.own_rows(mesh, plan.rows)
    batches, evaluation = inputs.make_batches(config, data, plan, columns[0], terms, rows=own), None
    if sets[1:]:
        held_out = inputs.make_batches(config, *sets[1], columns[1], terms, sweep=True)
        evaluation = Evaluation(scorer, terms, sets[1][0], held_out, mesh, reference_scorer if is_live else None)

    # ------------------------------------------------------------------ the state, fresh or from a checkpoint
    origin = Record(data=data.digest, model="")
    if reference is not None:
        origin = dataclasses.replace(origin, model=reference.policy, reference=reference.digest)
    elif adapters is not None:
        origin = dataclasses.replace(origin, model=policy.digest_at_start(config, params, scorer))
    params, frozen = lora.split(params, adapters)
    beside = gradient.Beside(frozen, live)
    if resumes:
        del params  # before the others come
        forced = config.resume == "force"
        fresh = functools.partial(step.init_state, optimizer=update.optimizer, shardings=homes, terms=terms)
        done, state = saved.restore_latest(update.state, fresh if forced else None)
        check_origin(saved.record(done), origin, forced=forced)
        say(f"resumed after update {done} of {plan.updates}")
    else:
        if found == "unfinished":
            say(f"{where} holds this run without a checkpoint: it begins again from update 1")
        done, state = 0, step.init_state(params, update.optimizer, homes, terms)
        del params  # donated with the state
    expected, why_not = None, first_loss.why_not_checked(config, reference, Needs.of(terms), done)
    if why_not:
        say(f"first loss: not checked, {why_not}")
    else:
        first, keys = sharding.place(mesh, batches[0], rows=plan.rows), plan.shape(0).keys
        if is_live:
            known = gradient.Live.beside(scorer, reference_scorer, beside.following(state.reference))
            first |= gradient.known_of_reference(known, first, Needs.of(terms), keys=keys)
            del known  # it would keep the weights
        expected = first_loss.expect(first, terms, batch_size=plan.batch_size, dtype=config.model.dtype)
        del first

    # ------------------------------------------------------------------ the updates
    progress = Progress("train", plan.updates, "update", done=done)
    counts = run.make_counts(config, scorer, reference_scorer, terms, data, plan, chosen)
    meters = run.make_meters(config, mesh, counts)
    say(f"mfu: {'left out, ' if meters.peak.flops is None else 'against '}{meters.peak.words}")
    clock = metrics.Clock(plan, data.lengths, done, meters)
    trace.begin(done)
    queued: collections.deque[jax.Array] = collections.deque()
    earliest, latest = {}, {}
    # Placed in that thread too: a process fills in its own devices' parts without asking the others.
    placed = made_ahead(lambda update: sharding.place(mesh, batches[update], rows=plan.rows), range(done, plan.updates))

    def begin() -> None:
        processes.first_alone(lambda: folder.begin(where, asked, updates=done, revisions=revisions))

    def open_writer() -> metrics.Writer:
        return processes.by_first(lambda: metrics.Writer(where, updates=done), lambda: metrics.Writer(None))

    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(where, config.watchdog_minutes))
        stack.callback(placed.close)
        stack.callback(progress.close)
        stack.enter_context(shortage.explained("the run"))
        stack.callback(saved.close)
        writer, is_saved = None, True
        # What is known here: a bucket that is out of reach would answer with an error in place of what ended the run.
        stack.callback(lambda: trace.close(keep=found == "unfinished" or writer is not None))
        for t in range(done, plan.updates):
            with clock.waiting():
                batch = next(placed)
            with trace.update(t + 1):
                state, logged = update(state, batch, beside, keys=plan.shape(t).keys)
            queued.append(logged["loss"])
            if len(queued) > IN_FLIGHT:
                queued.popleft().block_until_ready()
                watchdog.advance()
            ends = t + 1 == plan.updates
            saves = ends or (t + 1) % config.checkpoint.every == 0
            evaluates = evaluation is not None and (
                ends
                or (t + 1) % (config.eval.every or plan.updates) == 0
                or (saves and config.checkpoint.best is not None)
            )
            if t == done or ends or evaluates or (t + 1) % config.log.every == 0:
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
                    begin()
                    writer = stack.enter_context(contextlib.closing(open_writer()))
                    earliest = latest = latest | {"compile_seconds": compile_seconds}
                if evaluates and evaluation is not None:
                    latest |= _evaluated(evaluation, state, beside, t + 1, watchdog)
                writer.write(t + 1, latest)
                progress.advance({name: latest[name] for name in SHOWN if name in latest})
            else:
                progress.advance()
            stops = processes.is_stopping() and not ends
            if saves or stops:
                if not jax.jit(step.all_finite)(state.params):
                    raise UserError(
                        f"update {t + 1} made parameters that are not finite; lower optimizer.learning_rate. No model "
                        "was written."
                    )
                held_out = {name: latest[name] for name in latest if evaluates and name.startswith("eval/")}
                with watchdog.paused():
                    if writer is not None:  # a run that goes on from here has what was said before
                        writer.flush()
                    record = dataclasses.replace(origin, metrics=held_out)
                    is_saved = saved.save(t + 1, state, record, wait=ends or stops)
            if stops and is_saved:
                raise processes.StoppedError(f"update {t + 1} of {plan.updates} is saved")
            if stops:
                raise processes.StoppedError(f"update {t + 1} could not be saved; an earlier one may be there")
            trace.after(t + 1, logged["loss"])
            if saves or evaluates:
                clock.restart(t + 1)

        # -------------------------------------------------------------- the result
        stack.enter_context(watchdog.paused())
        if writer is None:  # all was done before
            begin()
        del beside, frozen, live  # before the weights come to be merged with
        words = tokenizer_path(config)
        if adapters is not None:  # first: it is small, and all that was trained
            base = directory.pinned(asked.model.path, revisions)
            peft.save(str(where / "adapter"), state.params, architecture, adapters, base=base, tokenizer_path=words)
        weights.save(
            str(where / "model"),
            policy.merged(config, state.params, scorer, mesh),
            architecture,
            model_path=config.model.path,
            tokenizer_path=words,
        )
        if not is_saved:
            raise UserError(
                f"the model is in {where / 'model'}, but the last checkpoint could not be saved; make room, then start "
                "the same command again."
            )

        def finish() -> None:
            if writer is not None:
                writer.complete()
            folder.finish(where, plan.updates)

        processes.first_alone(finish)
    for name in SHOWN:
        if name in earliest:
            say(f"{name}: {earliest[name]:.6g} at update {done + 1}, {latest[name]:.6g} at update {plan.updates}")
    if (best := saved.best_step()) not in (None, plan.updates):
        say(
            f"the best checkpoint by {config.checkpoint.best} is that of update {best}: "
            f"python -m daajax.export --workdir={where} --step={best}"
        )
    adapter = f", its adapter in {where / 'adapter'}" if adapters is not None else ""
    say(f"the model is in {where / 'model'}{adapter}, the metrics in {where / 'metrics.jsonl'}")


def _evaluated(
    evaluation: Evaluation, state: step.TrainState, beside: gradient.Beside, updates: int, watchdog: Watchdog
) -> dict[str, float]:
    """What an evaluation finds; nothing where it fails, which is said and does not end the run."""
    try:
        values = evaluation(state.params, state.objectives, beside.following(state.reference), watchdog)
    except Exception as error:  # whatever it is: hours of training are worth more
        if processes.count() > 1:  # the others may wait for this one, in the middle of it
            raise
        say(f"the evaluation after update {updates} failed ({one_line(error)}); the run goes on")
        return {}
    shown = [f"{name} {values[f'eval/{name}']:.4g}" for name in SHOWN if f"eval/{name}" in values]
    say(f"evaluation after update {updates}: {', '.join(shown)}")
    return values


if __name__ == "__main__":
    command.run(train, "train")
