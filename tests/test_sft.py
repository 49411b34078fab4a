"""Instruction tuning: what is read and learnt, and packing that changes nothing."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import chat, data, model, runs, sample, sampling, train
from gpt_jax.tasks import lm, sft
from tests import test_step, tiny

ROWS = [
    {"instruction": "Say it twice.", "input": word, "output": f"{word} {word}"}
    for word in ("one", "three", "seven and eight", "ten", "twenty" * 5, "six")
] * 5
TALK = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye."},
    ]
}


def write(tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def make(tmp_path, rows=ROWS, **changes):
    config = common.tiny(common.base())
    config.model.context_length = changes.pop("context", 160)
    config.data.source = str(write(tmp_path, rows))
    config.data.skip_bad_docs = changes.pop("skip_bad_docs", False)
    config.task = {**common.task_sft(), "template": "chatml", **changes}
    return tiny.task(config, progress=True)


def learnt(task, example):
    """Returns the texts that a row of a task's examples teaches, by segment."""
    texts = []
    for segment in range(int(example["segments"].max()) + 1):
        here = (example["segments"] == segment) & (example["mask"] > 0)
        if here.any():
            texts.append(task.tokenizer.decode(example["targets"][here]))
    return texts


# --- what is learnt -------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_answers_with_their_end_are_learnt_and_nothing_else(tmp_path, pack):
    task = make(tmp_path, pack=pack)
    found = [
        text for i in range(len(task.train)) for text in learnt(task, task.train[i])
    ]
    wanted = [f"{row['output']}<|endoftext|>" for row in ROWS[:24]]
    assert sorted(found) == sorted(wanted)
    assert (len(task.train) < 24) == pack


def test_every_answer_of_a_conversation_is_learnt(tmp_path):
    task = make(tmp_path, rows=[TALK] * 9, template="plain")
    (text,) = {text for i in range(2) for text in learnt(task, task.train[i])}
    assert text == "Hello.<|endoftext|>Bye.<|endoftext|>"


def weighted(*weights):
    """TALK with these weights of its two answers."""
    turns = [dict(turn) for turn in TALK["messages"]]
    for turn, weight in zip((turns[2], turns[4]), weights, strict=True):
        turn["weight"] = weight
    return {"messages": turns}


def test_an_answer_of_weight_0_is_not_learnt(tmp_path):
    task = make(tmp_path, rows=[weighted(0, 1)] * 9, template="plain", pack=False)
    assert learnt(task, task.train[0]) == ["Bye.<|endoftext|>"]
    with pytest.raises(ValueError, match=r"8 of 8 rows .* none to learn.*row 1"):
        make(tmp_path, rows=[weighted(0, 0)] * 10)
    with pytest.raises(ValueError, match=r"row 1: an answer has the weight 0, but"):
        make(tmp_path, rows=[weighted(0, 1)] * 9, learn="all")


@pytest.mark.fault(34)
def test_rows_that_cannot_be_read_are_left_out_where_that_is_wanted(tmp_path, capfd):
    rows = [{"instruction": "cut", "output": "yes \ud83d"}, *ROWS]
    with pytest.raises(ValueError, match=r"row 1: 'output' holds half of a surrogate"):
        make(tmp_path, rows=rows)
    task = make(tmp_path, rows=rows, pack=False, skip_bad_docs=True)
    assert len(task.train) == 24
    assert "1 row left out that cannot be read" in "".join(capfd.readouterr())


def test_all_tokens_but_the_first_can_be_learnt(tmp_path):
    task = make(tmp_path, learn="all", pack=False)
    (text,) = learnt(task, task.train[0])
    assert text == (
        "|im_start|>user\nSay it twice.\none<|im_end|>\n<|im_start|>assistant\n"
        "one one<|endoftext|>"
    )


def test_rows_are_packed_into_few_and_each_is_there_once():
    rng = np.random.default_rng(0)
    examples = [
        sft.Example(np.full(size + 1, n), np.ones(size + 1, np.float32))
        for n, size in enumerate(rng.integers(1, 32, 200))
    ]
    rows = sft.pack_rows(examples, 64)
    there = sorted(int(example.ids[0]) for row in rows for example in row)
    sizes = [sum(example.size for example in row) for row in rows]
    assert there == list(range(200)) and max(sizes) <= 64
    assert sum(sizes) / (64 * len(rows)) > 0.97


MODELS = {"learned": {}, "rope, windows": {"position": "rope"}}
MODELS["rope, windows"]["pattern"] = (
    {"window": 5, "rope_base": 1e4, "rope_scaling": None},
)


@pytest.mark.fault(19)
@pytest.mark.parametrize("kind", MODELS)
def test_packed_and_unpacked_conversations_have_the_same_loss_and_gradient(kind):
    """Sums over all rows, whatever the rows are."""
    rng = np.random.default_rng(1)
    examples = []
    for size in (9, 4, 12, 3, 7, 16):
        mask = (rng.random(size + 1) < 0.6).astype(np.float32)
        examples.append(sft.Example(rng.integers(0, 61, size + 1), mask))
    gpt = model.GPT(tiny.cfg(init="torch_default", **MODELS[kind]))
    loss = lm.make_loss(gpt, np.ones(61), loss_chunk=0, dropout=())
    weights = model.init(gpt.cfg, jax.random.key(0))
    hyper = test_step.make_hyper()

    def summed(weights, batch):
        sums = loss(weights, {}, batch, None, hyper)
        return sums["loss"], sums

    found = []
    for rows in (sft.pack_rows(examples, 16), sft.one_a_row(examples, 16)):
        (batch,) = data.once(sft.Packed(rows, 16), batch_size=len(rows))
        batch = jax.tree.map(lambda x: x[0], batch)
        found.append(tiny.jit(jax.grad(summed, has_aux=True))(weights, batch))
    assert len(sft.pack_rows(examples, 16)) == 4
    test_step.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_rows_without_anything_to_learn_give_no_nan():
    """In the loss, in the step, and in an evaluation of nothing else."""
    example = sft.Example(np.arange(5), np.zeros(5, np.float32))
    (batch,) = data.once(sft.Packed([[example], []], 8), batch_size=2)
    state_fn, tx = test_step.make_step(
        name="adamw",
        loss=lm.make_loss(test_step.GPT, np.ones(61), loss_chunk=0, dropout=()),
    )
    before = test_step.begin(tx)
    hyper = test_step.make_hyper(weight_decay=0.0)
    state, sums, info = tiny.jit(state_fn)(before, batch, test_step.KEY, hyper)
    assert float(sums["weight"]) == float(sums["loss"]) == float(info["grad_norm"]) == 0
    test_step.assert_close(state.params, before.params)


# --- what is left out -----------------------------------------------------------------


def test_a_conversation_that_is_too_long_is_refused_dropped_or_cut(tmp_path, capfd):
    with pytest.raises(ValueError, match=r"4 of 24 conversations \(train\).* 155: "):
        make(tmp_path, context=128)
    dropped = make(tmp_path, too_long="drop", pack=False, context=128)
    assert len(dropped.train) == 20
    assert "4 of 24 conversations (train) were longer than 128 tokens: 4 left out" in (
        capfd.readouterr().out.replace("\n", " ")
    )
    cut = make(tmp_path, too_long="cut", pack=False, context=128)
    assert len(cut.train) == 24
    assert "0 left out" in capfd.readouterr().out
    longest = max(learnt(cut, cut.train[i])[0] for i in range(24))
    assert "twenty" in longest and not longest.endswith("<|endoftext|>")


def test_a_conversation_cut_before_its_answer_is_left_out(tmp_path, capfd):
    task = make(tmp_path, too_long="cut", pack=False, context=72)
    assert len(task.train) < 24
    assert all(task.train[i]["mask"].any() for i in range(len(task.train)))
    assert "cut," in capfd.readouterr().out
    with pytest.raises(ValueError, match="no conversation"):
        make(tmp_path, too_long="cut", context=16)


@pytest.mark.parametrize("output", ["", " \n", None])
def test_an_empty_answer_is_refused_or_left_out_and_counted(tmp_path, capfd, output):
    rows = [{**ROWS[0], "output": output}, *ROWS[:3] * 5]
    with pytest.raises(ValueError, match=r"1 of \d+ rows \(train\) have an empty"):
        make(tmp_path, rows=rows)
    task = make(tmp_path, rows=rows, empty="drop", pack=False)
    assert "1 of 12 rows (train) left out" in capfd.readouterr().out
    assert len(task.train) == 11


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"template": "alpacca"}, "'alpacca' is not one of: alpaca, phi3"),
        ({"learn": "answer"}, r"task\.learn 'answer' is not one of: answers, all"),
        ({"too_long": "x"}, r"task\.too_long 'x' is not one of: refuse, drop, cut"),
        ({"empty": "cut"}, r"task\.empty 'cut' is not one of: refuse, drop"),
        ({"loss_chunk": -1}, r"task\.loss_chunk is -1: give a number of positions"),
    ],
)
def test_an_unknown_choice_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **changes)


def test_the_rows_of_the_test_belong_to_what_a_run_was_started_on(tmp_path):
    rows = [ROWS[1]] * 20
    one = make(tmp_path, rows)
    assert len(one.test) == 2 and one.fingerprint == make(tmp_path, rows).fingerprint
    rows[16] = {**ROWS[1], "output": "another"}
    other = make(tmp_path, rows)
    assert one.test != other.test and one.fingerprint != other.fingerprint


def test_a_prompt_that_is_too_long_in_its_template_is_refused_at_once(tmp_path):
    config = common.tiny(common.base())
    config.task, config.init_from = common.task_sft(), "random"
    config.data.source = str(write(tmp_path, [ROWS[1]] * 20))
    config.model.context_length = 300
    config.sample_every = 5
    config.sample.prompt = "x" * 200  # the template has 150 more
    with pytest.raises(ValueError, match=r"the prompt has 3\d\d tokens but .* is 300"):
        train.make_task(train.unpack(config), tmp_path)


# --- a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run that learnt one answer by heart, and its folder."""
    folder = tmp_path_factory.mktemp("sft")
    config = common.tiny(common.base())
    config.task, config.init_from = common.task_sft(), "random"
    config.task.template = "plain"
    config.data.source = str(write(folder, [ROWS[1]] * 20))
    config.model.context_length = 48
    config.update(steps=60, eval_every=60, log_every=60, sample_every=60, batch_size=4)
    config.update(checkpoint_every=60, compile_cache="", tensorboard=False)
    config.hyper.update(lr=1e-2, warmup_steps=5.0)
    config.sample.update(prompt="Say it twice.\nthree", temperature=0.0)
    result = train.train(config, folder / "run")
    return result, folder / "run"


def test_a_tuned_run_answers_by_its_template_and_ends_by_itself(run):
    result, folder = run
    assert result.numbers["val_loss"] < 0.1
    opened = runs.open(folder)
    template = chat.template_of(folder)
    assert template == "plain"
    request = chat.messages_of(ROWS[1], template)[:1]
    prompt, _ = chat.render(request, opened.tokenizer, template, reply=True)
    (answer,) = sample.texts(
        model=opened.model,
        params=opened.params,
        tokenizer=opened.tokenizer,
        prompts=[prompt],
        count=1,
        seed=0,
        stop=chat.stop_ids(opened.tokenizer, template),
        **sample_settings(),
    )
    assert (answer.text, answer.detail) == ("three three", "end of text")


def test_a_run_keeps_the_rows_of_its_test(run):
    _, folder = run
    assert json.loads((folder / "test.json").read_text()) == [ROWS[1]] * 2


def talk(folder, *lines, flags=()):
    """Runs the door with these lines piped in; returns its answers and its remarks."""
    door = [sys.executable, "-m", "experiments.chat", f"--run={folder}", *flags]
    text = "\n".join(lines)
    done = subprocess.run(door, input=text, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_piped_chat_answers_obeys_and_drops_the_oldest_turns_whole(run, tmp_path):
    _, folder = run
    kept, again = tmp_path / "a.json", "Say it twice.\\\nthree"
    said, told = talk(
        folder,
        *("/set temperature 0", "/set temperature warm", "/set top_p 7", "/set heat 1"),
        *(again, again, f"/save {kept}", f"/save {kept}", "/reset", "/hm"),
        f"/save {tmp_path / 'none.json'}",
        *(again, f"/save {tmp_path / 'b.json'}", "x" * 99, "/quit", again),
    )
    assert said == "three three\n" * 3
    for words in (
        "temperature is a number, not 'warm'",
        "top_p is 7.0 but must be above 0",
        "the names are: temperature, top_k",
        "the context of 48 tokens is full: dropped the oldest turn",
        f"File exists: {kept}",
        "the conversation has no answer",
        "command '/hm' is not one of: /reset, /undo",
        "[the first answer compiles the model]",
        "there is room for 24; shorten it",
    ):
        assert words in told
    assert not (tmp_path / "none.json").exists()
    question = {"role": "user", "content": "Say it twice.\nthree"}
    answer = {"role": "assistant", "content": "three three"}
    # The first turn was dropped for the second, and all by /reset.
    for name in ("a.json", "b.json"):
        (row,) = json.loads((tmp_path / name).read_text())
        assert row == {"messages": [question, answer]}


def test_a_chat_can_be_undone_asked_again_saved_and_taken_up(run, tmp_path):
    _, folder = run
    kept, again = tmp_path / "a.json", "Say it twice.\\\nthree"
    bad = tmp_path / "bad.json"
    bad.write_text('[{"messages": [{"role": "user", "content": "x"}]}]')
    other = tmp_path / "other"  # whose makers say how it is drawn from
    shutil.copytree(folder, other)
    drawn = {"temperature": 0.3, "top_p": 0.9, "no_repeat_ngram_size": 3}
    (other / "generation_config.json").write_text(json.dumps(drawn))
    said, told = talk(
        folder,
        *("/undo", "/regenerate", "/set temperature 0", again, "/regenerate"),
        *(f"/save {kept}", "/undo", "/undo", "/system Be brief.", "/system"),
        *(f"/load {kept}", f"/load {bad}", "/load", f"/load {tmp_path / 'none.json'}"),
        *("/set", f"/run {other}", "/set", f"/save {tmp_path / 'b.json'}"),
        "/run nowhere",
    )
    assert said == "three three\n" * 2
    assert told.count("there is no message yet") == 3
    for words in (
        "[system: 'Be brief.']",
        "[forgotten: 'Say it twice.\\nthree']",
        "[no system message]",
        f"[2 messages read from {kept}]",
        f"{bad} ends without an answer",
        "write /load FILE",
        "No such file or directory",
        "[generation_config.json says no_repeat_ngram_size 3, which nothing here does",
        "nowhere is not a run folder",
    ):
        assert words in told, told
    # What was set stays, the rest is the run's; /regenerate took the next seed.
    for own in (
        "temperature 0.0, top_k 0, top_p 1.0",
        "temperature 0.0, top_k 0, top_p 0.9",
    ):
        assert re.search(f"^{own},.* max_new 200, seed 1338$", told, re.M), told
    (row,) = json.loads((tmp_path / "b.json").read_text())
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["user", "assistant"]


def test_a_chat_with_a_base_model_continues_what_is_written(run, tmp_path):
    _, folder = run
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    config = json.loads((base / "config.json").read_text())
    config["task"] = common.task_lm().to_dict()
    (base / "config.json").write_text(json.dumps(config))
    flags = ("--temperature=0", "--max_new_tokens=5")
    # The backslash of the last line holds nothing back: there is no next one.
    said, told = talk(base, "Say it twice.\\\nthree\\\nthr\\", flags=flags)
    assert said == "Say it twice.\nthree\nthree th\n"
    assert "has no chat template: a base model" in told
    assert "[stopped: 5 new tokens]" in told


def sample_settings():
    return sampling.settings(30, temperature=0.0)


def test_the_samples_of_a_run_are_answers_to_its_prompt(run):
    _, folder = run
    text = (folder / "samples.md").read_text()
    assert "## Step 60\n\n````text\nSay it twice.\nthree\nthree three\n````" in text
