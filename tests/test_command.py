"""The command line: what it understands, what it refuses in one line, and how a process ends."""

import io
import json
import pathlib
import re

import jax
import pytest

from configs import base
from daajax import command, folder, processes
from daajax.errors import UserError
from tests import worlds

NO_RECIPES = ("__init__", "base", "published")
RECIPES = sorted(str(path) for path in (worlds.ROOT / "configs").glob("*.py") if path.stem not in NO_RECIPES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def ends(main, argv=("train",), monkeypatch=None):
    """Exit code and standard error of a command."""
    errors = io.StringIO()
    monkeypatch.setattr("sys.stderr", errors)
    with pytest.raises(SystemExit) as exit:
        command.run(main, "train", list(argv))
    return exit.value.code, errors.getvalue()


# ---------------------------------------------------------------------- what it understands


def test_a_recipe_and_overrides_become_a_config_and_a_folder(world):
    config, folder = worlds.parse(*world.flags, "--config.batch_size=4", workdir="somewhere")
    assert (config.batch_size, config.steps, config.model.path) == (4, 5, str(world.model))
    assert folder == "somewhere"


@pytest.mark.parametrize(
    ("recipe", "folder"),
    [("stories.py", "stories"), ("stories.py:learn", "stories-learn"), ("dpo_llama.py:simpo", "dpo_llama-simpo")],
)
def test_the_folder_is_called_by_the_recipe_unless_named(world, recipe, folder):
    _, workdir = worlds.parse(*world.flags[:2], recipe=str(worlds.ROOT / "configs" / recipe))
    assert pathlib.Path(workdir) == pathlib.Path("runs") / folder


def test_the_recipe_may_be_a_word_of_its_own(world):
    config, _ = command.parse(["train", "--config", worlds.STORIES, *world.flags, "--config.batch_size", "4"], "train")
    assert config.batch_size == 4


def test_a_further_loss_can_be_spelled_on_the_command_line(world):
    config, _ = worlds.parse(*world.flags, "--config.extra_losses=({'name':'sft','weight':0.2},)")
    assert [dict(loss) for loss in config.extra_losses] == [{"name": "sft", "weight": 0.2}]


def test_a_loss_can_be_replaced_as_a_whole(world):
    config, _ = worlds.parse(*world.flags, "--config.loss={'name':'simpo','beta':2.0}", "--config.reference.mode=none")
    assert config.loss.to_dict() == base.loss("simpo", beta=2.0).to_dict()  # with all defaults


@pytest.mark.parametrize("name", ["tokenizer.path", "chat.template", "data.cache_dir"])
def test_text_can_be_unset(world, name):
    config, _ = worlds.parse(*world.flags, f"--config.{name}=None")
    assert config.to_dict()[name.split(".")[0]][name.split(".")[1]] is None


@pytest.mark.parametrize("name", ["steps", "data.limit", "optimizer.max_grad_norm", "optimizer.b2"])
def test_an_optional_number_can_be_unset(world, name):
    config, _ = worlds.parse(*world.flags, "--config.epochs=1.0", "--config.steps=None", f"--config.{name}=None")
    for part in name.split("."):
        config = config[part]
    assert config is None


def test_every_resolved_config_is_locked(world):
    config, _ = worlds.parse(*world.flags, "--config.loss={'name':'ipo','beta':0.1}")
    with pytest.raises(AttributeError):
        config.nope = 1
    with pytest.raises(AttributeError):
        config.loss.nope = 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: pathlib.Path(path).stem)
def test_every_recipe_says_in_its_docstring_how_it_is_run(recipe):
    text = pathlib.Path(recipe).read_text()
    name = pathlib.Path(recipe).name
    lines = [line.strip() for line in text.split('"""')[1].splitlines() if line.strip().startswith("python -m daajax.")]
    assert any(f"--config=configs/{name}" in line for line in lines)
    for line in lines:
        argument = re.search(r"--config=(\S+)", line)[1]
        flags = [word for word in line.split() if word.startswith("--config.")]
        config, _ = worlds.parse(
            "--config.model.path=m", "--config.data.path=d", *flags, recipe=str(worlds.ROOT / argument)
        )
        assert config.batch_size


# ---------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--config.nope=1"], "nope"),
        (["--config.model.nope=1"], "nope"),
        (["--config.optimizer.lr=1e-4"], "lr"),
        (["--config.loss.gamma=1.0"], "gamma"),
        (["--nope=1"], "nope"),
        (["--config.batch_size=two"], "config.batch_size=two"),
        (["--config.batch_size=2.5"], "config.batch_size=2.5"),
        (["--config.batch_size="], "config.batch_size="),
        (["--config.batch_size"], "config.batch_size"),
        (["--config.data.shuffle=maybe"], "config.data.shuffle=maybe"),
        (["rubbish"], "'rubbish' is not understood"),
        (["--config.steps=3", "rubbish", "more"], "'rubbish' is not understood"),
        (["--config.loss=dpo"], "config.loss"),
        (["--config.loss={'name':"], "config.loss"),
        (["--config.mesh={'data':8}"], "config.mesh.context is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_line_that_is_not_understood_is_refused_in_one_line(world, arguments, names):
    with pytest.raises(UserError) as error:
        worlds.parse(*world.flags, *arguments)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.model.nope=1", "config.model.nope is not an option; config.model has dtype, param_dtype, path, "),
        ("--config.model.nope=None", "config.model.nope is not an option; config.model has dtype, "),
        ("--config.model.pth=x", "config.model.pth is not an option; did you mean config.model.path?"),
        ("--config.optimzer.name=sgd", "config.optimzer.name is not an option; did you mean config.optimizer?"),
        ("--noconfig.data.shufle", "config.data.shufle is not an option; did you mean config.data.shuffle?"),
        ("--config.learning_rate=1", "config.learning_rate is not an option; did you mean config.optimizer.learning_r"),
        ("--config.seed.x=1", "config.seed.x is not an option; config.seed has no keys."),
        ("--config.loss.gamma=1.0", "config.loss has beta, label_smoothing, name, weight."),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_an_unknown_key_is_named_in_full(world, argument, says):
    with pytest.raises(UserError) as error:
        worlds.parse(*world.flags, argument)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["model", "loss"])
def test_only_single_options_can_be_unset(world, name):
    with pytest.raises(UserError, match=rf"--config.{name}=None unsets several options"):
        worlds.parse(*world.flags, f"--config.{name}=None")


@pytest.mark.parametrize("arguments", [[], ["--workdir=x"], ["--config="], ["--config"]])
def test_without_a_recipe_the_line_that_is_needed_is_shown(arguments):
    with pytest.raises(UserError, match=r"no recipe: python -m daajax.train --config=configs/"):
        command.parse(["train", *arguments], "train")


@pytest.mark.parametrize("recipe", ["configs/nope.py", "nope", "configs"])
def test_a_missing_recipe_is_named(recipe):
    with pytest.raises(UserError, match=rf"--config={recipe}: there is no such file"):
        worlds.parse(recipe=recipe)


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe."""

    def write(text):
        (tmp_path / "recipe.py").write_text(text)
        return str(tmp_path / "recipe.py")

    return write


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config():\n    raise RuntimeError('boom\\nand more')\n", "recipe.py:2: RuntimeError: boom and more"),
        ("\nimport nowhere\n", "recipe.py:2: ModuleNotFoundError: No module named 'nowhere'"),
        ("\ndef get_config(:\n", "recipe.py:2: SyntaxError: "),
        ("import json\n\n\ndef get_config():\n    return json.loads('{')\n", "recipe.py:5: JSONDecodeError: "),
        ("def get_config():\n    return open('/nowhere')\n", "recipe.py:2: FileNotFoundError: "),
        ("def get_config():\n    return {}\n", "recipe.py: get_config() returns a dict; it must return base."),
        ("x = 1\n", "recipe.py defines no get_config()"),
        (
            "from configs import base\ndef get_config():\n    config = base.get_config()\n    config.modle = 3\n",
            'recipe.py:4: AttributeError: Key "modle" does not exist and cannot be added since the config is locked. '
            'Did you mean "model" instead of "modle"?',
        ),
        (
            "from configs import base\ndef get_config():\n    config = base.get_config()\n    with config.unlocked():\n"
            "        config.further = 1\n    return config\n",
            "config.further is not an option",
        ),
    ],
    ids=["raises", "import", "syntax", "library", "file", "dict", "nothing", "typo", "further"],
)
def test_a_broken_recipe_is_one_line(world, recipe, text, says):
    with pytest.raises(UserError) as error:
        worlds.parse(*world.flags, recipe=recipe(text))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["stories.py:nope", "dpo_llama.py:nope"])
def test_an_unknown_variant_of_a_recipe_names_the_known_ones_and_nothing_else(name):
    with pytest.raises(UserError, match=r"there is no variant .* there are (trl|alphapo)") as error:
        worlds.parse(recipe=str(worlds.ROOT / "configs" / name))
    assert "Traceback" not in str(error.value)


def test_a_recipe_that_takes_no_argument_says_so(recipe):
    path = recipe("from configs import base\ndef get_config():\n    return base.get_config()\n")
    with pytest.raises(UserError, match=r"recipe.py: TypeError: get_config\(\) takes 0 positional arguments"):
        worlds.parse(recipe=f"{path}:ipo")


def test_two_recipes_of_one_name_are_two(world, recipe):
    text = "from configs import base\ndef get_config():\n    config = base.get_config()\n    config.seed = {}\n"
    text += "    return config\n"
    assert [worlds.parse(*world.flags, recipe=recipe(text.format(seed)))[0].seed for seed in (3, 4)] == [3, 4]


def test_a_recipe_that_sets_an_unknown_key_gets_a_line_that_can_be_read(recipe):
    with pytest.raises(UserError) as error:
        worlds.parse(recipe=recipe("from configs import base\ndef get_config():\n    base.get_config().modle = 3\n"))
    assert len(str(error.value)) < 300


# ---------------------------------------------------------------------- how it ends


def test_a_users_error_is_one_line_and_exit_code_1(world, monkeypatch):
    def main(config, workdir):
        raise UserError("the moon is full; wait")

    code, errors = ends(main, ["train", f"--config={worlds.STORIES}", *world.flags], monkeypatch)
    assert (code, errors) == (1, "error: the moon is full; wait\n")


def test_a_bug_keeps_its_stack_trace(world):
    def main(config, workdir):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command.run(main, "train", ["train", f"--config={worlds.STORIES}", *world.flags])


@pytest.mark.parametrize(("error", "code"), [(jax.errors.JaxRuntimeError("INTERNAL: CUDA error"), 43), (KeyError(), 1)])
def test_a_device_of_one_of_several_that_fails_is_started_again_and_a_bug_is_not(world, monkeypatch, error, code):
    def main(config, workdir):
        raise error

    def leave(code):  # in place of the process
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(processes, "are_several", lambda: True)
    found, errors = ends(main, ["train", f"--config={worlds.STORIES}", *world.flags], monkeypatch)
    assert found == code
    assert "Traceback" in errors
    assert type(error).__name__ in errors


def test_an_interrupt_is_no_stack_trace(world, monkeypatch):
    def main(config, workdir):
        raise KeyboardInterrupt

    def leave(code):  # in place of the process
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    code, errors = ends(main, ["train", f"--config={worlds.STORIES}", *world.flags], monkeypatch)
    assert (code, errors) == (130, "stopped\n")


@pytest.mark.parametrize("module", ["train", "precompute"])
def test_help_is_a_usage_line_of_the_command_itself(module):
    result = worlds.command(module, "--help")
    assert result.returncode == 0
    assert f"usage: python -m daajax.{module} --config=" in result.stdout
    assert "configs/base.py" in result.stdout


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("train", ["--config=configs/nope.py"], "configs/nope.py"),
        ("train", ["--config=configs/stories.py", "--config.nope=1"], "nope"),
        ("precompute", [], "no recipe"),
        ("train", ["--config=configs/dpo_llama.py"], "hf download"),
    ],
    ids=["recipe", "key", "nothing", "model"],
)
def test_a_process_ends_with_1_and_one_line(tmp_path, module, arguments, says):
    result = worlds.command(module, *arguments, f"--workdir={tmp_path / 'run'}", DAAJAX_ASSETS="")
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- commands that start from a run


@pytest.fixture
def run(world, tmp_path):
    """The folder of a run, so far as a command reads it."""
    config, _ = worlds.parse(*world.flags, "--config.extra_losses=({'name':'sft','weight':0.2},)")
    (tmp_path / "run").mkdir()
    folder.begin(tmp_path / "run", config, updates=0)
    return tmp_path / "run"


def parse_at(*arguments):
    return command.parse_at(["export", *arguments], "export", {"step": int, "output": str})


def test_the_config_of_a_run_is_read_back_as_it_was(world, run):
    expected, _ = worlds.parse(*world.flags, "--config.extra_losses=({'name':'sft','weight':0.2},)")
    config, workdir, values = parse_at(f"--workdir={run}")
    assert config.to_json_best_effort(sort_keys=True) == expected.to_json_best_effort(sort_keys=True)
    assert isinstance(config.extra_losses, tuple)
    assert (workdir, values) == (str(run), {"step": None, "output": None})


@pytest.mark.parametrize("name", ["data.cache_dir", "steps", "optimizer.max_grad_norm", "tokenizer.path"])
def test_what_a_run_had_unset_is_unset(world, tmp_path, name):
    length = ("--config.epochs=1.0", "--config.steps=None")
    config, _ = worlds.parse(*world.flags, *length, f"--config.{name}=None")
    (tmp_path / "run").mkdir()
    folder.begin(tmp_path / "run", config, updates=0)
    found, _, _ = parse_at("--workdir", str(tmp_path / "run"))
    assert found.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "loss", ["{'name':'ipo','beta':0.2}", "{'name':'dpo','beta':0.5,'label_smoothing':0.1}"], ids=["ipo", "dpo"]
)
def test_a_runs_own_loss_is_read_back(world, tmp_path, loss):
    config, _ = worlds.parse(*world.flags, f"--config.loss={loss}")
    (tmp_path / "run").mkdir()
    folder.begin(tmp_path / "run", config, updates=0)
    found, _, _ = parse_at(f"--workdir={tmp_path / 'run'}")
    assert found.loss.to_dict() == config.loss.to_dict()
    assert folder.examine(tmp_path / "run", config) == "unfinished"  # the same line again goes on
    name = config.loss.name
    assert set(config.loss) == set(base.loss(name)), "what is not named has its default"


def test_a_command_takes_its_own_options_and_overrides(run):
    config, _, values = parse_at(
        f"--workdir={run}", "--step=3", "--output", "x", "--config.batch_size=3", "--config.eval_data.path=held.jsonl"
    )
    assert values == {"step": 3, "output": "x"}
    assert (config.batch_size, config.eval_data.path) == (3, "held.jsonl")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no run: python -m daajax.export --workdir=DIR"),
        (["--workdir="], "no run: python -m daajax.export --workdir=DIR"),
        (["--workdir"], "no run: python -m daajax.export --workdir=DIR"),
        (["--workdir=nowhere"], "--workdir=nowhere is not a folder"),
        (["--workdir=configs"], "--workdir=configs exists and is not a run's folder"),
        (["--workdir={}", "--config=configs/stories.py"], "reads the config of the run in --workdir"),
        (["--workdir={}", "--step=two"], "two"),
        (["--workdir={}", "--step="], "step"),
        (["--workdir={}", "--nope=1"], "nope"),
        (["--workdir={}", "rubbish"], "'rubbish' is not understood"),
        (["--workdir={}", "--config.nope=1"], "config.nope is not an option"),
        (["--workdir={}", "--config.batch_size=two"], "config.batch_size=two"),
        (["--workdir={}", "--config.batch_size=0"], "config.batch_size=0 must be at least 1"),
        (["--workdir={}", "--config.model=None"], "unsets several options"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_line_for_a_run_that_is_not_understood_is_refused_in_one_line(run, arguments, says, monkeypatch):
    monkeypatch.chdir(worlds.ROOT)
    with pytest.raises(UserError) as error:
        parse_at(*(argument.format(run) for argument in arguments))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"),
        ("model", 3),
        ("model", None),
        ("loss", None),
        ("loss", "dpo"),
        ("nope", 1),
        ("mesh", {"x": 1}),
    ],
    ids=str,
)
def test_a_runs_config_that_does_not_fit_is_refused_in_one_line(run, key, value):
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | {key: value}))
    with pytest.raises(UserError) as error:
        parse_at(f"--workdir={run}")
    assert "\n" not in str(error.value)
    assert key in str(error.value) or "config.json" in str(error.value)


def test_a_command_at_a_run_gets_only_the_options_that_are_given(run, monkeypatch):
    calls = []

    def main(config, workdir, step=None, output=None):
        calls.append((config.batch_size, workdir, step, output))

    for arguments in ([], ["--step=4"]):
        with pytest.raises(SystemExit) as exit:
            command.run_at(main, "export", ["export", f"--workdir={run}", *arguments], step=int, output=str)
        assert exit.value.code == 0
    assert calls == [(8, str(run), None, None), (8, str(run), 4, None)]


def test_a_mistake_at_a_run_is_one_line_and_exit_code_1(run, monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr("sys.stderr", errors)
    with pytest.raises(SystemExit) as exit:
        command.run_at(lambda *_: None, "export", ["export", "--workdir=nowhere"], step=int)
    assert exit.value.code == 1
    assert errors.getvalue() == "error: --workdir=nowhere is not a folder; name that of a run.\n"


@pytest.mark.parametrize(("module", "option"), [("evaluate", "--step"), ("export", "--output")])
def test_help_at_a_run_names_its_options(module, option):
    result = worlds.command(module, "--help")
    assert result.returncode == 0
    assert f"usage: python -m daajax.{module} --workdir=DIR [--step=…]" in result.stdout
    assert option in result.stdout


@pytest.mark.parametrize(("words", "steps"), [(("None", "7"), 7), (("7", "None"), None), (("3", "None", "4"), 4)])
def test_the_last_of_several_overrides_counts(world, words, steps):
    epochs = ["--config.epochs=1.0"] if steps is None else []
    config, _ = worlds.parse(*world.flags, *epochs, *(f"--config.steps={word}" for word in words))
    assert config.steps == steps


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.loss=ipo", r"config\.loss=ipo .* needs a dict; there are .*config\.loss\.name, "),
        ("--config.optimizer=adam", r"config\.optimizer=adam .* needs a dict; there are .*config\.optimizer\.name, "),
        ("--workdir=", "--workdir= is empty; name a folder"),
    ],
)
def test_what_a_newcomer_types_is_answered(world, argument, says):
    with pytest.raises(UserError, match=says):
        worlds.parse(*world.flags, argument)
