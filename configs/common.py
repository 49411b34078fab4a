"""Every configuration key, its default, and what it means.

A config file calls `base()`, states only what differs, and returns it from
`get_config(arg)`. `arg` is what follows the colon on the command line:
`--config=configs/gpt2.py:size=medium` calls `get_config("size=medium")`.

Rules kept here: 0 or "" means "choose for me"; a number that training may vary
without recompiling lives in `hyper`; everything else is fixed for the run.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from gpt_jax import names


def base() -> ConfigDict:
    """Returns a fresh config holding every key with its default value."""
    config = ConfigDict()
    config.seed = 1337  # one root for weights, data order, dropout and sampling
    # Whose weights this run starts from: a run folder, hf:<folder or id> from Hugging
    # Face, or gguf:<file> of llama.cpp's; "random" = none, "" = none where the task is
    # not for tuning a model
    config.init_from = ""
    # The step of another run that this one goes on from, with its optimizer memory and
    # its place in the data: runs/a:step=600; "" = none. Steps count on from there.
    config.fork = ""
    # Go on with a run though its data is not what it was; --allow-data-change sets it
    config.allow_data_change = False

    config.data = ConfigDict(
        {
            # What to read: "builtin" (the standard library's source; "builtin:json" is
            # one folder of it), a corpus name, a file, a folder, a glob, any of these
            # in a store (gs://bucket/books), "hf:<dataset>", or a weighted mixture
            # "a*3 + b*1".
            "source": "builtin",
            "field": "text",  # the field of a row (.jsonl, .csv, ...) with its text
            # char, word, byte, bpe:<size>, gpt2, or the path of a tokenizer.json
            "tokenizer": "bpe:2000",
            "folder": "data",  # where prepared token shards are kept; may be an address
            "cache": "~/.cache/gpt_jax",  # where downloads are kept
            "val_fraction": 0.1,  # the share of the text kept for validation
            "split": "fraction",  # cut at that share of "fraction" or "documents"
            "seq_len": 0,  # tokens in a training window; 0 = model.context_length
            "stride": 0,  # tokens between window starts; 0 = seq_len (no overlap)
            "workers": 0,  # threads that tokenize; 0 = one per core, at most 8
            # Leave out files and rows that cannot be read, and say how many
            "skip_bad_docs": False,
        }
    )

    config.model = ConfigDict(
        {
            "vocab_size": 0,  # 0 = the tokenizer's
            "vocab_multiple": 1,  # the embedding table is padded (and masked) to this
            "n_classes": 0,  # of a classifier's head; 0 = the head of a language model
            "context_length": 256,  # the most tokens that the model sees at once
            "n_layers": 6,
            "d_model": 384,
            "n_heads": 6,
            "n_kv_heads": 0,  # 0 = n_heads; fewer = grouped-query attention
            "head_dim": 0,  # 0 = d_model / n_heads
            "d_ff": 0,  # width inside the MLP; 0 = 4 * d_model
            "position": "learned",  # learned, rope, none
            # Layer kinds, repeated over the depth. window 0 = full attention.
            # rope_scaling: None or {"kind", "factor", ...}. Kinds: linear; and, with an
            # original_context, llama3 with low_freq_factor and high_freq_factor, yarn
            # with beta_fast and beta_slow, longrope with short_factors.
            # rope_base 0 = these layers know no positions.
            "pattern": ({"window": 0, "rope_base": 10000.0, "rope_scaling": None},),
            "rotary_dim": 0,  # features of a head that rope rotates; 0 = all
            # The MLP reads what attention reads, not what it gives: no; shared, with
            # one norm for both; own, with a norm for each
            "parallel": "no",
            "norm": "layernorm",  # layernorm, rmsnorm
            "norm_eps": 1e-5,
            "norm_scale": True,  # a learned scale in every norm
            "norm_bias": True,  # a learned bias in every LayerNorm
            "norm_offset": 0.0,  # the scale is applied as (offset + scale)
            # pre, post (behind each sublayer, before it is added), both
            "norm_placement": "pre",
            "embed_norm": False,  # a norm right after the embedding
            "activation": "gelu_tanh",  # gelu_tanh, gelu, relu2, silu, relu
            "gated": False,  # the MLP multiplies by a gate (with silu: SwiGLU)
            "qkv_bias": True,
            "attn_bias": True,  # on the projection after attention
            "mlp_bias": True,
            "head_bias": False,
            "tie_embeddings": True,  # the head reuses the token embedding
            "qk_norm": False,  # normalise queries and keys
            "qk_norm_over": "head",  # head, each for itself; heads, all as one vector
            "qkv_clip": 0.0,  # no feature of query, key, value is beyond this; 0 = off
            "query_scale": 0.0,  # 0 = head_dim ** -0.5
            "attn_softcap": 0.0,  # cap * tanh(score / cap); 0 = off
            "logit_softcap": 0.0,  # the same on the logits; 0 = off
            "embed_scale": 1.0,  # the embedding is multiplied by this
            "residual_scale": 1.0,  # and what is added to the residual stream by this
            "logit_divisor": 1.0,  # the logits are divided by this, before a soft-cap
            # Whether rates found at one width stay right at others: standard, no; mup,
            # yes (Yang et al. 2022): see docs/guide/17-laboratory.md
            "param": "standard",
            "base_width": 64,  # mup: the d_model at which it is almost standard
            "init": "gpt2",  # gpt2, torch_default, modern
            "zero_init": False,  # projections into the residual stream start at 0
            "scan_layers": False,  # one compiled block looped over (deep models)
            # What the backward pass computes again, to save memory: none; dots, all but
            # matrix products; save_attn_out, all but attention; full, all.
            "remat": "none",
            "dtype": "float32",  # activations: float32, bfloat16
            "param_dtype": "float32",  # stored weights
            # auto, plain, blocked, xla, cudnn; auto takes cudnn on a GPU for bfloat16
            # where a trial of it succeeds, and native for a long cache on a CPU.
            "attention": "auto",
            # Keys and values that are kept while a text is written: "" = as dtype;
            # bfloat16; int8, with a scale for each token and head.
            "cache_dtype": "",
        }
    )

    config.task = task_lm()  # what is optimised: one of TASKS below
    config.adapter = adapter_full()  # which weights move: one of ADAPTERS below

    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # adamw, muon, lion, adafactor, sgd
            "schedule": "cosine",  # constant, cosine, linear, wsd
            # Which parameters decay, by path; the first match wins.
            "decay": ((r"(bias|scale)$", False), (r".*", True)),
            "rates": (),  # (regex, factor): the learning rate of a group of weights
            "freeze": (),  # regexes of parameters that do not move
            # Which parameters Muon takes (the rest goes to AdamW).
            "muon": (r"blocks?[_/].*kernel$",),
            # Averages of gradients (not of their squares): float32, bfloat16
            "moment_dtype": "float32",
            "ema": False,  # keep a moving average of the weights (hyper.ema_decay)
        }
    )

    # Traced numbers: changing them never recompiles, a population varies them.
    config.hyper = ConfigDict(
        {
            "lr": 1e-3,
            "matrix_lr": 0.02,  # Muon's rate for the matrices that it takes
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "momentum": 0.95,  # Muon and SGD
            "warmup_steps": 100.0,
            "initial_lr_ratio": 0.0,  # the rate of step 0, as a share of lr
            "decay_steps": 0.0,  # where the schedule ends; 0 = steps
            "decay_fraction": 0.2,  # wsd: the share of decay_steps that decays
            "final_lr_ratio": 0.1,
            "clip": 1.0,  # the largest norm of the whole gradient; 0 = off
            "dropout_embed": 0.0,
            "dropout_attn": 0.0,
            "dropout_residual": 0.0,
            "dropout_adapter": 0.0,  # of what an adapter's first matrix reads
            "label_smoothing": 0.0,
            "z_loss": 0.0,  # weight of log(sum(exp(logits)))^2
            "ema_decay": 0.999,
            "spike_sigma": 6.0,  # standard deviations above the mean that are a spike
        }
    )

    config.batch_size = 32  # windows in one step, over all devices
    config.accumulate = 1  # micro-batches that one step is made of
    config.steps = 1000
    config.max_tokens = 0  # stop after so many training tokens; 0 = no limit
    # Stop after so many bytes of training text, whatever its tokens are; 0 = no limit
    config.max_bytes = 0
    config.max_seconds = 0.0  # stop after so much wall time; 0 = no limit
    # Choose steps so that the run takes so much wall time, compiling and evaluating
    # included; 0 = steps as they are. Needs the schedule wsd or constant.
    config.fit_seconds = 0.0
    config.patience = 0  # stop after so many evaluations without a new best; 0 = never
    # An update is skipped when its loss is a spike against so many before it; 0 = never
    config.spike_window = 0
    config.max_skipped = 10  # stop after so many skipped updates in a row

    config.log_every = 10
    config.eval_every = 250
    config.eval_batch_size = 0  # windows at once; 0 = a micro-batch, or 16,384 tokens
    # Evaluate and sample also at steps 20, 50, 100, 200, ... from this number on, until
    # the first interval ends; 0 = not
    config.early_from = 20
    config.eval_windows = 0  # at most so many windows, evenly spaced; 0 = all
    config.checkpoint_every = 250
    config.keep = 2  # newest checkpoints kept, besides the best
    # When one cannot be saved (a full disk): stop, or continue and try the next one.
    # The last one of a run must be saved all the same.
    config.on_save_error = "stop"
    config.sample_every = 0  # write samples at this interval; 0 = never
    config.sample = ConfigDict(
        {
            "prompt": "",  # "" = the end-of-text token, or a character of the text
            "count": 1,
            "max_new_tokens": 100,
            "temperature": 0.8,
            "top_k": 0,
            "top_p": 1.0,
            # Record the share of their words that the training text has, too
            "words": False,
        }
    )

    config.mesh = ConfigDict(
        {
            "strategy": "mesh",  # mesh (jit over a device mesh), pmap
            "data": -1,  # devices that share the batch; -1 = all that are left
            "fsdp": 1,  # devices that split weights and examples
            "tensor": 1,  # devices that split heads, MLP columns and the vocabulary
            "cpu_devices": 0,  # XLA devices on a CPU; 0 = one per core, at most 8
        }
    )

    config.tensorboard = True
    config.wandb = ""  # a Weights & Biases project; "" = off
    config.compile_cache = "~/.cache/gpt_jax/compile"  # "" = compile every time
    # Of several processes: one that shows no sign of life for so long ends the run
    config.heartbeat_timeout_seconds = 30
    config.data_timeout_s = 300.0  # the longest wait for a batch before the run stops
    config.grace_s = 120.0  # after SIGTERM or Ctrl-C, the longest wait before leaving
    return config


def task_lm() -> ConfigDict:
    """Predict the next token of running text."""
    return ConfigDict(
        {
            "name": "lm",
            # Positions of a window whose logits exist at once: fewer save memory and
            # cost a tenth of a step. 0 = all, or what fits into 2 GB a micro-batch.
            "loss_chunk": 0,
        }
    )


def task_sft() -> ConfigDict:
    """Learn the answers of instructions and conversations.

    config.data.source names their file: JSON, JSONL, hf:<dataset>, "instructions" (the
    1,100 rows of Raschka's book), "alpaca" (Stanford's 52,002) or "builtin:json".
    data.split cuts them "fraction" as they stand, "documents" after a shuffle.
    """
    return ConfigDict(
        {
            "name": "sft",
            "template": "alpaca",  # alpaca, phi3, chatml, plain, or the text of a Jinja
            "learn": "answers",  # answers, all: which tokens count in the loss
            "pack": True,  # several conversations to a row, unseen by each other
            # A conversation longer than the window: refuse, drop, cut
            "too_long": "refuse",
            "empty": "refuse",  # a row with an empty answer, or none: refuse, drop
            "test_fraction": 0.1,  # rows kept for a test, behind those to train on
            "loss_chunk": 0,  # see task_lm
        }
    )


def template(name: str) -> str:
    """Returns a chat template: the text of a .jinja file, or a name as it is."""
    is_file = name.endswith(".jinja")
    return Path(name).read_text(encoding="utf-8") if is_file else name


def task_dpo() -> ConfigDict:
    """Prefer one of two answers to an instruction.

    config.data.source names their file, as in task_sft; its rows have the columns
    rejected, and chosen or output.
    """
    return ConfigDict(
        {
            "name": "dpo",
            # As in task_sft; "" = that of the run whose weights this one starts from
            "template": "",
            "variant": "dpo",  # dpo, ipo, orpo
            "logp": "sum",  # log-probability of an answer: sum or mean of its tokens'
            "beta": 0.1,  # how closely the start is held to; orpo: weight of the odds
            # A pair with an answer longer than the window: refuse, drop, cut
            "too_long": "refuse",
            "empty": "refuse",  # a row with an empty answer: refuse, drop
            "test_fraction": 0.1,  # rows kept for a test, behind those to train on
            "loss_chunk": 0,  # see task_lm
        }
    )


def task_classify() -> ConfigDict:
    """Sort texts into classes; config.data.source names the table."""
    return ConfigDict(
        {
            "name": "classify",
            "text_column": "text",
            "label_column": "label",  # of the class
            "columns": (),  # the names of all columns, where the file has no header
            "labels": (),  # the classes; () = all that the table has, sorted
            "skip": False,  # leave out rows that cannot be used, and count them
            "balance": False,  # of each class only as many rows as the rarest has
            # The parts: a column that holds train, val or test; or tables of their own
            # for val and test; or shares of all rows, in an order that the seed draws.
            "split_column": "",
            "val": "",
            "test": "",
            "fractions": (0.7, 0.1, 0.2),
            "split_seed": 123,
            # Whose features are classified: last or first token of the text, the mean
            # of all; or end, the last position of the row, padding or not.
            "pool": "last",
            "causal": True,  # a token sees only what is before it
            # Widths that a batch may be padded to, instead of the one that fits all
            # texts; each is compiled for when it first comes.
            "buckets": (),
        }
    )


def task_answers() -> ConfigDict:
    """Learn the right answers of generated problems: the start of task_grpo."""
    return ConfigDict(
        {
            "name": "answers",
            # reverse (abc< cba), sort (cab^ abc), copy (abc= abc), upper (abc> ABC) of
            # letters; add (12+7= 19) of digits
            "kind": "reverse",
            "shortest": 3,  # letters, or digits of a summand
            "longest": 5,
            "problems": 1_000_000,  # how many training problems there are to draw
            "held_out": 500,  # problems of an evaluation, never trained on
            "max_new_tokens": 0,  # the longest completion; 0 = the longest answer's
        }
    )


def task_grpo() -> ConfigDict:
    """Learn to solve generated problems from rewards; batch_size counts questions."""
    task = task_answers()
    task.update(
        name="grpo",
        group=16,  # answers to each question, which are compared
        reward="exact",  # exact (0 or 1), partial (the share of right positions)
        normalize=True,  # divide advantages by the group's standard deviation
        average="sequence",  # what counts the same: each sequence, token; or constant
        clip=0.2,  # how far a probability ratio may move; 0 = off
        kl=0.0,  # weight of the divergence from the start; 0 = no reference
        temperature=1.0,  # that answers are drawn with
        updates=1,  # steps that use one rollout; 1 = exactly on-policy
    )
    return task


def adapter_full() -> ConfigDict:
    """Every weight trains."""
    return ConfigDict({"name": "full"})


def adapter_only() -> ConfigDict:
    """Some weights train, as they are; the others are frozen and stored once."""
    # Regexes of the paths of those that train, such as block_5/attn/query/kernel.
    return ConfigDict({"name": "only", "train": (r"final_norm/", r"classifier/")})


def adapter_lora() -> ConfigDict:
    """LoRA: every weight is frozen; a product of two thin matrices trains beside some.

    Hu et al. 2021. What the thin matrices read is dropped by hyper.dropout_adapter.
    """
    return ConfigDict(
        {
            "name": "lora",
            "rank": 8,  # the width between the two matrices
            "alpha": 16.0,  # their product is multiplied by alpha / rank
            # Regexes of the kernels that get one: those of linear layers.
            "targets": (r"(query|key|value|out|up|gate|down|classifier)/kernel$",),
            # How frozen kernels and embeddings are kept: "" = as they are, bfloat16,
            # or int8 (kernels only; they lose bits, see docs/guide/10-preferences.md)
            "base_dtype": "",
        }
    )


TASKS = {
    "lm": task_lm,
    "classify": task_classify,
    "sft": task_sft,
    "dpo": task_dpo,
    "answers": task_answers,
    "grpo": task_grpo,
}
ADAPTERS = {"full": adapter_full, "only": adapter_only, "lora": adapter_lora}


DEEP = 20  # layers from which on one is compiled and looped over


def from_run(config: ConfigDict, folder: str) -> ConfigDict:
    """Starts a config from the weights of a run: its model and its tokenizer as well.

    A task whose template is "" takes the run's. Call it last, and change the model's
    shape after it only in what the task needs. With "" (no such run) the config stays
    as it is; with "none" its weights are random, on purpose.

    Raises:
      ValueError: the folder is no run, or its config.json cannot be read.
    """
    if not folder:
        return config
    if folder == "none":
        config.init_from = "random"
        return config
    from gpt_jax import files, stores  # which few configs need

    path = stores.fetched(folder) / "config.json"
    if not path.is_file():
        what = "has no config.json" if path.parent.is_dir() else "does not exist"
        what = "is a file" if path.parent.is_file() else what
        raise ValueError(
            f"run={folder} is not a run folder: it {what}. A run is made by training, "
            "for example --config=configs/quickstart.py"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = {key: _tuples(value) for key, value in saved["model"].items()}
        template = saved["task"].get("template", "") or _chat_template(path.parent)
        unknown = sorted(found.keys() - config.model.keys())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a run: {error!r}") from error
    if unknown:
        raise ValueError(
            f"{path} has keys of a model that are not known here: {', '.join(unknown)}"
        )
    config.model.update(found)
    # One by one, XLA looks through all copies of many layers again for each array that
    # trains: with LoRA in 30 of them for more than ten minutes, looped half a minute.
    config.model.scan_layers = config.model.n_layers >= DEEP
    if config.task.get("template") == "":
        config.task.template = template
    config.init_from = folder if files.is_address(folder) else str(path.parent)
    return config


def _chat_template(folder: Path) -> str:
    """Returns the template that an imported model came with, "" for none."""
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _tuples(value):
    """Returns what JSON holds with lists as tuples, as configs are written."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def options(arg: str | None, **defaults: str) -> dict[str, str]:
    """Returns the `key=value,key=value` options after a config's colon.

    Args:
      arg: the text after the colon, or None.
      **defaults: the options that the config knows, with their default values.

    Raises:
      ValueError: an option is unknown or not written `key=value`.
    """
    chosen = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        known = ", ".join(f"{k}={v}" for k, v in defaults.items())
        if not equals:
            meant = "size" if "size" in defaults else next(iter(defaults))
            raise ValueError(
                f"config option {part!r} has no name: write {meant}={part}; the "
                f"options are {known}"
            )
        if key not in defaults:
            near = names.did_you_mean(key, defaults)
            raise ValueError(f"config option {part!r} is not one of: {known}{near}")
        chosen[key] = value
    return chosen


def choose(table: dict, key: str, what: str):
    """Returns `table[key]`; the error of a wrong key names the choices."""
    return names.choose(what, key, table)


def tiny(config: ConfigDict) -> ConfigDict:
    """Shrinks a config to seconds on one core, text included; the tests run it so."""
    config.model.update(n_layers=2, d_model=32, n_heads=2, n_kv_heads=0, head_dim=0)
    config.model.update(d_ff=0, context_length=32, scan_layers=False)
    tokenizer = "char" if config.data.tokenizer == "char" else "byte"
    config.data.update(source="builtin:json", tokenizer=tokenizer, split="fraction")
    config.data.update(seq_len=0, stride=0, workers=1, val_fraction=0.1)
    config.update(batch_size=4, accumulate=1, steps=6, log_every=2, eval_every=3)
    config.update(checkpoint_every=3, eval_windows=8)
    config.hyper.warmup_steps = 2.0
    if config.sample_every:
        config.sample_every = 3
        config.sample.max_new_tokens = 8
    return config


def modern(config: ConfigDict) -> ConfigDict:
    """Switches a config to the modern block and optimizer.

    RoPE instead of learned positions, RMSNorm without parameters, QK-norm, squared
    ReLU, no biases, an untied head with a soft-cap, projections that start at zero;
    Muon for the matrices and AdamW for the rest, on a warm-up-stable-decay schedule.
    """
    config.model.update(
        position="rope",
        norm="rmsnorm",
        norm_scale=False,
        embed_norm=True,
        activation="relu2",
        qkv_bias=False,
        attn_bias=False,
        mlp_bias=False,
        qk_norm=True,
        tie_embeddings=False,
        logit_softcap=15.0,
        init="modern",
        zero_init=True,
    )
    config.optimizer.update(name="muon", schedule="wsd")
    config.hyper.update(lr=5e-3, matrix_lr=0.02, weight_decay=0.0, beta2=0.95)
    config.hyper.update(warmup_steps=20.0, decay_fraction=0.5, final_lr_ratio=0.0)
    return config
