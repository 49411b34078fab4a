"""One of several known names: picked, or refused with the nearest one told."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# What keys and flags are called elsewhere (nanoGPT, Hugging Face, litgpt), by what they
# are called here.
ELSEWHERE = {
    "hyper.lr": "learning_rate max_lr peak_lr base_lr",
    "hyper.final_lr_ratio": "min_lr",
    "hyper.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "hyper.decay_steps": "lr_decay_iters",
    "hyper.clip": "grad_clip max_grad_norm clip_norm gradient_clip_val",
    "hyper.weight_decay": "wd decay",
    "hyper.dropout_residual": "dropout resid_pdrop dropout_rate",
    "hyper.dropout_attn": "attn_pdrop attention_dropout",
    "hyper.dropout_embed": "embd_pdrop embedding_dropout",
    "hyper.beta1": "adam_beta1",
    "hyper.beta2": "adam_beta2",
    "hyper.eps": "adam_epsilon epsilon",
    "batch_size": "batch micro_batch_size per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps grad_accum accumulate_grad_batches",
    "steps": "max_iters max_steps num_steps total_steps iterations train_steps",
    "patience": "early_stopping",
    "fork": "branch branch_from resume_from resume_from_checkpoint",
    "eval_every": "eval_interval eval_steps",
    "eval_windows": "eval_iters",
    "log_every": "log_interval logging_steps",
    "checkpoint_every": "save_every save_interval save_steps",
    "wandb": "wandb_project",
    "data.source": "dataset dataset_name train_file data_path",
    "data.seq_len": "seq_length sequence_length max_length max_seq_length",
    "model.context_length": (
        "block_size ctx_len context n_ctx n_positions max_position_embeddings"
    ),
    "model.d_model": "n_embd hidden_size width dim embed_dim emb_dim",
    "model.n_layers": "n_layer num_layers depth num_hidden_layers",
    "model.n_heads": "n_head num_heads num_attention_heads",
    "model.n_kv_heads": "num_key_value_heads n_query_groups",
    "model.d_ff": "intermediate_size mlp_dim ffn_dim hidden_dim",
    "model.tie_embeddings": "tie_word_embeddings weight_tying",
    "model.qkv_bias": "bias",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "max_new_tokens": "max_tokens max_length num_tokens length",
    "count": "num_samples n num_return_sequences",
    "temperature": "temp",
    "prompt": "start",
    "run": "model checkpoint ckpt folder",
    "workdir": "out_dir output_dir logdir",
}


def choose(what: str, value: Any, known: Iterable[Any]) -> Any:
    """Returns what a table holds at `value`, or `value` where `known` is no table.

    Raises:
      ValueError: `known` does not hold it; says what was wanted and found, and which
        known word is near.
    """
    if value in (words := list(known)):
        return known[value] if isinstance(known, Mapping) else value
    shown = ", ".join(
        word if word and isinstance(word, str) else repr(word) for word in words
    )
    raise ValueError(
        f"{what} {value!r} is not one of: {shown}{did_you_mean(value, words)}"
    )


def did_you_mean(value: Any, known: Iterable[Any]) -> str:
    """Returns "; did you mean adamw?" where a known word is near, else ""."""
    near = nearest(str(value), known)
    return f"; did you mean {near[0]}?" if near else ""


def nearest(word: str, known: Iterable[Any], count: int = 1) -> list[str]:
    """Returns the known words that are spelt most like `word`, best first.

    Where words are dotted keys, the last part counts: hyper.learning_rate and lr are
    both near hyper.lr. What other projects call a key counts as well (ELSEWHERE).
    """
    words = [str(name) for name in known]
    lower = {name.lower(): name for name in reversed(words)}
    word, last = word.lower(), word.lower().rpartition(".")[2]
    found = [name for name in words if last in ELSEWHERE.get(name, "").split()]
    found += [name for name in words if last == name.lower().rpartition(".")[2]]
    found += [lower[name] for name in difflib.get_close_matches(word, lower, count)]
    if "." in "".join(words):
        tails = {name.rpartition(".")[2]: lower[name] for name in reversed(lower)}
        found += [tails[x] for x in difflib.get_close_matches(last, tails, count)]
    return list(dict.fromkeys(found))[:count]
