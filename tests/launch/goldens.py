"""What launchers print in dry runs, kept in golden/: WRITE_GOLDENS=1 writes it anew, to be read before a commit."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    """Compares a text with the one that is kept."""
    if os.environ.get("WRITE_GOLDENS") == "1":
        (FOLDER / name).write_text(text)
    assert text == (FOLDER / name).read_text()
