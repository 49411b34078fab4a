"""Runs that learn to a known number. Minutes each; a stopped one is gone on with."""

from experiments.targets import Found, Place, Row, train

SHAPE = "configs/shakespeare_char.py:size=cpu,recipe="
GOAL = 1.898  # nanoGPT's loss on a CPU, over all windows
SHARE = 0.25  # of its wall time


def nanogpt(place: Place) -> Found:
    """Returns the validation loss of nanoGPT's CPU recipe after 2,000 steps."""
    place.file("tinyshakespeare.txt")
    loss = _evaluated(_shakespeare(place, "nanogpt"))[-1][1]
    return Found(f"{loss:.3f}", loss <= 1.90 + 0.02)


def modern(place: Place) -> Found:
    """Returns when our recipe reaches that loss, against nanoGPT's in the same code."""
    place.file("tinyshakespeare.txt")
    ours = _evaluated(_shakespeare(place, "modern"))
    theirs = _evaluated(_shakespeare(place, "nanogpt"))
    reached = next(((s, t) for s, loss, t in ours if loss <= GOAL), None)
    if reached is None:
        return Found(f"{min(loss for _, loss, _ in ours):.3f} at best", False)
    step, seconds = reached
    share = seconds / theirs[-1][2]
    words = f"step {step}, {seconds:.0f} s: {share:.2f} of nanoGPT's recipe here"
    return Found(words, share <= SHARE)


def _shakespeare(place: Place, recipe: str) -> list[dict]:
    """Returns the record of a recipe; all of them are evaluated equally often."""
    return train(place, f"shakespeare_{recipe}", SHAPE + recipe, "eval_every=50")


def verdict(place: Place) -> Found:
    """Returns losses of the book's chapter 5: it learns the story by heart."""
    for name in ("the-verdict.txt", "gpt2_tokenizer/encoder.json"):
        place.file(name)
    lines = train(place, "verdict", "configs/the_verdict.py:recipe=chapter5")
    learnt = [line["train_loss"] for line in lines if "train_loss" in line][-1]
    loss = _evaluated(lines)[-1][1]
    words = f"train {learnt:.2f}, validation {loss:.2f}"
    return Found(words, learnt < 1 and abs(loss - 6.4) <= 0.4)


def _evaluated(lines: list[dict]) -> list[tuple[int, float, float]]:
    """Returns (step, validation loss, seconds) of every evaluation."""
    wanted = ("step", "val_loss", "seconds")
    found = [line for line in lines if line.get("val_loss") is not None]
    return [tuple(line[key] for key in wanted) for line in found]


ROWS = (
    Row("nanoGPT's CPU recipe, tinyshakespeare: validation loss", "1.90 after 2,000 "
        "steps", "+ 0.02", nanogpt),
    Row("our recipe, same data and tokens a step", f"{GOAL} in a quarter of the time",
        "wall time at most 0.25", modern),
    Row("the book's chapter 5 on The Verdict (124M)", "train below 1, validation "
        "about 6.4", "+- 0.4", verdict),
)  # fmt: skip
