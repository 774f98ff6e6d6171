"""Supervised fine-tuning of Llama 3.x on your own texts or chats, for instance ahead of preference optimization.

    hf download meta-llama/Llama-3.1-8B --local-dir models/Llama-3.1-8B
    python -m daajax.train --config=configs/sft_llama.py --config.data.path=chats.jsonl.gz

A learning rate of 2e-5 with a cosine, batches of 128, sequences of 2,048 tokens and one epoch, as the alignment
handbook made Zephyr's first stage (huggingface.co/alignment-handbook/zephyr-7b-sft-full). Unlike there: no warm-up in
place of a tenth of the run, because an epoch of few examples is short (with 100,000, set optimizer.warmup_steps=80);
only responses are scored, where theirs scores prompts too. An example is a line such as one of

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "The beginning of a text", "response": " and how it goes on."}
    {"prompt": "", "response": "A whole text."}

A base model brings no chat template: for chats take an Instruct model, or name one with --config.chat.template=FILE.
The loss is in nats per token; on UltraChat it ended at 0.91 there. `runs/sft_llama/model` is then what
configs/dpo_llama.py starts from: --config.model.path=runs/sft_llama/model. The one override people want:
--config.chat.score=all, which scores every assistant turn of a conversation and not the last alone.
"""

from typing import Any

from configs import base


def get_config() -> Any:
    """The recipe."""
    config = base.get_config()
    config.model.path = "models/Llama-3.1-8B"
    config.data.path = "data/chats.jsonl.gz"
    config.max_length = 2048
    config.batch_size = 128
    config.epochs = 1.0
    config.loss = base.loss("sft")
    config.reference.mode = "none"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 0
    config.optimizer.max_grad_norm = 1.0
    config.remat = "full"
    return config
