import builtins
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import metrics


def writer(folder, **changes):
    options = {"tensorboard": False, "wandb": "", "config": None, "resume_step": 0}
    return metrics.Writer(folder, **{**options, **changes})


def record(folder, steps, **changes):
    w = writer(folder, **changes)
    for step in steps:
        w.write(step, train_loss=float(step))
    w.close()


def steps(folder):
    return [row["step"] for row in metrics.read(folder)]


# ---- the record ----


def test_what_is_written_is_read_back(tmp_path):
    w = writer(tmp_path / "new" / "run")
    w.write(3, train_loss=jnp.float32(1.5), tokens=2**40, lr=np.float64(0.1))
    w.write(3, val_loss=2)
    w.close()
    assert metrics.read(tmp_path / "new" / "run") == [
        {"step": 3, "train_loss": 1.5, "tokens": 2**40, "lr": 0.1},
        {"step": 3, "val_loss": 2},
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    w = writer(tmp_path)
    w.write(1, train_loss=2.0)
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "train_loss": 2.0}\n'
    w.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(np.nan)])
def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path, value):
    w = writer(tmp_path, tensorboard=True)
    w.write(1, train_loss=value, lr=1.0)
    w.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["train_loss"] is None
    assert metrics.read(tmp_path)[0] == {"step": 1, "train_loss": None, "lr": 1.0}


def test_resuming_cuts_later_lines_and_appends(tmp_path):
    record(tmp_path, [0, 10, 20, 20, 30])
    record(tmp_path, [30, 40], resume_step=20)
    assert steps(tmp_path) == [0, 10, 20, 20, 30, 40]


def test_starting_over_leaves_nothing_of_before(tmp_path):
    record(tmp_path, [0, 10])
    record(tmp_path, [0], resume_step=0)
    assert steps(tmp_path) == [0]


def test_a_last_line_cut_short_is_dropped_wherever_it_is_cut(tmp_path):
    record(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(second + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps(tmp_path) == [1]
    path.write_bytes(whole[:-1])  # only the newline is missing
    record(tmp_path, [3], resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]
    path.write_bytes(whole[:-5])
    record(tmp_path, [3], resume_step=2)
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("damage", ["oops", "[1]", '{"loss": 1}', "7"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    record(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(damage + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        metrics.read(tmp_path)


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        metrics.read(tmp_path)


def test_closing_twice_is_harmless(tmp_path):
    w = writer(tmp_path, tensorboard=True)
    w.close()
    w.close()


# ---- copies ----


def events(folder):
    """Returns {(name, step): value} and the purge steps of all TensorBoard files."""
    from tensorboardX.proto import event_pb2

    Event, SessionLog = (getattr(event_pb2, x) for x in ("Event", "SessionLog"))
    values, purged = {}, []
    for path in sorted((folder / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                purged.append(event.step)
            for value in event.summary.value:
                texts = value.tensor.string_val
                found = texts[0].decode() if texts else value.simple_value
                values[value.tag, event.step] = found
    return values, purged


def test_tensorboard_holds_the_same_numbers(tmp_path):
    w = writer(tmp_path, tensorboard=True)
    w.write(5, train_loss=1.5, val_loss=math.nan)
    w.close()
    assert events(tmp_path)[0] == {("train/loss", 5): 1.5}


def test_tensorboard_shows_the_numbers_in_groups_and_the_samples(tmp_path):
    w = writer(tmp_path, tensorboard=True)
    names = ("val_bpb", "train_no_signal", "sample_words", "lr", "mfu", "tokens")
    w.write(1, **dict.fromkeys(names, 1))
    w.samples(1, ["a\n\n# b", "c"])
    w.close()
    found = events(tmp_path)[0]
    assert {tag for tag, _ in found} == {
        *("val/bpb", "train/no_signal", "sample/words"),
        *("update/lr", "speed/mfu", "progress/tokens", "samples/text_summary"),
    }
    # As Markdown has it, indented text is shown as it stands.
    assert found["samples/text_summary", 1] == "    a\n    \n    # b\n\n---\n\n    c"


def test_tensorboard_drops_what_comes_after_the_resumed_step(tmp_path):
    record(tmp_path, [1], tensorboard=True, resume_step=20)
    assert events(tmp_path)[1] == [21]


def test_wandb_gets_the_numbers_and_the_config(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda row: calls.append(row),
        finish=lambda: calls.append("finish"),
        define_metric=lambda *args, **kwargs: None,
    )

    def init(**options):
        calls.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume in (0, 3):
        w = writer(tmp_path, wandb="cats", config={"seed": 1}, resume_step=resume)
        w.write(4, lr=0.5, train_loss=math.nan)
        w.close()
    first, row, end, second = calls[:4]
    assert (first["project"], first["config"]) == ("cats", {"seed": 1})
    assert (row, end) == ({"step": 4, "lr": 0.5}, "finish")
    assert first["id"] == second["id"]


@pytest.mark.fault(31)
def test_copies_that_fail_are_told_once_and_the_record_goes_on(
    tmp_path, monkeypatch, caplog
):
    def refuse(*args, **options):
        raise RuntimeError("no network")

    run = types.SimpleNamespace(
        log=refuse, finish=refuse, define_metric=lambda *args, **options: None
    )
    for wandb in ({"init": refuse}, {"init": lambda **options: run}):
        module = types.SimpleNamespace(**wandb)
        monkeypatch.setitem(sys.modules, "wandb", module)
        w = writer(tmp_path, wandb="cats")
        for step in (1, 2):
            w.write(step, lr=0.5)
        w.close()
        assert steps(tmp_path) == [1, 2]
        assert caplog.text.count("Weights & Biases fails, the run goes on") == 1
        assert "no network" in caplog.text
        caplog.clear()


@pytest.mark.fault(31)
def test_a_tensorboard_that_cannot_be_opened_is_told_and_the_record_goes_on(
    tmp_path, caplog
):
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    record(tmp_path, [1, 2], tensorboard=True)
    assert steps(tmp_path) == [1, 2]
    assert caplog.text.count("TensorBoard fails, the run goes on without it") == 1


@pytest.mark.fault(31)
def test_a_tensorboard_whose_disk_is_full_is_told_and_nothing_waits_for_it(
    tmp_path, monkeypatch, caplog
):
    from tensorboardX import event_file_writer, record_writer

    def full(*args):
        raise OSError(28, "No space left on device")

    w = writer(tmp_path, tensorboard=True)
    worker = w._copies["TensorBoard"]._events.file_writer.event_writer._worker
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    monkeypatch.setattr(event_file_writer.threading, "excepthook", lambda _: None)
    w.write(1, lr=0.5)
    worker.join(timeout=20)
    for step in (2, 3):
        w.write(step, lr=0.5)
    w.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert caplog.text.count("TensorBoard fails, the run goes on without it") == 1


def test_wandb_that_is_absent_is_explained_and_nothing_is_touched(
    tmp_path, monkeypatch
):
    record(tmp_path, [0, 1])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"'cats'.*pip install wandb"):
        writer(tmp_path, wandb="cats")
    assert steps(tmp_path) == [0, 1]


def test_copies_that_are_off_are_not_imported(tmp_path, monkeypatch):
    real = builtins.__import__

    def guard(name, *args, **kwargs):
        assert name.split(".")[0] not in ("wandb", "tensorboardX"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guard)
    monkeypatch.setattr(
        metrics.importlib, "import_module", lambda name: pytest.fail(name)
    )
    record(tmp_path, [1])
    assert not (tmp_path / "tensorboard").exists()


# ---- speed ----


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(value=100.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.value)
    return now


def throughput(peak=None, devices=1):
    return metrics.Throughput(flops_per_token=100.0, peak_flops=peak, devices=devices)


def test_compilation_and_pauses_do_not_slow_the_measured_speed(clock):
    rate = throughput()
    clock.value += 60  # compiling
    assert rate.measure(1000) == {}
    clock.value += 2
    assert rate.measure(2000) == {"tokens_per_second": 500}
    clock.value += 30  # an evaluation
    rate.pause()
    clock.value += 4
    assert rate.measure(3000) == {"tokens_per_second": 250}


def test_a_pause_before_the_first_measurement_does_not_start_the_clock(clock):
    rate = throughput()
    rate.pause()
    clock.value += 60
    assert rate.measure(1000) == {}


def test_mfu_is_a_share_of_all_devices(clock):
    rate = throughput(peak=1e5, devices=2)
    rate.measure(0)
    clock.value += 1
    assert rate.measure(500) == {"tokens_per_second": 500, "mfu": 500 * 100 / 2e5}


def test_no_progress_has_no_speed(clock):
    rate = throughput()
    rate.measure(10)
    assert rate.measure(20) == {}
    clock.value += 1
    assert rate.measure(20) == {}


def test_flops_of_a_token_are_those_of_the_palm_paper():
    got = metrics.flops_per_token(1000, n_layers=3, n_heads=2, head_dim=16, seq_len=64)
    forward = 2 * 1000 + 3 * (2 * 2 * 64 * 2 * 16)  # weights; scores and their values
    assert got == 3 * forward
