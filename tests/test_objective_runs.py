"""Every objective as a run: by its recipe, on a small world, through the front door."""

import math
import shutil

import numpy as np
import pytest

from configs.published import COMBINED
from daajax.errors import UserError
from daajax.losses.objectives import OBJECTIVES
from tests import worlds

RECIPE = str(worlds.ROOT / "configs" / "dpo_llama.py")
NAMES = [*OBJECTIVES, *COMBINED]

# The first loss when the policy is the reference, in closed form. For the default or published hyper-parameters of each
# recipe; several are functions of them, as the docstrings say.
AT_REFERENCE = {
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "robust": math.log(2),
    "dpo_unweighted": 0.0,
    "plackett_luce": math.log(2),  # ln K!
    "ipo": 25.0,  # 1 / (4 beta²)
    "ipo_mean": 25.0,
    "hinge": 1.0,
    "dpo_norm": math.log(2),
    "spin": math.log(2),
    "cal_dpo": math.log(2) + 0.5 / 0.001**2,
    "dpop": math.log(2),
    "discopop": 0.5 * math.log(2) + 0.5,
    "f_dpo": math.log(2),
    "sppo_hard": 0.5 / 0.001**2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "beta_dpo": math.log(2),
    "kto": 0.5,
    "kto_pair": 0.5,
    "apo_zero_unpaired": 0.5,
    "bco": math.log(2),
    "bco_pair": 2 * math.log(2),
    "nca": 2 * math.log(2),  # -Σ t log σ(0) - Σ (1/K) log σ(0)
    "info_nca": math.log(2),
    "ld_dpo": math.log(2),
    "sampo": math.log(2),
    "tdpo1": math.log(2),
    "tdpo2": math.log(2),
    "mallows_dpo": math.log(2),
    "mallows_ipo": 25.0,
    "d2po": math.log(2),
    "dno": math.log(2),
    "sppo": 0.5 * 2 * (0.4 / 0.001) ** 2,  # win rates of 0.9 and 0.1
    "rebel": 0.8**2,
    "odpo": math.log1p(math.exp(math.log(0.8))),
    "rpo_reward": None,  # below
    "pairwise": math.log(2),
    "tr_dpo": math.log(2),
    "tr_dpo_hard": math.log(2),
}
_P = 1 / (1 + math.exp(-0.8))  # KL(σ(0.8) ‖ ½)
AT_REFERENCE["rpo_reward"] = _P * math.log(2 * _P) + (1 - _P) * math.log(2 * (1 - _P))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs that are easy to tell apart, with win rates; and the same as single responses with theirs."""
    folder = tmp_path_factory.mktemp("world")
    rows = worlds.pairs(40)
    for row in rows:
        row |= {"chosen": row["chosen"] + " happy", "rejected": row["rejected"] + " sad and afraid"}
        row |= {"score_chosen": 0.9, "score_rejected": 0.1}
    single = [{"prompt": row["prompt"], "responses": [row["chosen"]], "scores": [0.9]} for row in rows]
    worlds.write_rows(folder / "single.jsonl", single)
    return worlds.World(folder, worlds.make_model(folder / "model"), worlds.write_rows(folder / "pairs.jsonl", rows))


def flags_of(world, name, *, steps):
    small = ["--config.batch_size=8", f"--config.steps={steps}", "--config.epochs=None", "--config.log.every=1"]
    small += ["--config.model.dtype=float32", "--config.remat=none", "--config.data.shuffle=False"]
    data = world.data.with_name("single.jsonl") if name == "nash_md" else world.data
    return [*world.flags, *small, f"--config.data.path={data}"]


def run(world, workdir, name, *further, steps, devices=1):
    return worlds.train(
        workdir, *flags_of(world, name, steps=steps), *further, recipe=f"{RECIPE}:{name}", devices=devices
    )


# One of each kind: what they compute is held in tests/losses and tests/golden, this is that runs are wired to them.
KINDS = [
    *("dpo", "ipo_mean", "hinge", "cal_dpo", "discopop", "f_dpo", "wpo", "aot", "beta_dpo", "kto", "bco", "info_nca"),
    *("plackett_luce", "ld_dpo", "tdpo1", "d2po", "sppo", "rebel", "nash_md", "rpo_reward", "pairwise"),
    *("sft", "simpo", "orpo"),
    *COMBINED,
]


def test_every_kind_is_an_objective_with_a_recipe():
    assert set(KINDS) <= set(NAMES)
    assert len(set(KINDS)) == len(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_objective_begins_where_theory_says_and_moves_its_margins_the_right_way(
    world, tmp_path, name, capsys
):
    further = ["--config.loss.eta=1.0"] * (name == "rebel")  # published for scores a thousand times as large
    history = run(world, tmp_path / "run", name, *further, steps=20)
    said = capsys.readouterr().out
    assert all(np.isfinite(list(values.values())).all() for values in history)
    if name in AT_REFERENCE:
        # Log-ratios are 0 to 1e-4 nats; what that does to a loss of slope 1 / beta is under 1 % of it.
        assert history[0]["loss"] == pytest.approx(AT_REFERENCE[name], rel=1e-5, abs=1e-4)
    if name not in COMBINED and OBJECTIVES[name].reference and name not in ("wpo",):
        assert "first loss: not checked" not in said
    # Five updates are an epoch, in file order: the last ones see what the first ones saw.
    if name == "discopop":  # its slope at the reference is (1 - ln 2) / (4 tau) - 3/4 > 0: margins begin by going down
        assert history[-1]["loss"] < AT_REFERENCE[name]
        return
    values = worlds.column(history, "rewards/margins" if "rewards/margins" in history[0] else "logps/chosen")
    assert values[-5:].mean() > values[:5].mean()


# One for each kind of need: labels and mismatches, state, random draws, whole distributions, a reference that moves.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bco", "tr_dpo", "kto", "sampo", "tdpo2", "mallows_dpo"])
def test_a_run_with_further_needs_goes_on_bit_for_bit_and_evaluates(world, tmp_path, name):
    held_out = [f"--config.eval_data.path={world.data}", f"--config.eval_data.cache_dir={world.folder / 'tokens'}"]
    ema = ["--config.reference.ema.every=2"] * (name == "tr_dpo")
    options = [*held_out, *ema, "--config.checkpoint.every=2", "--config.optimizer.schedule=constant"]
    whole = run(world, tmp_path / "whole", name, *options, steps=4)
    # Interrupted after update 2: its checkpoint, its config, its metrics are there, and nothing later.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "finished").unlink()
    for later in ("model", "checkpoints/4"):
        shutil.rmtree(tmp_path / "cut" / later)
    rest = run(world, tmp_path / "cut", name, *options, steps=4)
    for metric in ("loss", "grad_norm", "eval/loss", "rewards/margins", "logps/chosen"):
        for one, two in zip(whole[2:], rest[2:], strict=True):
            assert one.get(metric) == two.get(metric), metric
    assert math.isfinite(whole[-1]["eval/loss"])


@pytest.mark.slow
def test_a_live_reference_is_the_cached_one(world, tmp_path):
    cached = run(world, tmp_path / "cached", "ipo_mean", steps=3)
    cache = tmp_path / "empty"
    live = ["--config.reference.live=True", f"--config.reference.cache_dir={cache}"]
    kept = run(world, tmp_path / "live", "ipo_mean", *live, steps=3)
    assert not cache.exists()
    assert kept[0]["loss"] == pytest.approx(25.0, rel=1e-4)
    for name in ("loss", "grad_norm"):
        assert worlds.deviation(worlds.column(kept, name), worlds.column(cached, name)) < 1e-4  # slope 10 a nat


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_reference_follows_the_policy_when_and_as_far_as_told(world, tmp_path, decay):
    ema = ["--config.reference.ema.every=2", f"--config.reference.ema.decay={decay}"]
    constant = ["--config.optimizer.schedule=constant", "--config.optimizer.max_grad_norm=None"]
    same = [f"--config.data.path={world.folder / 'same.jsonl'}"]  # the same pairs every time
    rows = worlds.pairs(8)
    worlds.write_rows(world.folder / "same.jsonl", rows * 4)
    fixed = run(world, tmp_path / "fixed", "dpo", "--config.loss.beta=0.05", *constant, *same, steps=4)
    moved = run(world, tmp_path / "moved", "tr_dpo", *ema, *constant, *same, steps=4)
    for update in (0, 1):  # until then the reference is the initial policy
        assert moved[update]["loss"] == pytest.approx(fixed[update]["loss"], rel=1e-5)
    assert fixed[2]["rewards/margins"] > 0.01
    if decay == 0.0:  # the reference is the policy: every log-ratio is 0 again
        assert moved[2]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert moved[2]["log_ratios/largest"] < 1e-3
    else:
        assert 0.1 < moved[2]["rewards/margins"] / fixed[2]["rewards/margins"] < 0.9


@pytest.mark.slow
def test_kto_on_four_devices_in_four_parts_is_kto_on_one_device(world, tmp_path):
    one = run(world, tmp_path / "one", "kto", steps=3)
    four = run(world, tmp_path / "four", "kto", "--config.micro_batches=4", "--config.mesh.fsdp=4", steps=3, devices=4)
    assert worlds.deviation(worlds.column(four, "loss"), worlds.column(one, "loss")) < 1e-5
    assert worlds.deviation(worlds.column(four, "grad_norm"), worlds.column(one, "grad_norm")) < 5e-5


@pytest.mark.parametrize(
    ("name", "further", "message"),
    [
        ("rebel", (), r"'rebel' needs scores but 40 of 40 examples have none, such as '.*': add"),
        ("odpo", (), r"'odpo' needs scores but 40 of 40 examples have none"),
        ("nash_md", (), r"'nash_md' needs scores"),
        ("robust", ("--config.loss.label_smoothing=0.5",), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        ("dpo", ("--config.loss.beta=-0.1",), r"beta=-0\.1 must be > 0"),
        (
            "kto",
            ("--config.extra_losses=({'name':'sft'},)",),
            r"'kto' reads labelled responses.*'sft' does not look at labels",
        ),
        ("online_dpo", ("--config.loss.missing_eos_penalty=1.0",), r"'online_dpo' needs (finished|scores)"),
        ("dpo", ("--config.loss.weight=0.0",), r"loss 'dpo': weight=0\.0 must be > 0"),
        ("exo", ("--config.loss.log_eps=-10.0",), r"log_eps=-10\.0 must be left out: only target='pair' has one"),
        ("f_dpo", ("--config.loss.alpha=0.3",), r"alpha=0\.3 must be left out: only divergence='alpha' has one"),
        (
            "kto",
            ("--config.eval_data.path=x", "--config.checkpoint.best=eval/rewards/accuracies"),
            r"loss 'kto' compares no two responses, it has no accuracy",
        ),
    ],
    ids=str,
)
def test_data_and_hyper_parameters_that_do_not_do_are_one_line_before_anything_is_compiled(
    tmp_path_factory, tmp_path, name, further, message
):
    bare = worlds.make_world(tmp_path_factory.mktemp("bare"))  # pairs without scores or labels
    flags = [*bare.flags, "--config.epochs=None", "--config.model.dtype=float32", *further]
    with pytest.raises(UserError, match=message) as error:
        worlds.train(tmp_path / "run", *flags, recipe=f"{RECIPE}:{name}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_lists_are_no_pairs(tmp_path):
    lists = worlds.World(
        tmp_path, worlds.make_model(tmp_path / "model"), worlds.write_rows(tmp_path / "lists.jsonl", LISTS)
    )
    flags = [*lists.flags, "--config.epochs=None", "--config.model.dtype=float32", "--config.batch_size=8"]
    with pytest.raises(UserError, match=r"loss 'rebel' compares 2 responses but the data have 3 a prompt"):
        worlds.train(tmp_path / "run", *flags, recipe=f"{RECIPE}:rebel")


LISTS = [{"prompt": "once", "responses": [" upon", " a", " time"], "scores": [3, 2, 1]}] * 16


@pytest.mark.parametrize(
    ("rows", "name", "further", "message"),
    [
        (
            LISTS,
            "plackett_luce",
            "--config.extra_losses=({'name':'ipo'},)",
            r"loss 'ipo' compares 2 responses, 'plackett_luce' 3: the two cannot be added",
        ),
        (
            [{"prompt": "once", "responses": [" upon", " a"], "scores": [1, 2]}] * 16,
            "xpo",
            "--config.seed=0",
            r"loss 'xpo' gives each place of a list a meaning of its own",
        ),
        (
            [
                {"prompt": "once", "response": " upon", "label": True} | extra
                for extra in ({}, {"prompt_probability": 0.5})
            ]
            * 8,
            "bco",
            "--config.seed=0",
            r"loss 'bco' needs prompt_probabilities but 8 of 16 examples have none",
        ),
    ],
    ids=["lists and pairs", "places with a meaning", "some probabilities"],
)
def test_data_that_would_give_wrong_numbers_are_refused(tmp_path, rows, name, further, message):
    made = worlds.World(tmp_path, worlds.make_model(tmp_path / "model"), worlds.write_rows(tmp_path / "x.jsonl", rows))
    flags = [*made.flags, "--config.epochs=None", "--config.model.dtype=float32", "--config.batch_size=8", further]
    with pytest.raises(UserError, match=message) as error:
        worlds.train(tmp_path / "run", *flags, recipe=f"{RECIPE}:{name}")
    assert "\n" not in str(error.value)


def test_margins_that_have_no_logarithm_are_refused(tmp_path):
    rows = [row | {"score_chosen": 1.0, "score_rejected": 1.0} for row in worlds.pairs(16)]
    tied = worlds.World(
        tmp_path, worlds.make_model(tmp_path / "model"), worlds.write_rows(tmp_path / "tied.jsonl", rows)
    )
    flags = [*tied.flags, "--config.epochs=None", "--config.model.dtype=float32", "--config.batch_size=8"]
    with pytest.raises(UserError, match=r"loss 'odpo'.*") as error:
        worlds.train(tmp_path / "run", *flags, recipe=f"{RECIPE}:odpo")
    assert "\n" not in str(error.value)
