"""Options of XLA's compilers: named sets, single options, and what is refused before anything is compiled."""

import jax
import pytest

from daajax import compiler_options, sharding
from daajax.compiler_options import SETS
from daajax.errors import UserError
from tests import worlds


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def test_a_single_option_is_taken_with_its_value_and_the_later_one_holds(mesh):
    given = ("xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math=False", "xla_backend_optimization_level=1")
    expected = {"xla_cpu_enable_fast_math": False, "xla_backend_optimization_level": "1"}
    assert compiler_options.chosen(given, mesh) == expected
    assert compiler_options.chosen((), mesh) == {}


def test_a_set_is_the_options_that_the_table_has(mesh, monkeypatch):
    monkeypatch.setitem(SETS, "cpu", {"quick": {"xla_backend_optimization_level": "0"}})
    given = ("quick", "xla_cpu_enable_fast_math=true")
    expected = {"xla_backend_optimization_level": "0", "xla_cpu_enable_fast_math": True}
    assert compiler_options.chosen(given, mesh) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("latency_hiding", r"'latency_hiding', which is of another platform than cpu; its sets: none\.$"),
        ("xla_tpu_scoped_vmem_limit_kib=1", r"'xla_tpu_scoped_vmem_limit_kib=1', which is of another platform"),
        ("xla_nope=true", r"^config.compiler_options: .* refuses xla_nope=True \(.*No such compile option: 'xla_nope'"),
        ("xla_cpu_enable_fast_math=perhaps", r"refuses xla_cpu_enable_fast_math=perhaps \(.*not a valid bool"),
    ],
)
def test_what_the_platforms_compiler_would_not_take_is_refused_in_one_line(mesh, given, message):
    with pytest.raises(UserError, match=message) as error:
        compiler_options.chosen((given,), mesh)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["fast", 1])
def test_a_name_that_no_platform_has_is_refused_with_the_config(given):
    with pytest.raises(UserError, match=r"holds .*, which is no set \(tpu: async_collectives.*gpu: latency_hiding"):
        worlds.parse("--config.model.path=m", "--config.data.path=d", f"--config.compiler_options=({given!r},)")


def test_no_two_platforms_have_a_set_of_the_same_name():
    names = [name for sets in SETS.values() for name in sets]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_run_compiles_its_update_and_its_reference_pass_with_them(tmp_path, monkeypatch):
    world = worlds.make_world(tmp_path / "world")
    given, jit = [], jax.jit

    def spied(function=None, **options):
        given.append((getattr(function, "__name__", ""), options.get("compiler_options")))
        return jit(function, **options) if function is not None else lambda f: spied(f, **options)

    monkeypatch.setattr(jax, "jit", spied)
    option = "--config.compiler_options=('xla_cpu_enable_fast_math=false',)"
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", option)
    told = {name for name, options in given if options == {"xla_cpu_enable_fast_math": False}}
    assert told == {"update", "score"}
