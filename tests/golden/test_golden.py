"""Golden numbers of published code, and the command that checks any folder of them."""

import json
import subprocess
import sys

import pytest

from tests.golden import check
from tests.golden.cases import COMMITTED, TOKEN_INPUTS, Case, read

FILES = sorted(path for path in COMMITTED.glob("*.json") if path.name != TOKEN_INPUTS)


def cases_of(path):
    return [case for case in read(path) if isinstance(case, Case)]


# Those that compile for more than 8 s.
LONG = ("alphapo", "bco", "aot", "dpo_plackett_luce", "online_dpo", "ld_dpo")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONG else ()) for path in FILES],
)
def test_numbers_are_those_of_published_code(path):
    verdicts = list(check.check_file(path))
    assert [verdict.outcome for verdict in verdicts] == ["passed"] * len(cases_of(path)), "\n".join(
        line for verdict in verdicts for line in verdict.lines
    )


def test_every_committed_file_is_of_an_objective_that_can_be_read():
    assert {path.stem for path in FILES} == set(check.FILES)


# ---------------------------------------------------------------------- the command


def run(capsys, *arguments):
    code = check.main(list(map(str, arguments)))
    output = capsys.readouterr().out.splitlines()
    return code, output[:-1], output[-1]


def committed(name):
    return json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_command_ends_with_a_line_of_counts():
    """As a user types it, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.golden.check", str(COMMITTED / "absent")],
        cwd=COMMITTED.parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"
    assert ended.returncode == 1


def test_a_folder_that_is_right_passes(tmp_path, capsys):
    for name in ("tr_dpo", "d2po"):
        write(tmp_path, f"{name}.json", committed(name))
    write(tmp_path, "README.md", "not of the golden numbers")
    assert run(capsys, tmp_path) == (0, [], "2 passed, 0 failed, 0 skipped")


@pytest.mark.parametrize(("place", "dtypes"), [("losses", 2), ("loss_mean", 2), ("grads", 2)])
def test_a_wrong_number_is_printed_beside_ours(place, dtypes, tmp_path, capsys):
    content = committed("dpo")
    outputs = content["cases"][2]["outputs"]
    if place == "grads":
        right = outputs["grads"]["policy_rejected_logps"][3]
        outputs["grads"]["policy_rejected_logps"][3] = wrong = right * (1 + 1e-4)
    elif place == "losses":
        right = outputs["losses"][3]
        outputs["losses"][3] = wrong = right * (1 + 1e-4)
    else:
        right = outputs["loss_mean"]
        outputs["loss_mean"] = wrong = right * (1 + 1e-4)
    write(tmp_path, "dpo.json", content)
    code, lines, last = run(capsys, tmp_path)
    assert (code, last) == (1, f"{len(content['cases']) - 1} passed, 1 failed, 0 skipped")
    assert len(lines) == dtypes
    assert all("dpo.json case 2" in line and f"expected {wrong!r}" in line and place in line for line in lines)
    assert f"got {right!r}"[:12] in lines[0]


def test_float64_is_held_to_the_tolerance_of_the_case(tmp_path, capsys):
    content = committed("dpo")
    content["cases"] = content["cases"][:1]
    content["cases"][0]["outputs"]["losses"][0] *= 1 + 1e-9  # float32 cannot tell
    write(tmp_path, "dpo.json", content)
    code, (line,), _ = run(capsys, tmp_path)
    assert (code, "float64 losses[0]" in line) == (1, True)


def one_case(change):
    content = committed("dpo")
    content["cases"] = content["cases"][:1]
    change(content, content["cases"][0])
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one_case(lambda file, case: case["hyperparameters"].update(gamma=1.0)), "hyper-parameters {'gamma': 1.0}"),
        (one_case(lambda file, case: case["hyperparameters"].update(beta=-1)), "beta=-1.0 must be > 0"),
        (one_case(lambda file, case: case["outputs"].update(entropy=[1.0])), r"outputs ['entropy']"),
        (one_case(lambda file, case: case["outputs"].update(loss_mean=[1.0, 2.0])), "got the shape (), expected (2,)"),
        (one_case(lambda file, case: case["outputs"].update(losses=[None] * 16)), "nonfinite_as_null"),
        (one_case(lambda file, case: case.update(grad_of="median")), "grad_of='median'"),
        (one_case(lambda file, case: case.update(inputs="other")), "no set of inputs 'other'"),
        (one_case(lambda file, case: case.pop("rtol")), "KeyError: 'rtol'"),
        (one_case(lambda file, case: file["inputs"]["main"].pop("policy_chosen_logps")), "policy_chosen_logps"),
        (one_case(lambda file, case: file.update(name="ppo")), "'ppo' is none of the objectives"),
        ({"name": "dpo", "inputs": {}}, "no list of cases"),
        ("{", "unreadable"),
        ("[]", "no list of cases"),
    ],
)
def test_what_cannot_be_checked_is_a_failure_that_says_what(content, message, tmp_path, capsys):
    write(tmp_path, "strange.json", content)
    code, lines, last = run(capsys, tmp_path)
    assert (code, last) == (1, "0 passed, 1 failed, 0 skipped")
    assert lines
    assert all("strange.json" in line and message in line for line in lines)


def test_an_unknown_value_is_a_failure_that_names_it(tmp_path, capsys):
    content = committed("xpo")
    content["cases"][0]["hyperparameters"]["link"] = "cubic"
    write(tmp_path, "xpo.json", content)
    code, (line,), last = run(capsys, tmp_path)
    assert (code, last) == (1, "1 passed, 1 failed, 0 skipped")
    assert "link='cubic' is none of ['sigmoid', 'ipo']" in line


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_golden_files_is_a_failure(make, tmp_path, capsys):
    folder = tmp_path / "golden"
    if make:
        folder.mkdir()
        write(folder, TOKEN_INPUTS, {})
    code, (line,), last = run(capsys, folder)
    assert (code, last) == (1, "0 passed, 1 failed, 0 skipped")
    assert str(folder) in line


def test_numbers_that_the_source_could_not_represent_are_not_compared(tmp_path, capsys):
    def null(file, case):
        case["nonfinite_as_null"] = True
        case["outputs"]["losses"][2] = case["outputs"]["loss_mean"] = None
        case["outputs"]["grads"]["policy_chosen_logps"][2] = None

    write(tmp_path, "dpo.json", one_case(null))
    assert run(capsys, tmp_path) == (0, [], "1 passed, 0 failed, 0 skipped")


def test_gradients_of_ignored_rows_are_not_compared(tmp_path, capsys):
    def ignore(file, case):
        case["ignore_grad_rows"] = [2]
        case["outputs"]["grads"]["policy_chosen_logps"][2] = 5.0

    write(tmp_path, "dpo.json", one_case(ignore))
    assert run(capsys, tmp_path) == (0, [], "1 passed, 0 failed, 0 skipped")


def test_a_case_of_nothing_but_nulls_is_skipped_with_a_reason_of_its_source(tmp_path, capsys):
    def null(file, case):
        case |= {"nonfinite_as_null": True, "outputs": {"losses": [None] * 16}, "note": "0/0 where policy is reference"}

    write(tmp_path, "dpo.json", one_case(null))
    code, (line,), last = run(capsys, tmp_path)
    assert (code, last) == (0, "0 passed, 0 failed, 1 skipped")
    assert "its source has no finite number" in line
    assert "0/0 where policy is reference" in line
