"""The README's table of objectives is the code's."""

import pathlib

from daajax.losses import catalogue

README = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_the_table_that_the_code_makes():
    assert catalogue.table() in README, "run python -m daajax.losses.catalogue and put what it prints into README.md"
