"""What every test runs under: eight CPU devices, shapes checked, compiled programs kept, no network."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "jax"
CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook  # noqa: E402 - the variables come first

install_import_hook("daajax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Folder of real data and the tiny model; without it the test is skipped, visibly."""
    folder = os.environ.get("DAAJAX_ASSETS")
    if not folder:
        pytest.skip("DAAJAX_ASSETS is not set: no real data")
    return pathlib.Path(folder)
