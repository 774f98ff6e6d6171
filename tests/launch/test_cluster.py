"""What launch/ hands to clusters: Slurm's script in a dry run, Kubernetes' objects, the image, the variables."""

import functools
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.launch import goldens

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

yaml = pytest.importorskip("yaml")
LOSSES = """--config.extra_losses=({'name': 'sft', 'note': "$(NO) \\\\ ${NAME}"},)"""
GKE = ["--image=europe-docker.pkg.dev/mine/images/daajax:1", "--claim=shared", "--dry-run"]
TRAINS = ["--config=configs/dpo_llama.py:simpo", "--workdir=/shared/runs/a"]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---------------------------------------------------------------------- Slurm


def test_slurm_dry_runs_are_as_expected():
    cases: list[tuple[list[str], dict[str, str]]] = [
        (["--config=c d.py", "--workdir=runs/a"], {}),
        (["--smoke"], {"PYTHON": "/opt/python"}),
        (["--config=c.py"], {"CONTAINER": "nvcr.io#mine/daajax:1", "CONTAINER_MOUNTS": "/data:/data"}),
        (["--config=c.py"], {"CONTAINER": "/images/daajax.sif", "CONTAINER_MOUNTS": "/data:/data"}),
    ]
    text = ""
    for arguments, environment in cases:
        result = run("slurm.sbatch", "--dry-run", *arguments, **environment)
        assert result.returncode == 0, result.stderr
        text += f"$ {shlex.join([*(f'{k}={v}' for k, v in environment.items()), *arguments])}\n"
        text += result.stdout.replace(str(ROOT), "CHECKOUT")
    goldens.check("slurm.txt", text)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "no recipe"),
        (["--config=c.py"], {}, "this is no Slurm job"),
        (["--config=c.py"], {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/"}, "/ is no checkout of daajax"),
        (["--config=c.py"], {"SLURM_JOB_ID": "1", "ENV_FILE": "no.env"}, "ENV_FILE=no.env is not there"),
        (["--config=c.py"], {"SLURM_JOB_ID": "1", "PYTHON": "/no/python"}, "there is no /no/python"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mistake_of_slurm_is_one_line(arguments, environment, said):
    result = run("slurm.sbatch", *arguments, **environment)
    assert result.returncode == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------- Kubernetes


@functools.cache
def objects(*arguments: str) -> list[dict[str, Any]]:
    """What the launcher would apply."""
    result = run("gke.sh", *arguments)
    assert result.returncode == 0, result.stderr
    assert "${" not in re.sub(r"^#.*|^ +args: .*", "", result.stdout, flags=re.MULTILINE)
    return list(yaml.safe_load_all(result.stdout))


def of_gpus() -> list[dict[str, Any]]:
    return objects("gpu", *GKE, "--nodes=4", "--gpus=2", "--gpu=nvidia-l4", "--name=mine", *TRAINS)


def of_tpu() -> dict[str, Any]:
    return objects("tpu", *GKE, "--topology=4x4", "--tpu=tpu-v5-lite-podslice", *TRAINS)[0]


def dictionaries(value: Any) -> list[dict[str, Any]]:
    """All in a tree."""
    if isinstance(value, dict):
        return [value, *(found for child in value.values() for found in dictionaries(child))]
    return [found for child in value for found in dictionaries(child)] if isinstance(value, list) else []


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_rendered_objects_are_as_expected(kind):
    result = run("gke.sh", kind, *GKE, *(["--topology=4x4"] if kind == "tpu" else ["--nodes=2"]), *TRAINS)
    goldens.check(f"gke_{kind}.yaml", result.stdout)


def test_job_and_service_are_what_kubernetes_knows():
    validate = pytest.importorskip("kubernetes_validate")
    for found in of_gpus():
        validate.validate(found, "1.31", strict=True)
    wrong = json.loads(json.dumps(of_gpus()[1]))
    wrong["spec"]["backOffLimit"] = 3
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, "1.31", strict=True)


def test_the_jobset_is_what_its_controller_knows():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((HERE / "jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(of_tpu(), schema)
    wrong = json.loads(json.dumps(of_tpu()))
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    # Its jobs are Kubernetes' own.
    validate = pytest.importorskip("kubernetes_validate")
    for job in of_tpu()["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
        validate.validate(whole, "1.31", strict=True)


def test_gpu_pods_know_of_each_other():
    service, job = of_gpus()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    assert environment["DAAJAX_NUM_PROCESSES"] == "4"
    # The pods of an Indexed Job are called NAME-INDEX, and found in the domain of their headless service.
    assert environment["JAX_COORDINATOR_ADDRESS"].split(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"] == "mine"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "mine"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}


def test_deaths_are_allowed_for_each_node():
    assert of_gpus()[1]["spec"]["backoffLimit"] == 20 * 4


def test_exit_codes_of_gpu_pods_have_their_meaning():
    job = of_gpus()[1]
    found = {
        code: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert found == {1: "FailJob", 42: "Ignore", 43: "Ignore"}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # or the policy would be refused


def test_the_jobset_has_a_pod_for_each_host_and_ends_at_a_clear_error():
    spec = of_tpu()["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert job["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1]
    assert [rule["action"] for rule in spec["failurePolicy"]["rules"]] == ["FailJobSet"]
    assert pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_arguments_arrive_as_they_are(kind):
    needed = ["--topology=2x2"] if kind == "tpu" else []
    found = objects(kind, *GKE, *needed, *TRAINS, LOSSES)[-1]
    (container,) = [one for value in dictionaries(found) for one in value.get("containers", [])]
    arguments = [word.replace("$$", "$") for word in container["args"]]  # as Kubernetes does
    assert arguments == [*TRAINS, LOSSES]
    bash, c, script, zero, module = container["command"]
    assert (bash, c, module) == ("bash", "-c", "daajax.train")
    script = script.replace("exec python", "printf '%s\\n'")
    said = subprocess.run(
        [bash, c, script, zero, module, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == ["-m", "daajax.train", *TRAINS, LOSSES]


def test_a_trial_of_a_cluster_has_a_folder_of_its_own():
    (container,) = [
        one for value in dictionaries(objects("gpu", *GKE, "--smoke")) for one in value.get("containers", [])
    ]
    assert container["command"][-1] == "demo.smoke"
    assert re.fullmatch(r"--workdir=/shared/runs/smoke-daajax-[\d-]+", container["args"][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "gpu or tpu comes first"),
        (["cpu"], "gpu or tpu comes first"),
        (["gpu"], "--image= is needed"),
        (["gpu", "--image=i"], "--claim= is needed"),
        (["gpu", *GKE], "no recipe"),
        (["gpu", *GKE, "--config=c.py"], "--workdir=/shared/DIR or gs://bucket/folder is needed"),
        (["gpu", *GKE, *TRAINS, "--nodes=two"], "--nodes=two: a whole number"),
        (["gpu", *GKE, *TRAINS, "--name=My_Job"], "--name=My_Job: up to 40"),
        (["tpu", *GKE, *TRAINS], "--topology= is needed, such as 4x4"),
        (["tpu", *GKE, *TRAINS, "--topology=2x3"], "has 6 chips, no multiple of --chips=4"),
        (["gpu", *GKE, *TRAINS, "--config.a=\n"], "holds a control character"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mistake_of_gke_is_one_line(arguments, said):
    result = run("gke.sh", *arguments)
    assert result.returncode == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_kubectl_applies_what_a_dry_run_shows(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@"\ncat\n')
    kubectl.chmod(0o755)
    arguments = ["gpu", *GKE, *TRAINS]
    shown = run("gke.sh", *arguments)
    applied = run(
        "gke.sh", *[word for word in arguments if word != "--dry-run"], PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    assert applied.stdout.startswith("apply -f -\n" + shown.stdout)


# ---------------------------------------------------------------------- image and variables


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's: name and the rest, lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "launch/Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_copies_what_there_is_and_its_commands_parse():
    found = instructions()
    assert found[0] == ("FROM", "python:3.11-slim")
    assert {name for name, _ in found} <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    copied = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {"daajax", "configs", "demo", "launch", "pyproject.toml", "requirements/python3.11.txt"} <= set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["project"]["license-files"]) <= set(copied)  # or it could not be installed
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    names = [name for name, _ in found]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert dict(found)["USER"] == "daajax"
    assert isinstance(json.loads(dict(found)["CMD"]), list)


def test_accelerators_are_the_extras_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for name in ("tpu", "cuda12", "cuda13"):
        assert extras[name] == [f"jax[{name}]"]
        for file in ("Makefile", "launch/Dockerfile"):
            assert name in (ROOT / file).read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "launch/env").glob("*.env")), ids=lambda file: file.name)
def test_variables_are_set_where_they_are_not_and_the_rest_is_off(file):
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    forms = [re.fullmatch(r"(\w+)=\$\{(\w+):-(.+)\}", line) for line in lines]
    assert all(form and form[1] == form[2] for form in forms)
    assert [line.partition("=")[0] for line in lines] == ["GLIBC_TUNABLES"]
    off = re.findall(r"^# (\w+)=\$\{(\w+):-.+\}$", file.read_text(), re.MULTILINE)
    assert all(name == again and not name.startswith("XLA_FLAGS") for name, again in off)
    shown = f"set -a; . {file}; env"
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in run_bash(shown)
    assert "GLIBC_TUNABLES=mine" in run_bash("GLIBC_TUNABLES=mine; " + shown)


def run_bash(text: str) -> list[str]:
    found = subprocess.run(
        ["bash", "-c", text], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()
