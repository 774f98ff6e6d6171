"""The search for a layout: counted, put in order, compiled until one fits; the compiler is a function of the test."""

import pytest

from daajax.models.remat import REMAT
from daajax.planning import report
from daajax.planning.layouts import make_layout, with_options
from daajax.planning.search import count, search
from tests.test_plan import subject

GIB = 2**30


def rank(candidate):
    return round(candidate.time.seconds + candidate.waits, 9)


@pytest.fixture(scope="module")
def counted():
    """Every candidate of a small world."""
    return count(*subject()).candidates


def test_candidates_come_in_the_order_of_time(counted):
    order = [rank(one) for one in counted]
    assert order == sorted(order)
    options = [one.options for one in counted]
    assert {one["remat"] for one in options} == set(REMAT)
    assert {one["mesh.tensor"] for one in options} == {1, 2, 4}
    assert {one["mesh.context"] for one in options} == {1, 2, 4, 8}
    assert {one["micro_batches"] for one in options} >= {1, 2}
    assert {one["packing.rows"] for one in options} >= {None, 16}


def test_no_layout_is_counted_twice(counted):
    options = [tuple(one.options.items()) for one in counted]
    assert len(options) == len(set(options))


def test_the_first_that_fits_is_the_end(counted):
    found = search(counted, GIB, lambda candidate: (candidate == counted[3], "compiled"), tries=10)
    assert found.best is not None
    assert found.best.candidate == counted[3]
    assert [one.fits for one in found.tried] == [False, False, False, True]
    assert (found.too_large, found.left) == (0, len(counted) - 4)
    whole, config = subject()
    make_layout(whole, with_options(config, found.best.candidate.options))  # what is recommended can be run


def test_a_search_ends_after_so_many_tries(counted):
    found = search(counted, GIB, lambda candidate: (False, None), tries=3)
    assert len(found.tried) == 3
    assert found.best is None


def test_what_cannot_fit_is_not_compiled(counted):
    sizes = sorted(one.memory for one in counted)
    memory = sizes[len(sizes) // 2]
    found = search(counted, memory, lambda candidate: (False, None), tries=len(counted))
    assert found.too_large == sum(size > memory for size in sizes)
    assert all(one.candidate.memory <= memory for one in found.tried)
    assert found.left == 0


def test_less_recomputation_comes_before_less_memory(counted):
    for one in counted:
        if one.options["remat"] == "full":
            faster = next(other for other in counted if other.options == one.options | {"remat": "none"})
            assert rank(faster) <= rank(one)
            assert faster.memory > one.memory


def test_what_is_recommended_can_be_pasted():
    options = {"mesh.data": 1, "mesh.fsdp": 8, "packing.rows": None, "remat": "dots"}
    assert report.pasted(options) == (
        "--config.mesh.data=1 --config.mesh.fsdp=8 --config.packing.rows=None --config.remat=dots"
    )
