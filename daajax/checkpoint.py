"""Checkpoints: a run's states on disk, by Orbax, each with a digest that tells a damaged one.

A checkpoint has an item for each part of the state that there is anything of, and each can be restored alone:
`params`, `optimizer`, what the `objectives` keep, a `reference` that follows the policy. Beside them lies `record`,
JSON that says what they must be. Orbax keeps no checksum of contents, so every leaf's digest is taken on the devices
before it is saved and compared after it is restored (`daajax.record`). What is damaged is set aside and the one before
it used, both of it said. `checkpoints_in_bucket` has what differs where the folder is in a bucket.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from daajax import bucket, checkpoints_in_bucket, processes
from daajax.console import say
from daajax.errors import OutageError, UserError, one_line
from daajax.record import ITEMS, DamagedError, Record, check_fits, check_leaves, check_origin, items_of, leaves_of
from daajax.step import TrainState

FAILURES = 3  # saves in a row that may fail before the run ends
BEST = {  # metric that the best checkpoint may be chosen by: whether less of it is better
    "eval/loss": True,
    "eval/rewards/accuracies": False,
    "eval/rewards/margins": False,
}
_SPOKEN = {"optimizer": "the optimizer", "objectives": "what the objectives keep", "reference": "the reference"}
_FOLDER, _ASIDE = "checkpoints", "damaged-checkpoints"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        where: The run's folder.
        keep: Latest checkpoints to keep; older ones go once a later one is whole.
        best: Key of `BEST`: the best by it is kept besides; None: by nothing.
    """

    def __init__(self, where: bucket.Path, *, keep: int = 1, best: str | None = None):
        self.folder, self.best, self._keep = where / _FOLDER, best, keep
        self._aside = where / _ASIDE
        self._options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(1),  # whoever calls `save` has decided
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self._best_of)]),
            cleanup_tmp_directories=True,
        )
        # Only to save: it removes what it takes for left behind.
        self._opened: _Manager | checkpoints_in_bucket.Saver | None = None
        self._records: dict[int, Record] = {}  # of what was saved since
        self._in_background: int | None = None  # update whose save is not known to have ended well
        self._failures = 0

    @property
    def steps(self) -> list[int]:
        """Updates that there is a checkpoint of, ascending."""

        def found() -> list[int]:
            if isinstance(self.folder, bucket.BucketPath):
                return sorted(checkpoints_in_bucket.whole(bucket.names(self.folder)))
            if not self.folder.is_dir():
                return []
            return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

        return processes.from_first(found)  # other hosts may still see the folder as it was

    def choose(self, step: int | None) -> int:
        """The update that a command asks for: itself, 0 for the initial policy, or None for the latest checkpoint.

        Raises:
            UserError: If there is none of that update.
        """
        steps = self.steps
        if step is None and steps:
            return steps[-1]
        if step is None or (step != 0 and step not in steps):
            there = ", ".join(map(str, steps)) or "none"
            wanted = "checkpoint" if step is None else f"checkpoint of update {step}"
            raise UserError(f"{self.folder} has no {wanted}; there are: {there}; --step=0 is the initial policy.")
        return step

    def best_step(self) -> int | None:
        """The update whose checkpoint is best by the metric chosen; None if none was evaluated."""
        return self._best_of(self.steps)

    def save(self, step: int, state: TrainState, record: Record, *, wait: bool = False) -> bool:
        """Begins to save a state, which goes to disk in the background.

        A save that fails is reported and the run goes on; what it left behind is removed and the next save tries again.

        Args:
            step: Updates done.
            state: Not changed, and free to be donated when this returns.
            record: What to say of it.
            wait: Return once it is on disk.

        Returns:
            Whether no failure is known of.

        Raises:
            UserError: If `FAILURES` saves in a row have failed.
        """
        self._settle()  # else its failure would be taken for this one's
        if (self._opened is None and not self._succeeds(step, self._open)) or (opened := self._opened) is None:
            return False
        self._records[step] = record = dataclasses.replace(record, leaves=leaves_of(items_of(state)))
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(item) for name, item in items_of(state).items()},
            record=ocp.args.JsonSave(record.sealed()),
        )
        if self._succeeds(step, lambda: opened.save(step, args=items)):
            self._in_background = step
        if wait:
            self._settle()
        return self._failures == 0

    def close(self) -> None:
        """Ends background work.

        Raises:
            UserError: As `save`.
        """
        self._settle()
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def record(self, step: int) -> Record:
        """What a checkpoint says of itself.

        Raises:
            DamagedError: If it cannot be read.
        """
        return Record.opened(self._read(step, record=ocp.args.JsonRestore())["record"])

    def check_origin(self, step: int, now: Record, *, forced: bool) -> None:
        """See `check_origin`; of the latest checkpoint for step 0, and of none if there is none.

        Raises:
            UserError: If the checkpoint was made with something else, or is damaged.
        """
        step = step or max(self.steps, default=0)
        if step:
            with self._must_be_sound(step):
                before = self.record(step)
            check_origin(before, now, forced=forced)

    def restore(self, step: int, abstract: TrainState, fresh: Callable[..., TrainState] | None = None) -> TrainState:
        """Reads a state onto the devices.

        Args:
            step: Which.
            abstract: Shapes, dtypes and shardings.
            fresh: Called as `fresh(params, updates=…, parts=…)`, makes those parts of a state of parameters alone,
                should the checkpoint be of another optimizer or loss; None refuses it.

        Raises:
            UserError: If it is the state of another model or optimizer.
            DamagedError: If any of it is not what was saved.
        """
        record, place = self.record(step), str(self.folder / str(step))
        check_fits(record, abstract, "params", place)
        items, lacking = items_of(abstract), []
        for name in ITEMS[1:]:
            try:
                check_fits(record, abstract, name, place)
            except UserError as error:
                if fresh is None:
                    raise
                afresh = "starts afresh from them" if name in items_of(abstract) else "is left out"
                say(f"{error} Forced: its parameters are taken, and {_SPOKEN[name]} {afresh}")
                lacking.append(name)
                items.pop(name, None)
        found = self._restored(step, record, items)
        state = abstract._replace(step=jax.device_put(jnp.int32(step), abstract.step.sharding), **found)
        if fresh is not None and lacking:
            made = fresh(state.params, updates=step, parts=lacking)
            return state._replace(**{name: getattr(made, name) for name in lacking})
        return state

    def restore_parts(self, step: int, abstract: TrainState) -> TrainState:
        """Reads some parts of a state.

        Args:
            step: Which.
            abstract: Shapes, dtypes and shardings; parts that are empty are not read.

        Raises:
            UserError: If it is another model's or damaged.
        """
        with self._must_be_sound(step):
            record, items = self.record(step), items_of(abstract)
            for name in items:
                check_fits(record, abstract, name, str(self.folder / str(step)))
            return abstract._replace(**self._restored(step, record, items))

    def restore_latest(
        self, abstract: TrainState, fresh: Callable[..., TrainState] | None = None
    ) -> tuple[int, TrainState]:
        """The latest checkpoint that is sound, of those that there are: its update and its state.

        Damaged ones that are later than it are moved out of the way, never removed.

        Args:
            abstract: See `restore`.
            fresh: See `restore`.

        Raises:
            UserError: If all of them are damaged.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps):
            try:
                state = self.restore(step, abstract, fresh)
            except DamagedError as reason:
                damaged[step] = reason
                continue
            for bad, reason in damaged.items():
                aside = processes.from_first(functools.partial(self._set_aside, bad))
                say(f"checkpoint of update {bad} is damaged ({reason}): set aside as {aside}")
            return step, state
        # All stay where they are: without them the same command would begin from update 1.
        reasons = "; ".join(f"update {step} ({reason})" for step, reason in damaged.items())
        raise UserError(
            f"every checkpoint in {self.folder} is damaged: {reasons}; name another --workdir to begin again."
        )

    def _set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint out of the way; gives its new place."""
        self._aside.mkdir(exist_ok=True)
        copies = len(list(self._aside.glob(f"{step}*")))
        aside = self._aside / (f"{step}-{copies + 1}" if copies else str(step))
        (self.folder / str(step)).rename(aside)
        return str(aside)

    @contextlib.contextmanager
    def _must_be_sound(self, step: int) -> Iterator[None]:
        """Ends a command that asked for a checkpoint which is damaged."""
        try:
            yield
        except DamagedError as reason:
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged ({reason}); use another --step."
            ) from None

    def _open(self) -> None:
        """Makes what saves; what an interrupted save left behind is removed."""
        if isinstance(self.folder, bucket.BucketPath):
            if processes.is_first():
                checkpoints_in_bucket.remove_partial(self.folder)
            self._opened = checkpoints_in_bucket.Saver(self.folder)
        else:
            self._opened = _Manager(self.folder.absolute(), options=self._options)

    def _settle(self) -> None:
        """Waits for the save in the background."""
        if self._in_background is not None and (opened := self._opened) is not None:
            step, self._in_background = self._in_background, None
            if self._succeeds(step, lambda: opened.wait_until_finished()):
                self._failures = 0
                if isinstance(self.folder, bucket.BucketPath):
                    self._remove_old(self.folder)

    def _remove_old(self, folder: bucket.BucketPath) -> None:
        """Removes the checkpoints in a bucket that are not to be kept."""
        try:
            steps = self.steps
            kept = {*steps[-self._keep :], self._best_of(steps)}
            for step in (step for step in steps if step not in kept and processes.is_first()):
                checkpoints_in_bucket.remove(folder / str(step))
        except UserError as error:  # of the bucket
            say(f"a checkpoint that is not needed any more could not be removed: {error} The run goes on")

    def _succeeds(self, step: int, act: Callable[[], object]) -> bool:
        """Does a part of a save, which may fail up to `FAILURES` times in a row; what a failure leaves is removed."""
        failure, is_outage = None, False
        try:
            act()
        except Exception as error:  # Orbax and TensorStore raise whatever the file system makes of it
            failure = one_line(error)
            is_outage = isinstance(error, OutageError) or (
                isinstance(self.folder, bucket.BucketPath) and bucket.is_outage(error)
            )
        # What fails in one process is given up by all.
        failures = [failed for failed in processes.gathered([failure, is_outage]) if failed[0]]
        if not failures:
            return True
        self._failures += 1
        manager, self._opened = self._opened, None
        with contextlib.suppress(Exception):
            if manager is not None:
                manager.close()
        if processes.is_first() and not isinstance(self.folder, bucket.BucketPath):
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        line = f"the checkpoint of update {step} could not be saved ({failures[0][0]})"
        if self._failures >= FAILURES:
            kind = OutageError if all(passes for _, passes in failures) else UserError
            raise kind(
                f"{line}: {self._failures} times in a row; make room or make {self.folder} writable, then start "
                "the same command again."
            )
        say(f"{line}; the run goes on")
        return False

    def _best_of(self, steps: Sequence[int]) -> int | None:
        """The best of these updates; None if there is no finite metric of any."""
        if self.best is None:
            return None
        found = {}
        for step in steps:
            with contextlib.suppress(DamagedError):
                found[step] = (self._records.get(step) or self.record(step)).metrics.get(self.best, math.nan)
        finite = {step: value for step, value in found.items() if math.isfinite(value)}
        return (min if BEST[self.best] else max)(finite, key=finite.__getitem__, default=None)

    def _restored(self, step: int, record: Record, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Items as they were saved, by name."""
        items = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        found = {name: value for name, value in self._read(step, **items).items() if name in items}
        check_leaves(record, leaves_of(found))
        return found

    def _read(self, step: int, **items: Any) -> Any:
        found, damage, no_answer = None, None, None
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                found = reader.restore((self.folder / str(step)).absolute(), args=ocp.args.Composite(**items))
        except (MemoryError, PermissionError):  # nothing is wrong with the checkpoint
            raise
        except Exception as error:  # a page of TensorStore's text, of many kinds
            no_answer = self._no_answer(step, error)
            if no_answer is None and ("RESOURCE_EXHAUSTED" in str(error) or processes.is_lost(error)):
                raise
            damage = one_line(error)
        # What one process finds is so for all: each reads other parts.
        processes.raise_together(no_answer)
        if damages := [damage for damage in processes.gathered(damage) if damage]:
            raise DamagedError(damages[0])
        return found

    def _no_answer(self, step: int, error: Exception) -> bucket.BucketError | None:
        """What an error says of the bucket, where it says nothing of the checkpoint in it; None: it is another one."""
        if not isinstance(self.folder, bucket.BucketPath) or isinstance(error, bucket.BucketError):
            return error if isinstance(error, bucket.BucketError) else None
        return bucket.refused(self.folder / str(step), "read", error) if bucket.is_out_of_reach(error) else None


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for asking whether the platform wants a stop: its numbers would get between those of `processes`."""

    def reached_preemption(self, step: int) -> bool:
        """Never; see `daajax.processes.is_stopping`."""
        del step
        return False


@dataclasses.dataclass(frozen=True)
class _Best:
    """Orbax's policy that keeps the best checkpoint; its own one would rank NaN, and read files without a digest."""

    best_of: Callable[[Sequence[int]], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of these to keep."""
        del context
        best = self.best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]
