"""What a run reports: numbers computed inside the update, and where they are written.

The device side adds numbers up per micro-batch, as sums already divided by what the update counts, or as maxima; the
host side fetches them once a log interval. A new number is a line in `of_examples`.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from daajax import bucket, memory
from daajax.chips import Peak
from daajax.console import say
from daajax.data.packing import Plan
from daajax.flops import Counts
from daajax.losses.objective import Losses
from daajax.losses.scores import Responses
from daajax.mirror import Mirror
from daajax.output import as_json


class Logged(NamedTuple):
    """Metrics of some examples of an update: shares of the update's means, and maxima."""

    sums: dict[str, Array]
    maxima: dict[str, Array]

    def combined(self) -> "Logged":
        """Of parts stacked along the first axis."""
        return Logged(*(jax.tree.map(f, part) for f, part in zip((_sum, _max), self, strict=True)))

    def with_term(self, name: str, loss: Array) -> "Logged":
        """With a further term of the loss, which is logged beside it."""
        return self._replace(sums={**self.sums, "loss": self.sums["loss"] + loss, f"loss/{name}": loss})

    def values(self) -> dict[str, Array]:
        """Name to scalar."""
        return {**self.sums, **self.maxima}


def _sum(x: Array) -> Array:
    return x.sum(axis=0)


def _max(x: Array) -> Array:
    return x.max(axis=0)


def of_examples(
    loss: Float[Array, ""],
    results: Sequence[tuple[str, Array, Losses]],
    responses: Responses,
    real: Bool[Array, " examples"],
    count: Float[Array, ""],
    wanted: Float[Array, ""] | None = None,
) -> Logged:
    """What is logged of some examples of an update.

    `chosen` is response 0 and `rejected` the mean of the others that there are; of labelled examples, `chosen` are
    those that are wanted, `rejected` those that are not.

    Args:
        loss: Their share of the update's loss.
        results: Name, share of the loss and result of each of its terms; rewards are those of the first term that has
            any.
        responses: Their log-probs.
        real: Which of them are examples.
        count: Examples in the whole update.
        wanted: Of them, those with label 1; None where the terms read no labels.
    """
    sums, maxima = {"loss": loss}, {}

    def mean(name: str, values: Array, among: Array = real, of: Array = count) -> None:
        sums[name] = jnp.where(among, values, 0).sum() / jnp.maximum(of, 1)

    def sides(name: str, values: Float[Array, "examples responses"]) -> None:
        if wanted is not None:
            mean(f"{name}/chosen", values[:, 0], real & (responses.labels == 1), wanted)
            mean(f"{name}/rejected", values[:, 0], real & (responses.labels == 0), count - wanted)
        else:
            mean(f"{name}/chosen", values[:, 0])
            if values.shape[1] > 1:
                mean(f"{name}/rejected", _mean_of_others(values, responses.lengths))

    for name, part, result in results:
        if len(results) > 1:
            sums[f"loss/{name}"] = part
        for key, values in result.metrics.items():
            mean(key if key not in sums else f"{key}/{name}", values)
    sides("logps", responses.logps)
    rewards = next((result.rewards for _, _, result in results if result.rewards is not None), None)
    if rewards is not None and (wanted is not None or rewards.shape[1] > 1):
        sides("rewards", rewards)
        sums["rewards/margins"] = sums["rewards/chosen"] - sums["rewards/rejected"]
        if wanted is None:
            mean("rewards/accuracies", _in_order(rewards, responses.lengths))
    if responses.log_ratios is not None:
        ratios = responses.log_ratios
        sides("displacement", ratios)
        among = real if wanted is None else real & (responses.labels == 1)
        mean(
            "displacement/chosen_fell",
            (ratios[:, 0] < 0).astype(jnp.float32),
            among,
            count if wanted is None else wanted,
        )
        size = jnp.where(real[:, None], jnp.abs(ratios), 0)
        maxima["log_ratios/largest"] = size.max()
        maxima["log_ratios/largest_per_sqrt_token"] = (size / jnp.sqrt(jnp.maximum(responses.lengths, 1))).max()
    return Logged(sums, maxima)


def _mean_of_others(
    values: Float[Array, "examples responses"], lengths: Int[Array, "examples responses"]
) -> Float[Array, " examples"]:
    """The mean over the responses but the first, of those that there are."""
    others = lengths[:, 1:] > 0
    return jnp.where(others, values[:, 1:], 0).sum(axis=1) / jnp.maximum(others.sum(axis=1), 1)


def _in_order(
    rewards: Float[Array, "examples responses"], lengths: Int[Array, "examples responses"]
) -> Float[Array, " examples"]:
    """The share of pairs of responses, the first before the second, whose first has the higher reward."""
    responses = rewards.shape[1]
    earlier = jnp.triu(jnp.ones((1, responses, responses), bool), 1)
    pairs = earlier & (lengths[:, :, None] > 0) & (lengths[:, None] > 0)
    right = pairs & (rewards[:, :, None] > rewards[:, None])
    return right.sum(axis=(1, 2)) / jnp.maximum(pairs.sum(axis=(1, 2)), 1)


class Meters(NamedTuple):
    """What speed is measured against.

    Attributes:
        counts: Arithmetic of the run's updates.
        peak: What its devices can do.
    """

    counts: Counts
    peak: Peak

    def read(self, first: int, last: int, seconds: float) -> dict[str, float]:
        """Of the updates from `first` to below `last`, which took so long together.

        `hfu` is what the hardware was asked for, `mfu` the least that the pairs need, over what the chips could have
        done in that time: hfu times the four factors, `mfu/packing` and so on (`daajax.flops`). Without a known peak
        there are the factors alone.
        """
        found = {f"mfu/{step}": factor for step, factor in self.counts.factors(first, last).items()}
        if self.peak.flops is None:
            return found
        asked = self.counts.steps["packing"]
        hfu = float(asked[last] - asked[first]) / (seconds * self.peak.flops)
        return {"mfu": hfu * math.prod(found.values()), "hfu": hfu, **found}


class Clock:
    """What is known of updates from the plan and the wall clock.

    Args:
        plan: Of the run.
        lengths: Tokens of each example's parts.
        done: Updates done before.
        meters: What speed is measured against; None: nothing.
    """

    def __init__(self, plan: Plan, lengths: Int[np.ndarray, "examples parts"], done: int, meters: Meters | None = None):
        self._plan, self._examples, self._meters = plan, len(lengths), meters
        tokens = np.where(plan.windows >= 0, lengths.sum(axis=1)[plan.windows], 0).sum(axis=1)
        self._tokens = np.concatenate([[0], np.cumsum(tokens)])
        self._waited = 0.0
        self.restart(done)

    def restart(self, done: int) -> None:
        """Measures afresh from after so many updates, which the device has finished: what came since is left out."""
        self._at, self._time, self._waited = done, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def read(self, t: int) -> dict[str, float]:
        """Numbers of the updates since the last call, including update t, which the device has finished."""
        now, done = time.perf_counter(), t + 1
        seconds, updates = now - self._time, done - self._at
        tokens = int(self._tokens[done] - self._tokens[self._at])
        rates = {
            "pairs_per_second": updates * self._plan.batch_size / seconds,
            "tokens_per_second": tokens / seconds,
        }
        found = {
            "epoch": done * self._plan.batch_size / self._examples,
            "num_tokens": int(self._tokens[done]),
            "update_seconds": seconds / updates,
            "data_wait_seconds": self._waited / updates,
            **rates,
            "packing_efficiency": self._plan.efficiency["length"],
            **memory.peak(),
        }
        if self._meters is not None:
            found |= {f"{name}_per_chip": rate / self._meters.peak.chips for name, rate in rates.items()}
            found |= self._meters.read(self._at, done, seconds)
        self._at, self._time, self._waited = done, now, 0.0
        return found


class Writer:
    """Appends to a run's `metrics.jsonl` and TensorBoard events.

    In a bucket, where nothing is appended, both are copied every half minute and when `flush` is called.

    Args:
        folder: The run's folder; None writes nothing, as all processes of a job do but the first.
        updates: Done before; events of later ones are those of an interrupted run, and void.
    """

    def __init__(self, folder: bucket.Path | None, *, updates: int = 0):
        self._writes, self._mirror = folder is not None, None
        if folder is None:
            return
        if isinstance(folder, bucket.BucketPath):
            self._mirror = Mirror(folder)
            self._mirror.fetch("metrics.jsonl")
            folder = self._mirror.local
        import tensorboardX  # it imports PyTorch where that is installed: a second, which only writing need cost

        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=updates + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one JSON object and the same numbers as events; both are on this machine's disk when it returns.

        A disk that does not take them is no reason to end a run: it is said, and they are written with the next ones.
        """
        if not self._writes:
            return
        try:
            self._file.write(as_json({"step": step, **values}))
            self._file.flush()
        except OSError as error:
            say(f"{self._file.name} cannot be written ({error.strerror}); the run goes on")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        if self._mirror is not None:
            self._mirror.push_soon()

    def flush(self) -> None:
        """Returns once all is where it stays, or a bucket does not take it, which is said."""
        if self._mirror is not None:
            self._mirror.push()

    def complete(self) -> None:
        """Closes both at the end of a run, which is not finished unless all is where it stays.

        Raises:
            BucketError: If a bucket does not take it; it names the copy on this machine.
        """
        self._close_files()
        if self._mirror is not None:
            self._mirror.complete()

    def close(self) -> None:
        """Closes both; where a bucket does not take them, the copy on this machine stays, and is named."""
        self._close_files()
        if self._mirror is not None:
            self._mirror.close()

    def _close_files(self) -> None:
        if not self._writes:
            return
        try:
            self._file.close()
        except OSError as error:
            say(f"{self._file.name} is not complete ({error.strerror})")
        self._events.close()
