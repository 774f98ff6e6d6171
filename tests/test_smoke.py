"""The trial run of launchers: what it makes, how it judges, and that it works."""

import hashlib
import json
import math
import subprocess
import sys

import pytest

from daajax import bucket as buckets
from daajax import folder
from daajax.errors import UserError
from daajax.models.families import read_architecture
from demo import smoke
from tests import worlds

FILES = ("pairs.jsonl", "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json")


def digests(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def test_every_process_makes_the_same(tmp_path):
    smoke.make(tmp_path / "here")
    code = f"import pathlib; from demo import smoke; smoke.make(pathlib.Path({str(tmp_path / 'there')!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=worlds.ROOT, check=True)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    architecture = read_architecture(str(tmp_path / "here/model"), length=128)
    assert architecture.hidden_size % 256 == 0  # parameters are cut up over up to 256 devices
    rows = (tmp_path / "here/pairs.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows)) == smoke.BATCH * smoke.UPDATES


@pytest.mark.parametrize(
    ("losses", "code"),
    [([math.log(2), 0.69, 0.69], 0), ([0.72, 0.69, 0.69], 1), ([math.nan] * 3, 1), ([math.log(2)], 1), ([], 1)],
    ids=str,
)
def test_the_first_loss_must_be_ln_2_and_all_updates_there(capsys, losses, code):
    assert smoke.judge(losses) == code
    assert "0.693147" in capsys.readouterr().out


def test_what_is_not_understood_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("DAAJAX_NUM_PROCESSES", raising=False)
    assert smoke.main(["--dance"]) == 1
    assert "'--dance' is not understood" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").touch()
    assert smoke.main([f"--workdir={tmp_path}"]) == 1
    assert "exists and is not a run's folder" in capsys.readouterr().out
    assert smoke.main(["--workdir=s3://bucket/run"]) == 1
    assert "s3:// is neither read nor written" in capsys.readouterr().out
    monkeypatch.setenv("DAAJAX_NUM_PROCESSES", "2")
    assert smoke.main([]) == 1
    assert "several processes need one folder" in capsys.readouterr().out


TRIAL = {"model": {"path": "model"}, "data": {"path": "pairs.jsonl"}}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": TRIAL, "metrics.jsonl": 1, "checkpoints/3/x": 1}, ""),
        ({"reference/part": 1}, ""),  # interrupted before its first update
        ({"config.json": TRIAL, "finished": 1}, "holds a run already; name a folder that is not there yet"),
        ({"config.json": TRIAL | {"model": {"path": "mine"}}}, "holds a run already"),
        ({"thesis.tex": 1}, "is not a run's folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("place", ["here", "bucket"])
def test_a_trial_that_was_interrupted_begins_again_in_its_folder(bucket, tmp_path, place, files, words):
    workdir = tmp_path / "run" if place == "here" else buckets.BucketPath("gs://bucket/run")
    for name, content in files.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(json.dumps(content))
    if words:
        with pytest.raises(UserError, match=words):
            smoke.clear(workdir)
        assert all((workdir / name).exists() for name in files)
        return
    smoke.clear(workdir)
    assert not any((workdir / name).exists() for name in files)
    smoke.clear(workdir)  # there is nothing left, which is fine


def test_a_trial_that_is_at_work_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TRIAL))
    with folder.locked(tmp_path), pytest.raises(UserError, match="another run is at work there"):
        smoke.clear(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_a_machine_is_tried_on_every_device_of_every_process(tmp_path):
    result = subprocess.run(
        [
            worlds.ROOT / "launch/local.sh",
            "--smoke",
            "--processes=2",
            "--devices=1",
        ],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHON": sys.executable,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "devices: 2 cpu, mesh {'data': 1, 'fsdp': 2, 'tensor': 1, 'context': 1}" in result.stdout
    assert result.stdout.count("the first loss is 0.693147, ln 2 is 0.693147, 3 updates were made: it works") == 1
