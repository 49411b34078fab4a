"""The numbers of a run that are traced."""

from typing import Any, NamedTuple


class Hyper(NamedTuple):
    """The traced numbers of a run; configs/common.py says what each one means."""

    lr: Any
    matrix_lr: Any
    weight_decay: Any
    beta1: Any
    beta2: Any
    eps: Any
    momentum: Any
    warmup_steps: Any
    initial_lr_ratio: Any
    decay_steps: Any
    decay_fraction: Any
    final_lr_ratio: Any
    clip: Any
    dropout_embed: Any
    dropout_attn: Any
    dropout_residual: Any
    dropout_adapter: Any
    label_smoothing: Any
    z_loss: Any
    ema_decay: Any
    spike_sigma: Any
