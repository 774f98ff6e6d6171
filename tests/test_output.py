"""Files that are there whole or not at all."""

import pytest

from daajax import output


def test_a_file_is_made_and_replaced(tmp_path):
    output.write_text(tmp_path / "a.json", "ä\n")
    output.write_text(tmp_path / "a.json", "b\n")
    assert (tmp_path / "a.json").read_bytes() == b"b\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_text_is_utf_8_whatever_the_locale_says(tmp_path):
    output.write_text(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa4"


@pytest.mark.parametrize("before", [None, "whole"])
@pytest.mark.parametrize("written", [None, "ha"])
def test_what_fails_leaves_what_was_there(tmp_path, before, written):
    path = tmp_path / "a"
    if before is not None:
        path.write_text(before)

    def fail():
        with output.replacing(path) as scratch:
            if written is not None:
                scratch.write_text(written)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"a": before} if before else {})


def test_the_old_file_is_there_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    seen = []
    monkeypatch.setattr("os.fsync", lambda _: seen.append((tmp_path / "a").read_text()))
    output.write_text(tmp_path / "a", "new")
    assert seen == ["old"]
    assert (tmp_path / "a").read_text() == "new"


def test_a_folder_in_the_way_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        output.write_text(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
