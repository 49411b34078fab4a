"""look.html: one file, nothing fetched from elsewhere.

Its numbers stand in it as base64 of little-endian arrays; look.js draws them.
"""

import base64
import hashlib
import html
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gpt_jax.microscope import Frame, Look

MOST_BYTES = 5_000_000  # of the file: a browser opens that at once, and so does mail
FOLDER = resources.files("gpt_jax.microscope") / "page"


def make(found: "Look") -> tuple[str, list[int]]:
    """Returns the page, and the steps whose numbers it holds.

    Where not all checkpoints fit into MOST_BYTES it holds the one that was asked for
    and as many of the others as fit, evenly spread, and says so.

    Raises:
      ValueError: not even that one fits.
    """
    frames = {frame.step: json.dumps(_frame(frame)) for frame in found.frames}
    rest = _page(found, [], "").encode()
    room = MOST_BYTES - len(rest)
    if len(frames[found.opened]) > room:
        T = len(found.row.tokens_T)
        raise ValueError(
            f"what there is to see of {T} tokens takes "
            f"{(len(frames[found.opened]) + len(rest)) / 1e6:.0f} MB, more than the "
            f"{MOST_BYTES / 1e6:.0f} MB of a page: shorten the prompt"
        )
    steps = _fitting({step: len(text) for step, text in frames.items()}, found, room)
    return _page(found, steps, ",".join(frames[step] for step in steps)), steps


def hashes() -> dict[str, str]:
    """Returns what a Content-Security-Policy calls the page's script and style."""
    found = {}
    for kind, file in (("script", "look.js"), ("style", "look.css")):
        text = (FOLDER / file).read_text(encoding="utf-8")
        text = f"\n{text}\n"  # as look.html has it
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        found[kind] = f"'sha256-{digest}'"
    return found


def _fitting(sizes: dict[int, int], found: "Look", room: int) -> list[int]:
    """Returns as many steps as fit, evenly spread, with the one that was asked for."""
    steps = sorted(sizes)
    for count in range(len(steps), 0, -1):
        places = np.linspace(0, len(steps) - 1, count).round().astype(int)
        chosen = {steps[place] for place in places}
        if found.opened not in chosen:
            chosen -= {min(chosen, key=lambda step: abs(step - found.opened))}
            chosen |= {found.opened}
        if sum(sizes[step] + 1 for step in chosen) <= room:
            return sorted(chosen)
    raise AssertionError("one fits")


def _page(found: "Look", steps: list[int], frames: str) -> str:
    row, swap = found.row, found.swap
    data: dict[str, Any] = {
        "name": found.name,
        "tokens": row.tokens_T.tolist(),
        "segments": row.segments_T.tolist(),
        "texts": {str(i): text for i, text in found.texts.items()},
        "windows": found.windows,
        "opened": found.opened,
        "steps": steps,
        "facts": found.facts,
        "history": [
            {
                "step": frame.step,
                "induction": _packed(frame.induction_LH),
                "repeat": frame.repeat_losses,
                "loss": _mean_loss(frame, row),
            }
            for frame in found.frames
        ],
    }
    if swap:
        data["swap"] = {
            **{"here": swap.here, "there": swap.there},
            **{"before": swap.before, "whole": swap.whole},
            **{"other": swap.other_T.tolist(), "effect": _packed(swap.effect_LT)},
        }
    text = json.dumps(data, ensure_ascii=False)
    parts = {
        "TITLE": html.escape(found.name),
        "STYLE": (FOLDER / "look.css").read_text(encoding="utf-8"),
        "SCRIPT": (FOLDER / "look.js").read_text(encoding="utf-8"),
        # Within a script element a text may hold anything but its end.
        "DATA": text.replace("</", "<\\/").replace("<!--", "<\\u0021--"),
        "FRAMES": frames,
    }
    page = (FOLDER / "look.html").read_text(encoding="utf-8")
    before, *pieces = page.split("@@")
    for name, behind in zip(pieces[::2], pieces[1::2], strict=True):
        before += parts[name] + behind
    return before


def _mean_loss(frame: "Frame", row) -> float | None:
    """Returns the mean loss of the tokens that have one before them, in nats."""
    inside_T = row.segments_T[1:] == row.segments_T[:-1]
    chance_T = frame.lens[-1].chance_T[:-1][inside_T]
    if not len(chance_T):
        return None
    return float(-np.log(np.maximum(chance_T, 1e-30)).mean())


def _frame(frame: "Frame") -> dict[str, Any]:
    T = frame.weight_LHTS.shape[-1]
    past = np.tril_indices(T)  # no token sees a later one
    weight_LHN = frame.weight_LHTS[:, :, past[0], past[1]]
    parts = frame.parts
    whole = (parts.embedding_T, parts.constant_T, parts.softcap_T, parts.logit_T)
    lens = frame.lens
    return {
        "step": frame.step,
        "weights": _packed(np.round(255 * weight_LHN), "u1"),
        "likeliest": _packed(np.stack([one.likeliest_TN for one in lens]), "<i4"),
        "chances": _packed(np.stack([one.chance_TN for one in lens])),
        "rank": _packed(np.stack([one.rank_T for one in lens]), "<i4"),
        "chance": _packed(np.stack([one.chance_T for one in lens])),
        "norms": [
            _packed(x_LT)
            for x_LT in (frame.norm_LT, frame.attn_norm_LT, frame.mlp_norm_LT)
        ],
        "taken": _packed(frame.taken_TC, "<i4"),
        "whole": _packed(np.stack(whole, -1)),
        "heads": _packed(parts.head_TLH),
        "shifts": _packed(parts.shift_TL),
        "mlps": _packed(parts.mlp_TL),
    }


def _packed(array, kind: str = "<f4") -> dict[str, Any]:
    """Returns an array as JSON: its shape, and its bytes in base64."""
    array = np.ascontiguousarray(array).astype(kind)
    data = base64.b64encode(array.tobytes()).decode()
    return {"kind": kind[-2:], "shape": array.shape, "data": data}
