"""The house itself: set-up, launchers, locks, and what may import what."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement

from daajax.ops.attention import sum_copies

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / ".ci/run", *sorted(ROOT.glob("launch/*.sh")), ROOT / "launch/slurm.sbatch"]
LOCKS = [ROOT / "requirements/python3.11.txt", ROOT / "requirements/python3.12.txt"]

OLD = """#!/bin/sh
echo 3.10
"""
# As on Debian without python3-venv: the version is fine, `import ensurepip` is not.
WITHOUT_VENV = """#!/bin/sh
case "$2" in *ensurepip*) exit 1;; *) echo 3.11;; esac
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Under `make test` the variables of that make would reach the one started here.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=120, check=False
    )


def modules(package: str) -> list[str]:
    """Names of all modules below a package."""
    files = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def project_files() -> list[Path]:
    left_out = re.compile(r"\.venv.*|\.git|\.cache|\.\w+_cache|\.hypothesis|__pycache__|runs|build|.*\.egg-info")
    return [
        Path(folder, file)
        for folder, folders, files in os.walk(ROOT)
        for file in files
        if not folders.sort() and not any(left_out.fullmatch(part) for part in Path(folder).relative_to(ROOT).parts)
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_are_executable(path):
    assert run("bash", "-n", path).returncode == 0
    assert os.access(path, os.X_OK)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("goal", ["setup", "demo", "test", "check"])
@pytest.mark.parametrize(
    ("fake", "needed"),
    [
        (OLD, "is Python 3.10, daajax needs 3.11 or later"),
        (WITHOUT_VENV, "apt-get install python3.11-venv"),
        (None, "does not run; on Debian: apt-get install python3 python3-venv"),
    ],
    ids=["old", "without venv", "missing"],
)
def test_set_up_with_an_unfit_python_says_in_one_line_what_mends_it(tmp_path, goal, fake, needed):
    python = tmp_path / "python"
    if fake is not None:
        script(python, fake)
    result = run("make", "--no-print-directory", goal, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    ours = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert result.returncode != 0
    assert len(ours) == 1, result.stderr
    assert needed in ours[0]
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_makefile_sets_the_allocator_of_every_command():
    rule = "shown: ; @sh -c 'echo $$GLIBC_TUNABLES'"
    result = run("env", "-u", "GLIBC_TUNABLES", "make", "--no-print-directory", f"--eval={rule}", "shown")
    assert result.stdout == "glibc.malloc.hugetlb=1\n"


def test_the_local_launcher_sets_the_allocator_before_python_and_passes_everything_on(tmp_path):
    python = script(tmp_path / "python", '#!/bin/sh\necho "$GLIBC_TUNABLES" "$JAX_NUM_CPU_DEVICES" "$@"\nexit 42\n')
    result = run(
        "launch/local.sh",
        "--config=a b.py",
        "--workdir=w",
        PYTHON=str(python),
        GLIBC_TUNABLES="",
        JAX_NUM_CPU_DEVICES="4",
    )
    assert result.stdout == "glibc.malloc.hugetlb=1 4 -m daajax.train --config=a b.py --workdir=w\n"
    assert result.returncode == 42


def test_the_local_launcher_without_an_environment_says_how_to_make_one(tmp_path):
    result = run("launch/local.sh", PYTHON=str(tmp_path / "python"))
    assert result.returncode == 1
    assert "make setup" in result.stderr


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_locks_pin_every_dependency_and_hold_names_and_versions_only(lock):
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    assert not {"torch", "tensorflow", "daajax"} & set(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    for extra in ("test", "check"):
        wanted += project["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        pin = pins.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert pin is not None, f"{lock.name} lacks {requirement}: make lock"
        assert requirement.specifier.contains(pin), (
            f"{lock.name} has {requirement.name} {pin}, not {requirement}: make lock"
        )


def test_the_oracle_pins_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["oracle"]
    assert set(extra) <= set((ROOT / "requirements/oracle.txt").read_text().splitlines())
    assert any(pin.startswith("torch==") for pin in extra)  # or the others might bring another one


def test_the_compilers_for_chips_that_are_not_there_are_those_of_the_locked_jax():
    lines = [line for line in (ROOT / "requirements/ahead.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert f"jax=={pins['jax-cuda13-plugin']}" in LOCKS[0].read_text().splitlines()
    assert pins["jax-cuda13-pjrt"] == pins["jax-cuda13-plugin"]
    if importlib.metadata.version("jax") == pins["jax-cuda13-plugin"]:
        wanted = {found.name: found for found in map(Requirement, importlib.metadata.requires("jax") or [])}
        assert wanted["libtpu"].specifier.contains(pins["libtpu"])


# A folder of the project and what lies there, not a form such as `results/*.md` or what a run makes.
NAMED = re.compile(r"\b(?:benchmarks|configs|daajax|demo|examples|launch|requirements|tests)/[\w./-]*\w\.[a-z]+\b")


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/memory.md", "launch/README.md"]
)
def test_every_file_that_the_documents_name_is_there(name):
    named = set(NAMED.findall((ROOT / name).read_text(encoding="utf-8")))
    assert named
    assert sorted(file for file in named if not (ROOT / file).is_file()) == []


def test_only_ci_looks_outside_the_checkout():
    outside = ("../" + "shared").encode()  # in two parts, or this file would be found
    assert [file for file in project_files() if outside in file.read_bytes()] == [ROOT / ".ci/run"]


def test_the_package_imports_without_torch_and_tensorflow_and_what_imports_them():
    # None in sys.modules makes an import fail and find_spec say that there is no such package.
    code = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, tensorflow=None, tensorboardX=None, transformers=None)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)"
    )
    result = run(sys.executable, "-c", code, *modules("daajax"))
    assert result.returncode == 0, result.stderr


def test_data_never_imports_jax():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'jax' not in sys.modules, f'{name} imports jax'"
    )
    result = run(sys.executable, "-c", code, *modules("daajax.data"))
    assert result.returncode == 0, result.stderr


def test_sharding_uses_neither_pmap_nor_pickle():
    # The linter lets this one file touch jax.sharding, and with it everything else that is banned.
    path = ROOT / "daajax/sharding.py"
    assert not re.search(r"\bpmap\b|\bpickle\b", path.read_text())


def test_shapes_are_checked_under_pytest():
    """Otherwise every annotation would be a comment: the checks are put in where modules are imported."""
    rows, others = jnp.zeros((2, 3)), jnp.zeros((5, 4, 1), jnp.int32)
    with pytest.raises(TypeCheckError, match="sum_copies"):
        sum_copies(rows, others)
