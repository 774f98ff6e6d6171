"""`python -m daajax.evaluate --output=FILE`: what each held-out example was given."""

import json

import numpy as np
import pytest

from daajax.errors import UserError
from daajax.evaluate import evaluate
from tests import worlds


@pytest.mark.slow
def test_each_example_is_written_with_its_log_probs_and_they_make_the_metrics(tmp_path):
    world = worlds.make_world(tmp_path, count=40)
    worlds.train(tmp_path / "run", *world.flags)
    held_out = worlds.write_rows(
        tmp_path / "held_out.jsonl", [{"id": f"pair {n}", **row} for n, row in enumerate(worlds.pairs(7, seed=1))]
    )
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config.eval_data.path={held_out}"]
    worlds.at(evaluate, tmp_path / "run", *arguments, f"--output={tmp_path / 'after.jsonl'}")
    worlds.at(evaluate, tmp_path / "run", *arguments, "--step=0", f"--output={tmp_path / 'before.jsonl'}")
    after, before = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("after", "before")
    )
    assert [row["id"] for row in after] == [f"pair {n}" for n in range(7)]
    # The reference is the initial policy: a log-ratio is what training added to a log-prob.
    logps, log_ratios, initial = (
        np.array([row[name] for row in rows])
        for rows, name in ((after, "logps"), (after, "log_ratios"), (before, "logps"))
    )
    np.testing.assert_allclose(log_ratios, logps - initial, atol=2e-3)  # sums of 100 nats in float32
    np.testing.assert_allclose(np.array([row["log_ratios"] for row in before]), 0, atol=1e-4)
    values = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(values["eval/logps/chosen"], logps[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(values["eval/rewards/margins"], 0.1 * -np.diff(log_ratios).mean(), rtol=1e-4)
    with pytest.raises(UserError, match=r"--output=.*run exists; name another file"):
        worlds.at(evaluate, tmp_path / "run", *arguments, f"--output={tmp_path / 'run'}")
