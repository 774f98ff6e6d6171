import dataclasses
import math

import numpy as np
import pytest

from daajax.data.packing import Plan, Shape, pack, parse_row_length
from daajax.data.sizes import Sizes
from daajax.data.token_cache import tokenized
from daajax.data.windows import sweep_windows, training_windows
from daajax.errors import UserError
from tests.data.test_batches import random_examples, tokenized_data


def needs(data, prefix_sharing):
    """Tokens, row positions, scored tokens and gathered keys of every example, counted by hand."""
    counted = []
    for index, (prompt, *responses) in enumerate(data.lengths.tolist()):
        there = [length for length in responses if length]
        shared = prompt + sum(there)
        copied = sum(prompt + length for length in there)
        scored = sum(data.scored[data.starts[index] : data.starts[index + 1]].tolist())
        counted.append((shared, shared if prefix_sharing else copied, scored, copied))
    return np.array(counted)


def check(plan, data):
    """Every example of every window in exactly one row, and no row above a capacity; totals of the real parts."""
    sizes = needs(data, plan.prefix_sharing)
    real, capacity, visited = np.zeros(4), np.zeros(4), 0
    for update in range(plan.updates):
        shape = plan.shape(update)
        capacities = np.array([shape.length, shape.slots, shape.scored, shape.keys])
        rows = np.zeros((plan.micro_batches * plan.rows, 4), np.int64)
        for example, row in zip(plan.windows[update].tolist(), plan.row_of[update].tolist(), strict=True):
            assert (example < 0) == (row < 0)
            if example >= 0:
                rows[row] += [sizes[example, 1], 1, sizes[example, 2], sizes[example, 3]]
        assert (rows <= capacities).all()
        real += rows.sum(axis=0)
        capacity += len(rows) * capacities
        for part in rows[:, 2].reshape(plan.micro_batches, plan.rows):
            visited += part.max() * plan.rows  # the head's loop ends behind the last scored token of a micro-batch
    efficiency = dict(zip(("length", "slots", "scored", "keys"), real / capacity, strict=True))
    assert plan.efficiency == pytest.approx(efficiency | {"scored visited": real[2] / visited}, rel=1e-12)
    return plan.efficiency


def planned(data, *, prefix_sharing=True, batch_size=8, updates=4, row_multiple=2, **options):
    sizes = Sizes.of(data, prefix_sharing=prefix_sharing)
    order = training_windows(sizes, batch_size=batch_size, updates=updates, shuffle=True, seed=1)
    return pack(order, sizes, row_multiple=row_multiple, **dict(packing=True, micro_batches=1) | options)


@pytest.fixture(scope="module")
def data():
    return tokenized_data(random_examples(48, longest_prompt=60, longest_response=40))


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize(("responses", "ragged"), [(1, False), (2, False), (3, False), (3, True)])
def test_sizes_are_what_examples_take_of_a_row(responses, ragged, prefix_sharing):
    data = tokenized_data(random_examples(30, responses=responses, ragged=ragged))
    sizes = Sizes.of(data, prefix_sharing=prefix_sharing)
    counted = needs(data, prefix_sharing)
    for column, name in enumerate(("tokens", "length", "scored", "keys")):
        np.testing.assert_array_equal(getattr(sizes, name), counted[:, column])


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize(("responses", "ragged"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batches": 2},
        {"micro_batches": 4, "row_multiple": 1},
        {"row_multiple": 8},
        {"rows": 4},
        {"row_length": 512},
        {"row_length": 256, "rows": 8},
        {"shapes": 2},
        {"shapes": 99},
        {"shapes": 2, "row_length": 1024},
        {"packing": False},
        {"packing": False, "micro_batches": 3, "rows": 6},
        {"packing": False, "row_length": 256},
    ],
    ids=str,
)
def test_every_example_lies_in_one_row_and_no_row_exceeds_a_capacity(options, responses, ragged, prefix_sharing):
    examples = random_examples(30, responses=responses, ragged=ragged, longest_prompt=60, longest_response=40)
    data = tokenized_data(examples)
    plan = planned(data, prefix_sharing=prefix_sharing, **options)
    check(plan, data)
    assert plan.windows.shape == plan.row_of.shape == (4, 8)
    assert (plan.micro_batches, plan.prefix_sharing) == (options.get("micro_batches", 1), prefix_sharing)
    assert plan.rows % options.get("row_multiple", 2) == 0
    assert plan.rows == options.get("rows", plan.rows)
    assert len(set(plan.shapes)) == len(plan.shapes) <= options.get("shapes", 1)
    for shape in plan.shapes:
        assert (shape.length % 128, shape.keys % 128, shape.scored % 8) == (0, 0, 0)
    if "row_length" in options:
        assert max(shape.length for shape in plan.shapes) == options["row_length"]
    if not options.get("packing", True):
        assert (np.sort(plan.row_of, axis=1) == np.arange(8)).all()


def test_capacities_are_the_smallest_multiples_that_hold_every_update(data):
    plan = planned(data)
    rows = plan.micro_batches * plan.rows
    sizes = needs(data, True)
    totals = np.zeros((plan.updates, rows, 4), np.int64)
    for update in range(plan.updates):
        for example, row in zip(plan.windows[update], plan.row_of[update], strict=True):
            totals[update, row] += [sizes[example, 1], 1, sizes[example, 2], sizes[example, 3]]
    length, slots, scored, keys = totals.max(axis=(0, 1)).tolist()
    expected = Shape(128 * math.ceil(length / 128), slots, 8 * math.ceil(scored / 8), 128 * math.ceil(keys / 128))
    assert plan.shapes == (expected,)


def test_rows_are_as_few_as_the_mesh_or_the_row_length_allow(data):
    longest = int(needs(data, True)[:, 1].max())
    assert planned(data, row_multiple=4).rows == 4
    plan = planned(data, row_multiple=1, row_length=128 * math.ceil(longest / 128))
    total = needs(data, True)[plan.windows][:, :, 1].sum(axis=1).max()
    assert plan.rows >= total / plan.shapes[0].length
    assert plan.rows < 8  # fewer than one example a row
    fewer = dict(row_multiple=1, rows=plan.rows - 1, row_length=plan.shapes[0].length)
    with pytest.raises(UserError, match=r"packing\.row_length"):
        planned(data, **fewer)


def test_a_micro_batch_takes_its_share_of_the_examples(data):
    plan = planned(data, batch_size=16, updates=3, micro_batches=4, row_multiple=2)
    tokens = needs(data, True)[:, 0]
    for window, row_of in zip(plan.windows, plan.row_of, strict=True):
        shares = [tokens[window[row_of // plan.rows == part]].sum() for part in range(4)]
        assert max(shares) < 1.2 * min(shares)


def test_several_shapes_sort_updates_by_length():
    # One window in two is twice as long: with two shapes neither pays for the other.
    short, long = random_examples(16, seed=1), random_examples(16, seed=2, longest_prompt=200, longest_response=200)
    data = tokenized_data([example for pair in zip(short, long, strict=True) for example in pair])
    sizes = Sizes.of(data, prefix_sharing=True)
    order = np.array([np.arange(0, 16, 2), np.arange(1, 16, 2), np.arange(16, 32, 2), np.arange(17, 32, 2)])
    one, two = (pack(order, sizes, packing=True, micro_batches=1, row_multiple=2, shapes=shapes) for shapes in (1, 2))
    assert two.shape_of.tolist() == [0, 1, 0, 1]
    assert two.shapes[0].length < two.shapes[1].length
    assert two.shapes[1] == one.shapes[0]
    assert check(two, data)["length"] > check(one, data)["length"]


def test_shapes_that_come_out_the_same_are_one():
    # Four updates of the same examples: however they are sorted, they need the same rows.
    data = tokenized_data(random_examples(8))
    order = np.tile(np.arange(8), (4, 1))
    options = dict(packing=True, micro_batches=1, row_multiple=2)
    one, four = (pack(order, Sizes.of(data, prefix_sharing=True), shapes=shapes, **options) for shapes in (1, 4))
    assert four.shapes == one.shapes
    assert four.shape_of.tolist() == [0, 0, 0, 0]
    assert check(four, data) == check(one, data)


def test_a_ragged_last_window_packs_what_there_is():
    data = tokenized_data(random_examples(21))
    sizes = Sizes.of(data, prefix_sharing=True)
    order = sweep_windows(sizes, batch_size=16)
    for packing in (True, False):
        plan = pack(order, sizes, packing=packing, micro_batches=2, row_multiple=2)
        check(plan, data)
        assert (plan.row_of[1] >= 0).sum() == 5


def test_the_plan_does_not_depend_on_the_order_of_two_runs(data):
    first, second = planned(data), planned(data)
    np.testing.assert_array_equal(first.row_of, second.row_of)
    assert first.shapes == second.shapes


def test_rows_that_stay_empty_are_said(data):
    plan = planned(data, batch_size=4, row_multiple=8)
    assert (
        "rows pack badly: 0.5 examples a device and micro-batch; at least 4 pack well (batch_size 32, fewer "
        "micro_batches, or a smaller mesh)" in plan.notices
    )
    assert "50.0 % of the rows are empty" in plan.notices  # 4 examples in 8 rows
    assert set(plan.notices) < set(plan.report())
    assert planned(data, batch_size=8, row_multiple=2).notices == ()


def test_the_report_has_the_layout_and_the_efficiency_of_each_capacity(data):
    plan = dataclasses.replace(
        planned(data),
        shapes=(Shape(256, 5, 72, 384),),
        efficiency={"length": 0.912, "slots": 0.8, "scored": 0.7, "keys": 0.6, "scored visited": 0.99},
    )
    assert isinstance(plan, Plan)
    assert plan.report() == [
        "rows: 1 × 2 of 256 tokens × 5 slots, 72 scored, 384 keys",
        "rows in use: length 91.2 %, slots 80.0 %, scored 70.0 %, keys 60.0 %, scored visited 99.0 %",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 3}, r"^packing\.rows=3 must be a positive multiple of 2, .*$"),
        ({"rows": 0}, r"^packing\.rows=0 must be a positive multiple of 2, .*$"),
        ({"rows": 2, "row_length": 128}, r"^a row would need \d+ tokens but packing\.row_length=128; raise .*$"),
        ({"packing": False, "rows": 2}, r"^packing\.enabled=False gives each of 8 examples a row, but .*rows=2.*$"),
        (
            {"packing": False, "rows": 2, "micro_batches": 3},
            r"^packing\.enabled=False gives each of 8 examples a row, .*micro_batches=3 are fewer; .*$",
        ),
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(options, message):
    data = tokenized_data(random_examples(24, longest_prompt=60, longest_response=30))
    with pytest.raises(UserError, match=message) as error:
        planned(data, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "row_length"), [("auto", None), (128, 128), (2048, 2048), ("128", 128), ("2048", 2048)]
)
def test_a_row_length_is_auto_or_a_number_that_may_come_as_text(option, row_length):
    assert parse_row_length(option) == row_length


@pytest.mark.parametrize(
    "option",
    [200, "200", 64, 0, "0", -128, "-128", "256.0", "1e3", "", "Auto", "none", " 128", "9" * 5000, "128\n", "²", True],
)
def test_any_other_row_length_is_refused_in_one_line(option):
    message = r"^config\.packing\.row_length=.* must be a positive multiple of 128, or auto for the smallest .*$"
    with pytest.raises(UserError, match=message) as error:
        parse_row_length(option)
    assert "\n" not in str(error.value)


def test_an_example_longer_than_a_row_is_named():
    examples = random_examples(8, longest_prompt=10, longest_response=10)
    examples[5] = examples[5]._replace(prompt=[1] * 300)
    data = tokenized_data(examples)
    total = 300 + sum(map(len, examples[5].responses))
    message = rf"^example row/5 takes {total} tokens of a row but packing\.row_length=256; raise .*max_length\.$"
    with pytest.raises(UserError, match=message):
        planned(data, updates=1, row_length=256, names=data.ids)


def lognormal_data(examples, seed):
    """Pairs with lengths as in dialogue data, cut at 1,024: a long tail of prompts, shorter responses."""
    rng = np.random.default_rng(seed)
    prompt = np.clip(rng.lognormal(5.3, 0.8, examples), 8, 960).astype(np.int32)
    responses = np.clip(rng.lognormal(4.8, 0.9, (examples, 2)), 2, 1024 - prompt[:, None]).astype(np.int32)
    lengths = np.concatenate([prompt[:, None], responses], axis=1)
    blank = tokenized_data(random_examples(1))
    total = int(lengths.sum())
    scored = np.repeat(np.tile([False, True, True], examples), lengths.reshape(-1))
    return dataclasses.replace(
        blank,
        tokens=np.zeros(total, np.int32),
        scored=scored,
        lengths=lengths,
        starts=np.concatenate([[0], np.cumsum(lengths.sum(axis=1), dtype=np.int64)]),
        weights=np.ones(examples, np.float32),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_long_tailed_lengths_fill_rows_to_ninety_six_percent(seed):
    data = lognormal_data(1600, seed)
    plan = planned(data, batch_size=64, updates=25, row_multiple=8)
    efficiency = check(plan, data)
    assert efficiency["length"] >= 0.96  # rounding to whole blocks alone costs up to 128 of about 4,000 tokens
    assert efficiency["scored visited"] >= 0.9
    unpacked = planned(data, batch_size=64, updates=25, row_multiple=8, packing=False)
    assert unpacked.efficiency["length"] < 0.6  # what packing is for


def test_four_long_tailed_examples_a_row_fill_it_as_far_as_whole_blocks_allow():
    data = lognormal_data(1600, 2)
    plan = planned(data, batch_size=32, updates=50, row_multiple=8)
    tokens = needs(data, True)[:, 1][plan.windows]
    longest = max(int(tokens.max()), math.ceil(tokens.sum(axis=1).max() / 8))
    assert plan.shapes[0].length <= 128 * math.ceil(longest / 128) + 128
    assert check(plan, data)["scored visited"] >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("row_multiple", [1, 8])
@pytest.mark.parametrize(("name", "least"), [("hh_helpful", 0.97), ("stories_sentiment", 0.96)])
def test_sixteen_real_pairs_fill_a_row(name, least, row_multiple, assets):
    data = tokenized(
        "jsonl", str(assets / f"data/{name}.train.jsonl.gz"), str(assets / "tiny_model"), max_length=512, cache_dir=None
    )
    batch_size = 16 * row_multiple
    plan = planned(data, batch_size=batch_size, updates=len(data.weights) // batch_size, row_multiple=row_multiple)
    efficiency = check(plan, data)
    assert efficiency["length"] >= least
    assert efficiency["scored visited"] >= 0.9
