"""Which tokens begin and end texts, as published folders say it."""

import json
from pathlib import Path

import pytest

from gpt_jax import chat, sample, special, tokenizers
from gpt_jax.special import Special

BYTES = tokenizers.train("byte", []).add_special(["<a>", "<b>", "<c>"])
A, B, C = (BYTES.specials[name] for name in ("<a>", "<b>", "<c>"))


def folder(path: Path, **files) -> Path:
    """Makes a published folder of these files, with a tokenizer of bytes."""
    BYTES.save(path / "tokenizer.json")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "files, eos, ends",
    [
        ({"config": {"eos_token_id": A}}, A, (A,)),
        ({"config": {"eos_token_id": [A, B]}}, A, (A, B)),
        # generation_config.json says it better, a list or not.
        (
            {"config": {"eos_token_id": A}, "generation_config": {"eos_token_id": B}},
            B,
            (B,),
        ),
        # The tokenizer's own end is what stands between texts.
        (
            {
                "generation_config": {"eos_token_id": [A, B]},
                "tokenizer_config": {"eos_token": {"content": "<b>"}},
            },
            B,
            (B, A),
        ),
        ({"special_tokens_map": {"eos_token": "<c>"}}, C, (C,)),
        ({"config": {"eos_token_id": [A, 9999], "pad_token_id": -1}}, A, (A,)),
    ],
)
def test_what_a_folder_says_of_ends_is_read(tmp_path, files, eos, ends):
    files["config"] = {"model_type": "llama", **files.get("config", {})}
    found = tokenizers.load(folder(tmp_path, **files) / "tokenizer.json")
    assert (found.eos_id, found.ends) == (eos, ends)
    assert found.sha256 != BYTES.sha256


def test_what_nobody_says_goes_by_the_usual_name(tmp_path):
    found = tokenizers.load(folder(tmp_path) / "tokenizer.json")
    assert found == BYTES and found.ends == (BYTES.specials["<|endoftext|>"],)


def test_a_runs_own_config_is_no_published_one(tmp_path):
    run = folder(tmp_path, config={"model": {}}, generation_config={"eos_token_id": A})
    assert tokenizers.load(run / "tokenizer.json") == BYTES


def test_what_is_said_is_kept_beside_the_tokenizer(tmp_path):
    said = BYTES.with_special(Special(C, A, None, (A, B)))
    said.save(tmp_path / "tokenizer.json")
    found = tokenizers.load(tmp_path / "tokenizer.json")
    assert found == said and found.sha256 == said.sha256
    assert (found.bos_id, found.eos_id, found.ends) == (C, A, (A, B))
    BYTES.save(tmp_path / "tokenizer.json")
    assert tokenizers.load(tmp_path / "tokenizer.json") == BYTES


def test_a_token_that_ends_texts_is_never_text(tmp_path):
    document = json.loads(BYTES.json)
    for token in document["added_tokens"]:
        token["special"] = token["content"] != "<a>"
    plain = tokenizers.Tokenizer(json.dumps(document))
    assert plain.encode("<a>") == [A]
    assert plain.with_special(Special(None, A, None, (A,))).encode("<a>") == [
        60,
        97,
        62,
    ]


def test_files_that_name_no_ids_are_refused_by_name(tmp_path):
    run = folder(tmp_path, config={"model_type": "llama", "eos_token_id": "</s>"})
    with pytest.raises(ValueError, match="eos_token_id is not the id"):
        tokenizers.load(run / "tokenizer.json")
    special.beside(tmp_path / "tokenizer.json").write_text('{"bos": "x"}')
    with pytest.raises(ValueError, match=r"tokenizer\.special\.json does not hold"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_answers_end_at_every_token_that_ends_texts():
    said = BYTES.with_special(Special(None, A, None, (A, B)))
    assert chat.stop_ids(said, "alpaca") == [A, B]
    scribe = sample.Transcript(said, [97], [*said.ends])
    assert [scribe.push(97), scribe.push(B)] == ["a", ""] and scribe.stopped_by == B


def test_a_template_is_told_the_stated_tokens():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}"
    template += "{% endfor %}"
    talk = [chat.Message("user", "x"), chat.Message("assistant", "y")]
    ids, _ = chat.render(
        talk, BYTES.with_special(Special(C, B, None, (B,))), template, reply=False
    )
    assert ids == [C, 120, B, 121, B]
