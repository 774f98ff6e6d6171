"""What makes a run smaller: values that the options allow, from the run's own, first what leaves its numbers alone."""

import re

import numpy as np
import pytest

from configs import base
from daajax.config import every_option, resolve
from daajax.data.packing import pack
from daajax.data.windows import training_windows
from daajax.folder import may_change
from daajax.remedies import OFFERED, remedies
from tests.data.test_windows import random_sizes

ONE, FOUR = dict(data=1, fsdp=1, tensor=1, context=1), dict(data=1, fsdp=4, tensor=1, context=1)
REPLICAS, CUT = dict(data=2, fsdp=2, tensor=1, context=1), dict(data=1, fsdp=1, tensor=1, context=4)


def config_of(**options):
    config = base.get_config()
    config.model.path, config.data.path, config.steps = "model", "pairs", 1
    config.update_from_flattened_dict(options)
    return resolve(config)


def new_values(remedy):
    """By option; a row's length is text, as on the command line."""
    values = {name: value for name, (value, _) in remedy.values.items()}
    return values | {name: str(value) for name, value in values.items() if name == "packing.row_length"}


def words_of(options, mesh, **given):
    return [remedy.words() for remedy in remedies(config_of(**options), mesh, **given)]


def test_every_slice_keeps_a_replica():
    mesh = {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    for slices, wanted in {1: (1, 8), 2: (2, 4)}.items():
        (found, *_) = words_of({}, mesh, of_state=True, slices=slices)
        assert found == f"set mesh.data={wanted[0]} and mesh.fsdp={wanted[1]} in place of 4 and 2"
    assert not [found for found in words_of({}, mesh, of_state=True, slices=4) if "mesh.data" in found]


NEW = " (changes what is learned, so in a new run)"
FIXED = {"packing.row_length": "1024"}


@pytest.mark.parametrize(
    ("options", "mesh", "head", "wanted"),
    [
        ({}, ONE, "row", ["micro_batches=2 in place of 1", "remat=dots in place of", "head=token in place of auto"]),
        ({}, ONE, "token", ["micro_batches=2", "remat=dots", "with more devices, set mesh.fsdp=2 in place of 1"]),
        ({"remat": "save_attention"}, FOUR, None, ["micro_batches=2", "remat=full in place of save_att", "=8 in"]),
        # Two micro-batches of four devices' rows would leave rows without a pair: half as many, cut over two each.
        ({"batch_size": 4, "remat": "full"}, FOUR, None,
         ["mesh.fsdp=2 and mesh.context=2 and micro_batches=2 in place of 4 and 1 and 1", "mesh.fsdp=8",
          "max_length=1024 in place of 2048" + NEW]),
        ({"batch_size": 1, "remat": "full"}, CUT, None, ["with more devices, set mesh.context=8 in", "=2 in"]),
        ({"packing.row_length": "2048", "remat": "full"}, CUT, None, ["packing.row_length=1024 and micro_batches=2"]),
        # As many tokens whatever is in them: rows of half the length, or half the rows, in twice as many parts.
        (FIXED, ONE, None, ["packing.row_length=512 and micro_batches=2 in place of 1024 and 1", "remat=dots"]),
        (FIXED | {"packing.rows": 8}, FOUR, None, ["packing.rows=4 and micro_batches=2 in place of 8 and 1", "remat"]),
        (FIXED | {"packing.rows": 4}, FOUR, None, ["packing.row_length=512 and micro_batches=2", "remat=dots"]),
        ({"packing.row_length": "128", "remat": "full"}, ONE, None, ["with more devices, set mesh.fsdp=2"]),
        ({"packing.enabled": False, "packing.rows": 64}, ONE, None, ["packing.rows=32 and micro_batches=2", "remat"]),
        ({"packing.rows": 4}, FOUR, None, ["set micro_batches=2 in place of 1", "remat=dots"]),
        ({"max_length": 3, "batch_size": 1, "remat": "full"}, ONE, None, ["mesh.context=2", "mesh.fsdp=2", "mu_dtype"]),
    ],
)  # fmt: skip
def test_what_leaves_the_numbers_of_a_large_update_alone_comes_first(options, mesh, head, wanted):
    found = words_of(options, mesh, of_state=False, head=head)
    assert [part in line for part, line in zip(wanted, found, strict=False)] == [True] * len(wanted), found


@pytest.mark.parametrize(
    ("options", "mesh", "platform", "wanted"),
    [
        ({}, ONE, "tpu", ["optimizer.offload=True in place of False", "mu_dtype=bfloat16 in place of None" + NEW,
                          "lora.rank=16 in place of 0" + NEW]),
        ({}, FOUR, "cpu", ["optimizer.mu_dtype", "lora.rank", "with more devices, set mesh.fsdp=8 in place of 4"]),
        ({}, REPLICAS, "gpu", ["mesh.data=1 and mesh.fsdp=4 in place of 2 and 2", "optimizer.offload", "mu_dtype"]),
        ({"optimizer.name": "sgd"}, ONE, "gpu", ["lora.rank=16", "with more devices", "micro_batches=2"]),
        ({"optimizer.name": "sgd", "optimizer.b1": 0.9}, ONE, "gpu", ["optimizer.offload", "mu_dtype", "lora.rank"]),
        ({"optimizer.name": "rmsprop"}, ONE, "gpu", ["optimizer.offload", "lora.rank", "with more devices"]),
        ({"optimizer.name": "adafactor"}, ONE, "gpu", ["lora.rank", "with more devices", "micro_batches"]),
        ({"optimizer.offload": True, "optimizer.mu_dtype": "bfloat16"}, ONE, "gpu", ["lora.rank", "with", "micro"]),
        ({"lora.rank": 8}, FOUR, "gpu", ["lora.quantization=nf4 in place of None" + NEW, "with more devices", "micro"]),
        ({"lora.rank": 8, "lora.quantization": "int8"}, ONE, "gpu", ["with more devices", "micro_batches", "remat"]),
    ],
)  # fmt: skip
def test_a_large_state_is_made_smaller_by_what_applies(options, mesh, platform, wanted):
    found = words_of(options, mesh, of_state=True, platform=platform)
    assert [part in line for part, line in zip(wanted, found, strict=True)] == [True] * OFFERED, found


CONFIGS = [
    {},
    {"lora.rank": 4},
    {"batch_size": 1, "max_length": 2, "remat": "full"},
    {"batch_size": 3, "max_length": 5, "micro_batches": 3},
    {"packing.row_length": "128"},
    {"packing.row_length": "384", "packing.rows": 12, "batch_size": 48},
    {"packing.enabled": False, "packing.row_length": "2048"},
    {"optimizer.name": "adafactor"},
    {"optimizer.name": "lion", "remat": "save_except_mlp"},
    {"optimizer.name": "sgd"},
    {"reference.mode": "ema"},
    {"loss": base.loss("simpo"), "reference.mode": "none"},
]


CASES = [(ONE, False, "cpu", "row"), (FOUR, True, "gpu", "token"), (REPLICAS, False, "tpu", "token"),
         (REPLICAS, True, "cpu", "row"), (CUT, False, "tpu", "token")]  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: " ".join(map(str, options)))
def test_every_value_is_one_that_the_options_allow_and_is_said_with_what_it_takes(options):
    for mesh, of_state, platform, head in CASES:
        options = options | {f"mesh.{axis}": count for axis, count in mesh.items()}
        found = remedies(config_of(**options), mesh, of_state=of_state, platform=platform, head=head)
        assert 1 <= len(found) <= OFFERED
        for remedy in found:
            said = remedy.words()
            printed = dict(pair.split("=") for pair in re.findall(r"[\w.]+=\S+", said))
            assert printed == {name: str(value) for name, (value, _) in remedy.values.items()}
            changed = dict(every_option(config_of(**options | new_values(remedy)).to_dict()))
            before = dict(every_option(config_of(**options).to_dict()))
            assert {name: str(changed[name]) for name in printed} == printed
            assert all(changed[name] != before[name] for name in printed)
            devices = np.prod([remedy.values.get(f"mesh.{axis}", (mesh[axis],))[0] for axis in mesh])
            assert (devices > np.prod(list(mesh.values()))) == said.startswith("with more devices, ")
            assert ("in a new run" in said) == (not all(map(may_change, printed)))


@pytest.mark.parametrize(
    "options",
    [{}, {"packing.row_length": "8192"}, {"packing.row_length": "6144", "packing.rows": 4}, {"packing.rows": 4},
     {"packing.enabled": False, "packing.rows": 64}],
    ids=str,
)  # fmt: skip
def test_smaller_parts_are_smaller_in_the_plan(options):
    sizes, config = random_sizes(256), config_of(**options)
    windows = training_windows(sizes, batch_size=64, updates=4, shuffle=True, seed=0)

    def tokens(config):
        length = config.packing.row_length
        plan = pack(
            windows,
            sizes,
            packing=config.packing.enabled,
            micro_batches=config.micro_batches,
            row_multiple=1,
            rows=config.packing.rows,
            row_length=None if length == "auto" else int(length),
        )
        return plan.rows * plan.shape(0).length

    first = remedies(config, ONE, of_state=False)[0]
    changed = config_of(**options | new_values(first))
    assert tokens(changed) < 0.7 * tokens(config)
