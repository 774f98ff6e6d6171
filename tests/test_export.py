"""A checkpoint as a model directory: the run's own model at its end, an earlier one before it, companions untouched."""

import json
import shutil

import numpy as np
import pytest

from daajax.errors import UserError
from daajax.export import export
from tests import worlds

COMPANIONS = {
    "generation_config.json": '{"temperature": 0.6,\n\n "eos_token_id": [2]}',
    "chat_template.jinja": "{% for m in messages %}<s> {{ m.content }}</s>{% endfor %}",
    "special_tokens_map.json": '{ "bos_token": "<s>" }\n',
    "LICENSE.txt": "do as you like\r\n",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = worlds.make_world(tmp_path_factory.mktemp("world"))
    for name, text in COMPANIONS.items():
        (world.model / name).write_bytes(text.encode())
    return world


@pytest.fixture(scope="module")
def run(world):
    """A finished run with the checkpoints 2, 4 and 5."""
    workdir = world.folder / "run"
    worlds.train(workdir, *world.flags, "--config.checkpoint.every=2", "--config.checkpoint.keep=9")
    return workdir


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_last_update_is_the_runs_own_model(run, tmp_path, capsys):
    worlds.at(export, run, f"--output={tmp_path / 'model'}")
    assert content(tmp_path / "model") == content(run / "model")
    assert f"the model of update 5 is in {tmp_path / 'model'}" in capsys.readouterr().out


def test_companions_are_untouched(world, run, tmp_path):
    worlds.at(export, run, "--step=4", f"--output={tmp_path / 'model'}")
    found = content(tmp_path / "model")
    assert set(found) == set(content(world.model))
    for name, content_of in content(world.model).items():
        assert (found[name] == content_of) == (name != "model.safetensors"), name


def test_an_earlier_update_is_another_model(world, run, tmp_path):
    for step in (0, 2, 4, 5):
        worlds.at(export, run, f"--step={step}", f"--output={tmp_path / str(step)}")
    found = {step: worlds.load_tensors(tmp_path / str(step)) for step in (0, 2, 4, 5)}
    initial = worlds.load_tensors(world.model)
    assert all((found[0][name] == initial[name]).all() for name in initial)
    for one, other in ((0, 2), (2, 4), (4, 5)):
        assert all((found[one][name] != found[other][name]).any() for name in initial)


def test_a_run_that_ended_there_has_the_same_model(world, run, tmp_path):
    worlds.train(tmp_path / "short", *world.flags, "--config.steps=2")
    worlds.at(export, run, "--step=2", f"--output={tmp_path / 'model'}")
    assert content(tmp_path / "model") == content(tmp_path / "short" / "model")


def test_without_an_output_it_lies_in_the_runs_folder(run):
    worlds.at(export, run, "--step=4")
    assert (run / "model-4" / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"--output=.*model-4 exists; name another directory, or remove it"):
        worlds.at(export, run, "--step=4")
    shutil.rmtree(run / "model-4")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_not_replaced(run, tmp_path, kind):
    target = tmp_path / "model"
    target.mkdir() if kind == "folder" else target.write_text("mine")
    with pytest.raises(UserError, match=r"--output=.*model exists"):
        worlds.at(export, run, f"--output={target}")
    assert list(target.iterdir()) == [] if kind == "folder" else target.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/model cannot be written") as error:
        worlds.at(export, run, f"--output={tmp_path / 'file' / 'model'}")
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    large = max((tmp_path / "run/checkpoints/5/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flipped = bytearray(large.read_bytes())
    flipped[len(flipped) // 2] ^= 8
    large.write_bytes(flipped)
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged \(.*\); use another --step") as error:
        worlds.at(export, tmp_path / "run", f"--output={tmp_path / 'model'}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
    worlds.at(export, tmp_path / "run", "--step=4", f"--output={tmp_path / 'model'}")


def test_another_model_is_refused(run, tmp_path):
    model = worlds.make_model(tmp_path / "model", intermediate_size=96)
    with pytest.raises(UserError, match="is of another model or optimizer: params/"):
        worlds.at(export, run, f"--config.model.path={model}", f"--output={tmp_path / 'out'}")


def test_a_folder_without_checkpoints_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"has no checkpoint; there are: none; --step=0 is the initial policy"):
        worlds.at(export, tmp_path)


@pytest.mark.slow
def test_a_run_of_eight_devices_is_exported_on_one(world, tmp_path):
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    worlds.train(tmp_path / "run", *world.flags, *mesh, "--config.steps=1", devices=8)
    with pytest.raises(UserError, match=r"needs 8 devices"):
        worlds.at(export, tmp_path / "run", f"--output={tmp_path / 'model'}")
    worlds.at(
        export, tmp_path / "run", "--config.mesh.fsdp=1", "--config.mesh.tensor=1", f"--output={tmp_path / 'model'}"
    )
    assert content(tmp_path / "model") == content(tmp_path / "run" / "model")


def test_the_exported_model_is_a_hugging_face_directory(run, tmp_path):
    import transformers

    worlds.at(export, run, "--step=2", f"--output={tmp_path / 'model'}")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.model_type, config.hidden_size) == ("llama", 32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("the dog").input_ids[0] == 1
    assert tokenizer.chat_template == COMPANIONS["chat_template.jinja"]
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.6
    assert all(np.isfinite(value).all() for value in worlds.load_tensors(tmp_path / "model").values())
