"""The row `serving`: our server against Hugging Face `generate` behind FastAPI."""

from experiments.benches.match import Match
from experiments.benches.setting import (
    BABY,
    GPT2,
    GPT2_TOKENS,
    TOY,
    TOY_TOKENS,
    Setting,
    recipe,
    shape,
)
from experiments.benches.worker import Side

SERVING = "experiments.benches.servers"
GOALS = {1: None, 8: 1.5, 32: None}
REQUESTS = {1: 8, 8: 24, 32: 64}
BABY_TOKENS = 4096  # a small vocabulary of word pieces


def serving(setting: Setting) -> list[Match]:
    """Streamed greedy texts for 1, 8 and 32 clients at once."""
    sizes = {
        "baby": (shape(BABY, BABY_TOKENS, setting), 64, GOALS),
        # Its peer would take five minutes for what 32 clients ask.
        "gpt2_124m": (shape(GPT2, GPT2_TOKENS, setting), 16, [1, 8]),
    }
    if setting.toy:
        sizes = {"toy": (shape(TOY, TOY_TOKENS, setting), 8, GOALS)}
    matches = []
    for name, (fixed, most, loads) in sizes.items():
        for clients in loads:
            goal = GOALS[clients]
            load = {"clients": clients, "count": min(most, REQUESTS[clients])}
            mine = {"recipe": recipe(fixed), "batches": [1, 8, 32], **load}
            matches.append(
                Match(
                    "serving",
                    f"{name}, {clients} clients",
                    Side("gpt_jax.serve", f"{SERVING}:ours", mine),
                    Side(
                        "Hugging Face generate behind FastAPI",
                        f"{SERVING}:hugging_face",
                        {"shape": fixed, **load},
                    ),
                    "tokens/s",
                    goal,
                    repeats=3,
                )
            )
    return matches


ROWS = {"serving": serving}
