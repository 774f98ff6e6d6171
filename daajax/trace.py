"""A look inside a few updates: `profile.start` and `profile.steps` of a run, through jax.profiler."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from daajax import bucket, output
from daajax.console import say
from daajax.errors import UserError
from daajax.mirror import Mirror

ANNOTATION = "update"  # what an update is called in the trace, with its number


class Trace:
    """Traces some of a run's updates; where none is asked for, it does nothing.

    Args:
        folder: Where the trace goes.
        first: Number of the first update, counted from 1 as in the log; None: none is traced.
        steps: How many.
        updates: Length of the run.
        is_made: Whether this process makes it; of several, the first one does.

    Raises:
        UserError: If the run ends before.
    """

    def __init__(self, folder: bucket.Path, *, first: int | None, steps: int, updates: int, is_made: bool = True):
        self._folder, self._is_running = folder, False
        self._mirror: Mirror | None = None  # of a folder in a bucket, while a trace goes on
        self._numbers = range(0) if first is None else range(first, first + steps)
        if self._numbers and self._numbers[-1] > updates:
            raise UserError(
                f"config.profile.start={first} with profile.steps={steps} reaches update {self._numbers[-1]} but the "
                f"run ends at {updates}; lower them, or unset profile.start."
            )
        if not is_made:
            self._numbers = range(0)

    def begin(self, done: int) -> None:
        """Says what will not be traced because it was done before."""
        if self._numbers and self._numbers[0] <= done:
            left = [number for number in self._numbers if number > done]
            say(f"profile: asked for {_words(self._numbers)}; after update {done} there is left: {_words(left)}")

    def update(self, number: int) -> AbstractContextManager[Any]:
        """Around an update, by its number; the first one that is traced starts the trace."""
        if number not in self._numbers:
            return contextlib.nullcontext()
        if not self._is_running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would fill the trace
            self._mirror = Mirror(self._folder) if isinstance(self._folder, bucket.BucketPath) else None
            where = self._folder if self._mirror is None else self._mirror.local
            jax.profiler.start_trace(str(where), profiler_options=options)
            self._is_running = True
        return jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=number)

    def after(self, number: int, result: jax.Array) -> None:
        """Behind an update and all that the log says of it; the last one that is traced ends the trace.

        Args:
            number: Of the update.
            result: Of it; the trace goes on until it is there.
        """
        if self._is_running and number == self._numbers[-1]:
            result.block_until_ready()
            where = self._stop()
            say(
                f"profile: {_words(self._numbers)} are in {where}: pip install xprof; xprof "
                f"--logdir={where}; or open its trace.json.gz at https://ui.perfetto.dev"
            )

    def close(self, *, keep: bool) -> None:
        """Ends a trace that an error cut short, and removes it unless it is to be kept."""
        if self._is_running:
            where = self._stop()
            if not keep:
                output.remove_folder(where)

    def _stop(self) -> bucket.Path:
        """Ends the trace, and gives where it is: on this machine if a bucket does not take it."""
        jax.profiler.stop_trace()
        self._is_running = False
        return self._folder if self._mirror is None else self._mirror.close()


def _words(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    return f"update {numbers[0]}" if len(numbers) == 1 else f"updates {numbers[0]} to {numbers[-1]}"
