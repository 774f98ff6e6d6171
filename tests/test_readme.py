"""The README's own lines: every command in its code blocks is run on a tiny world, or is known and accounted for."""

import importlib.machinery
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests import stores, worlds

README = worlds.ROOT / "README.md"
LAUNCHERS = worlds.ROOT / "launch" / "README.md"
BLOCK = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGETS = ("setup", "demo", "test", "test-slow", "check", "bench")  # of `make`: other tests and CI run them


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
OTHERS += [words for words in lines_of(LAUNCHERS.read_text(encoding="utf-8")) if words not in OTHERS]


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
    elif "launch/slurm.sbatch" in words:
        place = words.index("launch/slurm.sbatch")
        assert words[0] == "sbatch"
        assert all((word.startswith("--") and "=" in word) or word == "--exclusive" for word in words[1:place])
        dry_run(words[place:])
    elif words[0].startswith("launch/"):
        dry_run(words)
    elif words[0] == "docker":
        assert words[1] in ("build", "push", "run")
        files = [words[i + 1] for i, word in enumerate(words) if word == "--file"]
        assert all((worlds.ROOT / file).is_file() for file in files)
    elif words[0].startswith("python"):
        assert (worlds.ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        assert words[0] in ("source", "git", "cd", "hf", "pip", "kubectl"), "a command that no test covers"


def dry_run(words):
    """Lets a launcher show what it would do of a line."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [*words, "--dry-run"], cwd=worlds.ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in words if word.startswith("--config"))


# Plans are of a small model, for GPUs, whose compiler is the quicker one.
PLANNED = ("--model=llama-3.2-1b", "--topology=h200:1", "--config.batch_size=4")
COMPILER, AHEAD = "jax_cuda13_plugin", pathlib.Path(sys.prefix, "ahead")
SMALL = ("batch_size=4", "max_length=128", "model.dtype=float32", "data.limit=8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every command of ours, once, in the README's order and in a folder that holds what they name, but small."""
    home = tmp_path_factory.mktemp("home")
    (home / "configs").symlink_to(worlds.ROOT / "configs")
    worlds.make_model(home / "models" / "Llama-3.2-1B-Instruct", hidden_size=64, intermediate_size=128)
    rows = worlds.pairs(16)
    worlds.write_rows(home / "pairs.jsonl", rows[:12])
    worlds.write_rows(home / "held_out.jsonl", rows[12:])
    caches = [f"{name}.cache_dir={home / name}" for name in ("data", "eval_data", "reference")]
    bucket, results = stores.Bucket(), {}
    bucket.write("Llama-3.2-1B-Instruct", stores.files_of(home / "models" / "Llama-3.2-1B-Instruct"))
    bucket.write("", {"pairs.jsonl": (home / "pairs.jsonl").read_bytes()})
    for words in OURS:
        module, arguments = module_of(words)
        # A recipe that is given in epochs is short on few examples; the others start from a run or a model.
        of_bucket = any("gs://" in word for word in words)
        kept = caches[1:2] if of_bucket else caches
        small = [f"--config.{option}" for option in (*SMALL, *kept)] if module in ("train", "precompute") else []
        if module == "plan":
            if importlib.machinery.PathFinder.find_spec(COMPILER, [str(AHEAD), *sys.path]) is None:
                continue
            small = [*PLANNED, f"--cache={home / 'plans'}"]
        with bucket.serving():
            places = {"TENSORSTORE_GCS_HTTP_URL": bucket.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": stores.TOKEN}
            places = {"HOME": str(home), **places} if of_bucket else {}
            result = worlds.command(module, *arguments, *small, cwd=home, JAX_NUM_CPU_DEVICES="1", **places)
        results[" ".join(words)] = result
    for name, content in bucket.files("runs").items():  # beside the folders of the other runs, to be looked at likewise
        file = home / "gs:" / "bucket" / "runs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return home, results


@pytest.mark.slow
@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_of_ours_runs(ran, words):
    home, results = ran
    if " ".join(words) not in results:
        pytest.skip(f"{COMPILER} is not installed: make setup-ahead")
    result = results[" ".join(words)]
    assert result.returncode == 0, result.stderr
    module, arguments = module_of(words)
    flags = dict(word.removeprefix("--").split("=", 1) for word in arguments if "=" in word)
    workdir = home / flags.get("workdir", f"runs/{re.sub('.*/|[.]py', '', flags.get('config', '')).replace(':', '-')}")
    if module == "train":
        assert (workdir / "model" / "model.safetensors").is_file()
        adapts = any(flag.startswith("config.lora.") for flag in flags)
        assert (workdir / "adapter" / "adapter_model.safetensors").is_file() == adapts
        assert len(worlds.read_metrics(workdir)) == 2
    if module == "plan":
        assert "fits: " in result.stdout
        assert ("recommended: --config.mesh.data=" in result.stdout) == ("--search" in arguments)
    if module == "evaluate":
        assert f"added to {flags['workdir']}/evaluations.jsonl" in result.stdout
    if module == "export":
        assert (home / flags["output"] / f"{flags.get('form', '')}_model.safetensors".strip("_")).is_file()
    if module == "generate":
        texts = [word.removeprefix("--prompt=") for word in arguments if word.startswith("--prompt=")]
        for text in texts:
            assert result.stdout.count(f"\n{text}") == int(flags.get("samples", 1))
