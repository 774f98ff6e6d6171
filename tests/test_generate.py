"""`python -m daajax.generate`: what it writes, and what it refuses in one line."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import generate as command
from daajax import policy, prompts, sharding
from daajax.data.rows import Example
from daajax.data.tokenizer import load_tokenizer
from daajax.errors import UserError
from daajax.generator import Generator
from daajax.models.families import read_architecture
from daajax.scoring import Scorer
from tests import worlds

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = worlds.make_model(tmp_path_factory.mktemp("world"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    return folder


@pytest.fixture
def rows(tmp_path, path):
    """Runs the command in this process; returns the lines of its output file."""

    def sampled(*arguments, model=path):
        output = tmp_path / "out" / "samples.jsonl"
        output.unlink(missing_ok=True)
        with worlds.visible(1):
            line = ["generate", f"--output={output}", "--max_tokens=12", *arguments]
            command.generate(command.parse(line if model is None else [*line, f"--model={model}"]))
        return [json.loads(line) for line in output.read_text().splitlines()]

    return sampled


def prompts_file(folder, values, name="prompts.jsonl"):
    return worlds.write_rows(folder / name, [{"prompt": value} for value in values])


# ---------------------------------------------------------------------- what it writes


def test_lines_are_the_generators_responses(path, rows, tmp_path):
    texts = ["once upon a time", "one day she saw a big dog", "the"]
    found = rows(f"--prompts={prompts_file(tmp_path, texts)}", "--samples=2", "--seed=5", "--top_k=30", "--top_p=0.9")
    tokenizer = load_tokenizer(path)
    with worlds.visible(1):
        mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
    scorer = Scorer.make(
        read_architecture(str(path)), mesh, attention="dense", remat="none", dtype=jnp.float32, param_dtype=jnp.float32
    )
    samples = Generator(scorer, mesh).generate(
        policy.load_params(str(path), scorer, mesh),
        [tokenizer(text)["input_ids"] for text in texts],  # BOS in front
        key=jax.random.key(5),
        max_tokens=12,
        samples=2,
        top_k=30,
        top_p=0.9,
        stop_ids=[2, 7, 9],  # the tokenizer's </s>, and those of generation_config.json
    )
    assert [(row["prompt"], row["sample"]) for row in found] == [(text, nth) for text in texts for nth in (0, 1)]
    for row, tokens, logps, length, finished in zip(
        found,
        *(value.reshape(6, -1) for value in (samples.tokens, samples.logps)),
        *(value.reshape(6) for value in (samples.lengths, samples.finished)),
        strict=True,
    ):
        assert row["tokens"] == tokens[:length].tolist()
        assert row["finished"] == finished
        np.testing.assert_allclose(row["logp"], logps.sum(), rtol=0, atol=1e-4)
    assert 0 < samples.finished.sum() < 6
    assert {row["tokens"][-1] for row in found if row["finished"]} <= {2, 7, 9}


def test_prompt_and_response_are_the_text_of_all_their_tokens(path, rows):
    prompts = ["once upon a time", "one day she", "a"]
    tokenizer = load_tokenizer(path)
    for row in rows(*(f"--prompt={prompt}" for prompt in prompts), "--samples=8"):
        ids = tokenizer(row["prompt"])["input_ids"] + row["tokens"]
        assert row["prompt"] + row["response"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_space_that_begins_a_response_is_kept(path):
    tokenizer = load_tokenizer(path)
    whole, prompt = (tokenizer(text)["input_ids"] for text in ("once upon a time", "once upon"))
    assert whole[: len(prompt)] == prompt
    assert prompts.text_after(prompt, whole[len(prompt) :], tokenizer) == " a time"
    assert prompts.text_after([1], whole[1:], tokenizer) == "once upon a time"


def test_greedy_continues_a_real_story(assets, rows):
    (row,) = rows("--prompt=Once upon a time", "--temperature=0", "--max_tokens=40", model=assets / "tiny_model")
    assert row["response"].startswith(", there was a little girl named Lily. She loved to play outside in the park.")


def test_chat_is_rendered_with_the_template_up_to_the_answer(tmp_path, rows):
    model = worlds.make_model(tmp_path / "model")
    worlds.save_tokenizer(model, chat_template=TEMPLATE)
    tokenizer = load_tokenizer(model)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the dog"}]
    tokens, _ = prompts.tokenize([Example(messages, ()), Example("the dog", ())], tokenizer)
    wanted = "<s><system>be kind<user>the dog<assistant>"
    assert tokens[0] == tokenizer.backend_tokenizer.encode(wanted, add_special_tokens=False).ids
    assert tokens[0].count(tokenizer.bos_token_id) == 1
    assert tokens[1] == [1, *tokenizer("the dog", add_special_tokens=False)["input_ids"]]
    asked = rows("--prompt=the dog", "--chat", "--temperature=0", model=model)
    read = rows(f"--prompts={prompts_file(tmp_path, [messages[1:]])}", "--temperature=0", model=model)
    assert asked == read
    assert asked[0]["prompt"] == messages[1:]


def test_tools_of_a_prompt_are_rendered_and_come_back(tmp_path, rows):
    model = worlds.make_model(tmp_path / "model")
    worlds.save_tokenizer(model, chat_template=TEMPLATE + "{% for t in tools or [] %}{{ t.name }} {% endfor %}{{ a }}")
    prompt = [{"role": "user", "content": "the dog"}]
    lines = [
        {"prompt": prompt, "tools": [{"name": "bark"}], "chat_template_kwargs": {"a": "b", "c": 1}, "chosen": "x"},
        {"prompt": prompt, "tools": json.dumps([{"name": "bark"}])},
        {"prompt": prompt},
    ]
    file = worlds.write_rows(tmp_path / "prompts.jsonl", lines)
    asked = prompts.read(str(file))
    tokenizer = load_tokenizer(model)
    tokens, notices = prompts.tokenize(asked, tokenizer)
    texts = [tokenizer.decode(ids) for ids in tokens]
    assert [text.count("bark") for text in texts] == [1, 1, 0]
    assert notices == ["1 examples with chat_template_kwargs that the chat template does not know"]
    found = rows(f"--prompts={file}", "--temperature=0", model=model)
    assert [row.get("tools") for row in found] == [[{"name": "bark"}], [{"name": "bark"}], None]
    assert [row.get("chat_template_kwargs") for row in found] == [{"a": "b", "c": 1}, None, None]


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(tmp_path, path):
    tokenizer = load_tokenizer(path)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    (tokens,), _ = prompts.tokenize(
        [Example([{"role": "user", "content": "a dog"}], ())], tokenizer, str(tmp_path / "mine.jinja")
    )
    assert tokens == tokenizer.backend_tokenizer.encode("[a dog]", add_special_tokens=False).ids


def test_compressed_prompts_and_other_columns_and_a_limit(tmp_path, rows):
    lines = [json.dumps({"id": n, "prompt": f"the dog {n}", "chosen": " a", "rejected": " b"}) for n in range(5)]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    found = rows(f"--prompts={tmp_path / 'pairs.jsonl.gz'}", "--limit=3")
    assert [row["prompt"] for row in found] == ["the dog 0", "the dog 1", "the dog 2"]


@pytest.mark.parametrize(("said", "dtype"), [("bfloat16", "bfloat16"), ("float16", "float32"), (None, "float32")])
def test_the_dtype_is_that_of_the_weights(tmp_path, said, dtype):
    for key in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({key: said}))
        assert command.dtype_of(str(tmp_path)) == dtype


@pytest.mark.slow
def test_the_command_prints_what_it_samples_on_a_mesh(path):
    arguments = [
        f"--model={path}",
        "--prompt=once upon",
        "--prompt=the dog",
        "--max_tokens=5",
        "--mesh=fsdp=2,tensor=2",
    ]
    result = worlds.command("generate", *arguments, JAX_NUM_CPU_DEVICES="4")
    assert result.returncode == 0, result.stderr
    assert "in float32 on 4 cpu: 1 response(s) to each of 2 prompt(s)" in result.stdout
    assert "\nonce upon" in result.stdout
    assert "\nthe dog" in result.stdout


# ---------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no model: python -m daajax.generate --model=DIR --prompt=TEXT"),
        (["--model=MODEL"], "no prompt: --prompt=TEXT, or --prompts=FILE.jsonl"),
        (["--model=nowhere", "--prompt=a"], "--model='nowhere' is not a directory"),
        (["--model=MODEL", "--prompt=a", "rubbish"], "'rubbish' is not understood"),
        (["--model=MODEL", "--prompt=a", "--nope=1"], "nope"),
        (["--model=MODEL", "--prompt=a", "--samples=two"], "samples=two"),
        (["--model=MODEL", "--prompt=a", "--samples=0"], "samples=0"),
        (["--model=MODEL", "--prompt=a", "--max_tokens=0"], "max_tokens=0"),
        (["--model=MODEL", "--prompt=a", "--max_tokens=255"], "max_tokens=255 it needs 257 positions"),
        (["--model=MODEL", "--prompt=a", "--temperature=-1"], "temperature=-1.0"),
        (["--model=MODEL", "--prompt=a", "--temperature=0", "--top_p=0.5"], "temperature=0 takes the most probable"),
        (["--model=MODEL", "--prompt=a", "--top_p=0"], "top_p=0.0"),
        (["--model=MODEL", "--prompt=a", "--top_p=1.5"], "top_p=1.5"),
        (["--model=MODEL", "--prompt=a", "--top_k=0"], "top_k=0"),
        (["--model=MODEL", "--prompt=a", "--batch_size=0"], "batch_size=0"),
        (["--model=MODEL", "--prompt=a", "--dtype=float8"], "float8"),
        (["--model=MODEL", "--prompt=a", "--mesh=nope=2"], "--mesh=nope=2: axes of data, fsdp, tensor are needed"),
        (
            ["--model=MODEL", "--prompt=a", "--mesh=context=2"],
            "--mesh=context=2: axes of data, fsdp, tensor are needed",
        ),
        (["--model=MODEL", "--prompt=a", "--mesh=data"], "--mesh=data: axes of data, fsdp, tensor are needed"),
        (["--model=MODEL", "--prompt=a", "--mesh=data=3"], "needs 3 devices but 1 are visible"),
        (["--model=MODEL", "--prompt=a", "--limit=2"], "--limit=2"),
        (["--model=MODEL", "--prompt=a", "--chat"], "chat template"),
        (["--model=MODEL", "--prompt=a", "--chat_template=x"], "no prompt is chat"),
        (["--model=MODEL", "--prompt=a", "--prompts=ROWS"], "--prompt and --prompts were both given"),
        (["--model=MODEL", "--prompts=nowhere.jsonl"], "--prompts=nowhere.jsonl is no file"),
        (["--model=MODEL", "--prompts=ROWS", "--limit=0"], "--limit=0"),
        (["--model=MODEL", "--prompts=ROWS"], "ROWS:2: no column `prompt`, there are text, n."),
        (["--model=MODEL", "--prompts=BROKEN"], "BROKEN:1: not JSON"),
        (["--model=MODEL", "--prompts=NUMBER"], "NUMBER:1: `prompt` is int 3"),
        (["--model=MODEL", "--prompts=ANSWERED"], "ANSWERED:1: the prompt ends in an assistant message"),
        (["--model=MODEL", "--prompts=EMPTY"], "EMPTY holds no rows"),
        (["--model=MODEL", "--prompt=a", "--output=FOLDER"], "FOLDER exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, path, arguments, says):
    places = {"MODEL": path, "FOLDER": tmp_path}
    files = {
        "ROWS": [{"prompt": "the dog"}, {"text": "a", "n": 1}],
        "BROKEN": ["{"],
        "NUMBER": [{"prompt": 3}],
        "ANSWERED": [{"prompt": [{"role": "assistant", "content": "a"}]}],
        "EMPTY": [],
    }
    places |= {name: worlds.write_rows(tmp_path / name, lines) for name, lines in files.items()}

    def placed(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    with pytest.raises(UserError) as error, worlds.visible(1):
        command.generate(command.parse(["generate", *map(placed, arguments)]))
    assert placed(says) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_generation_config_is_named(tmp_path):
    model = worlds.make_model(tmp_path)
    for text in ("[", "[]", '{"eos_token_id": "</s>"}'):
        (model / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config.json is no JSON object with eos_token_id"):
            command.stop_ids(str(model), load_tokenizer(model))


def test_a_process_ends_with_1_and_one_line_and_helps_with_0(path):
    result = worlds.command("generate", f"--model={path}")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no prompt: ")
    assert len(result.stderr.splitlines()) == 1
    result = worlds.command("generate", "--help")
    assert result.returncode == 0
    for name in command.Options.__dataclass_fields__:
        assert f"--{name}" in result.stdout


# ---------------------------------------------------------------------- from a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two updates that move the model far, with a checkpoint of each."""
    world = worlds.make_world(tmp_path_factory.mktemp("trained"))
    keep = ("--config.steps=2", "--config.checkpoint.every=1", "--config.checkpoint.keep=2")
    worlds.train(world.folder / "run", *world.flags, *keep, "--config.optimizer.learning_rate=0.1")
    return world


@pytest.mark.slow
def test_a_runs_checkpoints_are_its_models(trained, rows):
    asked = ("--prompt=the dog", "--temperature=0", "--max_tokens=12")
    workdir = trained.folder / "run"
    latest, first, before = (
        rows(*asked, f"--workdir={workdir}", *step, model=None) for step in ((), ("--step=1",), ("--step=0",))
    )
    assert latest == rows(*asked, model=workdir / "model")
    assert before == rows(*asked, model=trained.model)
    assert latest[0]["logp"] != first[0]["logp"] != before[0]["logp"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--workdir={run}", "--model={model}"), "choose one"),
        (("--model={model}", "--step=1"), "name its folder with --workdir"),
        (("--workdir={run}", "--step=7"), "no checkpoint of update 7; there are: 1, 2"),
        (("--workdir={run}/nowhere",), "is not a folder"),
        (("--workdir={model}",), "is not a run's folder"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(trained, arguments, says):
    there = [argument.format(run=trained.folder / "run", model=trained.model) for argument in arguments]
    with pytest.raises(UserError, match=says):
        command.generate(command.parse(["generate", "--prompt=the dog", *there]))
