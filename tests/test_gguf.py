"""GGUF files, read back with the gguf package."""

import itertools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as hf
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from configs import common
from gpt_jax import chat, model, pretrained, rope, tokenizers
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import config_json, gguf_file, gguf_tokenizer, weights
from gpt_jax.pretrained.gguf import interleaved, save
from gpt_jax.special import Special

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

GOLDEN = Path(__file__).parent / "golden"
BYTES = tokenizers.train("byte", [])


def opened(name: str) -> tuple[GPTConfig, dict]:
    folder = GOLDEN / name
    cfg = GPTConfig(**{**common.base().model.to_dict(), **pretrained.fields(folder)})
    return cfg, pretrained.load(folder, cfg)


def tiny(**changes) -> tuple[GPTConfig, dict]:
    config = common.base().model
    config.update(vocab_size=300, context_length=16, n_layers=1, d_model=32, n_heads=4)
    cfg = GPTConfig(**{**config.to_dict(), **changes})
    return cfg, model.init(cfg, jax.random.key(0))


LLAMA = {
    **{"position": "rope", "norm": "rmsnorm", "gated": True, "activation": "silu"},
    **{"qkv_bias": False, "attn_bias": False, "mlp_bias": False},
}


def write(path: Path, cfg, params, tokenizer=BYTES):
    """Returns the reader of a file just written, and its values by key."""
    save(path, params, cfg, tokenizer)
    reader = gguf.GGUFReader(path)
    return reader, {key: field.contents() for key, field in reader.fields.items()}


def arrays(reader) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in reader.tensors}


def test_gpt2_reads_back_equal(tmp_path):
    cfg, params = tiny()
    reader, about = write(tmp_path / "a.gguf", cfg, params)
    assert about["general.architecture"] == "gpt2"
    assert about["gpt2.context_length"] == 16 and about["gpt2.block_count"] == 1
    assert about["gpt2.attention.head_count"] == 4
    weights.save(tmp_path, params, cfg, tokens={}, shard_bytes=10**9)
    theirs = load_file(tmp_path / "model.safetensors")
    found, h = arrays(reader), "transformer.h.0."
    wanted = {
        "token_embd.weight": theirs["transformer.wte.weight"],
        "position_embd.weight": theirs["transformer.wpe.weight"],
        "output_norm.weight": theirs["transformer.ln_f.weight"],
        "blk.0.attn_qkv.weight": theirs[h + "attn.c_attn.weight"].T,
        "blk.0.attn_qkv.bias": theirs[h + "attn.c_attn.bias"],
        "blk.0.attn_output.weight": theirs[h + "attn.c_proj.weight"].T,
        "blk.0.ffn_up.weight": theirs[h + "mlp.c_fc.weight"].T,
        "blk.0.ffn_down.weight": theirs[h + "mlp.c_proj.weight"].T,
        "blk.0.ffn_norm.bias": theirs[h + "ln_2.bias"],
    }
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert len(found) == len(theirs)


def test_llama_reads_back_equal_with_its_heads_interleaved(tmp_path):
    scaling = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_context": 8}
    kind = {"window": 0, "rope_base": 500.0, "rope_scaling": scaling}
    cfg, params = tiny(**LLAMA, n_kv_heads=2, tie_embeddings=False, pattern=(kind,))
    reader, about = write(tmp_path / "a.gguf", cfg, params)
    assert about["general.architecture"] == "llama"
    assert about["llama.attention.head_count_kv"] == 2
    assert about["llama.rope.freq_base"] == 500.0
    found, block = arrays(reader), params["block_0"]
    for name, weight in (("q", "query"), ("k", "key")):
        rows = np.asarray(block["attn"][weight]["kernel"]).reshape(32, -1).T
        stored = found[f"blk.0.attn_{name}.weight"].reshape(-1, 8, 32)
        heads = rows.reshape(-1, 8, 32)
        # Neighbours are turned together: 0 with 1, which are our 0 and 4.
        np.testing.assert_array_equal(stored[:, 0::2], heads[:, :4])
        np.testing.assert_array_equal(stored[:, 1::2], heads[:, 4:])
    rows = np.asarray(block["attn"]["value"]["kernel"]).reshape(32, -1).T
    np.testing.assert_array_equal(found["blk.0.attn_v.weight"], rows)
    np.testing.assert_array_equal(
        found["output.weight"], np.asarray(params["head"]["kernel"]).T
    )
    slow = rope.rope_frequencies(8, base=500.0, scaling=cfg.kind(0).rope_scaling)
    plain = 1 / 500.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / found["rope_freqs.weight"], slow, rtol=1e-6)


def test_interleaving_keeps_the_scores_of_queries_and_keys():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 8))  # two heads of 8 features
    angle = rng.normal(size=(2, 1, 4))

    def halves(x, a):
        x, y = x[:, :4], x[:, 4:]
        return np.concatenate(
            [x * np.cos(a) - y * np.sin(a), y * np.cos(a) + x * np.sin(a)], 1
        )

    def neighbours(x, a):
        x, y = x[:, 0::2], x[:, 1::2]
        turned = [x * np.cos(a) - y * np.sin(a), y * np.cos(a) + x * np.sin(a)]
        return np.stack(turned, -1).reshape(2, 8)

    ours = (halves(q, angle[0]) * halves(k, angle[1])).sum(-1)
    q, k = (interleaved(x.reshape(16), 2).reshape(2, 8) for x in (q, k))
    theirs = (neighbours(q, angle[0]) * neighbours(k, angle[1])).sum(-1)
    np.testing.assert_allclose(ours, theirs)


def test_bfloat16_matrices_stay_and_vectors_widen(tmp_path):
    cfg, params = tiny(param_dtype="bfloat16")
    reader, _ = write(tmp_path / "a.gguf", cfg, params)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "BF16" and kinds["output_norm.weight"] == "F32"
    stored = arrays(reader)["token_embd.weight"].view(np.uint16).reshape(300, 32)
    ours = np.asarray(params["embed"]["embedding"]).view(np.uint16)
    np.testing.assert_array_equal(stored, ours)


def test_the_tokenizer_comes_along(tmp_path):
    words = tokenizers.train("bpe:280", ["the cat sat on the mat " * 20])
    cfg, params = tiny()
    _, about = write(tmp_path / "a.gguf", cfg, params, words)
    tokens = about["tokenizer.ggml.tokens"]
    assert len(tokens) == 300
    assert all(tokens[i] == token for token, i in words.vocab.items())
    assert about["tokenizer.ggml.model"] == "gpt2"
    assert about["tokenizer.ggml.pre"] == "gpt-2"
    assert about["tokenizer.ggml.eos_token_id"] == words.eos_id
    merges = json.loads(words.json)["model"]["merges"]
    assert about["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    types = about["tokenizer.ggml.token_type"]
    assert types[words.eos_id] == 3 and types[0] == 1 and types[299] == 5


def test_how_texts_are_split_goes_by_llama_cpps_names(tmp_path):
    cfg, params = tiny()
    words = tokenizers.train("bpe:280", ["the cat sat on the mat " * 20])
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for rule, name in (
        (pre_tokenizers.Sequence([digits, level]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), level]), None),
    ):
        backend = hf.Tokenizer.from_str(words.json)
        backend.pre_tokenizer = rule
        changed = tokenizers.Tokenizer(backend.to_str())
        if name:
            _, about = write(tmp_path / f"{name}.gguf", cfg, params, changed)
            assert about["tokenizer.ggml.pre"] == name
        else:
            with pytest.raises(ValueError, match="splits texts"):
                save(tmp_path / "b.gguf", params, cfg, changed)


@pytest.mark.parametrize(
    "name, named",
    [("gemma3", "gemma3_text"), ("mistral", "mistral"), ("llama_biases", "silu")],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, named, tmp_path):
    cfg, params = opened(name)
    with pytest.raises(ValueError, match=named):
        save(tmp_path / "a.gguf", params, cfg, BYTES)
    assert not list(tmp_path.iterdir())


LINEAR = {"kind": "linear", "factor": 2.0}
SCALED = ({"window": 0, "rope_base": 500.0, "rope_scaling": LINEAR},)


@pytest.mark.parametrize(
    "changes",
    [{}, {**LLAMA, "n_kv_heads": 2, "tie_embeddings": False, "pattern": SCALED}],
    ids=["gpt2", "llama"],
)
def test_a_file_comes_in_again_bit_for_bit(changes, tmp_path):
    cfg, params = tiny(**changes)
    said = BYTES.with_special(Special(None, 256, None, (256,)))
    save(tmp_path / "a.gguf", params, cfg, said, template="alpaca")
    source = pretrained.find(str(tmp_path / "a.gguf"))
    again = GPTConfig(**{**common.base().model.to_dict(), **pretrained.fields(source)})
    assert not config_json.difference(cfg, pretrained.fields(source))
    found = flatten_dict(pretrained.load(source, again))
    wanted = flatten_dict(params)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=str(path))
    words = pretrained.tokenizer(source)
    assert words.encode("Größe <|endoftext|>") == BYTES.encode("Größe <|endoftext|>")
    assert words.ends == (256,)
    assert pretrained.template(source) == chat.as_jinja("alpaca", said)


def test_eight_bits_and_sixteen_come_in_as_the_package_rounds_them(tmp_path):
    cfg, params = tiny(**LLAMA)
    table = np.asarray(params["embed"]["embedding"])
    for kind, least in (("F16", 1e-3), ("Q8_0", 1e-2)):
        path = tmp_path / f"{kind}.gguf"
        save(path, params, cfg, BYTES, kind=kind)
        found = np.asarray(pretrained.load(path, cfg)["embed"]["embedding"])
        number = gguf.GGMLQuantizationType[kind]
        rounded = gguf.quants.quantize(table, number)
        np.testing.assert_array_equal(found, gguf.quants.dequantize(rounded, number))
        assert 0 < np.abs(found - table).max() < least * np.abs(table).max()
        norm = pretrained.load(path, cfg)["final_norm"]["scale"]
        np.testing.assert_array_equal(norm, params["final_norm"]["scale"])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_few_bits_lie_as_far_apart_as_the_blocks_of_llama_cpp_have_them(kind, tmp_path):
    """Checked by the grid's own formula: 2^bits numbers to a block of 32."""
    cfg, params = tiny(**LLAMA)
    save(tmp_path / "a.gguf", params, cfg, BYTES, kind=kind)
    found = pretrained.load(tmp_path / "a.gguf", cfg)
    up = ("block_0", "mlp", "up", "kernel")
    was, now = (np.asarray(flatten_dict(x)[up]).T for x in (params, found))
    was, now = was.reshape(-1, 32), now.reshape(-1, 32)
    steps = 2.0 ** int(kind[1])
    if kind.endswith("_0"):  # a scale: the largest number is one end of the grid
        apart = np.abs(was).max(1) / (steps / 2)
        most = 1.01  # the other end of the grid is one step nearer
    else:
        apart = (was.max(1) - was.min(1)) / (steps - 1)
        most = 0.51
    off = np.abs(now - was).max(1) / apart
    assert 0.3 < off.max() < most
    types = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors
    }
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == kind


def test_starcoder_splits_as_smollm_does_and_llama3_as_llama_bpe():
    tokens = [*tokenizers.train("bpe:290", ["12 13 it's 123 123"]).vocab]
    about = {"model": "gpt2", "tokens": tokens, "merges": ["1 2"]}
    for name, same in (("starcoder", "smollm"), ("llama-v3", "llama-bpe")):
        found = []
        for pre in (name, same, "gpt-2"):
            keys = {f"tokenizer.ggml.{k}": x for k, x in (about | {"pre": pre}).items()}
            file = gguf_file.GGUF(Path("a.gguf"), {}, {}, keys | BOS)
            found.append(gguf_tokenizer.tokenizer(file))
        assert found[0].json == found[1].json != found[2].json


BOS = {"tokenizer.ggml.bos_token_id": 0}


@pytest.mark.parametrize("name", gguf_tokenizer.SPLITS)
def test_a_byte_level_tokenizer_goes_out_and_comes_in_by_every_split(name, tmp_path):
    cfg, params = tiny()
    text = "don't IT'S 1234567 a  b\n\n x²é 日本 " * 20
    backend = hf.Tokenizer.from_str(tokenizers.train("bpe:290", [text]).json)
    backend.pre_tokenizer = gguf_tokenizer.SPLITS[name]()
    document = json.loads(backend.to_str())
    document["model"]["ignore_merges"] = name in gguf_tokenizer.WHOLE_WORDS
    if name in gguf_tokenizer.COMPOSED:
        document["normalizer"] = {"type": "NFC"}
    words = tokenizers.Tokenizer(json.dumps(document))
    _, about = write(tmp_path / "a.gguf", cfg, params, words)
    assert about["tokenizer.ggml.pre"] == name
    found = pretrained.tokenizer(tmp_path / "a.gguf")
    for hostile in (
        text,
        "e\u0301\r\n\t 12 345'LL",
        "\x00\u200b\ufeff🏳️‍🌈",
        "   ",
        "a" * 99,
    ):
        assert found.encode(hostile) == words.encode(hostile)
    pieces = [
        p for p, _ in gguf_tokenizer.SPLITS[name]().pre_tokenize_str("IT'S 12345")
    ]
    digits = {"gpt-2": 1, "llama-bpe": 2, "smollm": 5, "qwen2": 5}[name]
    assert sum(p.strip("Ġ").isdecimal() for p in pieces) == digits


def test_a_tokenizer_without_a_space_in_front_says_so(tmp_path):
    vocab = {
        "<unk>": 0,
        **{f"<0x{b:02X}>": b + 1 for b in range(256)},
        "▁": 257,
        "a": 258,
    }
    bpe = hf.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    backend = hf.Tokenizer(bpe)
    cfg, params = tiny()
    for scheme, wanted in (("never", False), ("first", True)):
        rule = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.pre_tokenizer = rule
        words = tokenizers.Tokenizer(backend.to_str())
        _, about = write(tmp_path / f"{scheme}.gguf", cfg, params, words)
        assert about["tokenizer.ggml.add_space_prefix"] is wanted


def scored(**keys) -> tuple[tokenizers.Tokenizer, list[str], list[float]]:
    """Returns a tokenizer of SentencePiece's kind, read from a file's keys."""
    rng = random.Random(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<tool>"]
    types, letters = [2, 3, 3, *[6] * 256, 4], "▁abcé"
    pieces = {"".join(rng.choices(letters, k=rng.randint(2, 5))) for _ in range(300)}
    pieces = [*sorted(pieces), *letters]
    tokens, types = tokens + pieces, types + [1] * len(pieces)
    scores = [0.0] * 260 + rng.sample([-float(i) for i in range(500)], len(pieces))
    about = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    metadata = {f"tokenizer.ggml.{k}": x for k, x in (about | keys).items()}
    file = gguf_file.GGUF(Path("a.gguf"), {}, {}, metadata)
    return gguf_tokenizer.tokenizer(file), tokens, scores


def joined_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece's BPE as Kudo and Richardson 2018, section 3.1, have it."""
    parts, score = [*text], dict(zip(tokens[260:], scores[260:], strict=True))
    while True:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        best = max((score[pair] for pair in pairs if pair in score), default=None)
        if best is None:
            return parts
        at = next(i for i, pair in enumerate(pairs) if score.get(pair) == best)
        parts[at : at + 2] = [pairs[at]]


def test_a_tokenizer_with_scores_joins_what_scores_highest():
    found, tokens, scores = scored()
    assert (found.bos_id, found.eos_id, found.opening) == (1, 2, [1])
    rng, lengths = random.Random(1), []
    for _ in range(300):
        text = "".join(rng.choices(" abcé", k=rng.randint(1, 30)))
        wanted = joined_by_score("▁" + text.replace(" ", "▁"), tokens, scores)
        ids = found.encode(text)
        assert [tokens[i] for i in ids] == wanted
        assert found.decode(ids) == text
        lengths.append(len(text) / len(ids))
    assert max(lengths) > 2
    ids = found.encode("zé<s>")
    assert [tokens[i] for i in ids[:3]] == ["▁", "<0x7A>", "é"] and 1 not in ids
    bare, _, _ = scored(add_space_prefix=False, add_bos_token=False)
    assert [tokens[i] for i in bare.encode("z<tool>")] == ["<0x7A>", "<tool>"]
    assert bare.opening == []


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"scores": [0.0]}, "scores of 1"),
        ({"remove_extra_whitespaces": True}, "changes texts first"),
        ({"precompiled_charsmap": [1]}, "changes texts first"),
    ],
)
def test_a_tokenizer_with_scores_that_does_something_else_is_refused(keys, sentence):
    with pytest.raises(ValueError, match=rf"a\.gguf: .*{sentence}"):
        scored(**keys)


def test_a_tokenizer_with_scores_goes_out_and_comes_in(tmp_path):
    words, tokens, _ = scored()
    cfg, params = tiny(vocab_size=len(tokens))
    _, about = write(tmp_path / "a.gguf", cfg, params, words)
    assert about["tokenizer.ggml.model"] == "llama"
    assert about["tokenizer.ggml.token_type"][259] == 4  # <tool>, which is a text's
    found = pretrained.tokenizer(tmp_path / "a.gguf")
    rng = random.Random(2)
    for _ in range(100):
        text = "".join(rng.choices([*" abcé\n日", "<tool>", "<s>"], k=20))
        assert found.encode(text) == words.encode(text)
        if "<tool>" not in text:  # behind which a text begins anew, with its space
            assert found.decode(found.encode(text)) == text
    assert (found.bos_id, found.ends, found.opening) == (1, (2,), [1])


def changed(path: Path, **values) -> Path:
    """Writes a file of a tiny Llama in which these keys are other ones."""
    cfg, params = tiny(**LLAMA)
    real = gguf.GGUFWriter.add_key_value

    def add(writer, key, value, kind, *rest, **more):
        name = key.replace(".", "_")
        real(writer, key, values.get(name, value), kind, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_key_value", add)
        save(path, params, cfg, BYTES)
    return path


@pytest.mark.parametrize(
    "values, named",
    [
        ({"general_architecture": "mamba"}, "mamba"),
        ({"llama_vocab_size": 5, "llama_rope_dimension_count": 4}, "features"),
        ({"tokenizer_ggml_pre": "viking"}, "viking"),
        ({"tokenizer_ggml_model": "t5"}, "t5"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_name(values, named, tmp_path):
    path = changed(tmp_path / "a.gguf", **values)
    with pytest.raises(ValueError, match=named):
        pretrained.fields(path)
        pretrained.tokenizer(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = changed(tmp_path / "a.gguf")
    whole = path.read_bytes()
    for n, size in enumerate((0, 3, 20, 900, len(whole) // 2)):
        cut = tmp_path / f"{n}.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{n}.gguf"):
            pretrained.fields(cut)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    cfg, params = tiny(vocab_size=100)
    with pytest.raises(ValueError, match="257 tokens"):
        save(tmp_path / "a.gguf", params, cfg, BYTES)


def test_a_character_tokenizer_is_refused(tmp_path):
    cfg, params = tiny()
    with pytest.raises(ValueError, match="no char tokenizer"):
        save(tmp_path / "a.gguf", params, cfg, tokenizers.train("char", ["abc"]))
