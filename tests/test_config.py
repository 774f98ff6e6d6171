"""Every option of `configs/base.py` acts, or is refused: changed alone, each one changes what a run does."""

import re

import pytest

from configs import base
from configs.published import COMBINED, SETTINGS
from daajax import command, config, inputs, optimizer, policy, sharding
from daajax.config import losses, resolve
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.terms import bind
from daajax.models.families import read_architecture
from tests import worlds

FREE = ("loss", "extra_losses")


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict) and name not in FREE:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


LEAVES = sorted(leaves(base.get_config().to_dict()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A world of conversations with one response, which SFT learns from."""
    folder = tmp_path_factory.mktemp("chat")
    turns = [("user", "the dog"), ("assistant", "was sad"), ("user", "and the cat")]
    rows = [
        {"prompt": [{"role": role, "content": text} for role, text in turns], "response": f"saw {word}"}
        for word in worlds.WORDS[:40]
    ]
    model = worlds.make_model(folder / "model")
    worlds.save_tokenizer(model, chat_template="{% for m in messages %}<s> {{ m.content }}</s>{% endfor %}")
    return worlds.World(folder, model, worlds.write_rows(folder / "chat.jsonl", rows))


# What a run reads off its config, part by part: an option acts if one of them changes.


def data_of(options):
    return inputs.load_data(options, options.data, read_architecture(options.model.path), bind(losses(options)))


def seen_data(options):
    data = data_of(options)
    return data.digest, tuple(data.notices[:-1]), tuple(data.ids)


def seen_eval_data(options):
    architecture = read_architecture(options.model.path)
    data = inputs.load_data(options, options.eval_data, architecture, bind(losses(options)), "eval_data")
    return data.digest, tuple(data.ids)


def seen_plan(options):
    with worlds.visible(8):
        mesh = sharding.make_mesh(options.mesh.to_dict())
        plan = inputs.make_plan(options, data_of(options), mesh)
    return (
        plan.windows.tobytes(),
        plan.row_of.tobytes(),
        plan.shapes,
        plan.micro_batches,
        plan.rows,
        plan.prefix_sharing,
    )


def seen_mesh(options):
    return tuple(sharding.make_mesh(options.mesh.to_dict()).shape.items())


def seen_scorer(options):
    with worlds.visible(1):
        mesh = sharding.make_mesh(options.mesh.to_dict())
        architecture = read_architecture(options.model.path)
        scorer = policy.make_scorer(options, architecture, mesh, adapters=policy.lora_of(options, architecture))
    model = scorer.model
    return scorer.attention, model.remat, str(model.dtype), str(model.param_dtype), model.lora


def seen_terms(options):
    return tuple((term.name, term.weight, tuple(term.loss.keywords.items())) for term in bind(losses(options)))


CASES = {  # option: what is changed, and what must change with it
    "attention": (["attention=dense"], seen_scorer),
    "batch_size": (["batch_size=4"], seen_plan),
    "chat.template": (["chat.template={% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"], seen_data),
    "chat.score": (["chat.score=all"], seen_data),
    "data.extra": (["data.extra=({'name':'jsonl','path':'EXTRA'},)"], seen_data),
    "data.limit": (["data.limit=20"], seen_data),
    "data.shuffle": (["data.shuffle=True"], seen_plan),
    "data.truncation": (["data.truncation=drop", "max_length=30"], seen_data),
    "data.weight": (["data.weight=3.0", "data.extra=({'name':'jsonl','path':'EXTRA','weight':1.0},)"], seen_plan),
    "epochs": (["epochs=0.5"], seen_plan),
    "eval_data.extra": (["eval_data.extra=({'name':'jsonl','path':'DATA'},)"], seen_eval_data),
    "eval_data.limit": (["eval_data.limit=20"], seen_eval_data),
    "eval_data.truncation": (["eval_data.truncation=drop"], seen_eval_data),
    "extra_losses": (["extra_losses=({'name':'sft','weight':0.5},)"], seen_terms),
    "loss": (["loss={'name':'ipo','beta':0.1}"], seen_terms),
    "max_length": (["max_length=20"], seen_data),
    "max_prompt_length": (["max_prompt_length=5"], seen_data),
    "mesh.data": (["mesh.data=2", "mesh.fsdp=4"], seen_mesh),
    "mesh.fsdp": (["mesh.data=2", "mesh.fsdp=4"], seen_mesh),
    "mesh.tensor": (["mesh.tensor=2"], seen_mesh),
    "mesh.context": (["mesh.context=2"], seen_mesh),
    "micro_batches": (["micro_batches=2"], seen_plan),
    "lora.alpha": (["lora.rank=4", "lora.alpha=32.0"], seen_scorer),
    "lora.modules_to_save": (["lora.rank=4", "lora.modules_to_save=('norm',)"], seen_scorer),
    "lora.quantization": (["lora.rank=4", "lora.quantization=int8"], seen_scorer),
    "lora.rank": (["lora.rank=8"], seen_scorer),
    "lora.rslora": (["lora.rank=4", "lora.rslora=True"], seen_scorer),
    "lora.targets": (["lora.rank=4", "lora.targets=('q_proj',)"], seen_scorer),
    "model.dtype": (["model.dtype=bfloat16"], seen_scorer),
    "model.param_dtype": (["model.param_dtype=bfloat16"], seen_scorer),
    "packing.enabled": (["packing.enabled=False", "batch_size=24"], seen_plan),
    "packing.prefix_sharing": (["packing.prefix_sharing=False"], seen_plan),
    "packing.row_length": (["packing.row_length=512"], seen_plan),
    "packing.rows": (["packing.rows=16"], seen_plan),
    "packing.shapes": (["packing.shapes=2"], seen_plan),
    "remat": (["remat=full"], seen_scorer),
    "seed": (["seed=1", "data.shuffle=True"], seen_plan),
    "steps": (["steps=3"], seen_plan),
}
EVAL = ["eval_data.path=EXTRA", "eval_data.cache_dir=None", "max_length=30"]
BASES = {  # what the changed config is compared with, where it is not the world's own
    "data.truncation": ["max_length=30"],
    "data.weight": ["data.weight=1.0", "data.extra=({'name':'jsonl','path':'EXTRA','weight':1.0},)"],
    **{f"eval_data.{name}": EVAL for name in ("extra", "limit", "truncation")},
    **{
        f"lora.{name}": ["lora.rank=4"]
        for name in ("alpha", "modules_to_save", "quantization", "rank", "rslora", "targets")
    },
    "packing.enabled": ["batch_size=24"],
    "seed": ["data.shuffle=True"],
}
ELSEWHERE = {  # option: the test, here or beside, that changes it
    "lora.path": "test_lora: a run goes on with an adapter which is its reference",
    "compiler_options": "test_compiler_options: a run compiles its update and its reference pass with them",
    "check_first_loss": "test_train: the check can be turned off",
    "checkpoint.best": "test_checkpoint: the best one is kept besides the latest",
    "checkpoint.every": "test_resume: checkpoints come every so often and of the last update",
    "checkpoint.keep": "test_checkpoint: the latest are kept",
    "data.cache_dir": "test_folders_are_where_they_are_said_to_be",
    "data.max_bad_rows": "test_bad_rows_are_tolerated_up_to_a_number",
    "data.name": "test_data: every source trains the same model",
    "data.path": "test_bad_input: data that cannot be read are named",
    "data.split": "test_data: a split is chosen",
    "eval.every": "test_evaluate: evaluations come every so often and last",
    "model.router_aux_loss_coef": "test_router: a mixture is trained with and without it",
    "eval_data.cache_dir": "test_data: held out data are read by the options of their own",
    "eval_data.max_bad_rows": "test_data: held out data are read by the options of their own",
    "eval_data.name": "test_data: held out data are read by the options of their own",
    "eval_data.path": "test_data: held out data are read by the options of their own",
    "eval_data.split": "test_data: held out data are read by the options of their own",
    "head": "test_heads: a run says its form and every form gives the same run",
    "log.every": "test_train: metrics come every so often",
    "watchdog_minutes": "test_processes: a run without progress ends with what it was doing",
    "model.path": "test_bad_input: a damaged model directory is named",
    "model.random_init": "test_reference: fresh weights are a reference like any other",
    "optimizer.b1": "test_optimizer_options_reach_optax",
    "optimizer.b2": "test_optimizer_options_reach_optax",
    "optimizer.eps": "test_optimizer_options_reach_optax",
    "optimizer.learning_rate": "test_optimizer_options_reach_optax",
    "optimizer.max_grad_norm": "test_optimizer_options_reach_optax",
    "optimizer.mu_dtype": "test_optimizer_options_reach_optax",
    "optimizer.name": "test_optimizer_options_reach_optax",
    "optimizer.offload": "test_offload: a run with moments in the hosts memory is the run without",
    "optimizer.schedule": "test_optimizer_options_reach_optax",
    "optimizer.warmup_steps": "test_optimizer_options_reach_optax",
    "optimizer.weight_decay": "test_optimizer_options_reach_optax",
    "reference.cache_dir": "test_folders_are_where_they_are_said_to_be",
    "reference.mode": "test_reference: without a reference nothing is scored",
    "reference.path": "test_reference: another model is a reference",
    "peak_flops": "test_meters: speed is measured against what somebody knows better",
    "profile.start": "test_trace: the updates that are asked for are traced",
    "profile.steps": "test_trace: the updates that are asked for are traced",
    "resume": "test_folder: what is refused can be forced",
    "tokenizer.path": "test_bad_input: a tokenizer of its own is checked too",
    "reference.ema.decay": "test_objective_runs: a reference follows the policy when and as far as told",
    "reference.ema.every": "test_objective_runs: a reference follows the policy when and as far as told",
    "reference.live": "test_objective_runs: a live reference is the cached one",
}


def test_every_option_has_a_test():
    assert sorted([*CASES, *ELSEWHERE]) == LEAVES


@pytest.mark.parametrize("option", ELSEWHERE)
def test_the_test_of_an_option_is_there(option):
    file, _, words = ELSEWHERE[option].rpartition(": ")
    path = worlds.ROOT / "tests" / f"{file or 'test_config'}.py"
    name = re.sub(r"\W", "_", words.removeprefix("test_"))
    assert f"def test_{name}" in path.read_text(), f"{path.name} has no test_{name}"


def flags_of(world, chat, option):
    """The command line that an option is changed on."""
    if option.startswith("chat."):
        return [*chat.flags, "--config.loss={'name':'sft'}", "--config.reference.mode=none"]
    if option == "epochs":
        return [flag for flag in world.flags if "steps" not in flag]
    return [*world.flags]


@pytest.mark.parametrize("option", CASES)
def test_an_option_acts(world, chat, option):
    overrides, seen = CASES[option]
    flags = flags_of(world, chat, option)
    more = worlds.write_rows(world.folder / "more.jsonl", worlds.pairs(24, seed=1))
    base = [o.replace("EXTRA", str(more)) for o in BASES.get(option, [])]
    overrides = [o.replace("EXTRA", str(more)).replace("DATA", str(world.data)) for o in overrides]
    if option.startswith("eval_data."):
        overrides = [*base, *overrides]
    # The base recipe has neither steps nor epochs.
    recipe = _without_steps(world) if option == "epochs" else worlds.STORIES
    whole = ["epochs=1.0"] if option == "epochs" else []
    plain, _ = worlds.parse(*flags, *(f"--config.{o}" for o in [*whole, *base]), recipe=recipe)
    changed, _ = worlds.parse(*flags, *(f"--config.{override}" for override in overrides), recipe=recipe)
    assert seen(plain) == seen(plain)
    assert seen(plain) != seen(changed)


def _without_steps(world):
    path = world.folder / "epochs.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.model.dtype = 'float32'\n    config.batch_size = 8\n    return config\n"
    )
    return str(path)


def test_folders_are_where_they_are_said_to_be(world, tmp_path):
    tokens, reference = tmp_path / "t", tmp_path / "r"
    worlds.precompute(*world.flags, f"--config.data.cache_dir={tokens}", f"--config.reference.cache_dir={reference}")
    assert [path.is_dir() for path in tokens.iterdir()] == [True]
    assert len(list(reference.glob("*/part-*.parquet"))) == 1


def test_bad_rows_are_tolerated_up_to_a_number(world, tmp_path):
    data = worlds.write_rows(tmp_path / "pairs.jsonl", [*worlds.pairs(9), "{", "{"])
    flags = [*world.flags, f"--config.data.path={data}"]
    found = data_of(worlds.parse(*flags, "--config.data.max_bad_rows=2")[0])
    assert isinstance(found, TokenizedData)
    assert found.counters["bad_rows"] == 2
    with pytest.raises(UserError, match=r"data\.max_bad_rows=1"):
        data_of(worlds.parse(*flags, "--config.data.max_bad_rows=1")[0])


@pytest.mark.parametrize("name", config._CHOICES)
def test_choices_are_refused_with_the_known_ones(world, name):
    with pytest.raises(UserError, match=rf"config\.{name}='nope' is unknown; there are "):
        worlds.parse(*world.flags, f"--config.{name}=nope")


@pytest.mark.parametrize("name", [name for name in config._RANGES if name != "optimizer.learning_rate"])
def test_numbers_out_of_range_are_refused(world, name):
    with pytest.raises(UserError, match=rf"config\.{name}=-7(\.0)? must be (at least|above) "):
        worlds.parse(*world.flags, f"--config.{name}=-7")


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0"])
def test_a_learning_rate_is_a_finite_number(world, value):
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate=.* must be at least 0( and finite)?\.$"):
        worlds.parse(*world.flags, f"--config.optimizer.learning_rate={value}")


@pytest.mark.parametrize("value", ["-1.0", "0.0", "nan", "inf"])
def test_epochs_that_make_no_sense_are_refused(world, value):
    flags = flags_of(world, None, "epochs")
    with pytest.raises(UserError, match=rf"config.epochs={value} must be above 0( and finite)?\.$"):
        worlds.parse(*flags, f"--config.epochs={value}", recipe=_without_steps(world))


def test_optimizer_options_reach_optax(world, monkeypatch):
    """What `train` hands to the optimizer and the schedule is what the config says, option by option."""
    seen = {}

    class StoppedError(Exception):
        pass

    def make_schedule(**options):
        seen["schedule"] = options
        return optimizer.make_schedule(**options)

    def make_optimizer(name, schedule, **options):
        seen["optimizer"] = {"name": name, **options}
        raise StoppedError

    monkeypatch.setattr("daajax.run.make_schedule", make_schedule)
    monkeypatch.setattr("daajax.run.make_optimizer", make_optimizer)
    options = {
        "name": "adamw", "learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "b1": 0.8,
        "b2": 0.7, "eps": 1e-7, "max_grad_norm": 2.0, "mu_dtype": "bfloat16",
    }  # fmt: skip
    flags = [f"--config.optimizer.{name}={value}" for name, value in options.items()]
    with pytest.raises(StoppedError):
        worlds.train(world.folder / "run", *world.flags, *flags)
    assert seen["schedule"] == {"learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 3, "updates": 5}
    assert seen["optimizer"] == {
        "name": "adamw",
        "max_grad_norm": 2.0,
        "hyperparameters": {"b1": 0.8, "b2": 0.7, "eps": 1e-7, "weight_decay": 0.1, "mu_dtype": "bfloat16"},
    }
    known = {f"optimizer.{name}" for name in [*options, "offload"]}  # where it lives is not the optimizer's to know
    assert {name for name in LEAVES if name.startswith("optimizer.")} == known


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "recipe", ["stories.py", "stories.py:learn", *(f"dpo_llama.py:{name}" for name in (*OBJECTIVES, *COMBINED))]
)
def test_every_recipe_resolves_and_its_loss_binds(recipe):
    path = str(worlds.ROOT / "configs" / recipe)
    options, _ = worlds.parse("--config.model.path=m", "--config.data.path=d", recipe=path)
    terms = bind(losses(options))
    assert [term.name for term in terms] == [loss["name"] for loss in losses(options)]
    assert sorted(leaves(options.to_dict())) == LEAVES


def test_what_is_published_is_of_objectives_that_there_are():
    assert set(SETTINGS) <= set(OBJECTIVES)
    assert not set(COMBINED) & set(OBJECTIVES)


def test_a_recipe_never_changes_the_defaults_of_another():
    before = base.get_config().to_json_best_effort()
    command.parse(["train", f"--config={worlds.STORIES}", "--config.model.path=m", "--config.data.path=d"], "train")
    assert base.get_config().to_json_best_effort() == before


def test_resolving_twice_changes_nothing(world):
    options, _ = worlds.parse(*world.flags)
    assert resolve(options).to_dict() == options.to_dict()


def test_the_names_of_the_design_are_there():
    promised = """seed model.path model.random_init model.dtype model.param_dtype tokenizer.path chat.template
    chat.score data.name data.path data.split data.shuffle data.limit data.truncation data.max_bad_rows data.cache_dir
    eval_data.name eval_data.path eval_data.split eval_data.limit eval_data.truncation eval_data.max_bad_rows
    eval_data.cache_dir max_length
    max_prompt_length batch_size micro_batches steps epochs packing.enabled packing.prefix_sharing packing.rows
    packing.row_length packing.shapes loss extra_losses reference.mode reference.path reference.cache_dir optimizer.name
    optimizer.learning_rate optimizer.schedule optimizer.warmup_steps optimizer.weight_decay optimizer.b1 optimizer.b2
    optimizer.eps optimizer.max_grad_norm mesh.data mesh.fsdp mesh.tensor mesh.context attention remat log.every
    check_first_loss"""
    assert set(promised.split()) <= set(LEAVES)
