"""The groups of a config as types: frozen, with the keys of configs/common.py.

A config is unpacked into them once (`checks.unpack`); nothing behind that asks a
mapping for a key. What a task, an adapter or an optimizer reads stands with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """The keys of a config that are in no group."""

    seed: int
    init_from: str
    fork: str
    allow_data_change: bool
    batch_size: int
    accumulate: int
    steps: int
    max_tokens: int
    max_bytes: int
    max_seconds: float
    fit_seconds: float
    patience: int
    spike_window: int
    max_skipped: int
    log_every: int
    eval_every: int
    early_from: int
    eval_batch_size: int
    eval_windows: int
    checkpoint_every: int
    keep: int
    on_save_error: str
    sample_every: int
    tensorboard: bool
    wandb: str
    compile_cache: str
    heartbeat_timeout_seconds: int
    data_timeout_s: float
    grace_s: float


@dataclass(frozen=True)
class Data:
    """The keys of config.data."""

    source: str
    field: str
    tokenizer: str
    folder: str
    cache: str
    val_fraction: float
    split: str
    seq_len: int
    stride: int
    workers: int
    skip_bad_docs: bool


@dataclass(frozen=True)
class Sample:
    """The keys of config.sample."""

    prompt: str
    count: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    words: bool


@dataclass(frozen=True)
class Mesh:
    """The keys of config.mesh."""

    strategy: str
    data: int
    fsdp: int
    tensor: int
    cpu_devices: int
