"""The learning rate of a step: linear warm-up, then a cosine down to lr_min.

MATH   step < warmup:  lr * (step + 1) / warmup
       else            lr_min + (lr - lr_min) * (1 + cos(pi * (step - warmup) / (max_steps - warmup))) / 2
Step counts from 0, so the first step moves (upstream's first step had learning rate 0).
"""

import math

from apr.config import TransformerTrainConfig


def lr_at(config: TransformerTrainConfig, step: int) -> float:
    """The learning rate that step `step` applies; lr_min from max_steps on."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.lr_min
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))
