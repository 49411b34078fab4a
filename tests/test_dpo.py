"""Preferences: pairs of answers, and runs that learn which one is liked."""

import json

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import checkpoint, metrics, model, runs, train
from gpt_jax.rows import Row
from gpt_jax.tasks import dpo

VERBS = ("run", "walk", "sing", "read", "swim", "jump", "cook", "draw", "type", "sail")
ROWS = [
    {
        "instruction": "Say it.",
        "input": verb,
        "output": f"I {verb}.",
        "rejected": f"You {verb}!",
    }
    for verb in VERBS * 2
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("dpo")
    (home / "pairs.json").write_text(json.dumps(ROWS))
    return home


def configure(home, **changes):
    config = common.tiny(common.base())
    config.task, config.init_from = common.task_dpo(), "random"
    config.task.update({"template": "plain", **changes})
    config.data.update(source=str(home / "pairs.json"), tokenizer="byte")
    config.data.update(folder=str(home / "data"), val_fraction=0.2)
    config.model.update(context_length=32, n_layers=1)
    config.update(batch_size=4, steps=12, eval_every=6, log_every=1, compile_cache="")
    config.update(checkpoint_every=6, eval_windows=0, tensorboard=False)
    config.hyper.update(lr=3e-3, warmup_steps=0.0, decay_steps=12.0)
    config.mesh.data = 2
    return config


def task_of(config, tmp_path, rows=None):
    if rows is not None:
        config.data.source = str(tmp_path / "rows.json")
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    return train.make_task(train.unpack(config), tmp_path)


def test_a_pair_is_the_prompt_with_each_answer_and_counts_the_answers(home, tmp_path):
    task = task_of(configure(home), tmp_path)
    assert (len(task.train), len(task.evals["val"])) == (14, 4)
    pair = task.train[0]
    for side, answer in enumerate(("I run.", "You run!")):
        end = task.tokenizer.eos_id
        learnt = pair["targets"][side][pair["mask"][side] == 1].tolist()
        assert learnt == [*task.tokenizer.encode(answer), end]
        start = int(np.argmax(pair["mask"][side]))
        prompt = task.tokenizer.decode(pair["tokens"][side][: start + 1].tolist())
        assert prompt == "Say it.\nrun\n"
    np.testing.assert_array_equal(pair["tokens"][0, 1:12], pair["targets"][0, :11])


def test_chosen_comes_before_output_and_conversations_are_read_too(home, tmp_path):
    rows: list[dict] = [{**row, "chosen": "Yes."} for row in ROWS]
    told = [{"role": "user", "content": "Speak!"}]
    rows[0] = {"messages": told, "chosen": "Aye.", "rejected": "No."}
    task = task_of(configure(home), tmp_path, rows)
    text = [
        task.tokenizer.decode(task.train[n]["tokens"][0].tolist()).rstrip("\0")
        for n in (0, 1)
    ]
    assert text[0].startswith("Speak!\nAye.")
    assert text[1].startswith("Say it.\nwalk\nYes.")


def test_of_a_conversation_only_the_answers_that_differ_count(home, tmp_path):
    turns = [("user", "Hi!"), ("assistant", "Ho."), ("user", "Go?")]
    told = [{"role": role, "content": text} for role, text in turns]
    rows: list[dict] = [{"messages": told, "chosen": "Aye.", "rejected": "No."}]
    task = task_of(configure(home), tmp_path, rows * 10)
    pair, end = task.train[0], task.tokenizer.eos_id
    for side, answer in enumerate(("Aye.", "No.")):
        learnt = pair["targets"][side][pair["mask"][side] == 1].tolist()
        assert learnt == [*task.tokenizer.encode(answer), end]


def test_pairs_without_preferences_take_the_next_answer_as_rejected():
    rows = [Row("", n, {"instruction": "a", "output": f"{n}"}) for n in (1, 2)]
    found = [row.fields["rejected"] for row in dpo.mismatched(rows)]
    assert found == ["2", "1"]


def answered(**changes):
    """A row whose messages end with an answer, as many published ones do."""
    turns = [("user", "Hi!"), ("assistant", "Aye.")]
    told = [{"role": role, "content": text} for role, text in turns]
    return {"messages": told, "chosen": "Aye.", "rejected": "No.", **changes}


@pytest.mark.fault(34, injections=2)
def test_an_answer_that_the_messages_end_with_is_learnt_once(home, tmp_path, caplog):
    task = task_of(configure(home), tmp_path, [answered()] * 10)
    said = "the messages of 7 of 7 pairs (train) end with the chosen answer"
    assert said in caplog.text
    pair, end = task.train[0], task.tokenizer.eos_id
    for side, answer in enumerate(("Aye.", "No.")):
        learnt = pair["targets"][side][pair["mask"][side] == 1].tolist()
        assert learnt == [*task.tokenizer.encode(answer), end]
        start = int(np.argmax(pair["mask"][side]))
        assert task.tokenizer.decode(pair["tokens"][side][: start + 1]) == "Hi!\n"
    rows = [answered()] * 3 + [answered(chosen="Nay.")] * 7
    with pytest.raises(ValueError, match=r"json, row 4: its messages end with an ans"):
        task_of(configure(home), tmp_path, rows)


@pytest.mark.fault(34)
def test_rows_that_cannot_be_read_are_left_out_where_that_is_wanted(
    home, tmp_path, capfd
):
    config = configure(home)
    rows = [{**ROWS[0], "rejected": "cut \ud83d"}, *ROWS]
    with pytest.raises(ValueError, match=r"row 1: 'rejected' holds half of a"):
        task_of(config, tmp_path, rows)
    config.data.skip_bad_docs = True
    assert len(task_of(config, tmp_path, rows).train) == 14
    assert "1 row left out that cannot be read, the first:" in "".join(
        capfd.readouterr()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rejected": None}, "no field 'rejected'; it has: .*wanted"),
        ({"output": None}, "row 1 has no field 'chosen'"),
        ({"output": 3}, "not text"),
        ({"rejected": " "}, "1 of 14 pairs .* have an empty answer.*drop"),
        ({"output": "long " * 9}, "1 of 14 pairs .* longer than the window of 32"),
    ],
)
def test_rows_that_make_no_pair_are_refused_in_a_sentence(
    home, tmp_path, change, message
):
    row = {k: v for k, v in {**ROWS[0], **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        task_of(configure(home), tmp_path, [row, *ROWS[1:]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variant": "ppo"}, "task.variant 'ppo' is not one of: dpo, ipo, orpo"),
        ({"logp": "max"}, "task.logp 'max' is not one of: sum, mean"),
        ({"beta": 0.0}, "task.beta is 0.0: it must be above 0"),
        ({"variant": "orpo"}, "set task.logp=mean"),
        ({"template": ""}, "task.template is empty"),
        ({"too_long": "shrink"}, "task.too_long 'shrink' is not one of"),
        ({"loss_chunk": -1}, "task.loss_chunk is -1: give a number of positions"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(
    home, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        task_of(configure(home, **change), tmp_path)


def test_the_rows_of_the_test_belong_to_what_a_run_was_started_on(home, tmp_path):
    one = task_of(configure(home), tmp_path)
    first = len(one.train)
    assert one.test[0] == ROWS[first]
    other = task_of(
        configure(home),
        tmp_path,
        [
            {**row, "output": "Else."} if i == first else row
            for i, row in enumerate(ROWS)
        ],
    )
    assert len(one.train) == len(other.train) and one.test != other.test
    assert one.fingerprint != other.fingerprint


def test_what_is_left_out_or_cut_is_counted(home, tmp_path, capfd):
    rows = [
        {**ROWS[0], "output": "long " * 9},
        {**ROWS[1], "input": "long " * 9},
        {**ROWS[2], "rejected": ""},
        *ROWS[3:],
    ]
    dropped = task_of(configure(home, too_long="drop", empty="drop"), tmp_path, rows)
    said = capfd.readouterr().out
    assert "1 of 14 pairs (train) left out: an answer is empty" in said
    assert "2 of 13 pairs (train) were longer than 32 tokens: 0 cut, 2 left out" in said
    assert len(dropped.train) == 11
    cut = task_of(configure(home, too_long="cut", empty="drop"), tmp_path, rows)
    said = capfd.readouterr().out
    assert "2 of 13 pairs (train) were longer than 32 tokens: 1 cut, 1 left out" in said
    assert len(cut.train) == 12 and cut.train[0]["mask"][0, -1] == 1


@pytest.fixture(scope="module")
def trained(home):
    """Trains a full and a LoRA run; returns the digests of what was frozen, by step."""
    seen = {}
    save = train.save

    def keep(job, state, totals, step, metric):
        held = checkpoint.digest(job.strategy.view(state.frozen))
        seen[job.workdir.name, step] = held
        save(job, state, totals, step, metric)

    train.save = keep
    try:
        for name in ("full", "lora"):
            config = configure(home)
            config.adapter = common.ADAPTERS[name]()
            train.train(config, home / name)
    finally:
        train.save = save
    return seen


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_loss_starts_at_log_2_and_the_margin_grows(home, trained, name):
    rows = metrics.read(home / name)
    evaluations = [row for row in rows if "val_loss" in row]
    first, last = evaluations[0], evaluations[-1]
    assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["val_margin"] == pytest.approx(0, abs=1e-5)
    train_losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert train_losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert last["val_loss"] < 0.6
    assert last["val_margin"] > 0.2 and last["val_accuracy"] == 1.0
    reward = last["val_chosen_reward"] - last["val_rejected_reward"]
    assert last["val_margin"] == pytest.approx(reward, abs=1e-4)
    assert (home / name / "margins.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_reference_is_what_the_run_started_from_and_stays_so(home, trained, name):
    run = runs.open(home / name, weights="base")
    config = configure(home)
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    start = jax.jit(model.init, static_argnums=0)(run.model.cfg, init_key)
    wanted = checkpoint.digest(start)
    assert checkpoint.digest(run.params) == wanted
    assert checkpoint.digest(runs.open(home / name).params) != wanted
    held = {digest for (run_name, _), digest in trained.items() if run_name == name}
    (stored,) = (path.name for path in (home / name / "frozen").iterdir())
    assert held == {stored}
    where = "reference" if name == "full" else "base"
    assert stored == checkpoint.digest({where: start})


@pytest.mark.slow
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(home, trained):
    config = configure(home)
    config.steps = 6
    train.train(config, home / "parts")
    config.steps = 12
    train.train(config, home / "parts")
    whole, parts = (
        checkpoint.digest(runs.open(home / name, step="latest").params)
        for name in ("full", "parts")
    )
    assert whole == parts


def test_orpo_needs_no_reference(home, tmp_path):
    config = configure(home, variant="orpo", logp="mean")
    config.update(steps=6, eval_every=6)
    result = train.train(config, tmp_path / "orpo")
    assert not (tmp_path / "orpo" / "frozen").exists()
    first = next(r for r in metrics.read(tmp_path / "orpo") if "val_loss" in r)
    # About log(257) for the likelihood, and 0.1 log(2) for even odds.
    assert first["val_loss"] == pytest.approx(np.log(257) + 0.07, abs=0.2)
    assert result.numbers["val_loss"] < first["val_loss"]
