"""python run.py "Once upon a time" [tokens]: continues a text, the likeliest way."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer


def main(prompt: str, new: int = 50) -> None:
    """Prints the prompt and `new` tokens after it."""
    here = Path(__file__).parent
    about = json.loads((here / "model.json").read_text("utf-8"))
    with safe_open(here / "model.safetensors", framework="flax") as file:
        weights = [file.get_tensor(name) for name in about["weights"]]
    files = [here / f"{name}.stablehlo" for name in ("prefill", "decode")]
    blobs = [bytearray(file.read_bytes()) for file in files]
    try:
        prefill, decode = (jax.jit(jax.export.deserialize(blob).call) for blob in blobs)
    except Exception as error:  # whatever a reader of another format says
        sys.exit(
            f"jax {jax.__version__} cannot read these programs ({error}). They were "
            f"exported by jax {about['jax']} on {about['date']}; a release reads those "
            "of the six months before it. Install that one, or export the run again"
        )
    tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
    ids = about["opening"] + tokenizer.encode(prompt, add_special_tokens=False).ids
    start, most = len(ids), min(about["context_length"], len(ids) + new)
    tokens, length = np.array([ids], np.int32), np.array([start], np.int32)
    logits, cache = prefill(weights, tokens, length)
    while len(ids) < most and (token := int(logits.argmax())) not in about["ends"]:
        ids.append(token)
        logits, cache = decode(weights, np.array([[token]], np.int32), cache)
    print(prompt + tokenizer.decode(ids[start:], skip_special_tokens=False))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
