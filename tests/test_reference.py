"""The reference cache: what it depends on, what it does not, and that nothing damaged is ever used."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from daajax import reference
from daajax.errors import UserError
from tests import worlds

HEADER = reference.Header("weights", {"hidden_size": 8}, "float32")
ENTRIES = {bytes([n]) * 16: {"logps": np.linspace(-3, -1, n + 1, dtype=np.float32)} for n in range(4)}


@pytest.fixture
def cache(tmp_path):
    """Opens the cache of one reference afresh."""
    return lambda header=HEADER: reference.Cache(str(tmp_path), header)


def part(cache):
    """Its one file of entries."""
    (file,) = cache.folder.glob("part-*.parquet")
    return file


def found(cache):
    return {key: cache.get(key, len(entry["logps"])) for key, entry in ENTRIES.items()}


def test_entries_come_back_bit_for_bit(cache):
    cache().append(ENTRIES)
    for key, values in found(cache()).items():
        np.testing.assert_array_equal(values["logps"], ENTRIES[key]["logps"], strict=True)


def test_an_entry_of_another_length_is_none(cache):
    cache().append(ENTRIES)
    assert cache().get(bytes([2]) * 16, 2) is None
    assert cache().get(bytes([9]) * 16, 1) is None


def test_files_add_up(cache):
    keys = list(ENTRIES)
    for key in keys:
        cache().append({key: ENTRIES[key]})
    assert all(values is not None for values in found(cache()).values())
    cache().append({})
    assert len(list(cache().folder.glob("part-*"))) == len(keys)


def test_a_further_column_is_added_and_changes_no_number(cache, tmp_path):
    cache().append(ENTRIES)
    wider = reference.Cache(str(tmp_path), HEADER, ("logps", "entropies"))
    assert all(wider.get(key, len(entry["logps"])) is None for key, entry in ENTRIES.items())
    again = {key: {"logps": entry["logps"] + 1, "entropies": -entry["logps"]} for key, entry in ENTRIES.items()}
    wider.append(again)
    for opened in (wider, reference.Cache(str(tmp_path), HEADER, ("logps", "entropies"))):
        for key, entry in ENTRIES.items():
            values = opened.get(key, len(entry["logps"]))
            np.testing.assert_array_equal(values["logps"], entry["logps"], strict=True)
            np.testing.assert_array_equal(values["entropies"], -entry["logps"], strict=True)
    assert all(set(values) == {"logps"} for values in found(cache()).values())


@pytest.mark.parametrize(
    "header",
    [
        reference.Header("others", {"hidden_size": 8}, "float32"),
        reference.Header("weights", {"hidden_size": 9}, "float32"),
        reference.Header("weights", {"hidden_size": 8}, "bfloat16"),
    ],
    ids=["weights", "architecture", "dtype"],
)
def test_another_reference_has_another_folder(cache, header):
    cache().append(ENTRIES)
    other = cache(header)
    assert other.folder != cache().folder
    assert set(found(other).values()) == {None}


def test_another_format_has_another_folder(cache, monkeypatch):
    cache().append(ENTRIES)
    monkeypatch.setattr(reference, "FORMAT", reference.FORMAT + 1)
    assert set(found(cache()).values()) == {None}


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def values_at(content):
    """Where the log-probs of the longest entry lie in a file."""
    return content.index(ENTRIES[bytes([3]) * 16]["logps"].tobytes())


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-1],
    "without its beginning": lambda content: content[1:],
    "another log-prob": lambda content: flip(content, values_at(content) + 2),
    "not Parquet": lambda content: b"PAR1 nothing PAR1",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_and_named(cache, damage):
    first = cache()
    first.append(ENTRIES)
    file = part(first)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    second = cache()
    assert set(map(type, found(second).values())) == {type(None)}
    (notice,) = second.notices
    assert f"{file} is damaged" in notice
    assert "\n" not in notice
    assert not file.exists()
    assert file.with_suffix(".damaged").exists()
    assert cache().notices == []  # said once


def test_no_flipped_bit_changes_what_is_read(cache):
    first = cache()
    first.append(ENTRIES)
    file = part(first)
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(flip(whole, place))
        again = cache()
        for key, values in found(again).items():
            assert values is None or (values["logps"] == ENTRIES[key]["logps"]).all(), f"byte {place}"
        for aside in again.folder.glob("*.damaged"):
            aside.unlink()


def test_a_damaged_file_does_not_take_the_others_along(cache):
    one, two = list(ENTRIES)[:2]
    cache().append({one: ENTRIES[one]})
    file = part(cache())
    cache().append({two: ENTRIES[two]})
    file.write_bytes(b"")
    assert cache().get(one, 1) is None
    np.testing.assert_array_equal(cache().get(two, 2)["logps"], ENTRIES[two]["logps"])


def test_a_file_of_another_reference_is_never_used(cache):
    foreign = cache(reference.Header("others", {}, "float32"))
    foreign.append(ENTRIES)
    file = part(foreign)
    file.rename(cache().folder / file.name)
    second = cache()
    assert set(found(second).values()) == {None}
    assert "written for another reference" in second.notices[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_never_used(cache, value):
    cache().append({bytes(16): {"logps": np.array([-1, value], np.float32)}})
    second = cache()
    assert second.get(bytes(16), 2) is None
    assert "not finite" in second.notices[0]


def test_a_scratch_file_of_an_interrupted_write_is_not_an_entry(cache):
    first = cache()
    first.append(ENTRIES)
    part(first).rename(part(first).with_suffix(".tmp"))
    assert set(found(cache()).values()) == {None}
    assert cache().notices == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(cache, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match=r"reference cache .* cannot be written .*make room or name another folder"):
        cache().append(ENTRIES)
    assert [path.name for path in cache().folder.iterdir()] == ["header.json"]


def test_a_file_in_the_way_of_the_cache_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"reference.cache_dir=.* cannot be written .*name another folder"):
        reference.Cache(str(tmp_path / "file"), HEADER)


# ---------------------------------------------------------------------- through the front door


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = worlds.make_world(tmp_path_factory.mktemp("world"))
    worlds.precompute(*world.flags)
    return world


@pytest.fixture
def scored(monkeypatch):
    """Counts what reference passes score: examples, over all passes."""
    counts = []
    score_pass = reference.score_pass

    def counted(data, plan, *arguments, **options):
        counts.append(len(reference.examples_of(plan)))
        return score_pass(data, plan, *arguments, **options)

    monkeypatch.setattr(reference, "score_pass", counted)
    return counts


@pytest.mark.parametrize(
    "overrides",
    [
        ("--config.loss={'name':'ipo','beta':0.3}",),
        ("--config.loss.beta=0.5",),
        ("--config.loss.label_smoothing=0.1",),
        ("--config.extra_losses=({'name':'sft','weight':0.2},)",),
        ("--config.optimizer.learning_rate=1e-6",),
        ("--config.batch_size=4",),
        ("--config.batch_size=20", "--config.steps=2"),
        ("--config.micro_batches=2",),
        ("--config.packing.enabled=False",),
        ("--config.packing.prefix_sharing=False",),
        ("--config.packing.row_length=1024",),
        ("--config.data.shuffle=True", "--config.seed=7"),
        ("--config.data.cache_dir=None",),
        ("--config.attention=dense",),
        ("--config.remat=full",),
        ("--config.model.param_dtype=float32",),
        ("--config.steps=1",),
    ],
    ids=lambda value: value[0].removeprefix("--config."),
)
def test_what_a_sweep_changes_scores_nothing_again(world, scored, overrides):
    worlds.precompute(*world.flags, *overrides)
    assert scored == []


def test_another_mesh_scores_nothing_again(world, scored):
    worlds.precompute(*world.flags, "--config.mesh.fsdp=4", "--config.mesh.tensor=2", devices=8)
    assert scored == []


def test_other_files_of_the_same_weights_score_nothing_again(world, scored, tmp_path):
    # Two shards instead of one file, in another folder.
    model = worlds.make_model(tmp_path / "model", files=2)
    worlds.precompute(*world.flags, f"--config.model.path={model}")
    assert scored == []


@pytest.mark.parametrize("change", ["one bit", "dtype", "architecture"])
def test_another_reference_is_scored(world, scored, tmp_path, change):
    flags, changes = [*world.flags], {"rope_theta": 20000.0} if change == "architecture" else {}
    model = worlds.make_model(tmp_path / "model", **changes)
    if change == "one bit":
        values = worlds.load_tensors(model)
        values["model.layers.1.mlp.up_proj.weight"].view(np.uint32)[5, 3] ^= 1
        worlds.save_tensors(model, values)
    if change == "dtype":
        flags.append("--config.model.dtype=bfloat16")
    worlds.precompute(*flags, f"--config.model.path={model}")
    assert scored == [40]


def test_only_responses_that_are_new_are_scored(world, scored, tmp_path):
    rows = worlds.pairs(40)
    rows[3]["chosen"] += " cat"
    rows[7]["prompt"] = "the " + rows[7]["prompt"]
    rows[9]["weight"] = 2.0  # not part of a response
    data = worlds.write_rows(tmp_path / "pairs.jsonl", rows)
    worlds.precompute(*world.flags, f"--config.data.path={data}", "--config.batch_size=2", "--config.steps=20")
    assert scored == [2]


def test_limits_that_cut_no_token_score_nothing_and_others_score_what_they_cut(world, scored):
    worlds.precompute(*world.flags, "--config.max_length=127")
    assert scored == []
    worlds.precompute(*world.flags, "--config.max_length=64", "--config.max_prompt_length=6")
    (count,) = scored
    assert 0 < count <= 40


def logps(world, *overrides, devices=1):
    """What a run reads of its reference: one number a token."""
    from daajax import inputs, policy, run, sharding
    from daajax.config import losses
    from daajax.losses.terms import bind
    from daajax.models.families import read_architecture

    with worlds.visible(devices):
        config, _ = worlds.parse(*world.flags, *overrides)
        architecture = read_architecture(config.model.path)
        mesh = sharding.make_mesh(config.mesh.to_dict())
        terms = bind(losses(config))
        data = inputs.load_data(config, config.data, architecture, terms)
        plan = inputs.make_plan(config, data, mesh)
        scorer = policy.make_scorer(config, architecture, mesh)
        params = policy.load_params(config.model.path, scorer, mesh)
        return run.load_reference(config, [(data, plan)], scorer, scorer, params, terms, mesh).columns[0]["logps"]


def test_what_the_cache_gives_is_what_was_scored_bit_for_bit(world, tmp_path):
    elsewhere = f"--config.reference.cache_dir={tmp_path}"
    fresh, cached = logps(world, elsewhere), logps(world, elsewhere)
    np.testing.assert_array_equal(fresh, cached, strict=True)
    assert np.isfinite(fresh).any()


def test_layouts_score_alike(world, tmp_path):
    plain = logps(world)
    others = {
        "unpacked": ("--config.packing.enabled=False", "--config.packing.prefix_sharing=False"),
        "dense": ("--config.attention=dense",),
    }
    for name, overrides in others.items():
        other = logps(world, *overrides, f"--config.reference.cache_dir={tmp_path / name}")
        np.testing.assert_allclose(other, plain, atol=2e-5)  # float32, logits of some 10
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", f"--config.reference.cache_dir={tmp_path / 'mesh'}")
    np.testing.assert_allclose(logps(world, *mesh, devices=8), plain, atol=2e-5)


@pytest.mark.parametrize("damage", ["truncated", "another log-prob"])
def test_a_run_notices_a_damaged_cache_says_so_and_scores_again(world, scored, tmp_path, capsys, damage):
    elsewhere = f"--config.reference.cache_dir={tmp_path}"
    whole = logps(world, elsewhere)
    (file,) = tmp_path.rglob("part-*.parquet")
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-100])
    else:
        column = pq.read_table(file).column("logps").combine_chunks()
        file.write_bytes(flip(content, content.index(np.asarray(column.values)[:8].tobytes()) + 6))
    assert scored == [40]
    again = logps(world, elsewhere)
    assert scored == [40, 40]
    assert f"{file} is damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(again, whole)


# ---------------------------------------------------------------------- modes


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def spied(monkeypatch):
    """Bytes on the device before the reference is loaded, while it is scored, and after."""
    from daajax import run

    sizes = {}
    load, score_pass = run.load_reference, reference.score_pass

    def load_reference(*arguments):
        sizes["before"] = live_bytes()
        loaded = load(*arguments)
        sizes["after"] = live_bytes()
        return loaded

    def scoring(*arguments, **options):
        sizes["during"] = live_bytes()
        return score_pass(*arguments, **options)

    monkeypatch.setattr(run, "load_reference", load_reference)
    monkeypatch.setattr(reference, "score_pass", scoring)
    return sizes


def test_another_model_is_a_reference_whose_weights_are_gone_before_training(world, tmp_path, capsys, spied):
    other = worlds.make_model(tmp_path / "other", seed=1)
    size = sum(values.nbytes for values in worlds.load_tensors(other).values())
    path = ("--config.reference.mode=path", f"--config.reference.path={other}", "--config.steps=1")
    history = worlds.train(tmp_path / "run", *world.flags, *path)
    assert spied["during"] - spied["before"] >= size
    assert spied["after"] - spied["before"] < size / 100
    assert abs(history[0]["loss"] - np.log(2)) > 1e-3
    assert history[0]["log_ratios/largest"] > 0.1
    assert f"first loss: not checked, the reference, {other}, is not the initial policy" in capsys.readouterr().out


def test_a_copy_of_the_policy_is_recognised_and_checked(world, tmp_path, capsys, scored):
    copy = worlds.make_model(tmp_path / "copy")
    path = ("--config.reference.mode=path", f"--config.reference.path={copy}", "--config.steps=1")
    history = worlds.train(tmp_path / "run", *world.flags, *path)
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert "first loss: 0.6931" in capsys.readouterr().out
    assert scored == []  # the same weights, so the same entries


def test_without_a_reference_nothing_is_scored_and_nothing_cached(world, tmp_path, scored):
    simpo = ("--config.loss={'name':'simpo'}", "--config.reference.mode=none", "--config.steps=1")
    worlds.train(tmp_path / "run", *world.flags, *simpo, f"--config.reference.cache_dir={tmp_path / 'cache'}")
    assert scored == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_fresh_weights_are_a_reference_like_any_other(world, tmp_path, scored):
    fresh = ("--config.model.random_init=True", "--config.steps=1")
    runs = [
        worlds.train(tmp_path / str(place), *world.flags, *fresh, f"--config.seed={seed}")
        for place, seed in enumerate((0, 0, 1))
    ]
    assert [history[0]["loss"] for history in runs] == pytest.approx([np.log(2)] * 3, abs=1e-5)
    assert scored == [8, 8]  # seed 0 once, seed 1
    assert runs[0][0]["logps/chosen"] == runs[1][0]["logps/chosen"] != runs[2][0]["logps/chosen"]


def test_the_header_is_readable(world):
    headers = [json.loads(file.read_text()) for file in (world.folder / "reference").glob("*/header.json")]
    assert {header["dtype"] for header in headers} <= {"float32", "bfloat16"}
    assert {header["architecture"]["hidden_size"] for header in headers} == {32}
