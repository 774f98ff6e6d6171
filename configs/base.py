"""Every option of a run: its meaning, unit and default. A recipe starts from `get_config()` and sets only what differs.

Override any of them on the command line: `--config.batch_size=16 --config.optimizer.learning_rate=1e-6`.
"""

import inspect
import types
import typing
from typing import Any

from ml_collections import config_dict

from daajax.losses.objectives import OBJECTIVES


def loss(name: str, **hyperparameters: float | str | None) -> config_dict.ConfigDict:
    """An objective with all its hyper-parameters, so that each can be overridden on the command line.

    Args:
        name: Key of `daajax.losses.objectives.OBJECTIVES`.
        **hyperparameters: What differs from the objective's defaults.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"there is no objective {name!r}; there are {', '.join(sorted(OBJECTIVES))}")
    parameters = dict(list(inspect.signature(OBJECTIVES[name].function).parameters.items())[1:])
    values = {key: parameter.default for key, parameter in parameters.items()} | hyperparameters
    options = config_dict.ConfigDict({"name": name, "weight": 1.0} | values)
    for key, parameter in parameters.items():
        if types.NoneType in typing.get_args(parameter.annotation):  # a number may override None
            options[key] = optional_float()
            options[key] = values[key]
    return options


def optional_int() -> Any:
    """An integer that may be None."""
    return config_dict.placeholder(int)


def optional_float() -> Any:
    """A number that may be None."""
    return config_dict.placeholder(float)


def optional_text() -> Any:
    """Text that may be None."""
    return config_dict.placeholder(str)


def data_options() -> Any:
    """Options of a data set: of `data`, and of `eval_data`."""
    options: Any = config_dict.ConfigDict()
    # kind of source: jsonl, parquet (a file or a folder of them), hh (hh-rlhf's text), tfds (a folder that TensorFlow
    # Datasets prepared), hub (a folder, or owner/name on the Hugging Face Hub)
    options.name = "jsonl"
    options.path = (
        optional_text()
    )  # where it is; a file or a folder may also be gs://bucket/…, which is copied here first
    options.split = optional_text()  # which part of a folder or prepared data set, such as train
    options.limit = optional_int()  # first so many examples; None: all
    options.max_bad_rows = 0  # malformed rows that are skipped and counted before the run refuses the data
    options.truncation = "truncate"  # examples over max_length or max_prompt_length: truncate or drop
    options.cache_dir = "~/.cache/daajax/tokens"  # tokenized data, here or in gs://bucket/folder; None: not kept
    # further sources: ({'name': 'hh', 'path': 'hh-rlhf', 'split': 'train', 'weight': 0.3},); also limit, max_bad_rows
    options.extra = ()
    return options


def get_config() -> Any:
    """The defaults, locked: an unknown key is an error."""
    config: Any = config_dict.ConfigDict()

    config.seed = 0  # with the data it fixes the whole run

    config.model = config_dict.ConfigDict()
    # a Hugging Face model directory; hf://organization/name, also with @revision, from the Hub; gs://bucket/folder;
    # required
    config.model.path = optional_text()
    config.model.random_init = False  # True: only its architecture, weights drawn from the seed
    config.model.dtype = "bfloat16"  # compute dtype: bfloat16 or float32
    # dtype of the trained parameters; bfloat16 does not move at DPO's learning rates
    config.model.param_dtype = "float32"
    # weight of the loss that balances the experts of a mixture (its config's router_aux_loss_coef is not read); 0: none
    config.model.router_aux_loss_coef = 0.0

    # low-rank adapters: only they are trained; the base stays as it is
    config.lora = config_dict.ConfigDict()
    config.lora.rank = 0  # 0: off, all parameters are trained, unless a path is given
    # an adapter that PEFT saved, named as model.path is, to go on with; its rank, alpha, targets, rslora and
    # modules_to_save are taken
    config.lora.path = optional_text()
    config.lora.alpha = 16.0  # adapters are weighed with alpha / rank
    # projections that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; all-linear: all of them,
    # in a mixture of experts those of attention
    config.lora.targets = ("all-linear",)
    config.lora.rslora = False  # weigh with alpha / √rank
    # parameters that are trained whole beside them: embed_tokens, norm, lm_head, pre_attention_norm, router, …
    config.lora.modules_to_save = ()
    # how the base's projections are kept: int8, with a scale an output; nf4, 4 bits with double quantization (QLoRA);
    # None: in model.dtype, as all the rest
    config.lora.quantization = optional_text()

    config.tokenizer = config_dict.ConfigDict()
    config.tokenizer.path = optional_text()  # directory of the tokenizer, or as model.path; None: that
    config.chat = config_dict.ConfigDict()
    config.chat.template = optional_text()  # Jinja file or text; None: the tokenizer's own
    # which assistant turns are scored: last, or all (only with one response an example, and with a template that does
    # not render earlier turns otherwise, as Qwen3's does)
    config.chat.score = "last"

    config.data = data_options()  # what is learned from; data.path is required
    config.data.shuffle = True  # False: file order
    # share of this source in what is drawn, in any unit; set it for all sources or for none: each example once an epoch
    config.data.weight = optional_float()
    config.eval_data = data_options()  # held-out data, with options of their own; path None: there are none

    config.max_length = 2048  # tokens of prompt and one response together
    # last tokens kept of a longer prompt, beside BOS; None: the prompt is not cut
    config.max_prompt_length = optional_int()
    config.batch_size = 64  # examples an update, on all devices together
    config.micro_batches = 1  # parts an update is computed in; more of them need less memory, the numbers stay the same
    config.steps = optional_int()  # updates; set this or epochs
    config.epochs = optional_float()  # passes over the data

    config.packing = config_dict.ConfigDict()
    config.packing.enabled = True  # several examples a row; False: one
    config.packing.prefix_sharing = True  # an example's prompt lies in its row once; False: once a response
    config.packing.rows = optional_int()  # rows of a micro-batch; None: as few as the mesh or row_length allows
    # tokens, a multiple of 128 (in a recipe as text too, "2048"); auto: the smallest that holds every update
    config.packing.row_length = "auto"
    config.packing.shapes = 1  # row lengths that updates may be sorted into; each compiles once

    config.loss = loss("dpo")  # objective and hyper-parameters: daajax/losses/objectives.py
    config.extra_losses = ()  # further ones to add: ({'name': 'sft', 'weight': 0.2},)

    config.reference = config_dict.ConfigDict()
    # snapshot: the initial policy, with lora.path's adapter; path: another model; adapter_off: the base without any
    # adapter; ema: a copy of what is trained that follows it (TR-DPO); none: the loss reads no reference
    config.reference.mode = "snapshot"
    config.reference.path = optional_text()  # model for mode path, named as model.path
    # keep its model in memory beside the policy and score with it, in place of the cache; objectives that read whole
    # distributions (tdpo1, tdpo2) and mode ema do so by themselves
    config.reference.live = False
    # of mode ema: reference <- decay · reference + (1 - decay) · policy
    config.reference.ema = config_dict.ConfigDict()
    config.reference.ema.decay = 0.4  # 0: a hard update; TR-DPO's α is 1 - decay
    config.reference.ema.every = 512  # updates between two such steps
    # reference log-probs, shared by every run; here or in gs://bucket/folder
    config.reference.cache_dir = "~/.cache/daajax/reference"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.name = "adamw"  # adamw, rmsprop, sgd, adafactor, lion
    config.optimizer.learning_rate = 5e-7  # peak
    config.optimizer.schedule = "linear"  # after warm-up, down to the last update: constant, linear, cosine
    config.optimizer.warmup_steps = 0  # updates of linear warm-up; the first one's rate is not 0
    config.optimizer.weight_decay = optional_float()  # of matrices, not of norms; None: 0 (adamw, adafactor, lion)
    config.optimizer.b1 = optional_float()  # momentum, in [0, 1); None: the optimizer's default (adamw, lion, sgd)
    config.optimizer.b2 = optional_float()  # decay of squares, in [0, 1); None: the optimizer's default (all but sgd)
    config.optimizer.eps = optional_float()  # > 0; None: the optimizer's default (adamw, rmsprop, adafactor)
    config.optimizer.max_grad_norm = optional_float()  # global norm that gradients are clipped to; None: not clipped
    # dtype that the first moment is kept in: bfloat16; None: float32 (adamw, lion, sgd with b1)
    config.optimizer.mu_dtype = optional_text()
    # True: the optimizer's moments lie in the hosts' memory and come to the devices, all at once, when the parameters
    # are stepped (adamw, rmsprop, lion, sgd with b1)
    config.optimizer.offload = False

    config.mesh = config_dict.ConfigDict()  # devices on each axis; -1 on one of them takes the rest
    config.mesh.data = 1  # replicas of the model
    config.mesh.fsdp = -1  # parameters and optimizer state cut up, gathered a layer at a time
    config.mesh.tensor = 1  # heads and MLP cut up
    # the length of rows cut up, for examples too long for one device; parameters are cut over it as over fsdp
    config.mesh.context = 1

    # auto: the one for the platform, with why in the log; splash: a kernel for TPUs; cudnn: NVIDIA GPUs in bfloat16;
    # blockwise: plain XLA, anywhere; dense: builds the whole mask, the oracle. One that does not serve is an error
    config.attention = "auto"
    # how the vocabulary projection is gone through: frozen (2 products of its size; where it is not trained), row (3;
    # where the loss takes each row by itself; holds a row's logits), token (4; always); auto: the fewest that fit
    config.head = "auto"
    # what the backward pass keeps of a layer, in the order of memory: none (recomputes no product), dots (recomputes
    # attention), save_except_mlp, save_attention, full (recomputes all); README has the table
    config.remat = "none"
    # what XLA's compiler is told of the update and the reference pass: ('latency_hiding', …), sets of
    # daajax/compiler_options.py, or single options of its own, 'xla_gpu_enable_pipelined_all_gather=true'; measure
    # before you keep any
    config.compiler_options = ()

    config.eval = config_dict.ConfigDict()
    config.eval.every = optional_int()  # updates between evaluations on eval_data; None: only after the last one

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.every = 500  # updates; there is always one of the last update
    config.checkpoint.keep = 2  # latest ones; with one, there is none to fall back on if it is damaged
    # keep the best too: by eval/loss, eval/rewards/accuracies or eval/rewards/margins; evaluates before each checkpoint
    config.checkpoint.best = optional_text()
    # what an unfinished run in the workdir means: auto: go on with it, if the config still fits; never: refuse it;
    # force: go on though the config does not fit
    config.resume = "auto"

    config.log = config_dict.ConfigDict()
    config.log.every = 10  # updates
    # FLOP/s of a device that `mfu` is measured against; None: what is published of the chip in bfloat16, or no `mfu`
    config.peak_flops = optional_float()
    # a jax.profiler trace of some updates, in the run's folder under profile/
    config.profile = config_dict.ConfigDict()
    config.profile.start = optional_int()  # number of the first one, counted from 1 as in the log; None: no trace
    config.profile.steps = 3  # how many
    # stop if policy and reference disagree on the first update of a run where they are the same
    config.check_first_loss = True
    # end the process with exit code 43, and write what every thread was doing to stacks/ in the run's folder, when no
    # update ends for so many minutes, as where a network hangs; a launcher starts it again. 0.0: never
    config.watchdog_minutes = 60.0
    return config.lock()
