"""What fine-tuning reaches: spam, instructions, preferences, rewards."""

import json
import statistics
from pathlib import Path

from experiments.targets import Absent, Found, Place, Row, run, train
from gpt_jax import commands

SPAM_SEEDS, REWARD_SEEDS = (1337, 1338, 1339), (1, 2, 3)
BASE = "configs/austen_15m.py:size=small"
TRAINED_ON, TESTED_ON = 935, 110  # rows of the instruction file, in its order


def spam(place: Place) -> Found:
    """Returns the test accuracy of spam classifiers made of the pretrained model."""
    place.file("sms_spam.tsv")
    shares = [_spam(place, f"spam_{seed}", seed) for seed in SPAM_SEEDS]
    return Found(_percents(shares), statistics.mean(shares) >= 95)


def spam_lora(place: Place) -> Found:
    """Returns the same with LoRA, and how far that is from training all weights."""
    place.file("sms_spam.tsv")
    full = [_spam(place, f"spam_{seed}", seed) for seed in SPAM_SEEDS]
    lora = [_spam(place, f"spam_lora_{s}", s, ",adapter=lora") for s in SPAM_SEEDS]
    less = statistics.mean(full) - statistics.mean(lora)
    return Found(f"{_percents(lora)}, {less:.2f} points less", less <= 1.5)


def _spam(place: Place, name: str, seed: int, options: str = "") -> float:
    """Returns the test accuracy of a classifier, in percent."""
    config = _config("classify", _base(place)) + options
    train(place, name, config, f"seed={seed}")
    folder = place.out / name
    command = [*commands.argv("classify"), f"--run={folder}"]
    run([*command, "--test"], place.out / f"{name}_test.log")
    return (
        100 * json.loads((folder / "test_report.json").read_text("utf-8"))["accuracy"]
    )


def _percents(shares: list[float]) -> str:
    each = " / ".join(f"{share:.1f}" for share in shares)
    return f"{statistics.mean(shares):.2f} % ({each})"


def instructions(place: Place) -> Found:
    """Returns how much the validation loss of answers fell."""
    place.file("instruction-data.json")
    losses = _values(train(place, "sft", _config("sft", _base(place))), "val_loss")
    fall = 1 - min(losses) / losses[0]
    words = f"{losses[0]:.2f} to {min(losses):.2f}: by {100 * fall:.0f} %"
    return Found(words, fall >= 1 / 3)


def answers(place: Place) -> Found:
    """Returns scores of base and tuned model on the test rows, and how they end."""
    from gpt_jax import files
    from gpt_jax import instructions as reader

    test = reader.read_file(place.file("instruction-data.json"))
    train(place, "sft", _config("sft", _base(place)))
    files.write_json(place.out / "test.json", test[TRAINED_ON : TRAINED_ON + TESTED_ON])
    scored = place.out / "answers"
    command = [*commands.argv("evaluate"), "--template=alpaca"]
    command += [f"--run={_base(place)}", f"--run={place.out / 'sft'}"]
    command += [f"--rows={place.out / 'test.json'}", f"--out={scored}"]
    run([*command, "--max_new_tokens=100"], place.out / "answers.log")
    base, tuned = json.loads((scored / "scores.json").read_text("utf-8")).values()
    gains = [f"{name} {base[name]['mean']:.0f} to {tuned[name]['mean']:.0f}"
             for name in ("f1", "rouge_l", "chrf")]  # fmt: skip
    risen = all(tuned["gain"][name]["low"] > 0 for name in ("f1", "rouge_l", "chrf"))
    words = f"{tuned['ended']:.0f} % end, {tuned['length']:.2f}x as long; "
    right = tuned["ended"] >= 90 and 0.5 <= tuned["length"] <= 2
    return Found(words + ", ".join(gains), right and risen)


def preferences(place: Place) -> Found:
    """Returns the first and the best validation loss of DPO on the tuned model."""
    place.file("instruction-data-with-preference.json")
    train(place, "sft", _config("sft", _base(place)))
    losses = _values(train(place, "dpo", _config("dpo", place.out / "sft")), "val_loss")
    words = f"{losses[0]:.4f}, then {min(losses):.3f}"
    return Found(words, abs(losses[0] - 0.6931) <= 0.001 and min(losses) < 0.66)


def rewards(place: Place) -> Found:
    """Returns how often letters are reversed rightly, before and after GRPO."""
    befores, afters = [], []
    for seed in REWARD_SEEDS:
        begun, key = f"grpo_start_{seed}", f"seed={seed}"
        lines = train(place, begun, _config("grpo"), key)
        befores.append(_values(lines, "val_accuracy")[-1])
        config = _config("grpo", place.out / begun)
        lines = train(place, f"grpo_{seed}", config, key)
        afters.append(_values(lines, "val_accuracy")[-1])
    before, after = (
        " / ".join(f"{x:.2f}" for x in found) for found in (befores, afters)
    )
    return Found(f"{before} to {after}", max(befores) < 0.2 and min(afters) > 0.8)


def _config(name: str, base: Path | None = None) -> str:
    """Returns a config of this version that starts from a run."""
    file = f"configs/{name}.py"
    if not Path(file).is_file():
        raise Absent(f"{file} is not in this version")
    return f"{file}:run={base}" if base else file


def _base(place: Place) -> Path:
    """Returns the pretrained run: the one that was named, or one trained here."""
    if place.base:
        return place.base
    place.file("austen.txt")
    train(place, "base", BASE, "model.context_length=256")
    return place.out / "base"


def _values(lines: list[dict], name: str) -> list[float]:
    """Returns a number of every line that has it."""
    return [line[name] for line in lines if line.get(name) is not None]


ROWS = (
    Row("SMS spam, from a model of Jane Austen's novels: test accuracy, seeds "
        "1337 to 1339", "95 % or more", "none", spam),
    Row("the same with LoRA", "at most 1.5 points less", "none", spam_lora),
    Row("instruction tuning: validation loss of answers", "falls by a third or more",
        "none", instructions),
    Row("the tuned model's test answers", "90 % end by themselves, 0.5x to 2x as long; "
        "scores rise", "95 % intervals above 0", answers),
    Row("DPO on the tuned model: validation loss", "0.6931, then below 0.66",
        "+- 0.001", preferences),
    Row("GRPO on reversing 3 to 5 letters, seeds 1 to 3: held-out exact matches", "from"
        " below 0.2 to above 0.8", "none", rewards),
)  # fmt: skip
