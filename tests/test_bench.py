"""The benchmark: its harness, and every row once at a size that tests can afford."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benches import (
    cpu,
    gpu,
    machine,
    match,
    nanogpt,
    ours,
    race,
    report,
    texts,
    worker,
)
from experiments.benches.match import Match
from experiments.benches.setting import Setting
from experiments.benches.worker import Absent, Failed, Side, Worker
from gpt_jax import model
from tests.cases import few
from tests.tiny import cfg

CPU = {"platform": "cpu", "gflops": 100.0, "gbytes_s": 10.0, "versions": {}}
CPU |= {"device": "a chip", "cores": 2, "memory_gb": 8.0, "python": "3.11"}


def side(name, **options):
    return Side(name, f"tests.bench_sides:{name}", options)


def play(one, **options):
    settings = {"repeats": 3, "limit_s": 60.0, "machine": CPU, "say": lambda _: None}
    return match.play(one, **{**settings, **options})


# --- the numbers ----------------------------------------------------------------------


def test_spread_is_the_interquartile_range_over_the_median():
    values = [3.0, 9.0, 4.0, 5.0, 100.0, 7.0]
    low, middle, high = np.percentile(values, [25, 50, 75])
    assert match.spread(values) == pytest.approx((high - low) / middle)
    assert match.spread([5.0]) == 0.0


def test_a_ratio_is_a_speed_whatever_the_unit():
    assert match.speed_ratio(30.0, 10.0, "tokens/s") == 3.0
    assert match.speed_ratio(10.0, 30.0, "s") == 3.0
    assert match.speed_ratio(100.0, 50.0, "MB") == 0.5


class Logged:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def go(self):
        self.log.append(self.name)
        return {"value": float(len(self.log))}

    def cpu_seconds(self):
        return 0.0


def test_the_sides_take_turns():
    log = []
    sides = {"ours": Logged("A", log), "peer": Logged("B", log)}
    samples, disturbed = match.interleave(sides, repeats=3)
    assert "".join(log) == "ABABAB"
    assert [x["value"] for x in samples["peer"]] == [2.0, 4.0, 6.0]
    assert disturbed == {"idle_cpu": None, "others_cpu": None}  # too short to tell


class Clocked:
    """A side whose turns cost CPU time, and so does waiting for the other's turn."""

    def __init__(self, turn, waiting):
        self.used, self.turn, self.waiting = 0.0, turn, waiting
        self.other = self

    def go(self):
        time.sleep(0.11)
        self.used += self.turn
        self.other.used += self.other.waiting
        return {"value": 1.0}

    def cpu_seconds(self):
        return self.used


def test_cpu_time_of_a_waiting_side_and_of_others_is_told_apart(monkeypatch):
    ours_, peer = Clocked(5.0, 0.0), Clocked(3.0, 0.022)
    ours_.other, peer.other = peer, ours_
    # Beside the two, somebody uses 0.044 s in each turn.
    clock = iter([0.0, 5.066, 5.066, 8.11])
    monkeypatch.setattr(match, "busy_seconds", lambda: next(clock))
    _, disturbed = match.interleave({"ours": ours_, "peer": peer}, repeats=1)
    assert disturbed["idle_cpu"] == pytest.approx(0.2, rel=0.3)
    assert disturbed["others_cpu"] == pytest.approx(0.4, rel=0.3)


def test_a_goal_is_met_by_the_ratio_or_without_a_peer_by_the_value():
    line = {"goal": 2.0, "ours": 5.0, "peer_name": "x", "ratio": 2.1}
    assert match.met(line) is True
    assert match.met({**line, "ratio": 1.9}) is False
    assert match.met({**line, "ratio": None}) is None
    assert match.met({**line, "peer_name": None}) is False
    assert match.met({**line, "peer_name": None, "ours": 1.5}) is True


# --- processes ------------------------------------------------------------------------


def test_a_line_holds_what_was_measured_and_how():
    ours_, peer = side("counting", step=2.0, flops=1e10), side("counting")
    line = play(Match("row", "shape", ours_, peer, "tokens/s", goal=1.5))
    assert json.loads(json.dumps(line)) == line
    assert (line["ours"], line["peer"], line["ratio"]) == (4.0, 2.0, 2.0)
    assert line["samples"] == {"ours": [2.0, 4.0, 6.0], "peer": [1.0, 2.0, 3.0]}
    assert line["spread"] == {"ours": 0.5, "peer": 0.5, "ratio": 0.0}
    assert line["extra"]["ours"] == {"half": 2.0}
    assert line["facts"]["peer"]["word"] == "ready"
    assert line["roofline"] == {"flops": pytest.approx(4.0 * 1e10 / 100e9)}
    assert (line["note"], line["failed"], match.met(line)) == ("", False, True)
    assert {"unit", "load", "date", "machine", "peer_name"} <= line.keys()


def test_a_side_that_waits_its_turn_uses_no_cpu():
    line = play(Match("r", "s", side("counting"), side("counting", seconds=0.2), "s"))
    if not Path("/proc/self/stat").exists():
        assert line["idle_cpu"] is None
        return
    assert line["idle_cpu"] <= 0.1


def test_an_absent_peer_is_named_with_the_command_that_installs_it():
    line = play(Match("r", "s", side("counting"), side("needs_what_nobody_has"), "s"))
    assert "surely_no_such_package not installed: pip install -r" in line["note"]
    assert (line["ours"], line["peer"], line["ratio"]) == (2.0, None, None)
    assert not line["failed"]


def test_without_our_side_there_is_no_number():
    line = play(Match("r", "s", side("needs_what_nobody_has"), side("counting"), "s"))
    assert (line["ours"], line["peer"], line["ratio"]) == (None, None, None)


@pytest.mark.parametrize(
    "name, words",
    [("broken", "the weights do not fit"), ("dies", "out of memory, more or less")],
)
def test_a_side_that_breaks_says_why_and_gives_no_number(name, words):
    line = play(Match("r", "s", side("counting"), side(name), "s"))
    assert words in line["note"] and line["failed"]
    assert (line["ours"], line["peer"], line["ratio"]) == (None, None, None)


def test_a_side_that_never_answers_is_given_up():
    with Worker(side("stuck"), limit_s=20.0) as stuck:
        stuck.limit_s = 0.2
        with pytest.raises(Failed, match="no answer within"):
            stuck.go()


def test_what_libraries_print_does_not_come_between_the_answers():
    with Worker(side("chatty"), limit_s=60.0) as chatty:
        assert [chatty.go(), chatty.go()] == [{"value": 1.0}] * 2


def test_a_side_has_the_environment_that_it_asks_for():
    asks = side("knows", key="BENCH_ANSWER")._replace(env={"BENCH_ANSWER": "42"})
    with Worker(asks, limit_s=60.0) as knows:
        assert knows.facts["found"] == "42"
    with Worker(asks._replace(env={}), limit_s=60.0) as knows:
        assert knows.facts["found"] is None


def test_a_row_for_a_gpu_says_so_without_one():
    line = play(Match("gpu_x", "s", side("broken"), None, "s", gpu=True))
    assert line["note"] == "not measured: no GPU" and line["ours"] is None
    assert not line["failed"]


def test_a_fresh_process_measures_itself_from_launch():
    options = {"make": "tests.bench_sides:counting", "options": {"step": 3.0}}
    go, _ = race.fresh(**options, value="value", turns=2)
    found = go()
    assert found["value"] == 6.0 and 0 < found["seconds"] < 60


@pytest.mark.slow
def test_peak_memory_is_that_of_this_process_and_grows():
    with Worker(side("counting"), limit_s=60.0):
        before = worker.peak_mb()
        held = np.ones(int(before) * 10**6 // 8 + 10**7)
        peak = worker.peak_mb()
        assert peak > before + 50
        del held
        assert worker.peak_mb() > peak - 20  # not what it holds now


# --- the table ------------------------------------------------------------------------


@pytest.fixture
def lines():
    ours_, peer = side("counting", step=2.0), side("counting")
    first = play(Match("train_step", "toy", ours_, peer, "tokens/s", 1.0), repeats=1)
    none = play(Match("gpu_x", "toy", ours_, peer, "s", 1.0, gpu=True))
    return [first, none]


def test_lines_come_back_from_their_file_the_newest_of_each_row(lines, tmp_path):
    path = tmp_path / "bench.jsonl"
    for line in [*lines, {**lines[0], "ours": 99.0}]:
        report.append(path, line)
    assert report.read(path) == [{**lines[0], "ours": 99.0}, lines[1]]
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is not a line of the benchmark"):
        report.read(path)


def test_the_table_shows_numbers_ratios_goals_and_what_is_missing(lines):
    rows = [
        " ".join(line.split()) for line in report.table([*lines, lines[1]]).splitlines()
    ]
    assert rows[2].startswith("| train_step | toy | 2 tokens/s")
    assert "| **2.00** ± 0% | ≥ 1 yes | counting |" in rows[2]
    assert rows[3].startswith("| gpu_x | toy | – [1] | – | – | ≥ 1 |")
    assert rows[4].startswith("| gpu_x | toy | – [1] |")  # said once
    assert rows[-1] == "[1] not measured: no GPU<br>"


def test_a_page_keeps_what_stands_around_the_table(lines, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.rewrite(path, lines)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text and report.table(lines) in text and "a chip" in text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="no place for tables"):
        report.rewrite(path, lines)
    assert path.read_text() == "no marks"


def test_the_picture_needs_both_curves(lines, tmp_path):
    path = tmp_path / "images" / "time.png"
    assert not report.plot(lines, path) and not path.exists()
    curve = {"curve": [[1.0, 0, 4.0], [2.0, 50, 2.0]], "stop_at": 2.0}
    assert report.plot([{**lines[0], "extra": {"ours": curve, "peer": curve}}], path)
    assert path.read_bytes().startswith(b"\x89PNG")


# --- texts ----------------------------------------------------------------------------


def test_a_text_has_the_wanted_size_and_is_always_the_same(tmp_path):
    options = {"source": "builtin:json", "tokenizer": "bpe:300"}
    made = []
    for name in "ab":
        text, ready = texts.text_and_tokenizer(
            str(tmp_path / name), megabytes=0.15, **options
        )
        assert ready.is_file()
        made.append(text.read_bytes())
    assert made[0] == made[1]
    assert 150_000 <= len(made[0]) < 160_000


# --- the sides ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    text = folder / "text.txt"
    texts.write_text(text, 30_000, "builtin:json")
    return Setting(
        folder=str(folder),
        text=str(text),
        toy=True,
        eval_every=(2,),
        seeds=1,
        megabytes=0.2,
        seconds=0.0,
    )


ROWS = cpu.ROWS | gpu.ROWS
# Measured below; as a toy, gpu_population is population.
ELSEWHERE = {"time_to_loss", "gpu_time_to_loss", "gpu_population"}
QUICK = ("checkpoint", "decode", "loader", "memory", "prepare", "startup")
TOYS = few(
    sorted(ROWS.keys() - ELSEWHERE), *QUICK, "train_step", "gpu_train_124m"
)  # the others compile much, even as toys


def once(make, options):
    """Measures a side in this process; its facts and sample."""
    if make == "experiments.benches.race:fresh":
        make, options = options["make"], dict(options["options"])
        if make.endswith("ours:first_step"):
            options["cache"] = ""  # this process keeps its own
    where, _, function = make.partition(":")
    try:
        go, facts = getattr(importlib.import_module(where), function)(**options)
    except Absent as absent:
        pytest.skip(str(absent))
    return {**facts, **go()}


# JAX's own attention asks the rules of promotion for the types of its slopes.
@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("row", TOYS)
@pytest.mark.parametrize("which", ["ours", "peer"])
def test_every_row_measures_something_at_a_toy_size(row, which, setting):
    matches = ROWS[row](setting)
    assert matches and all(one.row == row for one in matches)
    sides = [getattr(one, which) for one in matches]
    found = {json.dumps([*side]): side for side in sides if side}
    for chosen in found.values():
        value = once(chosen.make, chosen.options)["value"]
        assert value > 0 or chosen.make in MAY_BE_0


# Shares of a step: nothing waited for is 0, and a small cost drowns in the noise.
MAY_BE_0 = ("experiments.benches.ours:data_wait", "experiments.benches.ours:data_cost")
# The CPU is compared with itself.
MAY_BE_0 += tuple(
    f"experiments.benches.correct:{name}_apart" for name in ("losses", "ids", "resume")
)


@pytest.mark.parametrize("row", sorted(ROWS))
def test_the_true_sizes_are_described(row, setting):
    full = setting._replace(toy=False)
    for one in ROWS[row](full):
        assert one.gpu == row.startswith("gpu_")
        json.dumps([one.ours.options, one.peer and one.peer.options])
        recipe = one.ours.options.get("recipe")
        if recipe:
            model.GPTConfig(**recipe["model"])


def test_both_sides_of_a_step_train_as_many_parameters(setting):
    for one in [*cpu.train_step(setting), *gpu.gpu_train_124m(setting)]:
        counts = [once(x.make, x.options)["parameters"] for x in (one.ours, one.peer)]
        assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_race_ends_at_the_first_evaluation_that_is_good_enough(setting):
    (one,) = cpu.time_to_loss(setting)
    for chosen in (one.ours, one.peer):
        found = once(chosen.make, {**chosen.options, "stop_at": 20.0})
        assert found["loss"] <= 20.0 and found["step"] == 0
        assert [found["value"], 0, found["loss"]] == list(found["curve"][-1])
        assert found["seed"] == 1337


SLOW = """
import json, pathlib
with pathlib.Path(r'{folder}/metrics.jsonl').open('w') as record:
    for step in (0, 5):
        row = {'step': step, 'val_loss': 2.0 - step / 10}
        print(json.dumps(row), file=record)
print('gave up')
"""


def test_a_race_that_is_not_won_is_an_error_unless_its_end_counts():
    options = {"words": ["-c", SLOW], "stop_at": 1.0, "seeds": [1]}
    go, _ = race.to_loss(**options)
    with pytest.raises(Failed, match=r"came to 1.5 and not to 1.0(.|\n)*gave up"):
        go()
    go, _ = race.to_loss(**options, end_counts=True)
    found = go()
    assert (found["loss"], found["step"], found["reached"]) == (1.5, 5, False)
    go, _ = race.to_loss(**{**options, "words": ["-c", "1 / 0"]}, end_counts=True)
    with pytest.raises(Failed, match="ZeroDivisionError"):
        go()


@pytest.mark.slow
def test_decoding_is_checked_against_the_path_without_a_cache():
    gpt = model.GPT(replace(cfg(), context_length=16))
    params = model.init(gpt.cfg, jax.random.key(3))
    prompt_BT = np.array([[1, 2, 3]], np.int32)
    tokens_BS = ours.writer(gpt, params, 6)(prompt_BT)
    assert (tokens_BS == ours._uncached(gpt, params, 6)(prompt_BT)).all()
    assert (ours.greedy_again(gpt, params, tokens_BS, 3) == tokens_BS).all()
    wrong_BS = tokens_BS.copy()
    wrong_BS[0, 5] = (wrong_BS[0, 5] + 1) % 61
    assert (ours.greedy_again(gpt, params, wrong_BS, 3) != wrong_BS).any()


# --- nanoGPT's recipe -----------------------------------------------------------------


def test_nanogpts_rate_rises_to_its_peak_and_falls_to_a_tenth():
    plan = nanogpt.Recipe(steps=2000, batch=12)
    assert nanogpt.rate(0, plan) == pytest.approx(1e-3 / 101)
    assert nanogpt.rate(100, plan) == pytest.approx(1e-3)
    assert nanogpt.rate(1050, plan) == pytest.approx((1e-3 + 1e-4) / 2)
    assert nanogpt.rate(2000, plan) == pytest.approx(1e-4)


def test_nanogpts_evaluation_sees_every_target_once(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch: the extra parity")
    monkeypatch.setattr(nanogpt, "EVAL_TOKENS", 12)  # several batches
    ids = np.arange(24)
    seen = []

    def loss(weights, tokens, targets, training):
        assert not training
        seen.extend(targets.flatten().tolist())
        assert (tokens + 1 == targets).all()
        return targets.float().mean()

    mean = nanogpt.evaluate(loss, {}, ids, 5, "cpu")
    assert sorted(seen) == list(range(1, 24))
    assert mean == pytest.approx(np.arange(1, 24).mean())
    assert torch.is_grad_enabled()


def test_nanogpts_model_is_the_one_that_we_train():
    torch = pytest.importorskip("torch", reason="needs torch: the extra parity")
    shape = nanogpt.Shape(vocab_size=61, seq_len=16, n_layers=2, n_heads=4, d_model=32)
    own = replace(
        cfg(),
        init="torch_default",  # large enough that the order of q and k shows
        activation="gelu",
        norm_bias=False,
        qkv_bias=False,
        attn_bias=False,
        mlp_bias=False,
    )
    weights = nanogpt.init(shape, "cpu")
    assert model.count(own) == sum(w.numel() for w in weights.values())
    params = model.init(own, jax.random.key(0))
    tokens_BT = np.random.default_rng(0).integers(0, 61, (2, 16))
    filled = {k: torch.from_numpy(np.array(v)) for k, v in _as_nanogpt(params).items()}
    given = torch.from_numpy(tokens_BT)
    theirs = nanogpt.make_loss(shape)(filled, given[:, :-1], given[:, 1:], False)
    logits_BTV, _ = model.GPT(own).apply({"params": params}, tokens_BT[:, :-1])
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    right = np.take_along_axis(np.asarray(logp_BTV), tokens_BT[:, 1:, None], -1)
    assert float(theirs) == pytest.approx(-right.mean(), rel=1e-5)


def _as_nanogpt(params):
    """Returns our weights under nanoGPT's names, as [outputs, inputs] matrices."""
    made = {
        "embed": params["embed"]["embedding"],
        "positions": params["positions"]["embedding"],
        "norm": params["final_norm"]["scale"],
    }
    for i in range(2):
        block = params[f"block_{i}"]
        attn = {k: np.asarray(v["kernel"]) for k, v in block["attn"].items()}
        qkv = [attn[k].reshape(32, 32).T for k in ("query", "key", "value")]
        made |= {
            f"{i}.qkv": np.concatenate(qkv),
            f"{i}.out": attn["out"].reshape(32, 32).T,
            f"{i}.up": np.asarray(block["mlp"]["up"]["kernel"]).T,
            f"{i}.down": np.asarray(block["mlp"]["down"]["kernel"]).T,
            f"{i}.norm1": block["norm1"]["scale"],
            f"{i}.norm2": block["norm2"]["scale"],
        }
    return made


# --- the machine and the door ---------------------------------------------------------


def test_the_ceilings_are_those_of_a_computer():
    found = machine.ceilings(toy=True, limit_s=60.0)
    assert found["platform"] == "cpu" and found["cores"] >= 1 and found["device"]
    assert 0.01 < found["gflops"] < 1e6 and 0.01 < found["gbytes_s"] < 1e5
    assert found["versions"]["jax"] == jax.__version__


def door(*flags, code=0):
    command = [sys.executable, "-m", "experiments.bench", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_the_door_measures_records_and_shows_again(tmp_path):
    out = tmp_path / "bench.jsonl"
    said = door("--rows=prepare", "--toy", "--repeats=1", f"--out={out}")
    (line,) = report.read(out)
    assert line["row"] == "prepare" and line["ratio"] > 0 and not line["failed"]
    assert report.table([line]) in said
    started = time.monotonic()
    assert report.table([line]) in door(f"--table={out}")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--rows=train", "--rows 'train' is not one of: train_step, time_to_loss"),
        ("--repeats=0", "--repeats=0 must be at least 1"),
        ("--table=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_the_door_refuses_in_a_sentence(flag, words):
    said = door(flag, code=2)
    assert words in said and "Traceback" not in said


def test_what_does_not_begin_within_the_suites_time_is_left_out():
    command = [sys.executable, "-m", "experiments.bench", "--gpu_suite", "--suite_s=0"]
    done = subprocess.run(
        [*command, "--toy"], capture_output=True, text=True, timeout=100, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not measured: no time was left") > len(gpu.SUITE)
