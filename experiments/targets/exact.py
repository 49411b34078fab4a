"""Facts that depend on no random number: counts, sizes, schedules, token ids."""

from functools import partial

from configs import common, gpt2, the_verdict
from experiments.targets import Place, exactly

SIZES = ("small", "medium", "large", "xl")


def parameters(place: Place, **switches) -> tuple[int, ...]:
    """Returns the parameters of GPT-2 in its four sizes."""
    from gpt_jax import model

    counts = []
    for size in SIZES:
        config = gpt2.get_config(f"size={size}").model
        config.update(vocab_size=50257, **switches)
        counts.append(model.count(model.GPTConfig(**config)))
    return tuple(counts)


def lora(place: Place) -> int:
    """Returns what trains of GPT-2 small with a 2-class head and LoRA of rank 16."""
    import jax

    from gpt_jax import adapters, model

    config = gpt2.get_config("size=small").model
    config.update(vocab_size=50257, n_classes=2, scan_layers=False)
    config.update(qkv_bias=False, tie_embeddings=False)
    cfg = model.GPTConfig(**config)
    options = {**common.adapter_lora(), "rank": 16}
    adapter = adapters.make(model.declared(cfg), **options)
    key = jax.random.key(0)
    shapes = jax.eval_shape(partial(model.init, cfg), key)
    return model.count(jax.eval_shape(adapter.split, shapes, key)[0])


def cache_gb(place: Place, kv_heads: int) -> str:
    """Returns the size of the KV cache of a 7B model for 32,768 tokens, bfloat16."""
    import jax
    import jax.numpy as jnp

    from gpt_jax import model

    config = common.base().model
    config.update(d_model=4096, n_heads=32, n_kv_heads=kv_heads, n_layers=32)
    config.update(context_length=32_768, position="rope", vocab_size=32_000)
    cfg = model.GPTConfig(**config)
    make = partial(model.init_cache, cfg, 1, 32_768, jnp.bfloat16)
    made = jax.eval_shape(make)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.layers))
    return f"{size / 1e9:.2f} GB"


def appendix_d(place: Place) -> tuple[int, int]:
    """Returns steps and warm-up of 15 epochs of The Verdict: a fifth is warm-up."""
    windows = (len(_gpt2(place).encode(_verdict(place))) * 9 // 10 - 1) // 256
    config = the_verdict.get_config("recipe=appendix_d")
    epoch = windows // config.batch_size
    assert config.steps == 15 * epoch, "the config trains another number of epochs"
    return config.steps, int(config.hyper.warmup_steps)


def verdict_words(place: Place) -> tuple[int, ...]:
    """Returns characters, words and vocabulary (without, with specials)."""
    from gpt_jax import tokenizers

    text = _verdict(place)
    words = tokenizers.train("word", iter([text]))
    plain = words.vocab_size - len(words.specials)
    return len(text), len(words.encode(text)), plain, words.vocab_size


def verdict_ids(place: Place) -> str:
    """Returns how many GPT-2 tokens The Verdict has, and its first four."""
    ids = _gpt2(place).encode(_verdict(place))
    return f"{len(ids):,}: {ids[:4]} ..."


def strange_word(place: Place) -> str:
    """Returns the ids of a word that GPT-2 never saw."""
    return str(_gpt2(place).encode("Akwirw ier"))


def shakespeare(place: Place) -> tuple[int, ...]:
    """Returns symbols, training characters, validation characters."""
    from gpt_jax import prepare

    place.file("tinyshakespeare.txt")
    keys = dict(common.base().data)
    for key in ("seq_len", "stride"):
        keys.pop(key)
    keys.update(source="tinyshakespeare", tokenizer="char", cache=str(place.data))
    keys.update(folder=str(place.out / "data"))
    made = prepare.prepare(**keys, progress=False)
    return made.tokenizer.vocab_size, len(made.train), len(made.val)


def _verdict(place: Place) -> str:
    return place.file("the-verdict.txt").read_text(encoding="utf-8")


def _gpt2(place: Place):
    from gpt_jax import tokenizers

    names = ("gpt2_tokenizer/encoder.json", "gpt2_tokenizer/vocab.bpe")
    return tokenizers.gpt2(*map(place.file, names))


ROWS = (
    exactly(
        "GPT-2 parameters (small / medium / large / XL), untied, no qkv bias",
        (163_009_536, 406_212_608, 838_220_800, 1_637_792_000),
        partial(parameters, tie_embeddings=False, qkv_bias=False),
    ),
    exactly(
        "the same, tied, with qkv bias (OpenAI's)",
        (124_439_808, 354_823_168, 774_030_080, 1_557_611_200),
        partial(parameters, tie_embeddings=True, qkv_bias=True),
    ),
    exactly(
        "the same, tied, no qkv bias (the book's count)",
        (124_412_160, 354_749_440, 773_891_840, 1_557_380_800),
        partial(parameters, tie_embeddings=True, qkv_bias=False),
    ),
    exactly("LoRA r=16, GPT-2 small + 2 classes: trainable", 2_666_528, lora),
    exactly(
        "KV cache, 32,768 tokens, d 4096, 32 layers, bf16, 32 heads",
        "17.18 GB",
        partial(cache_gb, kv_heads=32),
    ),
    exactly("the same, 8 KV heads", "4.29 GB", partial(cache_gb, kv_heads=8)),
    exactly("the book's appendix D: steps / warm-up", (135, 27), appendix_d),
    exactly(
        "The Verdict: characters / words / vocabulary / with specials",
        (20_479, 4_690, 1_130, 1_132),
        verdict_words,
    ),
    exactly(
        "The Verdict: GPT-2 tokens, the first four",
        "5,145: [40, 367, 2885, 1464] ...",
        verdict_ids,
    ),
    exactly(
        'GPT-2 ids of "Akwirw ier"', "[33901, 86, 343, 86, 220, 959]", strange_word
    ),
    exactly(
        "tinyshakespeare: symbols / training / validation characters",
        (65, 1_003_854, 111_540),
        shakespeare,
    ),
)
