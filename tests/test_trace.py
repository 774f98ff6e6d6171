"""Traces: of the updates that are asked for, in a run that goes on too, and of none beyond its end."""

import gzip
import json
import pathlib
import re
import shutil

import jax
import pytest

from daajax import bucket as buckets
from daajax import command
from daajax.errors import UserError
from daajax.trace import ANNOTATION, Trace
from tests import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def annotated(folder):
    """Numbers of the updates in the traces below a folder."""
    found = []
    for file in sorted(folder.rglob("*.trace.json.gz")):
        for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
            if event.get("name") == ANNOTATION:
                found.append(int(event["args"]["step_num"]))
    return sorted(found)


@pytest.mark.slow
def test_the_updates_that_are_asked_for_are_traced(world, tmp_path, capsys):
    workdir = tmp_path / "run"
    worlds.train(workdir, *world.flags, "--config.profile.start=2", "--config.profile.steps=3")
    assert annotated(workdir / "profile") == [2, 3, 4]
    assert list((workdir / "profile").rglob("*.trace.json.gz"))
    assert f"profile: updates 2 to 4 are in {workdir / 'profile'}: pip install xprof" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_goes_on_is_traced_from_where_it_is(world, tmp_path, capsys):
    workdir, flags = tmp_path / "run", [*world.flags, "--config.optimizer.schedule=constant"]
    worlds.train(workdir, *flags, "--config.steps=2")
    profile = ["--config.profile.start=2", "--config.profile.steps=2"]
    worlds.train(workdir, *flags, "--config.steps=4", *profile)
    assert annotated(workdir / "profile") == [3]
    assert "profile: asked for updates 2 to 3; after update 2 there is left: update 3\n" in capsys.readouterr().out


def test_beyond_the_end_of_the_run_nothing_can_be_traced(world, tmp_path):
    flags = ["--config.profile.start=4", "--config.profile.steps=3"]
    with pytest.raises(
        UserError, match=r"profile\.start=4 with profile\.steps=3 reaches update 6 but the run ends at 5"
    ):
        worlds.train(tmp_path / "run", *world.flags, *flags)
    assert not (tmp_path / "run").exists()


def test_a_number_of_updates_without_the_first_is_refused(world):
    with pytest.raises(UserError, match=r"config\.profile\.steps=5 but config\.profile\.start is not set"):
        command.parse(["train", f"--config={worlds.STORIES}", *world.flags, "--config.profile.steps=5"], "train")


def test_where_none_is_asked_for_nothing_happens(tmp_path):
    trace = Trace(tmp_path / "profile", first=None, steps=3, updates=1)
    trace.begin(0)
    for number in (1, 2):
        with trace.update(number):
            pass
        trace.after(number, jax.numpy.zeros(()))
    trace.close(keep=False)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_a_trace_that_an_error_cuts_short_ends(tmp_path, keep):
    trace = Trace(tmp_path / "profile", first=1, steps=3, updates=3)
    with trace.update(1):
        pass
    trace.close(keep=keep)
    assert (tmp_path / "profile").exists() == keep
    with trace.update(1):  # another one can begin
        pass
    trace.close(keep=False)


def test_a_trace_that_a_bucket_refuses_is_where_it_is_said_to_be(bucket, capsys):
    trace = Trace(buckets.BucketPath("gs://bucket/run/profile"), first=1, steps=1, updates=1)
    bucket.read_only = True
    with trace.update(1):
        pass
    trace.after(1, jax.numpy.zeros(()))
    said = re.search(r"profile: update 1 are in (\S+): pip install", capsys.readouterr().out)
    assert said is not None
    assert list(pathlib.Path(said[1]).rglob("*.xplane.pb"))
    shutil.rmtree(said[1])


def test_what_was_all_done_before_is_said(tmp_path, capsys):
    Trace(tmp_path, first=1, steps=1, updates=3).begin(2)
    assert capsys.readouterr().out == "profile: asked for update 1; after update 2 there is left: none\n"
