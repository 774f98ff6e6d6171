import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from daajax import flops, metrics
from daajax.chips import Peak
from daajax.data.packing import Plan, Shape
from daajax.flops import Counts
from daajax.losses.objective import Losses
from daajax.losses.scores import Responses


def examples(count=6, responses=2, seed=0):
    """Log-probs and rewards; every second example is a slot without one, full of what must not be logged."""
    rng = np.random.default_rng(seed)
    logps, ratios, rewards = rng.normal(size=(3, count, responses)).astype(np.float32)
    lengths = rng.integers(1, 9, (count, responses)).astype(np.int32)
    real = np.arange(count) % 2 == 0
    for array in (logps, ratios, rewards):
        array[~real] = np.nan
    return real, logps, ratios, rewards, lengths


def logged(real, logps, ratios, rewards, lengths, *, results=None, count=None):
    if results is None:
        losses = jnp.zeros(len(real))
        results = [("dpo", jnp.float32(0.5), Losses(losses, None if rewards is None else jnp.asarray(rewards), {}))]
    responses = Responses(jnp.asarray(logps), None if ratios is None else jnp.asarray(ratios), jnp.asarray(lengths))
    count = real.sum() if count is None else count
    return metrics.of_examples(jnp.float32(0.5), results, responses, jnp.asarray(real), jnp.float32(count))


def test_pairs_log_means_over_examples_and_the_largest_log_ratio():
    real, logps, ratios, rewards, lengths = examples()
    found = logged(real, logps, ratios, rewards, lengths).values()
    (c, r), (qc, qr), (uc, ur) = (x[real].astype(np.float64).T for x in (logps, ratios, rewards))
    wanted = {
        "loss": 0.5,
        "logps/chosen": c.mean(),
        "logps/rejected": r.mean(),
        "rewards/chosen": uc.mean(),
        "rewards/rejected": ur.mean(),
        "rewards/margins": (uc - ur).mean(),
        "rewards/accuracies": (uc > ur).mean(),
        "displacement/chosen": qc.mean(),
        "displacement/rejected": qr.mean(),
        "displacement/chosen_fell": (qc < 0).mean(),
        "log_ratios/largest": np.abs(ratios[real]).max(),
        "log_ratios/largest_per_sqrt_token": (np.abs(ratios[real]) / np.sqrt(lengths[real])).max(),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-6)
    assert {value.shape for value in found.values()} == {()}


def test_parts_combine_to_the_whole():
    whole = examples(12)
    parts = [[x[start : start + 4] for x in whole] for start in (0, 4, 8)]
    each = [logged(*part, count=6) for part in parts]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    found, wanted = stacked.combined().values(), logged(*whole).values()
    assert float(found.pop("loss")) == 3 * float(wanted.pop("loss"))  # shares of it, which add up
    assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-6)


def test_of_lists_the_rejected_are_the_mean_of_the_others_and_accuracy_that_of_the_order():
    real, logps, ratios, rewards, lengths = examples(responses=4)
    lengths[:3, 3] = 0  # ragged lists
    found = logged(real, logps, ratios, rewards, lengths).values()
    others, orders = [], []
    for row, size in zip(rewards[real].astype(np.float64), (lengths[real] > 0).sum(axis=1), strict=True):
        others.append(row[1:size].mean())
        orders.append(np.mean([row[i] > row[j] for i in range(size) for j in range(i + 1, size)]))
    assert float(found["rewards/rejected"]) == pytest.approx(np.mean(others), rel=1e-6)
    assert float(found["rewards/chosen"]) == pytest.approx(rewards[real, 0].mean(), rel=1e-6)
    assert float(found["rewards/accuracies"]) == pytest.approx(np.mean(orders), rel=1e-6)


def test_of_labelled_responses_the_chosen_are_the_wanted_ones():
    real, logps, ratios, rewards, lengths = examples(12, responses=2)  # the second is another example's
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], np.int32)
    result = Losses(jnp.zeros(12), jnp.asarray(rewards), {})
    responses = Responses(*(jnp.asarray(x) for x in (logps, ratios, lengths)), labels=jnp.asarray(labels))
    found = metrics.of_examples(
        jnp.float32(0), [("kto", jnp.float32(0), result)], responses, jnp.asarray(real), jnp.float32(6), jnp.float32(2)
    ).values()
    wanted, unwanted = real & (labels == 1), real & (labels == 0)
    for name, values in (("rewards", rewards), ("logps", logps), ("displacement", ratios)):
        assert float(found[f"{name}/chosen"]) == pytest.approx(values[wanted, 0].mean(), rel=1e-5)
        assert float(found[f"{name}/rejected"]) == pytest.approx(values[unwanted, 0].mean(), rel=1e-5)
    assert float(found["displacement/chosen_fell"]) == pytest.approx((ratios[wanted, 0] < 0).mean())
    assert float(found["rewards/margins"]) == pytest.approx(
        rewards[wanted, 0].mean() - rewards[unwanted, 0].mean(), rel=1e-5
    )
    assert "rewards/accuracies" not in found


def test_without_pairs_nothing_is_said_of_rejected_ones():
    found = logged(*examples(responses=1)).values()
    assert not [name for name in found if "rejected" in name or name.startswith("rewards/")]
    assert {"loss", "logps/chosen", "displacement/chosen"} <= set(found)


def test_without_a_reference_nothing_is_said_of_log_ratios():
    real, logps, _, _, lengths = examples()
    assert set(logged(real, logps, None, None, lengths).values()) == {"loss", "logps/chosen", "logps/rejected"}


def test_a_tie_is_no_accuracy():
    rewards = np.zeros((2, 2), np.float32)
    found = logged(np.ones(2, bool), rewards, rewards, rewards, np.ones((2, 2), np.int32)).values()
    assert float(found["rewards/accuracies"]) == 0


def test_several_terms_are_logged_by_name_with_the_rewards_of_the_first_that_has_any():
    real, logps, ratios, rewards, lengths = examples()
    blank = jnp.zeros(6)
    results = [
        ("sft", jnp.float32(0.2), Losses(blank, None, {})),
        ("dpo", jnp.float32(0.3), Losses(blank, jnp.asarray(rewards), {"gradient_weight": jnp.asarray(rewards[:, 0])})),
        ("simpo", jnp.float32(0.4), Losses(blank, jnp.ones((6, 2)), {})),
    ]
    found = logged(real, logps, ratios, None, lengths, results=results).values()
    assert [float(found[f"loss/{name}"]) for name in ("sft", "dpo", "simpo")] == pytest.approx([0.2, 0.3, 0.4])
    assert float(found["rewards/chosen"]) == pytest.approx(rewards[real, 0].mean(), rel=1e-6)
    assert float(found["gradient_weight"]) == pytest.approx(rewards[real, 0].mean(), rel=1e-6)


WRITTEN = {1: {"loss": 0.1 + 0.2, "rewards/margins": -1e-9}, 2: {"loss": math.pi}}


def test_lines_can_be_read_at_once_and_those_of_a_later_writer_follow(tmp_path):
    for step, values in WRITTEN.items():
        writer = metrics.Writer(tmp_path)
        writer.write(step, values)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, **values}  # before it is closed
        writer.close()
    assert len(lines) == 2


def test_events_hold_the_same_numbers(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step, values in WRITTEN.items():
        writer.write(step, values)
    writer.close()
    events = {}
    for file in (tmp_path / "tensorboard").iterdir():
        content = file.read_bytes()
        while content:  # length, its checksum, an event, its checksum
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            events.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
            content = content[16 + size :]
    assert events == pytest.approx(
        {(step, name): value for step, values in WRITTEN.items() for name, value in values.items()}, rel=1e-6
    )


# ---------------------------------------------------------------------- the clock


@pytest.fixture
def clocked(monkeypatch):
    """A clock of a run of 20 updates of two examples, and the seconds it reads."""
    seconds = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: seconds[0])
    windows = np.arange(40).reshape(20, 2) % 10
    places = np.zeros_like(windows)
    plan = Plan(windows, places, (Shape(128, 2, 8, 128),), places[:, 0], 1, 1, 1, True, {"length": 0.5}, 128, ())
    lengths = np.stack([np.arange(10), np.ones(10, int)], axis=1)  # example n has n + 1 tokens
    return lambda done, meters=None: metrics.Clock(plan, lengths, done, meters), seconds


def test_the_clock_divides_by_the_updates_since_it_was_read(clocked):
    make, seconds = clocked
    clock = make(0)
    seconds[0] += 4.0
    read = clock.read(3)  # updates 0 to 3 hold examples 0 to 7
    assert read["update_seconds"] == 1.0
    assert read["pairs_per_second"] == 2.0
    assert (read["num_tokens"], read["tokens_per_second"]) == (36, 9.0)
    assert read["epoch"] == 0.8
    seconds[0] += 1.0
    assert clock.read(4)["update_seconds"] == 1.0


def test_the_clock_says_how_long_an_update_waited_for_its_data(clocked):
    make, seconds = clocked
    clock = make(0)
    for wait in (3.0, 0.0, 1.0, 0.0):
        with clock.waiting():
            seconds[0] += wait
        seconds[0] += 1.0
    read = clock.read(3)
    assert (read["update_seconds"], read["data_wait_seconds"]) == (2.0, 1.0)
    seconds[0] += 1.0
    assert clock.read(4)["data_wait_seconds"] == 0.0


def test_the_clock_leaves_out_what_was_done_between_updates(clocked):
    make, seconds = clocked
    clock = make(0)
    seconds[0] += 7.0
    clock.restart(7)  # a checkpoint after 7 updates of a second each …
    seconds[0] += 50.0
    clock.restart(7)  # … took 50 seconds
    seconds[0] += 3.0
    assert clock.read(9)["update_seconds"] == 1.0


def test_a_run_that_goes_on_counts_from_where_it_was(clocked):
    make, seconds = clocked
    clock = make(5)
    seconds[0] += 2.0
    read = clock.read(5)
    assert read["update_seconds"] == 2.0
    assert read["num_tokens"] == 55 + 3  # an epoch, then examples 0 and 1


def meters(peak):
    """Of a run whose every update needs 6 TFLOP and asks for 12, half of them for padding, on two chips."""
    updates = np.arange(21) * 1e12
    steps = dict(head=6.0 * updates, remat=8 * updates, sharing=8 * updates, packing=16 * updates)
    return metrics.Meters(Counts(6 * updates, steps), Peak(2, peak, ""))


def test_utilization_is_what_was_asked_for_times_its_factors(clocked):
    make, seconds = clocked
    clock = make(0, meters(2 * 16e12))
    seconds[0] += 8.0  # four updates of 2 seconds
    read = clock.read(3)
    assert read["hfu"] == 0.25  # of 2 × 32 TFLOP, 16
    assert read["mfu"] == pytest.approx(6 / 64)
    factors = {name: read[f"mfu/{name}"] for name in ("head", "remat", "sharing", "packing")}
    assert factors == dict(head=1, remat=0.75, sharing=1, packing=0.5)
    assert read["mfu"] == pytest.approx(read["hfu"] * math.prod(factors.values()))
    assert read["pairs_per_second_per_chip"] == read["pairs_per_second"] / 2 == 0.5
    assert read["tokens_per_second_per_chip"] == read["tokens_per_second"] / 2


def test_without_a_peak_there_are_the_factors_alone(clocked):
    make, seconds = clocked
    clock = make(0, meters(None))
    seconds[0] += 1.0
    read = clock.read(0)
    assert {name for name in read if "fu" in name} == {f"mfu/{step}" for step in flops.STEPS}
