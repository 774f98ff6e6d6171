"""Golden numbers worked out here, read by the same command: what the files of published code do not reach."""

import json

import pytest

from tests.golden import check, further_inputs


@pytest.mark.slow  # together
@pytest.mark.parametrize(("name", "content"), [pytest.param(*file, id=file[0]) for file in further_inputs.files()])
def test_numbers_are_those_of_formulas_worked_out_apart(name, content, tmp_path):
    (tmp_path / "case.json").write_text(json.dumps(content))
    (verdict,) = check.check_folder(tmp_path)
    assert verdict.outcome == "passed", "\n".join(verdict.lines)
