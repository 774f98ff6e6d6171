"""The reference pass as its own command."""

import pytest

from daajax import reference
from daajax.errors import UserError
from tests import worlds


@pytest.fixture
def world(tmp_path):
    return worlds.make_world(tmp_path, count=16)


def test_after_precompute_a_run_scores_nothing(world, capsys, monkeypatch):
    flags = [*world.flags, "--config.steps=2"]
    worlds.precompute(*flags)
    said = capsys.readouterr().out
    assert "0 of 16 examples in the cache" in said
    assert "the reference cache has everything this run reads" in said.splitlines()[-1]
    monkeypatch.setattr(reference, "score_pass", None)  # calling it would be a TypeError
    history = worlds.train(world.folder / "run", *flags)
    assert "16 of 16 examples in the cache" in capsys.readouterr().out
    assert history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_precompute_scores_what_the_run_reads_and_no_more(world, capsys):
    worlds.precompute(*world.flags, "--config.steps=1")
    assert "0 of 8 examples" in capsys.readouterr().out
    worlds.precompute(*world.flags, "--config.steps=2")
    assert "8 of 16 examples" in capsys.readouterr().out


def test_the_process_makes_no_folder_of_a_run(world):
    arguments = (f"--config={worlds.STORIES}", *world.flags, "--config.steps=2")
    result = worlds.command("precompute", *arguments, cwd=world.folder, JAX_NUM_CPU_DEVICES="1")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in world.folder.iterdir()) == ["model", "pairs.jsonl", "reference", "tokens"]


def test_a_run_that_reads_no_reference_is_refused(world):
    with pytest.raises(UserError, match=r"config.reference.mode='none': .* nothing to precompute"):
        worlds.precompute(*world.flags, "--config.loss={'name':'simpo'}", "--config.reference.mode=none")
    assert not (world.folder / "reference").exists()


def test_an_interrupted_pass_keeps_what_it_saved(world, monkeypatch, capsys):
    monkeypatch.setattr(reference, "_SAVE_SECONDS", 0.0)  # after every batch
    append, calls = reference.Cache.append, []

    def interrupted(cache, entries):
        append(cache, entries)
        calls.append(len(entries))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(reference.Cache, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worlds.precompute(*world.flags, "--config.steps=2")
    monkeypatch.setattr(reference.Cache, "append", append)
    capsys.readouterr()
    worlds.precompute(*world.flags, "--config.steps=2")
    assert "8 of 16 examples in the cache" in capsys.readouterr().out
