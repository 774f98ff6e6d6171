import hashlib
import time

import numpy as np
import pytest

from daajax.data.sizes import Sizes
from daajax.data.windows import describe, epochs_of, sweep_windows, take_turns, training_windows, updates_of
from daajax.errors import UserError
from tests.data.test_batches import random_examples, tokenized_data


def random_sizes(examples, seed=0):
    """Sizes of examples as preference data have them: log-normal, cut at 1,024."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(5.5, 0.7, examples), 16, 1024).astype(np.int64)
    scored = (tokens * rng.uniform(0.2, 0.9, examples)).astype(np.int64)
    return Sizes(tokens, tokens, scored, tokens, prefix_sharing=True, predicted=2)


def windows_of(examples=101, *, batch_size=8, updates=40, shuffle=True, seed=3, data_seed=0):
    sizes = random_sizes(examples, data_seed)
    return training_windows(sizes, batch_size=batch_size, updates=updates, shuffle=shuffle, seed=seed)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("updates", [1, 12, 13, 26, 39])  # 101 examples: 12.6 windows of 8 an epoch
def test_more_updates_do_not_change_earlier_ones(shuffle, updates):
    fewer, more = windows_of(updates=updates, shuffle=shuffle), windows_of(updates=40, shuffle=shuffle)
    np.testing.assert_array_equal(fewer, more[:updates])


@pytest.mark.parametrize(("examples", "batch_size"), [(101, 8), (96, 8), (9, 8), (8, 8), (50, 1)])
def test_every_epoch_holds_each_example_once_and_epochs_follow_one_another(examples, batch_size):
    stream = windows_of(examples, batch_size=batch_size, updates=4 * examples // batch_size).reshape(-1)
    epochs = [stream[start : start + examples] for start in range(0, len(stream), examples)]
    for epoch in epochs[:-1]:
        assert sorted(epoch.tolist()) == list(range(examples))
    assert len(set(epochs[-1].tolist())) == len(epochs[-1])


def test_epochs_and_seeds_shuffle_differently_and_one_seed_alike():
    one = windows_of(updates=24)
    np.testing.assert_array_equal(one, windows_of(updates=24))
    assert (one != windows_of(updates=24, seed=4)).mean() > 0.9
    assert (one.reshape(-1)[:90] != one.reshape(-1)[101:191]).mean() > 0.9


def test_shuffling_mixes_the_file_from_one_end_to_the_other():
    # Half of a window's 16 examples come from either half of the file; 4 to 12 is ± 4 standard deviations over
    # 64 windows of sampling without replacement.
    windows = windows_of(1024, batch_size=16, updates=64)
    first_half = (windows < 512).sum(axis=1)
    assert first_half.min() > 0
    assert first_half.max() < 16
    assert abs(first_half.std() - 2) < 0.7  # sqrt(16 · ¼); 0 or 8 if windows followed the file


@pytest.mark.parametrize(("examples", "batch_size"), [(1600, 64), (1601, 64), (1000, 16), (5403, 64)])
@pytest.mark.parametrize("data_seed", [0, 1])
def test_windows_agree_in_tokens_within_one_percent(examples, batch_size, data_seed):
    tokens = random_sizes(examples, data_seed).tokens
    updates = 2 * examples // batch_size  # windows that straddle two epochs included
    windows = windows_of(examples, batch_size=batch_size, updates=updates, data_seed=data_seed)
    totals = tokens[windows].sum(axis=1)
    expected = batch_size * tokens.mean()
    assert totals.max() / totals.min() <= 1.01
    as_drawn = tokens[np.random.default_rng(0).permutation(examples)[: examples // batch_size * batch_size]]
    spread = np.abs(as_drawn.reshape(-1, batch_size).sum(axis=1) / expected - 1).max()
    assert spread > 0.05  # what there was to even out


def test_unshuffled_windows_follow_the_file_round_and_round():
    windows = windows_of(101, updates=40, shuffle=False)
    np.testing.assert_array_equal(windows.reshape(-1), np.arange(320) % 101)


# ---------------------------------------------------------------------- the same as ever

# Digests of windows as commit 6eb4715 made them, the last one before rows were dealt in another way (b3a2645): a run
# that goes on needs the windows that it began with, and the same seed has always meant these.
AS_EVER = [
    ((101, 8, 36), {}, "a3aa4135a252f5b6"),
    ((30, 2, 60), {}, "4c0901bb95407b16"),
    ((50, 5, 40), {}, "4d6c2bad52ec24cf"),
    ((600, 7, 85), {}, "810c61c175116bff"),
    ((300, 16, 55), {}, "b6c654175825f17d"),
    ((101, 3, 100), dict(counts=(70, 21, 10), shares=(0.5, 0.2, 0.3)), "97d96cac975f58c3"),
    ((240, 8, 60), dict(counts=(200, 40), shares=(0.7, 0.3)), "dfd39a000f388156"),
]


@pytest.mark.parametrize(("shape", "mixture", "digest"), AS_EVER)
def test_windows_are_those_that_a_seed_has_always_meant(shape, mixture, digest):
    examples, batch_size, updates = shape
    tokens = np.random.default_rng(0).integers(16, 1024, examples)  # integers, which every machine draws alike
    sizes = Sizes(tokens, tokens, tokens // 3, tokens, prefix_sharing=True, predicted=2)
    if mixture:
        cuts = np.cumsum(mixture["counts"])[:-1]
        mixture = dict(sources=np.split(np.arange(examples), cuts), shares=mixture["shares"])
    windows = training_windows(sizes, batch_size=batch_size, updates=updates, shuffle=True, seed=3, **mixture)
    assert hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()[:16] == digest


# ---------------------------------------------------------------------- several sources


def mixed(counts=(70, 21, 10), shares=(0.5, 0.2, 0.3), *, batch_size=8, updates=40, shuffle=True, seed=3):
    """Windows of a mixture, and the examples of each source."""
    sizes = random_sizes(sum(counts))
    sources = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    windows = training_windows(
        sizes, batch_size=batch_size, updates=updates, shuffle=shuffle, seed=seed, sources=sources, shares=shares
    )
    return windows, sources


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (3.0, 1.0), (0.01, 0.99), (5.0, 3.0, 1.0, 1.0), (1.0,) * 7])
def test_turns_keep_the_shares_at_every_beginning(shares):
    draws = take_turns(shares, 1000)
    parts = np.array(shares) / sum(shares)
    taken = np.cumsum(draws[:, None] == np.arange(len(shares)), axis=0)
    apart = np.abs(taken - np.arange(1, 1001)[:, None] * parts)
    # round(s · T) differs from s · T by at most 1/2, and the T at which n were drawn from n by at most S/2.
    assert (apart <= (1 + parts * len(shares)) / 2 + 1e-9).all()
    np.testing.assert_array_equal(take_turns(shares, 77), draws[:77])
    np.testing.assert_array_equal(take_turns([8 * share for share in shares], 1000), draws)


def test_two_equal_sources_alternate():
    assert take_turns([1.0, 1.0], 6).tolist() == [0, 1, 0, 1, 0, 1]
    # Due at 2/3, 2, 10/3, … and at 2: the first source comes first.
    assert take_turns([3.0, 1.0], 8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("updates", [1, 12, 13, 26, 39])
def test_more_updates_do_not_change_earlier_ones_of_a_mixture(shuffle, updates):
    np.testing.assert_array_equal(mixed(updates=updates, shuffle=shuffle)[0], mixed(shuffle=shuffle)[0][:updates])


def test_unshuffled_each_source_of_a_mixture_follows_its_file_round_and_round():
    windows, sources = mixed(shuffle=False)
    stream = windows.ravel()
    for members, share in zip(sources, (0.5, 0.2, 0.3), strict=True):
        drawn = stream[np.isin(stream, members)]
        np.testing.assert_array_equal(drawn, members[np.arange(len(drawn)) % len(members)])
        assert abs(len(drawn) - share * 320) <= 1.25


def test_an_epoch_of_a_mixture_is_as_many_draws_as_there_are_examples_in_the_shares_asked_for():
    windows, sources = mixed(updates=101)  # 808 draws: 8 epochs of 101
    stream = windows.ravel()
    for start in range(0, 808, 101):
        epoch = stream[start : start + 101]
        for members, share in zip(sources, (0.5, 0.2, 0.3), strict=True):
            assert abs(np.isin(epoch, members).sum() - share * 101) <= 2.5  # 1.25 at either end


def test_a_source_of_a_mixture_is_drawn_whole_before_any_example_of_it_comes_again():
    windows, sources = mixed(updates=101)
    for members, share in zip(sources, (0.5, 0.2, 0.3), strict=True):
        times = np.bincount(windows.ravel(), minlength=101)[members]
        assert times.max() - times.min() <= 1
        assert abs(times.mean() - share * 808 / len(members)) < 0.15
    assert epochs_of(windows, sources) == pytest.approx([404 / 70, 161.6 / 21, 242.4 / 10], abs=0.15)


def test_the_walks_of_a_source_of_a_mixture_differ_from_another_and_between_seeds():
    windows, (_, _, small) = mixed(updates=101)
    drawn = windows.ravel()[np.isin(windows.ravel(), small)]
    assert (drawn[:10] != drawn[10:20]).any()
    assert (windows != mixed(updates=101, seed=4)[0]).mean() > 0.8


def test_one_source_with_a_share_is_drawn_as_one_without():
    windows, _ = mixed((101,), (2.5,))
    np.testing.assert_array_equal(windows, windows_of(101))


@pytest.mark.parametrize("batch_size", [16, 64])
def test_windows_of_a_mixture_agree_in_tokens_within_one_percent(batch_size):
    counts = (1200, 400, 64)
    updates = 3 * sum(counts) // batch_size
    windows, _ = mixed(counts, (0.2, 0.5, 0.3), batch_size=batch_size, updates=updates)
    # Each epoch's windows aim at its own mean; the examples drawn in it differ a little from those of another.
    totals = random_sizes(sum(counts)).tokens[windows].sum(axis=1)
    for epoch in np.array_split(totals[: updates // 3 * 3], 3):
        assert epoch[1:-1].max() / epoch[1:-1].min() <= 1.01


def test_windows_of_a_mixture_do_not_depend_on_the_layout():
    data = tokenized_data(random_examples(40, responses=2, seed=5))
    orders = []
    for prefix_sharing in (True, False):
        sizes = Sizes.of(data, prefix_sharing=prefix_sharing)
        sources = [np.arange(30), np.arange(30, 40)]
        options = dict(batch_size=8, updates=10, shuffle=True, seed=0, sources=sources, shares=[0.4, 0.6])
        orders.append(training_windows(sizes, **options).tolist())
    assert orders[0] == orders[1]


def test_a_million_examples_of_three_sources_are_ordered_in_seconds():
    sizes = random_sizes(1_000_000)
    sources = np.split(np.arange(1_000_000), [700_000, 999_000])
    start = time.perf_counter()
    options = dict(batch_size=512, updates=1953, shuffle=True, seed=0)
    training_windows(sizes, **options)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    training_windows(sizes, **options, sources=sources, shares=[0.5, 0.4, 0.1])
    assert time.perf_counter() - start < 5 * alone + 5


@pytest.mark.parametrize("responses", [1, 2, 3])
def test_windows_do_not_depend_on_the_layout(responses):
    data = tokenized_data(random_examples(40, responses=responses, seed=5))
    orders = []
    for prefix_sharing in (True, False):
        sizes = Sizes.of(data, prefix_sharing=prefix_sharing)
        orders.append(training_windows(sizes, batch_size=8, updates=10, shuffle=True, seed=0).tolist())
    assert orders[0] == orders[1]


def test_fewer_examples_than_an_update_needs_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^data has 7 usable examples but batch_size is 8; .*lower batch_size.*$"):
        windows_of(7, batch_size=8, updates=1)


@pytest.mark.parametrize(("examples", "batch_size"), [(101, 8), (96, 8), (5, 8), (1, 1)])
def test_a_sweep_visits_every_example_once_and_fills_up_at_the_end(examples, batch_size):
    windows = sweep_windows(random_sizes(examples), batch_size=batch_size)
    flat = windows.reshape(-1)
    assert windows.shape == (-(-examples // batch_size), batch_size)
    assert sorted(flat[:examples].tolist()) == list(range(examples))
    assert (flat[examples:] == -1).all()


def test_full_windows_of_a_sweep_agree_in_tokens_within_one_percent():
    sizes = random_sizes(1601)
    windows = sweep_windows(sizes, batch_size=64)
    totals = sizes.tokens[windows[:-1]].sum(axis=1)
    assert totals.max() / totals.min() <= 1.01


def test_a_sweep_of_some_examples_visits_those_and_evens_out_their_tokens():
    sizes = random_sizes(1601)
    some = np.nonzero(sizes.tokens > 250)[0]
    windows = sweep_windows(sizes, batch_size=64, examples=some)
    flat = windows.reshape(-1)
    assert sorted(flat[: len(some)].tolist()) == some.tolist()
    assert (flat[len(some) :] == -1).all()
    totals = sizes.tokens[windows[:-1]].sum(axis=1)
    assert totals.max() / totals.min() <= 1.01


@pytest.mark.parametrize(
    ("steps", "epochs", "examples", "expected"),
    [
        (7, None, 101, 7),
        (None, 1.0, 101, 12),  # ⌊101 / 8⌋
        (None, 2.0, 101, 25),  # ⌊202 / 8⌋, not 2 · ⌊101 / 8⌋
        (None, 3.0, 8, 3),
        (None, 0.5, 101, 6),
    ],
)
def test_a_run_lasts_as_many_updates_as_steps_or_epochs_say(steps, epochs, examples, expected):
    assert updates_of(steps=steps, epochs=epochs, examples=examples, batch_size=8) == expected


@pytest.mark.parametrize("epochs", [None, 0.0, 0.05])
def test_a_run_without_an_update_is_refused(epochs):
    with pytest.raises(UserError, match="give no update; raise them or lower batch_size"):
        updates_of(steps=None, epochs=epochs, examples=101, batch_size=8)


def test_what_the_last_epoch_leaves_over_is_said():
    # 25 · 8 = 200 of 2 · 101 = 202
    assert describe(25, 8, 101).endswith("1.98 epochs of 101; 2 examples of the last epoch are not used")
    assert describe(12, 8, 96).endswith("1.00 epochs of 96; 0 examples of the last epoch are not used")
