import numpy as np
import pytest

from daajax.data import parts
from daajax.data.batches import LAYOUT, Batches
from tests.data.test_batches import planned, random_examples, tokenized_data


@pytest.mark.parametrize(("length", "count"), [(512, 1), (512, 2), (1536, 4), (12288, 4), (65536, 8)])
def test_every_token_lies_in_one_place(length, count):
    order, places = parts.order(length, count), parts.places(length, count)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    np.testing.assert_array_equal(places[order], np.arange(length))
    assert count > 1 or (order == places).all()


def test_chunks_are_dealt_in_turns_there_and_back_and_none_of_several_is_shorter_than_a_block():
    for length, chunks in ((512, [[0, 3], [1, 2]]), (4096, [[0, 3, 4, 7], [1, 2, 5, 6]])):
        size = length // np.size(chunks)
        found = parts.order(length, 2).reshape(2, -1, size)
        np.testing.assert_array_equal(found[:, :, 0], np.array(chunks) * size)
        assert (np.diff(found, axis=2) == 1).all()


def pairs_of_parts(prompt, responses, order, count):
    """Queries and keys of an example on a shared row that see each other, by part, over their mean."""
    seen = [np.arange(1, prompt + 1)]
    seen += [np.arange(prompt + 1, prompt + tokens + 1) for tokens in responses]
    seen = np.concatenate([*seen, np.zeros(len(order))])[: len(order)]
    found = seen[order].reshape(count, -1).sum(axis=1)
    return found / found.mean()


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("length", [1024, 65536])
def test_every_part_of_one_long_sequence_has_as_much_to_do(count, length):
    uncut = pairs_of_parts(0, [length], np.arange(length), count)
    assert uncut.max() == pytest.approx((2 * count - 1) / count, rel=1e-3)  # area of the last strip of a triangle
    assert pairs_of_parts(0, [length], parts.order(length, count), count).max() == pytest.approx(1, rel=1e-6)


def test_no_part_of_a_long_pair_has_much_more_to_do_than_the_others():
    random, length, count = np.random.default_rng(0), 65536, 8
    order, found = parts.order(length, count), []
    for prompt in random.integers(0, length - 2, 50).tolist():
        chosen = int(random.integers(1, length - prompt))
        found.append(pairs_of_parts(prompt, [chosen, length - prompt - chosen], order, count).max())
    # Keys of two queries of a turn differ by at most 1 / 16 of the row, and half a row's keys are seen by a query.
    assert max(found) < 1 + 2 / 16
    assert np.mean(found) < 1.03


@pytest.mark.parametrize("options", [dict(), dict(prefix_sharing=False), dict(packing=False, micro_batches=2)], ids=str)
def test_a_batch_in_parts_is_the_same_batch_and_each_state_lies_with_what_it_predicts(options):
    data = tokenized_data(random_examples(24, responses=3, ragged=True))
    reference = np.random.default_rng(0).normal(size=len(data.tokens)).astype(np.float32)
    whole, cut = (planned(data, row_length=512, parts=count, **options) for count in (1, 4))
    np.testing.assert_array_equal(whole.row_of, cut.row_of)
    for update in range(3):
        one, other = Batches(data, whole, reference)[update], Batches(data, cut, reference)[update]
        order, room = parts.order(512, 4), cut.shape(update).scored // 4
        real = other["owners"] >= 0
        part = np.arange(4 * room) // room
        np.testing.assert_array_equal((other["sources"] // 128)[real], np.broadcast_to(part, real.shape)[real])
        for name, (_, axes, _) in LAYOUT.items():
            if "length" in axes:
                np.testing.assert_array_equal(other[name], one[name][..., order])
            elif "scored" not in axes:
                np.testing.assert_array_equal(other[name], one[name])
        tokens = [_scored_tokens(batch, at) for batch, at in ((one, np.arange(512)), (other, order))]
        assert tokens[0] == tokens[1]


def _scored_tokens(batch, order):
    """What is known of every scored token, in whatever order."""
    found = []
    for part, row, slot in zip(*np.nonzero(batch["owners"] >= 0), strict=True):
        known = [batch[name][part, row, slot].item() for name in ("targets", "owners", "offsets", "reference")]
        found.append((int(part), int(row), int(order[batch["sources"][part, row, slot]]), *known))
    return sorted(found)


def test_a_part_without_room_for_what_it_scores_is_an_error():
    sources, owners = np.zeros((1, 16), int), np.zeros((1, 16), int)
    with pytest.raises(ValueError, match="part 0 of a row scores 16 tokens and has room for 8"):
        parts.scored_places(sources, owners, 256, 2)
