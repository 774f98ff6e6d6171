"""The README's own lines: every command in its code blocks is run on a tiny world, or is known and accounted for."""

import re
import shlex

import pytest

from tests import worlds

README = worlds.ROOT / "README.md"
BLOCK = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGETS = ("setup", "test", "test-slow", "check", "bench")  # of `make`: other tests and CI run them


def lines_of(text):
    """Commands of the shell blocks of a Markdown text: continuation lines joined, prompts and comments taken off."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words:
                found.append(words)
    return found


def module_of(words):
    """Which of our commands a line runs; None for another program's. Variables may come first."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:2] and words[0].startswith("python") and words[1] == "-m" and words[2].startswith("daajax."):
        return words[2].removeprefix("daajax."), words[3:]
    return None, words


COMMANDS = lines_of(README.read_text(encoding="utf-8"))
OURS = [words for words in COMMANDS if module_of(words)[0]]
OTHERS = [words for words in COMMANDS if not module_of(words)[0]]


def test_blocks_are_taken_apart():
    text = "a\n```sh\nmake setup  # once\n$ python -m daajax.train \\\n    --config=c.py\n```\n"
    text += "```json\n{}\n```\n```\nno\n```\n"
    assert lines_of(text) == [["make", "setup"], ["python", "-m", "daajax.train", "--config=c.py"]]
    assert module_of(lines_of(text)[1]) == ("train", ["--config=c.py"])
    assert module_of(["XLA_FLAGS=x", "python3", "-m", "daajax.train"]) == ("train", [])


def test_the_readme_has_commands():
    assert OURS, "no `python -m daajax.…` in a shell block of the README"


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_every_other_command_is_known(words):
    if words[0] == "make":
        makefile = (worlds.ROOT / "Makefile").read_text(encoding="utf-8")
        for target in [word for word in words[1:] if "=" not in word]:
            assert target in TARGETS
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    elif words[0].startswith("python"):
        assert (worlds.ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        assert words[0] in ("source", "git", "cd", "hf", "pip"), "a command that no test covers"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"), count=12)


@pytest.mark.slow
@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_of_ours_runs(world, tmp_path, words):
    module, arguments = module_of(words)
    tiny = [
        f"--config.model.path={world.model}",
        f"--config.data.path={world.data}",
        f"--config.data.cache_dir={world.folder / 'tokens'}",
        f"--config.reference.cache_dir={world.folder / 'reference'}",
        "--config.batch_size=4",
        "--config.max_length=128",
        "--config.model.dtype=float32",
    ]
    # The last --config.data.limit counts: a recipe that is given in epochs is short on few examples.
    tiny += ["--config.data.limit=8"]
    if any("stories.py" in word for word in arguments):
        tiny += ["--config.steps=2"]
    (tmp_path / "configs").symlink_to(worlds.ROOT / "configs")
    result = worlds.command(module, *arguments, *tiny, cwd=tmp_path, JAX_NUM_CPU_DEVICES="1")
    assert result.returncode == 0, result.stderr
    if module == "train":
        folders = [word.removeprefix("--workdir=") for word in arguments if word.startswith("--workdir=")]
        (workdir,) = [tmp_path / folder for folder in folders] or (tmp_path / "runs").iterdir()
        assert (workdir / "model" / "model.safetensors").is_file()
        assert len(worlds.read_metrics(workdir)) == 2
