"""Answers to a test file: prompts, resuming, what is skipped, what is told."""

import json

import jax
import pytest

from gpt_jax import chat, files, runs, sample, screen
from gpt_jax.evaluate import answers, compare
from gpt_jax.rows import Row
from tests import runs_to_evaluate

PLAIN = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "max_new": 8,
}
TEST = [
    {"instruction": "Say cat.", "input": "", "output": "cat"},
    {"instruction": "Double it", "input": "ab", "output": "abab"},
    {"messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello"}]},
]  # fmt: skip
BYTES = runs_to_evaluate.BYTES


def quiet(more: int) -> None:
    """A progress display that shows nothing."""


def asked(found=TEST, skip=False, context=64):
    found = [Row(f"row {n}", n, fields) for n, fields in enumerate(found, start=1)]
    return answers.ask(found, BYTES, "plain", context=context, skip=skip)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.open(runs_to_evaluate.make(tmp_path_factory.mktemp("run")))


def write(run, path, found=TEST, show=quiet, **changes):
    settings = {**PLAIN, **changes}
    return answers.answer(
        run,
        asked(found)[0],
        path,
        template="plain",
        skipped={},
        seed=7,
        settings=settings,
        show=show,
    )


def test_a_row_is_asked_up_to_where_its_answer_begins():
    found, skipped = asked()
    assert not skipped
    for one, row in zip(found, TEST):
        messages = chat.messages_of(row, "plain")
        ids, _ = chat.render(messages[:-1], BYTES, "plain", reply=True)
        assert one.prompt == ids and one.reference == messages[-1].content
        whole, mask = chat.render(messages, BYTES, "plain", reply=False)
        assert whole[: len(ids)] == ids and mask[len(ids)] == 1
    assert [one.question for one in found] == ["Say cat.", "Double it\nab", "Hi"]


BAD = [
    ({"question": "?"}, "unusable", "columns 'question'"),
    ({"instruction": "a", "output": " "}, "no reference", "no answer to compare"),
    ({"instruction": "a"}, "no reference", "no answer to compare"),
    ({"instruction": "a" * 99, "output": "b"}, "too long", "model's context is 64"),
]


@pytest.mark.parametrize("row, reason, words", BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(row, reason, words):
    with pytest.raises(ValueError, match=f"row 4: .*{words}.*--skip_bad_rows"):
        asked([*TEST, row])
    found, skipped = asked([row, *TEST], skip=True)
    assert [one.number for one in found] == [2, 3, 4] and skipped == {reason: 1}
    with pytest.raises(ValueError, match="none of the 1 rows"):
        asked([row], skip=True)


def test_answers_are_what_the_sampler_writes(run, tmp_path):
    said = write(run, tmp_path / "a.json")
    wanted = sample.texts(
        model=run.model,
        params=run.params,
        tokenizer=BYTES,
        prompts=[one.prompt for one in asked()[0]],
        count=1,
        seed=7,
        stop=[],
        **PLAIN,
    )
    for one, row, completion in zip(asked()[0], said.rows, wanted, strict=True):
        assert row["answer"] == completion.text and row["reason"] == completion.reason
        assert row["tokens"] == len(completion.ids)
        assert row["reference_tokens"] == len(one.reference)
    assert said.rows[1]["input"] == "ab" and said.rows[1]["number"] == 2
    assert answers.load(tmp_path / "a.json") == said


def test_what_was_begun_is_gone_on_with(run, tmp_path, monkeypatch):
    whole = write(run, tmp_path / "whole.json")
    kept = json.loads((tmp_path / "whole.json").read_text())
    kept["rows"] = [{**kept["rows"][0], "answer": "kept as it is"}]
    files.write_json(tmp_path / "part.json", kept)
    monkeypatch.setattr(sample, "ROWS", 1)
    done = []
    part = write(run, tmp_path / "part.json", show=done.append)
    assert done == [1, 1, 1]
    assert part.rows[0]["answer"] == "kept as it is"
    assert part.rows[1:] == whole.rows[1:]


def test_answers_to_something_else_are_never_gone_on_with(run, tmp_path):
    write(run, tmp_path / "a.json", TEST[:1])
    with pytest.raises(ValueError, match="another rows_sha256"):
        write(run, tmp_path / "a.json")
    corrected = [{**TEST[0], "output": "a cat"}]
    with pytest.raises(ValueError, match="another rows_sha256"):
        write(run, tmp_path / "a.json", corrected)
    other = jax.tree.map(lambda x: x + 1, run.params)
    with pytest.raises(ValueError, match="another weights_sha256"):
        write(run._replace(params=other), tmp_path / "a.json", TEST[:1])
    with pytest.raises(ValueError, match="another temperature"):
        write(run, tmp_path / "a.json", TEST[:1], temperature=0.5)
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="no answers of ours"):
        write(run, tmp_path / "b.json")


def said(*texts, reason="stop", skipped=None):
    row = {"reference": "ab", "reason": reason, "tokens": 4, "reference_tokens": 2}
    return answers.Answers({}, skipped or {}, [{**row, "answer": t} for t in texts])


def test_a_summary_tells_scores_ends_lengths_and_what_is_missing():
    one = said("ab", "", "ab", "x", skipped={"too long": 2})
    found = answers.summary(one, [{"exact": v} for v in (100, 0, 100, 0)], seed=1)
    assert found["exact"]["mean"] == 50 and found["rows"] == 4
    assert found["exact"]["low"] < 50 < found["exact"]["high"]
    assert (found["ended"], found["length"], found["empty"]) == (100, 2.0, 1)
    assert found["skipped"] == {"too long": 2}


def test_runs_stand_side_by_side_with_what_they_gained_row_by_row():
    scored = {
        "base": {1: {"exact": 0.0}, 2: {"exact": 100.0}, 4: {"exact": None}},
        "tuned": {4: {"exact": 9.0}, 1: {"exact": 50.0}, 2: {"exact": 100.0}},
        "other": {1: {"exact": 1.0}, 2: {"exact": 1.0}, 3: {"exact": 1.0}},
    }
    found = {
        name: answers.summary(said("ab"), [{"exact": 5.0}], seed=1) for name in scored
    }
    found["tuned"]["judge"] = {"mean": 1.0, "prose": 3}
    compare.gain(found, scored, seed=1)
    assert found["tuned"]["gain"]["exact"]["mean"] == 25.0  # of the two rows with both
    assert "gain" not in found["base"] and "gain" not in found["other"]
    heads, lines = compare.table(found)
    assert heads[:3] == ["run", "rows", "exact"]
    assert [line[0] for line in lines] == ["base", "tuned", "tuned - base", "other"]
    assert lines[0][2] == "5.0 [5.0, 5.0]" and lines[2][2].startswith("+25.0 [+0.0")
    assert lines[1][-1] == "3 without a number"
    table = screen.table(heads, lines).splitlines()
    assert len(table) == 2 + len(lines) and len({len(line) for line in table}) == 1


def test_a_judge_that_scored_no_row_of_both_runs_leaves_its_gain_empty():
    scored = {
        "base": {1: {"exact": 0.0, "judge": 50.0}, 2: {"exact": 0.0, "judge": None}},
        "tuned": {1: {"exact": 9.0, "judge": None}, 2: {"exact": 9.0, "judge": 50.0}},
    }
    one = answers.summary(said("ab"), [{"exact": 5.0, "judge": 50.0}], seed=1)
    found = {name: dict(one) for name in scored}
    compare.gain(found, scored, seed=1)
    heads, lines = compare.table(found)
    assert heads[2:4] == ["exact", "judge"]
    assert lines[2][2].startswith("+9.0") and lines[2][3] == ""
    assert len(lines[2]) == len(heads)
