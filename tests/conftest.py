"""What every test runs under: eight CPU devices, shapes checked, compiled programs kept, no network."""

import contextlib
import gc
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

from jaxtyping import _import_hook, install_import_hook  # noqa: E402 - the variables come first


class _OutermostOnly(_import_hook.JaxtypingTransformer):
    """Checks functions of modules and classes; those inside of functions would be compiled at every call."""

    def visit_FunctionDef(self, node):  # noqa: N802 - the name that ast.NodeVisitor looks for
        body, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = body
        return node


_import_hook.JaxtypingTransformer = _OutermostOnly
install_import_hook("daajax", "beartype.beartype")

import huggingface_hub  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from daajax import bucket as bucket_paths  # noqa: E402
from daajax import data_copies  # noqa: E402
from daajax.data import token_cache  # noqa: E402
from daajax.models import bucket as buckets  # noqa: E402
from tests import stores  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.freeze()  # what is imported by now stays, and is not gone through in every collection


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What a module has traced is of no use to the next one: gigabytes, which every collection would go through."""
    yield
    jax.clear_caches()
    gc.collect()


@contextlib.contextmanager
def _optimized(is_asked):
    """All optimizations of the compiler, where they are asked for, also in processes that are started meanwhile.

    XLA reads its flags once: those of this process stay.
    """
    if not is_asked or "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        yield
        return
    before = {name: os.environ.pop(name, None) for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    os.environ.update({name: value for name, value in before.items() if value is not None})
    jax.config.update("jax_disable_most_optimizations", before["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


@pytest.fixture(scope="module", autouse=True)
def optimizations_of_module(request):
    """Those of a module that is marked `optimized`, what its tests share included."""
    with _optimized(any(mark.name == "optimized" for mark in request.node.iter_markers())):
        yield


@pytest.fixture(autouse=True)
def optimizations(request, optimizations_of_module):
    """Those of a test that is marked `optimized`."""
    with _optimized(request.node.get_closest_marker("optimized") is not None):
        yield


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Folder of real data and the tiny model; without it the test is skipped, visibly."""
    folder = os.environ.get("DAAJAX_ASSETS")
    if not folder:
        pytest.skip("DAAJAX_ASSETS is not set: no real data")
    return pathlib.Path(folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, as HF_ENDPOINT and HF_HOME would name it and its cache."""
    hub = stores.Hub()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub.serving():
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
        huggingface_hub.close_session()  # it keeps connections


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A bucket, and caches for what lies in it."""
    bucket = stores.Bucket()
    with bucket.serving():
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", stores.TOKEN)
        monkeypatch.setattr(buckets, "CACHE", tmp_path / "buckets")
        monkeypatch.setattr(data_copies, "CACHE", tmp_path / "data")
        monkeypatch.setattr(token_cache, "LOCAL", tmp_path / "tokens")
        bucket_paths.store_of.cache_clear()
        yield bucket
        bucket_paths.store_of.cache_clear()
