"""The tokenizer and the chat template of a GGUF file; llama.cpp's names for splits."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gpt_jax.pretrained.gguf_file import GGUF
from gpt_jax.special import Special
from gpt_jax.tokenizers import Tokenizer

LLAMA3_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_RULE = LLAMA3_RULE.replace(r"\p{N}{1,3}", r"\p{N}")


def _by_rule(rule: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(hf.Regex(rule), "isolated")
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bare])


def _gpt2_rule() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_rule() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2_rule()])


# How llama.cpp calls the ways in which a byte-level BPE splits texts first.
SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2_rule,
    "llama-bpe": lambda: _by_rule(LLAMA3_RULE),
    "smollm": _smollm_rule,
    "qwen2": lambda: _by_rule(QWEN2_RULE),
}
ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # other names of the same
ALSO |= {"starcoder": "smollm", "refact": "smollm"}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one, whatever the merges say
COMPOSED = ("qwen2",)  # texts are brought to Unicode's NFC
# llama.cpp's numbers of the kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


def tokenizer(file: GGUF) -> Tokenizer:
    """Returns the tokenizer of a file.

    Raises:
      ValueError: it is none of KINDS, or splits texts in a way that is not known.
    """
    try:
        return _tokenizer(file.metadata)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def template(file: GGUF) -> str | None:
    """Returns the chat template of a file, if it has one."""
    return file.metadata.get("tokenizer.chat_template") or None


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if own.get("model") not in KINDS:
        raise ValueError(
            f"its tokenizer is of the kind {own.get('model')!r}; read are "
            f"{' and '.join(KINDS)}, byte-level BPE and SentencePiece's: take the "
            "model's folder from Hugging Face instead"
        )
    kind, tokens = KINDS[own["model"]], own.get("tokens") or []
    types = own.get("token_type") or [NORMAL] * len(tokens)
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != UNUSED}
    backend = kind.make(own, vocab, types)
    for among, special in (((CONTROL, UNKNOWN), True), ((USER,), False)):
        named = [t for i, t in enumerate(tokens) if types[i] in among]
        add = backend.add_special_tokens if special else backend.add_tokens
        add([hf.AddedToken(t, normalized=False, special=special) for t in named])
    bos, eos = (own.get(f"{k}_token_id", i) for k, i in kind.ends.items())
    if bos is not None and own.get("add_bos_token", kind.opens(own)):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    ends = [eos, *(own.get(f"{name}_token_id") for name in ("eot", "eom"))]
    ends = [i for i in dict.fromkeys(ends) if i is not None]
    found = Tokenizer(backend.to_str(pretty=True))
    said = Special(bos, eos, own.get("padding_token_id"), (*ends,))
    return found.with_special(said)


def _split(own: Mapping[str, Any]) -> str:
    name: str = own.get("pre", "default")
    return ALSO.get(name, name)


def _byte_level(own: Mapping, vocab: Mapping[str, int], types: Sequence) -> Any:
    """Returns the tokenizer of GPT-2's kind."""
    if (split := _split(own)) not in SPLITS:
        raise ValueError(
            f"its tokenizer splits texts in the way {split!r}; known are: "
            f"{', '.join([*SPLITS, *ALSO])}"
        )
    merges = [tuple(merge.split(" ")) for merge in own.get("merges") or []]
    whole = split in WHOLE_WORDS
    backend = _bpe(vocab, merges, ignore_merges=whole)
    if split in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = SPLITS[split]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _scored(own: Mapping, vocab: Mapping[str, int], types: Sequence) -> Any:
    """Returns the tokenizer of Llama's kind: a BPE of SentencePiece.

    That joins whatever neighbours make the token of the highest score; here, each pair
    that makes a token is a merge, in the order of these scores.
    """
    scores = own.get("scores") or []
    if len(scores) != len(types):
        raise ValueError(f"it has {len(types)} tokens, and scores of {len(scores)}")
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if own.get(key):
            raise ValueError(
                f"its tokenizer changes texts first (tokenizer.ggml.{key}), which "
                "Llama's does not: take the model's folder from Hugging Face instead"
            )
    joined = [token for token, i in vocab.items() if types[i] == NORMAL]
    merges = [
        (token[:n], token[n:])
        for token in sorted(joined, key=lambda token: -scores[vocab[token]])
        for n in range(1, len(token))
        if token[:n] in vocab and token[n:] in vocab
    ]
    unknown = next((t for t, i in vocab.items() if types[i] == UNKNOWN), None)
    fallback = BYTE in types
    backend = _bpe(
        vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback
    )
    before = own.get("add_space_prefix", True)
    space = [normalizers.Prepend("▁")] if before else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if before else []
    backend.decoder = decoders.Sequence(parts)
    return backend


def _bpe(vocab: Mapping[str, int], merges: list, **how: Any) -> hf.Tokenizer:
    try:
        return hf.Tokenizer(models.BPE({**vocab}, merges, **how))
    except Exception as error:  # Hugging Face raises nothing narrower
        raise ValueError(f"its tokens and merges do not fit: {error}") from error


class Kind(NamedTuple):
    """A kind of tokenizer.

    Attributes:
      make: (keys, ids by token, types) -> a Hugging Face tokenizer.
      ends: the first and the last token of a text, where the file does not say it.
      opens: (keys) -> whether texts begin with the first, where it does not say it.
    """

    make: Callable[[Mapping, Mapping[str, int], Sequence], Any]
    ends: Mapping[str, int | None]
    opens: Callable[[Mapping], bool]


KINDS = {
    "gpt2": Kind(
        _byte_level,
        {"bos": None, "eos": None},
        lambda own: _split(own) in WHOLE_WORDS,
    ),
    "llama": Kind(_scored, {"bos": 1, "eos": 2}, lambda own: True),
}


def split_of(document: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name for how a tokenizer.json splits texts; None, none."""
    for name, rule in SPLITS.items():
        own = hf.Tokenizer(models.BPE())
        own.pre_tokenizer = rule()
        wanted = _bare(own.to_str())
        whole = bool(document["model"].get("ignore_merges"))
        composed = (document.get("normalizer") or {}).get("type") == "NFC"
        same = (name in WHOLE_WORDS, name in COMPOSED) == (whole, composed)
        if same and _bare_rule(document.get("pre_tokenizer")) == wanted:
            return name
    return None


def _bare(text: str) -> Any:
    return _bare_rule(json.loads(text)["pre_tokenizer"])


def _bare_rule(rule: Any) -> Any:
    """Returns a pre-tokenizer's JSON without what decides no id."""
    if isinstance(rule, Mapping):
        return {k: _bare_rule(v) for k, v in rule.items() if k != "trim_offsets"}
    return [_bare_rule(v) for v in rule] if isinstance(rule, list) else rule
