"""Runs whose model lies on the Hub or in a bucket: what they write down of it, and that they go on with the same."""

import json
import pathlib

import pytest

from daajax.errors import UserError
from daajax.evaluate import evaluate
from daajax.export import export
from daajax.generate import Options, model_of_run
from tests import stores, worlds

ADDRESSES = {"hub": "hf://org/model", "bucket": "gs://bucket/a/model"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = worlds.make_world(tmp_path_factory.mktemp("world"), count=16)
    (world.model / "LICENSE").write_text("do as you like\n")
    return world


def content(model: pathlib.Path) -> dict[str, bytes]:
    """Every tensor's bits and every other file's bytes, by name."""
    tensors = {name: value.tobytes() for name, value in worlds.load_tensors(model).items()}
    return {name: value for name, value in stores.files_of(model).items() if name != "model.safetensors"} | tensors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADDRESSES)
def test_a_run_goes_on_with_the_model_that_it_began_with(world, tmp_path, request, capsys, kind):
    store, address, run = request.getfixturevalue(kind), ADDRESSES[kind], tmp_path / "run"

    def write(model: pathlib.Path) -> None:
        files = stores.files_of(model)
        store.push("org/model", files) if kind == "hub" else store.write("a/model", files)

    write(world.model)
    flags = [*world.flags, f"--config.model.path={address}"]
    worlds.precompute(*flags, "--config.steps=2")
    worlds.train(run, *flags, "--config.steps=1")
    assert "8 of 8 examples in the cache" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["model"]["path"] == address
    (revision,) = json.loads((run / "revisions.json").read_text()).values()

    write(worlds.make_model(tmp_path / "other", seed=1))
    worlds.train(run, *flags, "--config.steps=2")
    assert f"model.path: {address} is revision {revision[:12]}, in " in capsys.readouterr().out
    worlds.at(evaluate, run, "--step=2", f"--config.eval_data.path={world.data}")
    assert f"model.path: {address} is revision {revision[:12]}, in " in capsys.readouterr().out
    assert revision in model_of_run(Options(workdir=str(run))).path
    worlds.at(export, run, "--step=0", f"--output={tmp_path / 'initial'}")
    worlds.at(export, run, "--step=2", f"--output={tmp_path / 'trained'}")
    assert content(tmp_path / "initial") == content(world.model)
    assert stores.files_of(tmp_path / "trained") == stores.files_of(run / "model")
    assert not any(path.is_symlink() for path in (run / "model").iterdir())

    (run / "revisions.json").unlink()
    with pytest.raises(UserError, match="the weights of the model changed since the checkpoint was made"):
        worlds.train(run, *flags, "--config.steps=3")


@pytest.mark.slow
def test_reference_and_tokenizer_have_addresses_of_their_own(world, hub, bucket, tmp_path):
    files = stores.files_of(world.model)
    hub.push("org/model", {name: content for name, content in files.items() if "token" not in name})
    hub.push("org/words", {name: content for name, content in files.items() if "token" in name})
    bucket.write("a/model", stores.files_of(worlds.make_model(tmp_path / "other", seed=1)))
    flags = [
        *world.flags,
        "--config.steps=1",
        f"--config.model.path={ADDRESSES['hub']}",
        "--config.tokenizer.path=hf://org/words",
        "--config.reference.mode=path",
    ]
    (history,) = worlds.train(tmp_path / "run", *flags, f"--config.reference.path={ADDRESSES['bucket']}")
    (expected,) = worlds.train(
        tmp_path / "expected",
        *flags,
        f"--config.model.path={world.model}",
        f"--config.tokenizer.path={world.model}",
        f"--config.reference.path={tmp_path / 'other'}",
    )
    assert history["loss"] == expected["loss"]
    found = json.loads((tmp_path / "run" / "revisions.json").read_text())
    assert sorted(found) == [ADDRESSES["bucket"], ADDRESSES["hub"], "hf://org/words"]
    assert not (tmp_path / "expected" / "revisions.json").exists()
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == files["tokenizer.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADDRESSES)
def test_an_adapter_has_an_address_of_its_own(world, hub, bucket, tmp_path, kind):
    hub.push("org/model", stores.files_of(world.model))
    flags = [*world.flags, f"--config.model.path={ADDRESSES['hub']}", "--config.steps=1"]
    worlds.train(tmp_path / "first", *flags, "--config.lora.rank=2", "--config.optimizer.learning_rate=0.1")
    adapter = stores.files_of(tmp_path / "first" / "adapter")
    model_revision = json.loads((tmp_path / "first" / "revisions.json").read_text())[ADDRESSES["hub"]]
    config = json.loads(adapter["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", model_revision)
    hub.push("org/adapter", adapter)
    bucket.write("a/adapter", adapter)
    address = {"hub": "hf://org/adapter", "bucket": "gs://bucket/a/adapter"}[kind]
    (found,) = worlds.train(tmp_path / "run", *flags, f"--config.lora.path={address}")
    (expected,) = worlds.train(tmp_path / "same", *flags, f"--config.lora.path={tmp_path / 'first' / 'adapter'}")
    assert found["logps/chosen"] == expected["logps/chosen"]
    assert address in json.loads((tmp_path / "run" / "revisions.json").read_text())


@pytest.mark.slow
def test_sampling_from_adapters_fetches_their_base(world, tmp_path, monkeypatch):
    from daajax import run as runs

    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", "--config.lora.rank=2")
    seen = {}

    def fetch_models(config, revisions, **options):
        seen.update(options)
        return config, {}

    monkeypatch.setattr(runs, "fetch_models", fetch_models)
    model_of_run(Options(workdir=str(tmp_path / "run")))
    assert seen == {"with_weights": True}


def test_a_revision_that_is_damaged_is_named(world, tmp_path):
    flags = [*world.flags, "--config.steps=1"]
    config, _ = worlds.parse(*flags)
    from daajax import folder

    (tmp_path / "run").mkdir()
    folder.begin(tmp_path / "run", config, updates=0, revisions={"hf://org/model": "0" * 40})
    assert folder.read_revisions(tmp_path / "run") == {"hf://org/model": "0" * 40}
    (tmp_path / "run" / "revisions.json").write_text("[1]")
    with pytest.raises(UserError, match=r"revisions\.json is damaged; remove it"):
        worlds.train(tmp_path / "run", *flags)


@pytest.mark.slow
def test_a_process_samples_from_a_gated_model_of_the_hub_and_its_token_stays_secret(world, hub, tmp_path):
    hub.push("org/model", stores.files_of(world.model), "v1")
    hub.gated.add("org/model")

    def generate(**environment: str):
        return worlds.command(
            "generate",
            "--model=hf://org/model@v1",
            "--prompt=the dog",
            "--max_tokens=4",
            "--temperature=0",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="0",
            JAX_NUM_CPU_DEVICES="1",
            **environment,
        )

    refused = generate()
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: --model=hf://org/model@v1 is gated: accept its terms")
    done = generate(HF_TOKEN=stores.TOKEN)
    assert done.returncode == 0, done.stderr
    assert "the dog" in done.stdout
    assert stores.TOKEN not in done.stdout + done.stderr
