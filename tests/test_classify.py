"""Classification: how a text is read, what is trained, how good it is."""

import json
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import classify as recipe
from configs import common
from gpt_jax import classify, data, metrics, model, runs, tasks, tokenizers, train
from gpt_jax.sweep import after
from tests import test_step, tiny
from tests.cases import few

BYTES = tokenizers.train("byte", iter(["x"]))
CFG = tiny.cfg(n_classes=3, vocab_size=300, init="torch_default")
GPT = model.GPT(CFG)
WEIGHTS = tiny.jit(partial(model.init, CFG))(jax.random.key(0))


# --- how a text is read ---------------------------------------------------------------


def test_texts_are_padded_at_the_right_and_cut_at_the_end():
    found = classify.encode(BYTES, ["abc", "a", "abcdef"], length=4)
    ids = BYTES.encode("abcdef")
    assert found.tokens_NT.shape == (3, 4) and found.cut == 1
    assert found.length_N.tolist() == [3, 1, 4]
    assert found.tokens_NT[2].tolist() == ids[:4]
    assert found.tokens_NT[1].tolist() == [ids[0]] + [BYTES.eos_id or 0] * 3
    assert classify.encode(BYTES, ["abc", "a"], length=0).tokens_NT.shape == (2, 3)


def test_each_pool_takes_the_features_that_it_names():
    x_BTD = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    pools = {
        name: pool(x_BTD, np.array([2, 3])) for name, pool in classify.POOLS.items()
    }
    np.testing.assert_array_equal(pools["last"], x_BTD[[0, 1], [1, 2]])
    np.testing.assert_array_equal(pools["first"], x_BTD[:, 0])
    np.testing.assert_array_equal(pools["end"], x_BTD[:, 3])
    wanted = np.stack([x_BTD[0, :2].mean(0), x_BTD[1, :3].mean(0)])
    np.testing.assert_allclose(pools["mean"], wanted)


def logits(tokens_BT, length_B, pool, causal):
    read = partial(classify.logits, model=GPT, pool=pool, causal=causal)
    return np.asarray(tiny.jit(read)(WEIGHTS, tokens_BT, length_B))


TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("causal", few([True, False], False))
@pytest.mark.parametrize("pool", classify.POOLS)
def test_padding_is_read_by_the_end_of_the_row_only(pool, causal):
    length_B = np.array([4, 6])
    other = TOKENS.copy()
    other[0, 4:], other[1, 6:] = 7, 8
    a, b = (logits(t, length_B, pool, causal) for t in (TOKENS, other))
    wide = np.pad(TOKENS, ((0, 0), (0, 5)))
    c = logits(wide, length_B, pool, causal)
    if pool == "end":
        assert np.abs(a - b).max() > 1e-3
    else:
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_the_first_token_knows_the_text_without_the_causal_mask_only():
    other, full = TOKENS.copy(), np.array([9, 9])
    other[:, 8] += 1
    seen = [
        np.abs(
            logits(TOKENS, full, "first", causal) - logits(other, full, "first", causal)
        )
        for causal in (True, False)
    ]
    assert seen[0].max() < 1e-6 < 1e-4 < seen[1].max()


def test_probabilities_do_not_depend_on_the_other_texts():
    texts = [f"text number {i}"[: 5 + i % 9] for i in range(classify.ROWS + 1)]
    how = {"model": GPT, "params": WEIGHTS, "tokenizer": BYTES}
    how |= {"length": 12, "pool": "last", "causal": True}
    chances = classify.probabilities(texts, **how)
    np.testing.assert_allclose(chances.sum(1), 1.0, rtol=1e-5)
    alone = classify.probabilities(texts[-1:], **how)
    np.testing.assert_allclose(chances[-1:], alone, atol=1e-5)
    done = classify.labelled(texts, chances, "abc")
    assert [one.text for one in done] == texts
    assert done[0].label == "abc"[chances[0].argmax()]
    assert done[0].probability == max(done[0].probabilities.values())
    with pytest.raises(ValueError, match="text 2 of 2 is empty"):
        classify.probabilities(["a", " "], **how)
    with pytest.raises(ValueError, match="there is no text to classify"):
        classify.probabilities([], **how)


# --- how good it is -------------------------------------------------------------------


def test_a_report_counts_by_hand():
    right, given = "aaabbc", "aabbbc"
    found = classify.report(right, given, ("a", "b", "c", "d"))
    assert found.confusion == (
        (2, 1, 0, 0), (0, 2, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0)
    )  # fmt: skip
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.precision == pytest.approx((1.0, 2 / 3, 1.0, 0.0))
    assert found.recall == pytest.approx((2 / 3, 1.0, 1.0, 0.0))
    assert found.f1 == pytest.approx((0.8, 0.8, 1.0, 0.0))
    assert found.macro_f1 == pytest.approx((0.8 + 0.8 + 1.0) / 3)  # d never occurs
    assert "accuracy 83.33%, macro F1 0.8667" in found.text()
    assert json.loads(json.dumps(found.numbers()))["confusion"][0] == [2, 1, 0, 0]


def test_a_class_that_is_missed_and_never_given_counts_as_zero():
    found = classify.report("aab", "aaa", ("a", "b"))
    assert found.macro_f1 == pytest.approx((0.8 + 0.0) / 2)


def test_a_report_refuses_unknown_classes_and_no_texts():
    with pytest.raises(ValueError, match="'c' is not one of: a, b"):
        classify.report("ac", "ab", ("a", "b"))
    with pytest.raises(ValueError, match="no text to report on"):
        classify.report([], [], ("a", "b"))


# --- the task -------------------------------------------------------------------------

GOOD, BAD = "lovely kind sunny", "awful rude rainy"


def write(path, count=60):
    """Texts that one word decides, of many lengths."""
    rng = np.random.default_rng(0)
    rows = ["text\tlabel"]
    for i in range(count):
        label, words = (("good", GOOD), ("bad", BAD))[i % 2]
        filler = "".join(rng.choice(list("xyz"), rng.integers(1, 12)))
        rows.append(f"{rng.choice(words.split())} {filler}{i}\t{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


def settings(folder, **changes):
    config = common.tiny(common.base())
    config.task = common.task_classify()
    config.task.fractions = (0.5, 0.2, 0.3)
    config.data.update(source=str(folder / "table.tsv"), folder=str(folder / "data"))
    config.task.update(changes)
    config.update(compile_cache="", tensorboard=False)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    write(folder / "table.tsv")
    return folder


def make(config):
    return tiny.task(config)


def test_the_task_reads_as_far_as_its_longest_training_text(folder):
    task = make(settings(folder))
    assert task.model.cfg.n_classes == 2 and task.classes.labels == ("bad", "good")
    lengths = [int(task.train[i]["length"]) for i in range(len(task.train))]
    assert task.tokens == task.classes.length == max(lengths) <= 32
    assert (len(task.train), len(task.evals["val"])) == (30, 12)
    example = task.train[0]
    assert example["tokens"].shape == (task.tokens,) and example["mask"] == 1
    text = task.tokenizer.decode(example["tokens"][: example["length"]].tolist())
    right = task.classes.labels[int(example["label"])]
    assert (text.split()[0] in GOOD.split()) == (right == "good")
    config = settings(folder)
    config.data.seq_len = 5
    assert make(config).tokens == 5
    assert make(config).fingerprint != task.fingerprint


def test_a_batch_is_padded_to_the_first_bucket_that_holds_it(folder):
    config = settings(folder, buckets=(12, 16, 99))
    task = make(config)
    short = [i for i in range(30) if task.train[i]["length"] <= 12]
    long = next(i for i in range(30) if task.train[i]["length"] > 16)
    assert task.train.take(short[:2])["tokens"].shape == (2, 12)
    assert task.train.take([short[0], long])["tokens"].shape == (2, task.tokens)
    batch = next(iter(data.once(task.evals["val"], batch_size=8)))
    assert batch["tokens"].shape[1] == 8  # a row for each text


def test_filling_of_a_batch_counts_for_nothing(folder):
    task = make(settings(folder))
    weights = tiny.jit(partial(model.init, task.model.cfg))(jax.random.key(0))
    hyper = test_step.make_hyper(label_smoothing=0.5)
    last = list(data.once(task.evals["val"], batch_size=5))[-1]
    loss = tiny.jit(lambda batch: task.loss(weights, {}, batch, None, hyper))
    sums = loss({k: x[0] for k, x in last.items()})
    assert float(sums["weight"]) == 2.0  # 12 texts are 5 + 5 + 2
    alone = {k: jnp.asarray(x[0, :2]) for k, x in last.items()}
    wanted = loss(alone)
    for name, value in wanted.items():
        assert float(sums[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": {"pool": "best"}}, "task.pool 'best' is not one of: last, first"),
        ({"task": {"buckets": (0,)}}, "task.buckets holds 0"),
        (
            {"task": {"buckets": (1.5,)}},
            r"task.buckets\[0\] is 1.5: it must be a whole",
        ),
        (
            {"task": {"buckets": ("8",)}},
            r"task.buckets\[0\] is '8': it must be a whole",
        ),
        (
            {"task": {"fractions": ("a", 0, 1)}},
            r"task.fractions\[0\] is 'a': it must be a finite",
        ),
        (
            {"task": {"labels": ((1, 2), "b")}},
            r"task.labels\[0\] is \(1, 2\): it must be text or a finite number",
        ),
        ({"task": {"labels": ("good",)}}, "task.labels names one class, 'good'"),
        ({"task": {"labels": (0, 1)}}, r"unknown label '\w+' \(the classes are 0, 1\)"),
        ({"task": {"buckets": (8,), "pool": "end"}}, "leave task.buckets empty"),
        ({"data": {"seq_len": 33}}, "seq_len 33 is more than model.context_length 32"),
        ({"data": {"seq_len": -5}}, "data.seq_len is -5: give a number of tokens"),
        ({"model": {"n_classes": 3}}, "n_classes is 3 and the table has 2 classes"),
        ({"model": {"vocab_size": 9}}, "vocab_size 9 is less than the tokenizer's"),
        ({"task": {"labels": ("good", "fine")}}, "unknown label 'bad'"),
    ],
)
def test_what_does_not_fit_is_refused(folder, change, message):
    config = settings(folder)
    for part, values in change.items():
        config[part].update(values)
    with pytest.raises(ValueError, match=message):
        make(config)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (("a,b",), ("a", "b")),  # --config.task.labels=a,b
        (("a", "b,c"), ("a", "b,c")),
        ((0, 1.0, 2.5), ("0", "1", "2.5")),
        ((), ()),
    ],
)
def test_names_may_be_written_as_flags_write_them(written, names):
    assert tasks.classify.texts_of("task.labels", written) == names


def test_a_classifier_writes_no_samples(folder, tmp_path):
    config = settings(folder)
    config.sample_every = 5
    with pytest.raises(ValueError, match="a classifier writes no text"):
        train.make_task(train.unpack(config), tmp_path)


# --- a run and the door ---------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder):
    """A run that has learnt the table, with batches of several widths."""
    config = settings(folder, buckets=(14, 20))
    config.hyper.update(lr=1e-2, warmup_steps=5.0)
    config.update(steps=30, batch_size=8, eval_every=15, checkpoint_every=30)
    train.train(config, folder / "run")
    return folder / "run"


def test_a_run_learns_what_one_word_decides(run):
    rows = metrics.read(run)
    first = next(row for row in rows if "val_accuracy" in row)
    last = {key: value for row in rows for key, value in row.items()}
    assert first["val_loss"] == pytest.approx(np.log(2), abs=0.2)
    assert last["val_accuracy"] == 1.0 and last["train_accuracy"] > 0.9
    assert "val_perplexity" not in last
    opened = runs.open(run)
    assert opened.classes == runs.Classes(("bad", "good"), opened.classes.length)


def door(*args, text=""):
    """Runs the door; returns its exit code, stdout and stderr."""
    command = [sys.executable, "-m", "experiments.classify", *map(str, args)]
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, timeout=240
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_door_labels_texts_with_probabilities(run, tmp_path):
    out = tmp_path / "out.json"
    texts = ["--text=lovely x", "--file=-", f"--json={out}"]
    code, shown, error = door(f"--run={run}", *texts, text="rude y\r\nsunny z\r\n")
    assert code == 0, error
    assert [line.split()[0] for line in shown.splitlines()] == ["good", "bad", "good"]
    written = json.loads(out.read_text())
    assert [one["label"] for one in written] == ["good", "bad", "good"]
    assert [one["text"] for one in written] == ["lovely x", "rude y", "sunny z"]
    assert sum(written[1]["probabilities"].values()) == pytest.approx(1.0, rel=1e-5)


def test_a_chat_with_a_classifier_is_refused_before_it_begins(run):
    command = [sys.executable, "-m", "experiments.chat", f"--run={run}"]
    done = subprocess.run(command, input=b"hello\n", capture_output=True, timeout=240)
    assert done.returncode == 2
    assert b"sorts texts into classes and writes none" in done.stderr


@pytest.mark.slow
def test_the_door_reports_on_a_table(run, tmp_path):
    table = tmp_path / "more.csv"
    table.write_text("good,lovely day\nbad,rude day\nbad,kind day\neggs,sunny\n")
    named = ["--columns=label,text", f"--image={tmp_path / 'c.png'}", "--skip"]
    code, shown, error = door(f"--run={run}", f"--labelled={table}", *named)
    assert code == 0, error
    assert "left out: 1 with the unknown label 'eggs'" in error
    assert "3 texts, accuracy 66.67%" in shown
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_test_part_is_read_once(run, folder):
    code, shown, error = door(f"--run={run}", "--test")
    assert code == 0, error
    kept = json.loads((run / "test_report.json").read_text())
    assert kept["count"] == 18 and kept["accuracy"] > 0.9
    assert (run / "test_report.png").is_file()
    assert after.test_accuracy(run) == kept["accuracy"]
    kept["accuracy"] = 0.125  # so that reading it is told from measuring it
    (run / "test_report.json").write_text(json.dumps(kept))
    again = folder / "again.png"
    code, shown, _ = door(f"--run={run}", "--test", f"--image={again}")
    assert code == 0 and "was read before" in shown and "12.50%" in shown
    assert again.read_bytes().startswith(b"\x89PNG")
    (run / "test_report.json").unlink()
    old = (folder / "table.tsv").read_text()
    (folder / "table.tsv").write_text(old + "kind\tgood\n")
    code, _, error = door(f"--run={run}", "--test")
    (folder / "table.tsv").write_text(old)
    assert code == 2 and "is no longer what" in error


@pytest.mark.parametrize(
    "args, message",
    [
        (["--text=a"], "--run is missing"),
        (["--run=x"], "one of the three"),
        (["--run=x", "--text=a", "--test"], "one of the three"),
        (
            ["--run=x", "--text=a", "--image=a.png"],
            "--image goes with --labelled or --test, not with --text",
        ),
        (["--run=x", "--test", "--columns=a,b"], "--columns goes with --labelled, not"),
        (["--run=x", "--text=a", "--json=README.md/x"], "README.md is a file; name an"),
        (["--run=x", "--text=a", "--json=tests"], "is a folder; name another"),
        (["--run=x", "--text=a"], "x is not a run folder"),
    ],
)
def test_the_door_says_what_is_missing(args, message):
    code, _, error = door(*args)
    assert code == 2 and message in error and "Traceback" not in error


# --- the recipe -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, moving",
    [
        ("head", {"classifier/kernel", "classifier/bias"}),
        ("last1", {"classifier/kernel", "block_1/", "final_norm/"}),
        ("last2", {"classifier/kernel", "block_0/", "block_1/", "final_norm/"}),
        ("all", {"classifier/kernel", "block_0/", "block_1/", "embed/", "positions/"}),
    ],
)
def test_the_recipe_moves_the_weights_that_it_names(choice, moving):
    config = recipe.get_config(f"size=tiny,train={choice}")
    config.model.update(position="learned", norm_scale=True)
    cfg = model.GPTConfig(**{**config.model, "vocab_size": 61, "n_classes": 2})
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(lambda key: model.init(cfg, key), jax.random.key(0))
        )
    ]
    free = [
        path
        for path in paths
        if not any(re.search(rule, path) for rule in config.optimizer.freeze)
    ]
    for part in moving:
        assert any(path.startswith(part) for path in free), part
    if choice != "all":
        assert not any(path.startswith("embed/") for path in free)
    if choice == "last1":
        assert not any(path.startswith("block_0/") for path in free)
    if choice == "head":
        assert set(free) == moving


def test_the_recipe_refuses_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="all, head, last1 to last4"):
        recipe.get_config("train=last9")
