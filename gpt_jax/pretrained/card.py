"""The model card of an exported run: README.md, as Hugging Face shows it."""

import json
from pathlib import Path
from typing import Any

from gpt_jax import __version__, metrics
from gpt_jax.model import GPTConfig

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt_jax]
---
# {name}

{parameters:,} parameters: {layers} layers of width {width}, a context of {context:,}
tokens, a vocabulary of {vocabulary:,}. Exported from a run of gpt_jax {version}.

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = tokenizer("{prompt}", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

Before others get it, say here what it is for, what it must not be used for, and under
which licence: the texts that it learnt from decide that too.
"""


def write(
    folder: Path, run: Path, cfg: GPTConfig, *, name: str, parameters: int
) -> None:
    """Writes README.md of what a run is: its shape, its text, its best numbers.

    Args:
      folder: of the export.
      run: the run folder; an imported run has no record, and no text.
      cfg: the model.
      name: of the folder, in the end.
      parameters: how many the model has.
    """
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    rows = metrics.read(run) if (run / metrics.FILE).is_file() else []
    lines = [f"* {key}: {value}" for key, value in _facts(config, rows)]
    text = CARD.format(
        name=name,
        parameters=parameters,
        layers=cfg.n_layers,
        width=cfg.d_model,
        context=cfg.context_length,
        vocabulary=cfg.vocab_size,
        version=__version__,
        facts="\n".join(lines),
        prompt=config["sample"]["prompt"].strip() or "The",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _facts(config: dict[str, Any], rows: list[dict]) -> list[tuple[str, str]]:
    trained = [row for row in rows if row["step"] and row.get("tokens")]
    measured = [row for row in rows if row.get("val_loss") is not None]
    facts = []
    if config["data"]["source"]:
        facts.append(("text", f"`{config['data']['source']}`"))
    if config["init_from"]:
        facts.append(("begun from", f"`{config['init_from']}`"))
    if trained:
        last = max(trained, key=lambda row: row["step"])
        told = f"{last['step']:,} steps, {last['tokens']:,} tokens"
        facts.append(("training", f"task `{config['task']['name']}`, {told}"))
    if measured:
        best = min(measured, key=lambda row: row["val_loss"])
        told = f"loss {best['val_loss']:.4f} nats at step {best['step']:,}"
        if best.get("val_bpb") is not None:
            told += f", {best['val_bpb']:.4f} bits per byte"
        facts.append(("validation", told))
    return facts
