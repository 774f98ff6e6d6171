"""Sampling as a command: the responses of a model directory, or of a run's checkpoint, to prompts.

`python -m daajax.generate --model=DIR --prompt=TEXT [--output=FILE.jsonl] [--temperature=0.7 …]`; `--help` lists the
options. From a program, `daajax.generator.Generator` is what samples.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import flags

from daajax import bucket, checkpoint, command, folder, output, policy, processes, prompts, run, sampling, sharding
from daajax.config import DTYPES, has_adapters, resolve, restored, tokenizer_path
from daajax.console import say
from daajax.data.rows import Example
from daajax.data.tokenizer import check_vocabulary, load_tokenizer
from daajax.errors import UserError
from daajax.generator import Generator, Samples, check_prompts
from daajax.models import directory
from daajax.models.architecture import describe_rope, for_length
from daajax.models.decoder import Params
from daajax.models.families import read_architecture
from daajax.models.lora import Lora
from daajax.scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

USAGE = """usage: python -m daajax.generate --model=DIR --prompt=TEXT [--option=value …]

  --model=DIR            Hugging Face model directory, such as a run's model/; or hf://ORGANIZATION/NAME[@REVISION],
                         or gs://BUCKET/FOLDER
  --workdir=DIR          instead of it, a run's folder: its latest checkpoint
  --step=N               or the checkpoint of that update; 0 is the model before training
  --prompt=TEXT          what to continue; may be given several times
  --prompts=FILE         .jsonl or .jsonl.gz with a column `prompt`: text, or chat messages; beside these may be
                         `tools` and `chat_template_kwargs`, as in training data
  --limit=N              only the first N prompts of the file
  --chat                 text prompts are a user's message, rendered with the chat template
  --chat_template=FILE   Jinja file instead of the tokenizer's own template
  --output=FILE          JSON lines, one a sample, instead of text on the terminal
  --samples=1            responses to each prompt
  --max_tokens=128       most tokens of a response
  --temperature=1.0      divides the log-probs; 0 takes the most probable token
  --top_k=K              draw from the K most probable tokens only
  --top_p=1.0            of those, from the most probable ones that together reach this probability
  --seed=0               with the model and the prompts it fixes every response
  --batch_size=64        responses sampled at once
  --dtype=auto           compute dtype: float32, bfloat16, or auto: as config.json says, or the run's
  --mesh=fsdp=-1         devices on the axes data, fsdp, tensor, such as data=2,tensor=4; -1 takes the rest"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for, as in `USAGE`."""

    model: str | None = None
    workdir: str | None = None
    step: int | None = None
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    limit: int | None = None
    chat: bool = False
    chat_template: str | None = None
    output: str | None = None
    samples: int = 1
    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    dtype: str = "auto"
    mesh: str = "fsdp=-1"


@dataclasses.dataclass(frozen=True)
class Model:
    """Where the parts of a model that is to answer come from.

    Attributes:
        name: For messages.
        path: Directory with its `config.json` and generation config.
        tokenizer: Directory of its tokenizer.
        template: `chat.template`; None: the tokenizer's own.
        dtype: Compute dtype.
        param_dtype: Dtype of its parameters.
        load: Brings the parameters that a scorer scores with onto a mesh.
        length: Tokens of the longest sequence that it was trained on; 0: nobody knows.
        lora: Its adapters; None: it has none.
    """

    name: str
    path: str
    tokenizer: str
    template: str | None
    dtype: str
    param_dtype: str
    load: Callable[[Scorer, Any], Params]
    length: int = 0
    lora: Lora | None = None


def generate(options: Options) -> None:
    """Samples what the options ask for.

    Raises:
        UserError: If anything the user can mend stands in the way.
    """
    if processes.count() > 1:
        raise UserError(f"daajax.generate runs in one process, this is one of {processes.count()}; start it alone.")
    sampling.check(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, samples=options.samples)
    model = model_of_run(options) if options.workdir is not None else model_of_directory(options)
    architecture = read_architecture(model.path, "--model" if options.model else "model.path")
    mesh = sharding.make_mesh(parse_mesh(options.mesh))
    tokenizer = load_tokenizer(model.tokenizer)
    check_vocabulary(tokenizer, architecture.vocab_size)
    asked = read_prompts(options)
    if options.chat_template is not None and all(isinstance(prompt.prompt, str) for prompt in asked):
        raise UserError("--chat_template was given but no prompt is chat; add --chat, or leave it out.")
    tokens, notices = prompts.tokenize(asked, tokenizer, options.chat_template or model.template)
    for notice in notices:
        say(notice)
    check_prompts(tokens, architecture, options.max_tokens)
    architecture = for_length(architecture, max(model.length, max(map(len, tokens)) + options.max_tokens))
    for line in describe_rope(architecture):
        say(line)
    stops = stop_ids(model.path, tokenizer)
    file = None if options.output is None else bucket.path_of(options.output, "--output")
    if file is not None:
        output.check(file)
    scorer = Scorer.make(
        architecture,
        mesh,
        attention="auto",
        remat="none",
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        lora=model.lora,
    )
    params = model.load(scorer, mesh)
    say(
        f"{model.name} in {model.dtype} on {jax.device_count()} {jax.devices()[0].device_kind}: {options.samples} "
        f"response(s) to each of {len(asked)} prompt(s), to the ids {stops} or {options.max_tokens} tokens"
    )
    samples = Generator(scorer, mesh).generate(
        params,
        tokens,
        key=jax.random.key(options.seed),
        max_tokens=options.max_tokens,
        samples=options.samples,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_ids=stops,
        batch_size=options.batch_size,
    )
    rows = list(rows_of(asked, tokens, samples, tokenizer))
    if file is None:
        for row in rows:
            say(_readable(row))
    else:
        output.write_rows(file, rows)
        say(f"{len(rows)} responses are in {file}")


def model_of_directory(options: Options) -> Model:
    """The model of `--model`, its parameters in the compute dtype."""
    path = directory.fetch(str(options.model), "--model").path
    read_architecture(path, "--model")  # before its config.json is asked for a dtype
    dtype = dtype_of(path) if options.dtype == "auto" else options.dtype
    return Model(path, path, path, None, dtype, dtype, functools.partial(policy.load_params, path))


def model_of_run(options: Options) -> Model:
    """The model of `--workdir`, as its run computes it.

    Raises:
        UserError: If there is no such run, or no such checkpoint.
    """
    workdir = bucket.path_of(str(options.workdir), "--workdir")
    config = resolve(restored(folder.read_config(workdir)))
    saved = checkpoint.Checkpoints(workdir)
    step = saved.choose(options.step)
    config, _ = run.fetch_models(config, folder.read_revisions(workdir), with_weights=step == 0 or has_adapters(config))
    return Model(
        f"{workdir} after update {step}",
        config.model.path,
        tokenizer_path(config),
        config.chat.template,
        config.model.dtype if options.dtype == "auto" else options.dtype,
        config.model.param_dtype,
        functools.partial(policy.params_at, config, saved, step),
        config.max_length,
        policy.lora_of(config, read_architecture(config.model.path)),
    )


def dtype_of(path: str) -> str:
    """The compute dtype that suits a model directory: what its `config.json` says of the weights; else float32."""
    config = json.loads((pathlib.Path(path) / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in DTYPES else "float32"


def stop_ids(path: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Token ids that end a response: the tokenizer's EOS, and those of `generation_config.json`.

    Raises:
        UserError: If that file is broken.
    """
    eos: Any = tokenizer.eos_token_id
    found = {int(eos)}
    file = pathlib.Path(path) / "generation_config.json"
    if file.is_file():
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            found |= {int(stop) for stop in (named if isinstance(named, list) else [named]) if stop is not None}
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{file} is no JSON object with eos_token_id as a number or numbers; mend it.") from None
    return sorted(found)


def read_prompts(options: Options) -> list[Example]:
    """The prompts of the command line or of the file.

    Raises:
        UserError: If there are none, or one cannot be used.
    """
    if not options.prompt and options.prompts is None:
        raise UserError("no prompt: --prompt=TEXT, or --prompts=FILE.jsonl with a column `prompt`, is needed.")
    if options.prompt and options.prompts is not None:
        raise UserError("--prompt and --prompts were both given; choose one.")
    if options.limit is not None and (options.prompts is None or options.limit < 1):
        raise UserError(f"--limit={options.limit}: an integer >= 1 is needed, together with --prompts.")
    if options.prompts is None:
        found = [Example(prompt, ()) for prompt in options.prompt]
    else:
        found = prompts.read(options.prompts, options.limit)
    return [
        dataclasses.replace(asked, prompt=[{"role": "user", "content": asked.prompt}])
        if isinstance(asked.prompt, str) and options.chat
        else asked
        for asked in found
    ]


def rows_of(
    asked: Sequence[Example], tokens: Sequence[Sequence[int]], samples: Samples, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[dict[str, Any]]:
    """One row a sample: `prompt`, `sample`, `response`, `logp` in nats, `tokens`, and whether it is `finished`.

    Beside them are the prompt's `tools` and `chat_template_kwargs` if it has any.
    """
    for index, (example, ids) in enumerate(zip(asked, tokens, strict=True)):
        given = {"tools": example.tools, "chat_template_kwargs": example.template_kwargs}
        for sample, length in enumerate(samples.lengths[index].tolist()):
            written = samples.tokens[index, sample, :length].tolist()
            yield {
                "prompt": example.prompt,
                **{name: value for name, value in given.items() if value},
                "sample": sample,
                "response": prompts.text_after(ids, written, tokenizer),
                "logp": float(samples.logps[index, sample].sum(dtype="float64")),
                "tokens": written,
                "finished": bool(samples.finished[index, sample]),
            }


def _readable(row: dict[str, Any]) -> str:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    end = "" if row["finished"] else ", unfinished"
    head = f"[{len(row['tokens'])} tokens, logp {row['logp']:.2f}{end}]"
    return f"\n{head}\n{prompt}{'' if isinstance(row['prompt'], str) else ' → '}{row['response']}"


def parse(argv: Sequence[str]) -> Options:
    """From arguments, program name first, to options.

    Raises:
        UserError: If anything on the line is not understood.
    """
    values = flags.FlagValues()
    for name in ("model", "workdir", "prompts", "chat_template", "output"):
        flags.DEFINE_string(name, None, name, flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "prompt", flag_values=values)
    flags.DEFINE_bool("chat", False, "chat", flag_values=values)
    for name in ("step", "limit", "top_k", "samples", "max_tokens", "seed", "batch_size"):
        flags.DEFINE_integer(name, getattr(Options, name), name, flag_values=values)
    for name in ("temperature", "top_p"):
        flags.DEFINE_float(name, getattr(Options, name), name, flag_values=values)
    flags.DEFINE_enum("dtype", Options.dtype, ("auto", *DTYPES), "dtype", flag_values=values)
    flags.DEFINE_string("mesh", Options.mesh, "mesh", flag_values=values)
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise UserError(command.said_by(error)) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not understood; options look like --name=value, see --help.")
    if not values.model and not values.workdir:
        raise UserError("no model: python -m daajax.generate --model=DIR --prompt=TEXT, or --workdir=DIR of a run.")
    if values.model and values.workdir:
        raise UserError("--model and --workdir were both given; choose one.")
    if values.step is not None and not values.workdir:
        raise UserError(f"--step={values.step} is a checkpoint of a run; name its folder with --workdir.")
    found: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
    found["prompt"] = tuple(values.prompt)
    return Options(**found)


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as devices on every axis.

    Raises:
        UserError: If it is not of this form.
    """
    try:
        sizes = {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        sizes = {"": 0}
    axes = sharding.WHOLE_ROWS  # sampling adds one token at a time to a row
    if not set(sizes) <= set(axes):
        raise UserError(f"--mesh={text}: axes of {', '.join(axes)} are needed, such as data=2,tensor=4.")
    return dict.fromkeys(axes, 1) | sizes


if __name__ == "__main__":
    command.end(lambda argv: generate(parse(argv)), USAGE, remedies="lower --batch_size or --max_tokens", joins=True)
