"""Batches made ahead of their use, in a thread of their own, so that a step finds its batch ready.

One worker makes them one by one in order, so that what it makes is what a plain loop would have made.
"""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

DEPTH = 2  # batches that wait for their use; more would only hold memory

Key = TypeVar("Key")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Key], Made], keys: Iterable[Key], *, depth: int = DEPTH) -> Generator[Made, None, None]:
    """What `make` makes of each key, in their order; it is made while the one before is in use.

    An exception of `make` is raised where its result would have come, with the traceback of the worker. Close the
    generator (`contextlib.closing`) when done with it early: that waits for what is being made, and begins nothing new.

    Args:
        make: Called in the worker, never twice at once.
        keys: For example the updates.
        depth: How many may be made and not yet taken, >= 1.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as worker:
        pending: collections.deque[Future[Made]] = collections.deque()
        try:
            for key in keys:
                pending.append(worker.submit(make, key))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            worker.shutdown(wait=False, cancel_futures=True)
