"""A run's folder: what may go on there, what is refused and named, who is at work, and what damage is survived."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from configs import base
from daajax import folder
from daajax.errors import UserError
from tests import worlds


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


LEAVES = sorted(leaves(base.get_config().to_dict()))
FREE = [name for name in LEAVES if folder._is_among(name, folder.MAY_CHANGE)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def options(world):
    return worlds.parse(*world.flags)[0]


@pytest.fixture
def begun(options, tmp_path):
    """The folder of a run that was interrupted."""
    begin(tmp_path / "run", options)
    return tmp_path / "run"


def change(where, name):
    """Puts another value of the option's type into a folder's config.json."""
    stored = json.loads((where / "config.json").read_text())
    place, defaults = stored, base.get_config()
    *parts, last = name.split(".")
    for part in parts:
        place, defaults = place[part], defaults[part]
    others = {str: "another", int: 987, float: 0.987, tuple: ["another"], bool: not place[last]}
    place[last] = others[defaults.get_type(last)]
    (where / "config.json").write_text(json.dumps(stored))


def finish(where, updates):
    (where / "model").mkdir()
    folder.finish(where, updates)


def state(where, options):
    with folder.claimed(where, options) as found:
        return found


def begin(where, options, updates=0):
    with folder.claimed(where, options):
        folder.begin(where, options, updates=updates)


# ---------------------------------------------------------------------- what may change


def test_what_may_change_is_among_the_options():
    assert all(any(folder._is_among(leaf, (name,)) for leaf in LEAVES) for name in folder.MAY_CHANGE)


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_is_either_free_or_refused(begun, options, capsys, name):
    change(begun, name)
    if name in FREE:
        assert state(begun, options) == "unfinished"
        assert re.fullmatch(rf"config: {name} was .*, is .*\n", capsys.readouterr().out)
        return
    with pytest.raises(UserError, match=rf"holds a run of another config: {name} was .*, is .*; name another folder"):
        folder.examine(begun, options)


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in FREE])
def test_what_is_refused_can_be_forced(begun, world, capsys, name):
    change(begun, name)
    assert state(begun, worlds.parse(*world.flags, "--config.resume=force")[0]) == "unfinished"
    assert re.search(rf"config: {name} was .* \(forced\)", capsys.readouterr().out)


def test_a_hyper_parameter_that_was_not_there_then_had_todays_default(begun, options):
    stored = json.loads((begun / "config.json").read_text())
    del stored["loss"]["label_smoothing"]
    (begun / "config.json").write_text(json.dumps(stored))
    assert state(begun, options) == "unfinished"


@pytest.mark.parametrize("name", LEAVES)
def test_a_finished_run_is_unfinished_only_if_its_length_changes(begun, options, capsys, name):
    finish(begun, 5)
    assert folder.examine(begun, options) == "finished"
    change(begun, name)
    if name in FREE:
        expected = "unfinished" if name in ("steps", "epochs") else "finished"
        assert state(begun, options) == expected
        assert ("this does nothing, the run is finished" in capsys.readouterr().out) == (expected == "finished")


@pytest.mark.parametrize("finished", [False, True])
def test_never_goes_on_with_nothing(begun, world, finished):
    if finished:
        finish(begun, 5)
    with pytest.raises(UserError, match="resume='never' goes on with none; name another folder"):
        folder.examine(begun, worlds.parse(*world.flags, "--config.resume=never")[0])


@pytest.mark.parametrize("name", ["checkpoint", "data", "resume", "seed"])
def test_an_option_that_the_runs_version_did_not_have_had_its_default(begun, options, name):
    stored = json.loads((begun / "config.json").read_text())
    if name == "data":
        del stored["data"]["max_bad_rows"], stored["data"]["truncation"]
    else:
        del stored[name]
    (begun / "config.json").write_text(json.dumps(stored))
    assert folder.examine(begun, options) == "unfinished"


def test_an_option_of_a_later_version_is_a_difference(begun, options):
    stored = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps(stored | {"new": 1}))
    with pytest.raises(UserError, match="new was 1, is null"):
        folder.examine(begun, options)


def test_differences_of_two_configs_are_named_option_by_option():
    before = {"seed": 0, "loss": {"name": "dpo", "beta": 0.1}, "optimizer": {"learning_rate": 1e-6}}
    now = {"seed": 0, "loss": {"name": "simpo", "gamma": 1.0}, "optimizer": {"learning_rate": 2e-6}}
    assert list(folder.differences(before, now)) == [
        ("loss.beta", "loss.beta was 0.1, is null"),
        ("loss.gamma", "loss.gamma was null, is 1.0"),
        ("loss.name", 'loss.name was "dpo", is "simpo"'),
        ("optimizer.learning_rate", "optimizer.learning_rate was 1e-06, is 2e-06"),
    ]
    assert list(folder.differences(now, now)) == []


def test_the_first_few_differences_to_a_folders_run_are_named(world, tmp_path):
    begin(tmp_path, worlds.parse(*world.flags)[0])
    changes = ["seed=1", "steps=6", "optimizer.learning_rate=2e-3", "batch_size=9", "max_length=99"]
    with pytest.raises(UserError) as error:
        folder.examine(tmp_path, worlds.parse(*world.flags, *(f"--config.{change}" for change in changes))[0])
    assert str(error.value) == (
        f"--workdir={tmp_path} holds a run of another config: batch_size was 8, is 9; max_length was 128, is 99; "
        "optimizer.learning_rate was 0.001, is 0.002 and 1 more; name another folder, or go on all the same with "
        "--config.resume=force."
    )


def test_a_config_that_cannot_be_written_whole_is_not_there(world, tmp_path, monkeypatch):
    options, _ = worlds.parse(*world.flags)

    def full(path, text, **_):
        with path.open("w") as file:
            file.write(text[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(UserError, match="No space left on device"):
            begin(tmp_path, options)
    assert not (tmp_path / "config.json").exists()
    assert folder.examine(tmp_path, options) == "new"
    begin(tmp_path, options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json", "metrics.jsonl"]


# ---------------------------------------------------------------------- who is at work


def test_a_second_run_is_refused_and_told_who_is_at_work(begun, options):
    with folder.claimed(begun, options):
        line = rf"another run is at work there \(process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d .*\); wait for it"
        with pytest.raises(UserError, match=line):
            begin(begun, options)
    with folder.claimed(begun, options) as found:
        assert found == "unfinished"


def test_two_new_runs_never_share_a_folder(options, tmp_path):
    with folder.claimed(tmp_path / "new", options) as found:
        assert found == "new"
        with pytest.raises(UserError, match="another run is at work there"):
            begin(tmp_path / "new", options)
    assert not (tmp_path / "new").exists()  # nothing was begun, nothing is left


def test_a_run_that_finished_meanwhile_is_seen(begun, options, monkeypatch):
    """Another run may finish between the first look at the folder and the lock."""
    found = ["unfinished", "finished"]
    monkeypatch.setattr(folder, "examine", lambda where, config: found.pop(0))
    with folder.claimed(begun, options) as state:
        assert state == "finished"


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, MemoryError])
def test_a_run_that_ends_lets_go_of_its_folder(begun, options, error):
    def end():
        with folder.claimed(begun, options):
            raise error

    with pytest.raises(error):
        end()
    assert folder.examine(begun, options) == "unfinished"


def test_a_process_that_is_killed_lets_go_of_its_folder(begun, options):
    program = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write('process 1 on another machine'); file.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(begun / ".lock")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert "another machine" in (begun / ".lock").read_text()
    assert folder.examine(begun, options) == "unfinished"


# ---------------------------------------------------------------------- what cannot be written


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(begun, options, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--workdir=.* cannot be written; make it writable"):
        folder.examine(begun, options)


@pytest.mark.parametrize("below", ["new", "new/deeper/still", "."])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(options, tmp_path, monkeypatch, below):
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path).resolve() != tmp_path)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))} cannot be written; name another folder"):
        folder.examine(tmp_path / below, options)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_may_be_read_only(begun, options, monkeypatch):
    finish(begun, 5)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert folder.examine(begun, options) == "finished"


def test_a_lock_that_cannot_be_taken_is_one_line(begun, options):
    (begun / ".lock").unlink()
    (begun / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be written \(Is a directory\)"):
        begin(begun, options)


# ---------------------------------------------------------------------- what is foreign or damaged


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"3", b'"text"', b"\xff\xfe", b'{"seed": 0'])
def test_a_damaged_config_is_one_line(begun, options, content):
    (begun / "config.json").write_bytes(content)
    for act in (lambda: folder.examine(begun, options), lambda: folder.read_config(begun)):
        with pytest.raises(UserError, match=r"config\.json is damaged; name another --workdir, or remove the folder"):
            act()


def test_a_foreign_folder_is_refused(options, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for act in (lambda: folder.examine(tmp_path, options), lambda: folder.read_config(tmp_path)):
        with pytest.raises(UserError, match=r"exists and is not a run's folder; name another one"):
            act()


def test_a_run_is_read_from_a_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder; name that of a run"):
        folder.read_config(tmp_path / "nope")


@pytest.mark.parametrize(
    ("content", "updates", "expected"),
    [
        (b'{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2, b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2}\n{"ste', 2, b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2}', 2, b'{"step": 1}\n'),  # its end is not there: more may be lacking
        (b'{"step": 1}\nrubbish\n{"step": null}\n[]\n3\n{}\n{"step": 2}\n', 2, b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n\x00\x00\x00\n{"step": 2}\n', 2, b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n\xff\xfe{"step": 1}\n{"step": 2}\n', 2, b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1, "loss": NaN}\n{"step": NaN}\n', 1, b'{"step": 1, "loss": NaN}\n'),
        (b'{"step": 1}\n', 0, b""),
        (None, 3, b""),
    ],
)
def test_only_whole_lines_of_updates_that_are_done_remain(begun, options, content, updates, expected):
    (begun / "metrics.jsonl").unlink()
    if content is not None:
        (begun / "metrics.jsonl").write_bytes(content)
    begin(begun, options, updates)
    assert (begun / "metrics.jsonl").read_bytes() == expected


@pytest.mark.parametrize(("updates", "there"), [(0, False), (2, True)])
def test_events_of_a_run_that_begins_again_are_void(begun, options, updates, there):
    (begun / "tensorboard").mkdir()
    begin(begun, options, updates)
    assert (begun / "tensorboard").is_dir() == there


def test_a_run_that_goes_on_is_not_finished(begun, options):
    finish(begun, 3)
    folder.begin(begun, options, updates=3)
    assert not (begun / "finished").exists()
