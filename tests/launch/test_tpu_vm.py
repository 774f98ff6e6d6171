"""launch/tpu_vm.sh with a gcloud that plays back states, and launch/tpu_worker.sh, its hand on each host."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch import goldens

ROOT = Path(__file__).parents[2]
LINE = ["--zone=us-west4-a", "--type=v5litepod-16", "--spot", "--config=configs/dpo_llama.py", "--workdir=/mnt/nfs/a"]

# Each look plays the next state, each following the next log; what is said to it is kept.
GCLOUD = """#!{python}
import json, pathlib, sys
home = pathlib.Path({home!r})
words = sys.argv[1:]
verb = words[3]
if verb == "ssh":
    said = next(word for word in words if word.startswith("--command="))
    verb = next(name for name in ("set-up", "start", "follow", "code") if f"tpu_worker.sh {{name}}" in said)
with (home / "calls").open("a") as calls:
    calls.write(json.dumps([verb, words]) + "\\n")
if verb in ("describe", "follow"):
    file = home / f"{{verb}}.json"
    first, *rest = json.loads(file.read_text())
    file.write_text(json.dumps(rest))
    if first is None:
        print("ERROR: NOT_FOUND: the resource was not found", file=sys.stderr)
        sys.exit(1)
    if first.startswith("ERROR"):
        print(first, file=sys.stderr)
        sys.exit(1)
    print(first)
if verb == "code":
    import time
    for line in (home / "codes").read_text().splitlines():  # hosts answer one after the other, and one of them does not
        print(line, flush=True)
        time.sleep(0.05)
    sys.exit(255)
if verb == "scp":
    import tarfile
    (home / "copied").write_text("\\n".join(tarfile.open(words[4]).getnames()))
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the launchers alone: the log goes below it."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for left_out in (".venv", ".git", "runs"):
        (folder / left_out).mkdir()
        (folder / left_out / "file").touch()
    return folder


def launch(
    checkout: Path,
    *arguments: str,
    states: Sequence[str | None] = (),
    logs: Sequence[str] = (),
    codes: str = "",
    **environment: str,
) -> tuple[int, str, str, list[str]]:
    """Runs the launcher; returns its exit code, what it printed, and what gcloud was asked for."""
    home = checkout.parent
    (home / "bin").mkdir()
    gcloud = home / "bin/gcloud"
    gcloud.write_text(GCLOUD.format(python=sys.executable, home=str(home)))
    gcloud.chmod(0o755)
    (home / "describe.json").write_text(json.dumps(states))
    (home / "follow.json").write_text(json.dumps(logs))
    (home / "codes").write_text(codes)
    result = subprocess.run(
        [checkout / "launch/tpu_vm.sh", *arguments],
        env={"PATH": f"{home}/bin:{os.environ['PATH']}", "POLL_SECONDS": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    calls = (
        [json.loads(line) for line in (home / "calls").read_text().splitlines()] if (home / "calls").exists() else []
    )
    return result.returncode, result.stdout, result.stderr, [verb for verb, _ in calls if verb != "describe"]


def test_from_nothing_to_the_end(checkout):
    code, out, err, asked = launch(
        checkout,
        *LINE,
        states=[None, "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"],
        logs=["exit code NONE", "one\ntwo\nexit code 0"],
    )
    assert code == 0, err
    assert asked == ["create", "follow", "scp", "set-up", "start", "follow", "delete"]
    assert out == "one\ntwo\n"
    assert err.count("WAITING_FOR_RESOURCES") == 1
    assert (checkout / "runs/tpu_vm/daajax.log").read_text().endswith("one\ntwo\nexit code 0\n")
    copied = (checkout.parent / "copied").read_text().splitlines()
    assert "./launch/tpu_worker.sh" in copied
    assert not [name for name in copied if name.startswith(("./.venv", "./.git", "./runs"))]


def test_a_spot_tpu_that_is_taken_away_is_replaced_and_training_goes_on(checkout):
    code, _, err, asked = launch(
        checkout,
        *LINE,
        states=[None, "ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", None, "ACTIVE", "ACTIVE"],
        logs=["exit code NONE", "one", "ERROR ssh", "exit code NONE", "resumed\nexit code 0"],
    )
    assert code == 0, err
    one = ["create", "follow", "scp", "set-up", "start"]
    assert asked == [*one, "follow", "follow", "delete", *one, "follow", "delete"]
    assert "the TPU was taken away: a new one is asked for" in err


def test_a_broken_connection_goes_on_behind_the_lines_that_came(checkout):
    code, out, _, _ = launch(checkout, *LINE, states=["ACTIVE"] * 2, logs=["one\ntwo", "three\nexit code 0"])
    assert code == 0
    assert out == "one\ntwo\nthree\n"
    calls = [json.loads(line)[1] for line in (checkout.parent / "calls").read_text().splitlines()]
    assert [word.rpartition(" ")[2] for call in calls for word in call if "follow" in word] == ["0", "2"]


@pytest.mark.parametrize(
    ("logs", "code", "starts"),
    [
        (["exit code 42"] * 3 + ["exit code 0"], 0, 3),  # as often as it takes
        (["exit code 43", "exit code 137", "exit code 134"], 134, 2),  # RESTARTS times
        (["exit code 1"], 1, 0),
    ],
    ids=str,
)
def test_who_is_started_again(checkout, logs, code, starts):
    ended, _, _, asked = launch(checkout, *LINE, states=["ACTIVE"] * 5, logs=logs, RESTARTS="2")
    assert ended == code
    assert asked.count("start") == starts
    assert asked[-1] == "delete"


def test_a_clear_error_of_another_host_ends_it(checkout):
    codes = "SSH: connecting to worker 1\nexit code 134\nexit code 1\n" + 3 * "exit code 43\n"
    ended, _, err, asked = launch(checkout, *LINE, states=["ACTIVE"], logs=["exit code 134"], codes=codes)
    assert ended == 1
    assert asked == ["follow", "code", "delete"]
    assert "the training of another host ended with an error; its log there: ~/daajax-run/log" in err


def test_a_kept_tpu_is_not_deleted(checkout):
    code, _, err, asked = launch(checkout, *LINE, "--keep", states=["ACTIVE"], logs=["exit code 0"])
    assert code == 0
    assert "delete" not in asked
    assert "gcloud compute tpus queued-resources delete daajax --force" in err


def test_a_request_that_fails_ends_with_why(checkout):
    code, out, err, asked = launch(checkout, *LINE, states=[None, "FAILED", "FAILED\nquota"])
    assert code == 1
    assert "quota" in out
    assert "the request failed; above is why, and it was deleted." in err
    assert asked == ["create", "delete"]


def test_a_gcloud_that_does_not_answer_ends_it(checkout):
    code, _, err, asked = launch(checkout, *LINE, states=["ERROR: no active account"])
    assert code == 1
    assert "ERROR: no active account" in err
    assert asked == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--zone=ZONE and --type=TYPE are needed"),
        (["--zone"], "--zone needs its value behind a ="),
        (["--zone=z", "--type=v5litepod-8"], "no recipe"),
        (["--zone=z", "--type=v5litepod-8", "--config=c.py"], "--workdir=gs://bucket/folder is needed"),
        (["--zone=z", "--type=v9-8", "--smoke"], "--type=v9-8: no runtime is known for it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_mistake_is_one_line(checkout, arguments, said):
    code, _, err, asked = launch(checkout, *arguments)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert asked == []


def lines_of_a_dry_run() -> str:
    mount = "--setup=mountpoint -q /mnt/nfs || sudo mount -t nfs 10.0.0.2:/share /mnt/nfs"
    losses = "--config.extra_losses=({'name': 'sft', 'weight': 0.2},)"
    cases = [
        [*LINE, mount, losses, "--dry-run"],
        ["--zone=us-east5-a", "--type=v6e-8", "--name=trial", "--project=mine", "--smoke", "--keep", "--dry-run"],
    ]
    text = ""
    for arguments in cases:
        result = subprocess.run(
            [ROOT / "launch/tpu_vm.sh", *arguments], capture_output=True, text=True, timeout=60, check=True
        )
        text += f"$ launch/tpu_vm.sh {' '.join(arguments)}\n{result.stdout}{result.stderr}"
    return text


def test_dry_runs_are_as_expected():
    goldens.check("tpu_vm.txt", lines_of_a_dry_run())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_knows_every_flag(tmp_path):
    # Without an account it parses the flags, and then says that there is no account.
    for line in lines_of_a_dry_run().splitlines():
        if line.startswith("gcloud "):
            result = subprocess.run(
                ["bash", "-c", line + " --project=mine"],
                env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "none"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert "You do not currently have an active account" in result.stderr, (line, result.stderr)


@pytest.fixture
def worker(checkout, tmp_path):
    """Runs the worker's script, with a stand-in for Python."""

    (tmp_path / "bin").mkdir()
    curl = tmp_path / "bin/curl"  # in place of the host's own description of itself
    curl.write_text('#!/bin/sh\ncase "$*" in *Metadata-Flavor*attributes/agent-worker-number) printf 3;; esac\n')
    curl.chmod(0o755)

    def run(*arguments: str, program: str = "") -> str:
        python = tmp_path / "python"
        if program:
            python.write_text(program)
            python.chmod(0o755)
        result = subprocess.run(
            [checkout / "launch/tpu_worker.sh", *arguments],
            env=os.environ
            | {"RUN_FOLDER": str(tmp_path / "run"), "PYTHON": str(python), "TPU_LOCK_FILE": str(tmp_path / "lock")}
            | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return result.stdout + result.stderr

    return run


def test_a_host_runs_a_training_that_outlives_its_connection(worker, tmp_path):
    assert worker("follow") == "exit code NONE\n"
    assert worker("code") == ""
    (tmp_path / "lock").touch()
    program = '#!/bin/sh\necho "$GLIBC_TUNABLES"\necho "$DAAJAX_HOST"\nfor word; do echo "$word"; done\nexit 42\n'
    said = worker("start", "daajax.train", "--config=a b.py", program=program)
    assert said == f"removing {tmp_path}/lock, which a killed process left: it would keep this one from the TPU\n"
    assert not (tmp_path / "lock").exists()
    log = ["glibc.malloc.hugetlb=1", "3", "-m", "daajax.train", "--config=a b.py", "exit code 42"]
    assert worker("follow", "0").splitlines() == log
    assert worker("follow", "3").splitlines() == log[3:]
    assert worker("code") == "exit code 42\n"


def test_a_killed_training_is_known_and_a_hanging_one_ends_when_another_starts(worker, tmp_path):
    ready = tmp_path / "ready"
    program = f"#!/bin/sh\ntouch {ready}-$3\nsleep 60\n"
    worker("start", "daajax.train", "one", program=program)
    wait(Path(f"{ready}-one").exists)
    first = int((tmp_path / "run/process").read_text())
    assert is_alive(first)
    worker("start", "daajax.train", "two")
    second = int((tmp_path / "run/process").read_text())
    wait(lambda: not is_alive(first) and Path(f"{ready}-two").exists())
    os.killpg(second, signal.SIGKILL)
    assert worker("follow") == "exit code 137\n"


def is_alive(process: int) -> bool:
    file = Path(f"/proc/{process}/stat")
    return file.exists() and file.read_text().split()[2] != "Z"


def wait(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_is_asked_for_something_else_says_what_there_is(worker):
    assert worker("dance").count("\n") == 1
