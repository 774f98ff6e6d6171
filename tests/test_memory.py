"""Memory: what is free is read where the system says it, and what will not fit is refused before it runs."""

import types

import jax
import pytest

from daajax import memory
from daajax.errors import UserError
from tests import worlds

GIB = 2**30
MEMINFO = ["MemTotal:       32768000 kB", "MemFree:         1000000 kB", "MemAvailable:    2097152 kB", "Buffers: 7 kB"]
STAT = ["anon 5", "inactive_file 1073741824", "active_file 77", "inactive_file_not 3"]


@pytest.fixture
def system(monkeypatch):
    """A system whose files are those given."""

    def pretend(**files):
        monkeypatch.setattr(memory, "_lines", lambda path: files.get(path.rpartition("/")[2].replace(".", "_"), []))

    return pretend


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"meminfo": MEMINFO}, 2 * GIB),
        ({"meminfo": MEMINFO, "memory_max": ["max"], "memory_current": ["5"]}, 2 * GIB),
        ({"meminfo": MEMINFO, "memory_max": [str(3 * GIB)], "memory_current": [str(2 * GIB)]}, 1 * GIB),
        # Pages of files that were read once can be dropped at any time.
        (
            {
                "meminfo": MEMINFO,
                "memory_max": [str(3 * GIB)],
                "memory_current": [str(5 * GIB // 2)],
                "memory_stat": STAT,
            },
            3 * GIB // 2,
        ),
        ({"meminfo": MEMINFO, "memory_max": [str(99 * GIB)], "memory_current": ["0"]}, 2 * GIB),
        ({"memory_max": [str(3 * GIB)], "memory_current": [str(GIB)]}, 2 * GIB),
        ({"meminfo": MEMINFO, "memory_max": [str(3 * GIB)]}, 2 * GIB),
        ({"meminfo": MEMINFO[:2]}, None),
        ({}, None),
    ],
)
def test_what_is_free_is_the_least_that_the_system_says(system, files, expected):
    system(**files)
    assert memory.available() == expected


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert memory._lines(str(tmp_path / "nope")) == []
    (tmp_path / "some").write_text("a\nb\n")
    assert memory._lines(str(tmp_path / "some")) == ["a", "b"]


def test_this_machine_says_what_is_free():
    assert memory.available() > 0


@pytest.mark.parametrize(("stats", "expected"), [(None, None), ({}, None), ({"bytes_limit": 9, "bytes_in_use": 2}, 7)])
def test_an_accelerator_is_asked_itself(monkeypatch, stats, expected):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.available() == expected


def program(arguments=0, temp=0, output=0, alias=0):
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=arguments,
        temp_size_in_bytes=temp,
        output_size_in_bytes=output,
        alias_size_in_bytes=alias,
    )
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


def test_what_a_program_needs_are_its_arguments_what_it_makes_and_what_it_works_in(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [None])
    monkeypatch.setattr(memory, "available", lambda: 4 * GIB)
    # Outputs that take the place of arguments need nothing.
    fits = program(arguments=GIB, temp=2 * GIB, output=2 * GIB, alias=GIB)
    assert memory.check(fits, "the update") == "the update needs 4.00 GiB of memory, 4.00 GiB are free"
    refused = r"^the update needs 4\.00 GiB of memory, 4\.00 GiB are free; raise micro_batches"
    for part in ("arguments", "temp", "output"):
        with pytest.raises(UserError, match=refused) as error:
            memory.check(program(**{part: 4 * GIB + 1}), "the update")
        assert "\n" not in str(error.value)


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 4 * GIB)
    with pytest.raises(UserError, match=r"needs 8\.00 GiB"):
        memory.check(program(temp=GIB), "the update")


@pytest.mark.parametrize(("analysis", "free"), [(None, 1), (types.SimpleNamespace(), None)])
def test_where_the_platform_does_not_say_nothing_is_refused(monkeypatch, analysis, free):
    monkeypatch.setattr(memory, "available", lambda: free)
    assert memory.check(types.SimpleNamespace(memory_analysis=lambda: analysis), "the update") == ""


def test_the_advice_is_that_for_what_needs_most(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [None])
    monkeypatch.setattr(memory, "available", lambda: 0)
    for arguments, temp, of_state in ((GIB, 2 * GIB, False), (2 * GIB, GIB, True)):
        with pytest.raises(UserError, match=rf"are free; {of_state}\.$"):
            memory.check(program(arguments=arguments, temp=temp), "the update", str)


def test_the_peak_is_that_of_the_fullest_device(monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 7, 6)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.peak() == {"peak_memory_bytes": 7}


def test_the_peak_of_a_cpu_is_that_of_the_process():
    (before,) = memory.peak().values()
    ballast = bytearray(before + 2**26)  # more than there ever was
    ballast[::4096] = b"x" * len(ballast[::4096])
    after = memory.peak()
    assert after.keys() == {"peak_process_bytes"}
    assert after["peak_process_bytes"] >= before + 2**26


def test_a_run_that_would_not_fit_ends_before_its_first_update(tmp_path, monkeypatch):
    world = worlds.make_world(tmp_path / "world")
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    needed = (
        r"^the update needs 0\.\d\d GiB .* are free; the largest buffers on a device are .*; set micro_batches=2 in "
        r"place of 1, or set remat=dots in place of none, or set head=token in place of auto\.$"
    )
    with pytest.raises(UserError, match=needed):
        worlds.train(tmp_path / "run", *world.flags)
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_platform_that_does_not_say_prints_nothing_of_it(tmp_path, monkeypatch, capsys):
    world = worlds.make_world(tmp_path / "world")
    monkeypatch.setattr(memory, "available", lambda: None)
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1")
    said = capsys.readouterr().out
    assert "memory:" not in said
    assert " s\n" in said.partition("compiled the update in ")[2]
