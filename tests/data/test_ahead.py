"""Batches made ahead: by events that only one order of things can set, never by the clock."""

import contextlib
import threading
import traceback

import numpy as np
import pytest

from daajax.data.ahead import made_ahead
from daajax.data.batches import Batches
from tests.data.test_batches import planned, random_examples, tokenized_data

LONG = 60  # seconds after which a test fails that would otherwise wait for ever


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("depth", [1, 2, 20])
def test_what_is_made_comes_in_order(count, depth):
    assert list(made_ahead(str, range(count), depth=depth)) == [str(key) for key in range(count)]
    assert not workers()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_next_ones_are_made_while_one_is_in_use_and_no_more_of_them_than_asked(depth):
    begun = [threading.Event() for _ in range(10)]

    def make(key):
        begun[key].set()
        return key

    with contextlib.closing(made_ahead(make, range(10), depth=depth)) as ahead:
        for key in range(10 - depth):
            assert next(ahead) == key
            # The consumer is busy here: all of these begin without it asking for anything.
            assert all(event.wait(LONG) for event in begun[: key + depth + 1])
            assert not any(event.is_set() for event in begun[key + depth + 1 :])


def test_a_slow_step_never_waits_for_a_batch_that_takes_as_long():
    # Every batch needs its predecessor's step to be under way before it is finished, as one as slow as a step does:
    # a loop that makes it only after the step would stand still.
    under_way = [threading.Event() for _ in range(5)]
    made = [threading.Event() for _ in range(6)]

    def make(key):
        assert key == 0 or under_way[key - 1].wait(LONG)
        made[key].set()
        return key

    with contextlib.closing(made_ahead(make, range(6), depth=1)) as ahead:
        for key in range(5):
            assert next(ahead) == key
            under_way[key].set()
            assert made[key + 1].wait(LONG)  # ready before the step ends: the next `next` does not wait


def test_an_exception_comes_in_its_place_with_the_traceback_of_the_worker():
    def make_badly(key):
        if key == 2:
            raise OSError("the disk is gone")
        return key

    ahead = made_ahead(make_badly, range(9))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone") as error:
        next(ahead)
    assert "make_badly" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert not workers()
    assert list(ahead) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_a_loop_that_is_interrupted_leaves_no_thread_and_makes_no_more(interruption):
    made = []

    def loop():
        with contextlib.closing(made_ahead(made.append, range(99), depth=8)) as ahead:
            next(ahead)
            raise interruption

    with pytest.raises(interruption):
        loop()
    assert not workers()
    assert made == list(range(len(made)))
    assert len(made) <= 9  # the one in use, and the eight that were to be made ahead of the next


def test_a_maker_that_stops_iteration_does_not_end_the_loop_in_silence():
    def make(key):
        raise StopIteration

    with pytest.raises(RuntimeError):
        list(made_ahead(make, range(3)))


@pytest.mark.parametrize("done", [0, 2, 5])
def test_batches_made_ahead_are_those_of_the_plan_from_any_update_on(done):
    data = tokenized_data(random_examples(48))
    batches = Batches(data, planned(data, updates=5), draws=["gumbel"], seed=3)
    found = list(made_ahead(batches.__getitem__, range(done, 5)))
    assert len(found) == 5 - done
    for batch, update in zip(found, range(done, 5), strict=True):
        for name, value in batches[update].items():
            np.testing.assert_array_equal(batch[name], value)
