"""daajax as a worker of `benchmarks.against_trl`: what `daajax.train` does, an update at a time.

    python -m benchmarks.daajax_worker JSON

JSON: `model` and `pairs`, paths; `folder` for its caches; `updates` to go round in, None: the whole epoch; `options`:
`batch_size`, `max_length`, `learning_rate`, `beta`, `remat`, `dtype`, and others of a run by name, `set`.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

from benchmarks.memory import set_options
from benchmarks.workers import Parent, Stopwatch, peak
from configs import base
from daajax import inputs, policy, run, sharding, step
from daajax.config import Config, losses, resolve
from daajax.data.packing import Plan
from daajax.errors import UserError
from daajax.gradient import NOTHING
from daajax.losses.terms import Needs, bind
from daajax.models.families import read_architecture
from daajax.train import IN_FLIGHT


def make_config(given: dict[str, Any]) -> Config:
    """The run's: one epoch, with default options but for what the other side is given too."""
    options = given["options"]
    config = base.get_config()
    config.model.path, config.data.path = given["model"], given["pairs"]
    config.model.dtype = options["dtype"]
    config.data.truncation = "drop"  # the two would cut differently
    config.data.cache_dir, config.reference.cache_dir = f"{given['folder']}/tokens", f"{given['folder']}/reference"
    config.max_length, config.batch_size, config.epochs = options["max_length"], options["batch_size"], 1.0
    config.loss, config.remat = base.loss("dpo", beta=options["beta"]), options["remat"]
    config.optimizer.learning_rate, config.optimizer.schedule = options["learning_rate"], "constant"
    config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = 0.9, 0.999, 1e-8
    config.optimizer.weight_decay, config.optimizer.max_grad_norm = 0.0, 1.0
    set_options(config, options["set"])
    return resolve(config)


def most() -> int:
    """The most memory that this process ever had, bytes: of its device, or resident where that is the machine's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak()


def beginning(plan: Plan, updates: int) -> Plan:
    """The first updates of a plan, laid out as in the whole of it."""
    parts = {name: getattr(plan, name)[:updates] for name in ("windows", "row_of", "shape_of")}
    return dataclasses.replace(plan, **parts)


class Compilation:
    """Seconds that jax spends on tracing and compiling, from its own events."""

    def __init__(self) -> None:
        self._seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._seconds += duration_secs

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def main() -> None:
    """Trains as told; what the user can mend is said to the parent."""
    parent = Parent()
    try:
        work(parent, json.loads(sys.argv[1]))
    except UserError as error:
        parent.refuse(str(error))


def work(parent: Parent, given: dict[str, Any]) -> None:
    """Plans and compiles, then makes as many updates as the parent asks for, until it asks for no more."""
    compilation, config = Compilation(), make_config(given)
    terms, architecture = bind(losses(config)), read_architecture(config.model.path, length=config.max_length)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    data, whole = inputs.load_sets(config, architecture, terms, mesh)[0]
    plan = beginning(whole, given["updates"] or whole.updates)
    scorer = policy.make_scorer(config, architecture, mesh)
    parent.tell(
        order=[[data.ids[example] for example in window] for window in plan.windows.tolist()],
        updates=whole.updates,
        examples=len(data.weights),
        layout=whole.report(),
        attention=scorer.attention.name,
        device=jax.devices()[0].device_kind,
        peak=most(),
        versions={"jax": jax.__version__},
    )
    parent.next()

    # Compilation first, as in a run, then the reference.
    update, watch = run.make_update(config, scorer, scorer, terms, updates=whole.updates), Stopwatch()
    unknown = {name: np.zeros(len(data.tokens), np.float32) for name in Needs.of(terms).of_reference}
    shaped = inputs.make_batches(config, data, plan, unknown, terms)[0]
    update.compile(shaped, keys=plan.shape(0).keys)
    compiled = watch.read() | {"peak": most()}
    params = policy.load_initial_params(config, scorer, mesh)
    compilation.read()
    watch.read()
    reference = run.load_reference(config, [(data, plan)], scorer, scorer, params, terms, mesh)
    scored = watch.read() | {"compiling": compilation.read(), "peak": most()}
    batches = inputs.make_batches(config, data, plan, reference.columns[0], terms)
    state = step.init_state(params, update.optimizer, sharding.homes(update.state), terms)
    del params
    parent.tell(compiled=compiled, reference=scored)

    done = 0
    while (command := parent.next())["do"] == "update":
        times, found, until = [], [], done + command["count"]
        # Those that are queued end when they like: each is given its share of their time. The first one is apart.
        for begin, end in ((0, 1), (1, until)) if done == 0 else ((done, until),):
            if begin == end:
                continue
            watch.read()
            for t in range(begin, end):
                at = t % plan.updates
                state, logged = update(state, sharding.place(mesh, batches[at]), NOTHING, keys=plan.shape(at).keys)
                found.append(logged["loss"])
                if t - begin >= IN_FLIGHT:
                    found[-1 - IN_FLIGHT].block_until_ready()
            jax.block_until_ready(found)
            times += [{clock: seconds / (end - begin) for clock, seconds in watch.read().items()}] * (end - begin)
        done = until
        parent.tell(times=times, losses=[float(loss) for loss in found])
    parent.tell(peak=most())


if __name__ == "__main__":
    main()
