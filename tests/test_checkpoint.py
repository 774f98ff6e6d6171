"""Checkpoints of small states: which remain, what a failed save leaves, and that damage never becomes other numbers."""

import gc
import json
import math
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import checkpoint
from daajax.errors import UserError
from daajax.record import Record, check_origin, sha256
from daajax.step import TrainState

# What Orbax leaves unfinished where it cannot read or write: its own coroutines and threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

LOSS, ACCURACY = "eval/loss", "eval/rewards/accuracies"


def make_state(step):
    """A state of numbers that differ from each other and from those of other steps."""
    draw = np.random.default_rng(step).standard_normal
    params = {"a": jnp.float32(draw((200, 100))), "b": {"c": jnp.float32(draw((3, 2)))}}
    return TrainState(jnp.int32(step), params, ({"m": jnp.float32(draw(5)), "count": jnp.int32(step)},))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract(make_state(0))


def record(**metrics):
    return Record("data", "model", metrics={name.replace("_", "/"): value for name, value in metrics.items()})


def save(saved, *steps, wait=True, **metrics):
    for step in steps:
        saved.save(step, make_state(step), record(**metrics), wait=wait)


def same(found, expected):
    return all(
        a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.fixture
def collected():
    """What is left unfinished is heard of in the test that left it."""
    yield
    gc.collect()


@pytest.fixture
def saved(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    yield saved
    saved.close()


# ---------------------------------------------------------------------- there and back


def test_a_state_comes_back_bit_for_bit(saved):
    save(saved, 3)
    step, state = saved.restore_latest(ABSTRACT)
    assert step == 3
    assert same(state, make_state(3))
    assert same(saved.restore_parts(3, ABSTRACT._replace(optimizer=())).params, make_state(3).params)


def test_numbers_that_compare_unequal_to_themselves_come_back(saved):
    odd = TrainState(jnp.int32(1), {"a": jnp.array([-0.0, jnp.inf, jnp.nan, 1e-45])}, {"m": jnp.bfloat16([1, -2])})
    saved.save(1, odd, record(), wait=True)
    _, state = saved.restore_latest(abstract(odd))
    assert np.asarray(state.params["a"]).tobytes() == np.asarray(odd.params["a"]).tobytes()
    assert state.optimizer["m"].dtype == jnp.bfloat16


def test_the_record_says_what_was_saved(saved):
    saved.save(4, make_state(4), record(eval_loss=0.5), wait=True)
    found = saved.record(4)
    assert (found.data, found.model, dict(found.metrics)) == ("data", "model", {LOSS: 0.5})
    assert set(found.leaves) == {"params/a", "params/b/c", "optimizer/0/m", "optimizer/0/count"}
    assert found.leaves["params/b/c"].startswith("float32[3,2] ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s._replace(params={"a": s.params["a"]}), "params/b/c is float32[3,2], needed is nothing of that"),
        (
            lambda s: s._replace(params=s.params | {"d": s.params["a"]}),
            "params/d is not there, needed is float32[200,100]",
        ),
        (
            lambda s: s._replace(params=jax.tree.map(lambda x: jax.ShapeDtypeStruct((7,), x.dtype), s.params)),
            "params/a is float32[200,100], needed is float32[7]",
        ),
        (lambda s: s._replace(optimizer=()), "optimizer/0/count is int32[], needed is nothing of that name"),
    ],
    ids=["less", "more", "shape", "optimizer"],
)
def test_the_state_of_another_model_or_optimizer_is_refused(saved, change, says):
    save(saved, 1)
    with pytest.raises(UserError, match="is of another model or optimizer") as error:
        saved.restore_latest(change(ABSTRACT))
    assert says in str(error.value)


def test_another_optimizers_state_is_made_afresh_if_asked(saved, capsys):
    save(saved, 6)
    fresh = TrainState(jnp.int32(0), make_state(6).params, {"v": jnp.zeros(2)})
    step, state = saved.restore_latest(
        abstract(fresh), lambda params, updates, parts: fresh._replace(step=jnp.int32(updates), params=params)
    )
    assert step == 6
    assert same(state, fresh._replace(step=jnp.int32(6)))
    assert "the optimizer starts afresh from them" in capsys.readouterr().out


# ---------------------------------------------------------------------- which remain


@pytest.mark.parametrize(("keep", "expected"), [(1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
def test_the_latest_are_kept(tmp_path, keep, expected):
    saved = checkpoint.Checkpoints(tmp_path, keep=keep)
    assert saved.steps == []
    save(saved, 2, 4, 6, 8)
    saved.close()
    assert saved.steps == expected


@pytest.mark.parametrize(
    ("best", "values", "expected"),
    [
        (LOSS, [0.5, 0.3, 0.4, 0.6], [2, 4]),
        (LOSS, [0.5, 0.4, 0.3, 0.2], [4]),
        (LOSS, [0.1, 0.4, 0.3, 0.2], [1, 4]),
        (ACCURACY, [0.5, 0.9, 0.7, 0.6], [2, 4]),
        (ACCURACY, [0.5, 0.3, 0.4, 0.6], [4]),
        (LOSS, [0.5, math.nan, 0.6, 0.7], [1, 4]),  # a number that is none is never the best
        (LOSS, [math.nan, 0.5, math.inf, 0.7], [2, 4]),
        (ACCURACY, [math.nan, 0.5, math.nan, 0.2], [2, 4]),
        (LOSS, [None, 0.5, None, 0.7], [2, 4]),  # nor is an evaluation that failed
        (ACCURACY, [None, 0.5, None, 0.2], [2, 4]),
        (ACCURACY, [0.0, None, None, None], [1, 4]),
        (LOSS, [None, None, math.nan, None], [4]),
    ],
)
def test_the_best_one_is_kept_besides_the_latest(tmp_path, best, values, expected):
    saved = checkpoint.Checkpoints(tmp_path, keep=1, best=best)
    for step, value in enumerate(values, 1):
        metrics = {} if value is None else {best: value, "eval/other": -float(step)}
        saved.save(step, make_state(step), Record("data", "model", metrics=metrics), wait=True)
    saved.close()
    assert saved.steps == expected
    finite = [step for step in expected if values[step - 1] is not None and math.isfinite(values[step - 1])]
    # What is kept for being the best is the first of two, unless the latest is itself.
    assert saved.best_step() == (finite[0] if finite else None)
    assert checkpoint.Checkpoints(tmp_path, best=best).best_step() == saved.best_step()
    assert checkpoint.Checkpoints(tmp_path).best_step() is None


def test_the_best_one_outlives_the_process_that_saved_it(tmp_path):
    for step, loss in enumerate((0.3, 0.5, 0.4), 1):
        saved = checkpoint.Checkpoints(tmp_path, keep=1, best=LOSS)
        saved.save(step, make_state(step), record(eval_loss=loss), wait=True)
        saved.close()
    assert saved.steps == [1, 3]


def test_a_best_one_with_a_damaged_record_hinders_no_save(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=1, best=LOSS)
    saved.save(1, make_state(1), record(eval_loss=0.1), wait=True)
    saved.close()
    (tmp_path / "checkpoints" / "1" / "record" / "metadata").write_text("{")
    saved = checkpoint.Checkpoints(tmp_path, keep=1, best=LOSS)
    saved.save(2, make_state(2), record(eval_loss=0.2), wait=True)
    assert saved.best_step() == 2
    saved.close()


def test_nothing_is_deleted_before_its_successor_is_whole(tmp_path, monkeypatch):
    """Whenever Orbax deletes a step, a later one is there, and it can be restored."""
    seen = []
    rmtree = shutil.rmtree

    def spy(path, *arguments, **options):
        step = pathlib.Path(path).name
        if step.isdecimal():
            reader = checkpoint.Checkpoints(tmp_path)
            later = [other for other in reader.steps if other > int(step)]
            seen.append((int(step), [same(reader.restore(other, ABSTRACT), make_state(other)) for other in later]))
        return rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", spy)
    saved = checkpoint.Checkpoints(tmp_path, keep=1)
    save(saved, 1, 2, 3, wait=False)
    saved.close()
    assert seen == [(1, [True]), (2, [True])]


def test_reading_touches_nothing_that_a_run_is_writing(tmp_path):
    """An evaluation or an export beside a run at work must not take its unfinished save for something left behind."""
    saved = checkpoint.Checkpoints(tmp_path)
    save(saved, 1)
    saved.close()
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = checkpoint.Checkpoints(tmp_path)
    assert same(reader.restore_parts(reader.choose(None), ABSTRACT._replace(optimizer=())).params, make_state(1).params)
    reader.close()
    assert unfinished.is_dir()


def test_what_an_interrupted_save_left_behind_is_removed_by_the_next(saved):
    save(saved, 1)
    saved.close()
    (saved.folder / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (saved.folder / "7.orbax-checkpoint-tmp-1234").mkdir()
    assert saved.restore_latest(ABSTRACT)[0] == 1
    save(saved, 2)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("steps", "asked", "expected"), [((2, 4), None, 4), ((2, 4), 2, 2), ((2, 4), 0, 0), ((), 0, 0)]
)
def test_a_command_may_name_a_checkpoint(tmp_path, steps, asked, expected):
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    assert checkpoint.Checkpoints(tmp_path).choose(asked) == expected


@pytest.mark.parametrize(
    ("steps", "asked", "says"),
    [
        ((2, 4), 3, "has no checkpoint of update 3; there are: 2, 4; --step=0 is the initial policy"),
        ((2, 4), -1, "has no checkpoint of update -1"),
        ((), None, "has no checkpoint; there are: none"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, steps, asked, says):
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    with pytest.raises(UserError, match=says):
        checkpoint.Checkpoints(tmp_path).choose(asked)


# ---------------------------------------------------------------------- saves that fail


@pytest.fixture
def full(monkeypatch):
    """A disk that refuses the saves whose number, counted from 1, is among those given."""
    import orbax.checkpoint as ocp

    real, calls = ocp.CheckpointManager.save, []

    def refuse(*numbers):
        def failing(self, step, *arguments, **options):
            calls.append(step)
            if len(calls) in numbers:
                (pathlib.Path(self.directory) / f"{step}.orbax-checkpoint-tmp").mkdir()
                raise OSError(28, "No space left on device")
            return real(self, step, *arguments, **options)

        monkeypatch.setattr(ocp.CheckpointManager, "save", failing)
        return calls

    return refuse


def test_a_failed_save_is_said_and_cleaned_up_and_the_next_one_succeeds(saved, full, capsys):
    calls = full(2, 3)
    save(saved, 1, 2, 3, 4)
    said = capsys.readouterr().out
    assert (
        "the checkpoint of update 2 could not be saved (OSError: [Errno 28] No space left on device); the run goes on"
        in said
    )
    assert sorted(path.name for path in saved.folder.iterdir()) == ["1", "4"]
    assert calls == [1, 2, 3, 4]


def test_a_run_ends_after_so_many_failures_in_a_row(saved, full):
    full(2, 3, 5, 6, 7)
    save(saved, 1, 2, 3, 4, 5, 6)
    with pytest.raises(UserError, match=r"of update 7 could not be saved .* 3 times in a row; make room") as error:
        save(saved, 7)
    assert "\n" not in str(error.value)
    assert saved.restore_latest(ABSTRACT)[0] == 4


@pytest.fixture
def small_files(collected):
    """No file of this process may grow beyond some bytes: what a full disk does to a save, in the background."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failure_in_the_background_is_heard_at_the_next_save_and_does_not_lose_that_one(saved, small_files, capsys):
    save(saved, 1)
    small_files(20_000)  # a state has 80 kB
    save(saved, 2, wait=False)
    while saved._opened.is_saving_in_progress():
        time.sleep(0.01)
    small_files(resource.RLIM_INFINITY)
    save(saved, 3)
    assert saved.steps == [1, 3]
    said = capsys.readouterr().out
    assert "the checkpoint of update 2 could not be saved (" in said
    assert "update 3" not in said
    assert same(saved.restore_latest(ABSTRACT)[1], make_state(3))


def test_failures_in_the_background_end_a_run_too(saved, small_files):
    save(saved, 1)
    small_files(20_000)
    with pytest.raises(UserError, match=r"update 4 could not be saved .*: 3 times in a row") as error:
        save(saved, 2, 3, 4, 5, wait=False)
    small_files(resource.RLIM_INFINITY)
    assert "\n" not in str(error.value)
    assert saved.steps == [1]
    assert [path.name for path in saved.folder.iterdir()] == ["1"]


# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    saved = checkpoint.Checkpoints(folder, keep=2)
    save(saved, 1, 2)
    saved.close()
    return folder


def files_of(two, step=2):
    root = two / "checkpoints" / str(step)
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def flip(path, place, bit=3):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def check_after_damage(folder, capsys):
    """The state is that of update 2, or update 2 was set aside, said, and the state is that of update 1."""
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    step, state = checkpoint.Checkpoints(folder).restore_latest(ABSTRACT)
    assert same(state, make_state(step))
    said = capsys.readouterr().out
    if step == 2:
        assert said == ""
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    else:
        assert step == 1
        assert said.startswith("checkpoint of update 2 is damaged (")
        assert said.endswith(f"): set aside as {folder / 'damaged-checkpoints' / '2'}\n")
        assert said.count("\n") == 1
        assert (folder / "damaged-checkpoints" / "2").is_dir()
        assert not (folder / "checkpoints" / "2").exists()
    return step


def test_no_flipped_bit_becomes_another_number(two, collected, tmp_path, capsys):
    random = np.random.default_rng(0)
    found = []
    for n, file in enumerate(files_of(two)):
        size = (two / "checkpoints" / "2" / file).stat().st_size
        for place in random.integers(size, size=6 if size > 1000 else 3).tolist():
            folder = tmp_path / f"{n}-{place}"
            shutil.copytree(two, folder, dirs_exist_ok=True)
            flip(folder / "checkpoints" / "2" / file, place)
            found.append((check_after_damage(folder, capsys), str(file)))
    noticed = {file for step, file in found if step == 1}
    # The arrays' own files lie in d/; the record is JSON. Both must be among those where a flip matters.
    assert any("params" in file and "/d/" in file for file in noticed)
    assert any("optimizer" in file and "/d/" in file for file in noticed)
    assert "record/metadata" in noticed


def test_every_flipped_bit_of_the_record_is_noticed_or_harmless(two, collected, tmp_path, capsys):
    size = (two / "checkpoints" / "2" / "record" / "metadata").stat().st_size
    for place in range(0, size, 23):
        folder = tmp_path / str(place)
        shutil.copytree(two, folder)
        flip(folder / "checkpoints" / "2" / "record" / "metadata", place, bit=place % 8)
        check_after_damage(folder, capsys)


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "empty", "deleted"])
def test_a_file_that_is_not_whole_sets_the_checkpoint_aside(two, collected, tmp_path, capsys, damage):
    steps = set()
    for n, file in enumerate(files_of(two)):
        folder = tmp_path / str(n)
        shutil.copytree(two, folder)
        path = folder / "checkpoints" / "2" / file
        content = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            whole = {"truncated": content[: len(content) // 2], "zeroed": bytes(len(content)), "empty": b""}
            path.write_bytes(whole[damage])
        steps.add(check_after_damage(folder, capsys))
    assert 1 in steps


@pytest.mark.parametrize("item", ["params", "optimizer", "record", "."])
def test_a_checkpoint_without_one_of_its_items_is_set_aside(two, collected, tmp_path, capsys, item):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / item)
    (tmp_path / "checkpoints" / "2").mkdir(exist_ok=True)
    assert check_after_damage(tmp_path, capsys) == 1


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "null", '"text"', '{"content": "{}", "sha256": ""}', '{"content": 3, "sha256": 4}'],
)
def test_a_record_of_another_form_is_damage(two, collected, tmp_path, capsys, content):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "2" / "record" / "metadata").write_text(content)
    assert check_after_damage(tmp_path, capsys) == 1


def test_a_record_with_another_digest_names_the_leaf(two, collected, tmp_path, capsys):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "2" / "record" / "metadata"
    stored = json.loads(path.read_text())
    content = json.loads(stored["content"])
    name, digest = "params/b/c", content["leaves"]["params/b/c"]
    content["leaves"][name] = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    text = json.dumps(content)
    path.write_text(json.dumps({"content": text, "sha256": sha256(text)}))
    step, _ = checkpoint.Checkpoints(tmp_path).restore_latest(ABSTRACT)
    assert step == 1
    assert "update 2 is damaged (params/b/c is not what was saved)" in capsys.readouterr().out


def test_an_empty_folder_is_no_checkpoint(two, collected, tmp_path, capsys):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "9").mkdir()
    saved = checkpoint.Checkpoints(tmp_path)
    assert saved.restore_latest(ABSTRACT)[0] == 2
    assert "update 9 is damaged" in capsys.readouterr().out
    save(saved, 9)  # the place is free
    assert same(saved.restore_latest(ABSTRACT)[1], make_state(9))
    saved.close()


def test_where_all_are_damaged_each_is_named_and_stays_where_it_is(two, collected, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "params")
    (tmp_path / "checkpoints" / "2" / "record" / "metadata").unlink()
    for _ in range(2):  # the same command again does not begin from update 1 either
        with pytest.raises(UserError, match=r"is damaged: update 2 \(.*\); update 1 \(.*\); name another") as error:
            checkpoint.Checkpoints(tmp_path).restore_latest(ABSTRACT)
        assert "\n" not in str(error.value)
        assert checkpoint.Checkpoints(tmp_path).steps == [1, 2]


def test_parameters_alone_are_checked_too(two, collected, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    large = max((tmp_path / "checkpoints" / "2" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(large, large.stat().st_size // 2)
    with pytest.raises(UserError, match=r"checkpoint .*/2 is damaged \(.*\); use another --step") as error:
        checkpoint.Checkpoints(tmp_path).restore_parts(2, ABSTRACT._replace(optimizer=()))
    assert "\n" not in str(error.value)
    assert same(
        checkpoint.Checkpoints(tmp_path).restore_parts(1, ABSTRACT._replace(optimizer=())).params, make_state(1).params
    )


# ---------------------------------------------------------------------- origin


@pytest.mark.parametrize(
    ("data", "model", "says"),
    [("other", "model", "the data changed"), ("data", "other", "the weights of the model changed")],
)
def test_other_data_or_weights_are_refused_unless_forced(capsys, data, model, says):
    now = Record(data, model)
    with pytest.raises(UserError, match=rf"{says} since .* go on all the same with --config.resume=force"):
        check_origin(record(), now, forced=False)
    check_origin(record(), now, forced=True)
    assert says in capsys.readouterr().out


def test_weights_that_nobody_asked_for_are_not_compared(capsys):
    check_origin(record(), Record("data", ""), forced=False)
    check_origin(Record("data", ""), record(), forced=False)
    assert capsys.readouterr().out == ""
