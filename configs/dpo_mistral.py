"""Preference optimization of Mistral-7B-Instruct on UltraFeedback, 50,000 pairs.

    hf download mistralai/Mistral-7B-Instruct-v0.2 --local-dir models/Mistral-7B-Instruct-v0.2
    pip install 'daajax[hub]'
    python -m daajax.train --config=configs/dpo_mistral.py

DPO with beta 0.1, a learning rate of 5e-7, batches of 64 and one epoch: 781 updates. Data, rate and epoch are those of
the alignment handbook's run (huggingface.co/alignment-handbook/zephyr-7b-dpo-full), which ended at a held-out loss of
0.503 and an accuracy of 0.766: expect about that accuracy. Unlike there: the Instruct model in place of Zephyr's first
stage, beta 0.1 in place of 0.01, 50,000 of the 61,000 pairs, batches of 64 in place of 128, a linear fall from the
first update in place of a cosine after a warm-up, gradients clipped to 1.

Pairs with an empty answer or two equal ones are left out and counted. The first loss is 0.6931. Weights, gradients and
moments in float32 take 116 GB together, which config.mesh.fsdp spreads over all devices. Without a network:

    hf download --repo-type dataset HuggingFaceH4/ultrafeedback_binarized --local-dir data/ultrafeedback

and --config.data.path=data/ultrafeedback. The one override people want: --config.loss.beta=0.01.
"""

from typing import Any

from configs import base


def get_config() -> Any:
    """The recipe."""
    config = base.get_config()
    config.model.path = "models/Mistral-7B-Instruct-v0.2"
    config.data.name = "hub"
    config.data.path = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.split = "train_prefs"
    config.data.limit = 50_000
    config.data.max_bad_rows = 1_000  # some of its answers are empty, or chosen and rejected are one
    config.max_length = 2048
    config.batch_size = 64
    config.epochs = 1.0
    config.loss = base.loss("dpo", beta=0.1)
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 0
    config.optimizer.max_grad_norm = 1.0
    config.remat = "full"
    return config
