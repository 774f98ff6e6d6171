"""A run's batches are made in a thread ahead of the device, and the thread ends with the run, however it ends."""

import threading

import pytest

from daajax.data.batches import Batches
from tests import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def spy_on_batches(monkeypatch, spoiled=None):
    """Which update's batch is made in which thread; that of one update is spoiled where it is made ahead."""
    made, get = [], Batches.__getitem__

    def make(self, update):
        made.append((update, threading.current_thread()))
        if update == spoiled and threading.current_thread() is not threading.main_thread():
            raise ArithmeticError("no such batch")
        return get(self, update)

    monkeypatch.setattr(Batches, "__getitem__", make)
    return made


def test_batches_are_made_in_a_thread_of_their_own_which_ends_with_the_run(world, tmp_path, monkeypatch):
    made = spy_on_batches(monkeypatch)
    worlds.train(tmp_path / "run", *world.flags)
    ahead = [(update, thread) for update, thread in made if thread is not threading.main_thread()]
    assert [update for update, _ in ahead] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in ahead}) == 1
    assert not ahead[0][1].is_alive()


def test_a_batch_that_cannot_be_made_ends_the_run_with_its_error_and_no_thread_is_left(world, tmp_path, monkeypatch):
    made = spy_on_batches(monkeypatch, spoiled=2)
    with pytest.raises(ArithmeticError, match="no such batch"):
        worlds.train(tmp_path / "run", *world.flags, "--config.log.every=1")
    assert [values["step"] for values in worlds.read_metrics(tmp_path / "run")] == [1, 2]
    assert not any(thread.is_alive() for _, thread in made if thread is not threading.main_thread())
