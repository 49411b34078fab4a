"""What a run folder holds, who may write to it, and how it is opened.

runs/a/config.json      every key of the config, as last used
runs/a/tokenizer.json   the tokenizer; opens in Hugging Face `tokenizers` too
runs/a/classes.json     what a classifier's classes are called, and how far it reads
runs/a/data.json        the fingerprint of the training data
runs/a/test.json        rows that were kept for a test
runs/a/test_report.json how a classifier did on its test; test_report.png draws it
runs/a/checkpoints/     see checkpoint/; weights that never change in frozen/
runs/a/metrics.jsonl    one JSON object a line; loss.png draws it
runs/a/samples.md       texts written while training
runs/a/report.html      all of that on one page, for a browser
runs/a/sensitivity.json which of its numbers matter, where that was asked
runs/a/machine.json     where and with which versions it was last trained
runs/a/run.lock         the process that trains here, while one does
runs/a/ended.json       why a population ended this run before its last step
runs/a/wave.json        while members train that have not saved yet: how many they are
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from gpt_jax import adapters, files, quantised, stores, tokenizers
from gpt_jax.checkpoint import Checkpoints, Damaged
from gpt_jax.model import GPT, GPTConfig, declared, unstack
from gpt_jax.model import count as parameters
from gpt_jax.runs.config import (
    OF_TEXT,
    RESUMABLE,
    WHERE,
    as_config,
    as_text,
    complete,
    difference,
    filled,
    flat,
    read_config,
    tuples,
)
from gpt_jax.screen import count

__all__ = ["OF_DATA", "RESUMABLE", "WHERE", "Classes", "Run", "add_samples"]
__all__ += ["as_config", "as_text", "check_tokenizer", "complete", "create"]
__all__ += ["create_or_check", "difference", "end", "ended", "filled", "fingerprint_of"]
__all__ += ["flat", "go_on", "keep_test", "lock", "model_config", "open"]
__all__ += ["read_classes", "read_config", "tuples"]

log = logging.getLogger(__name__)

LOCK = "run.lock"
# What a run says of its data, where it has such data.
OF_DATA = ("classes.json", "test.json", "test_report.json", "test_report.png")


class Classes(NamedTuple):
    """What a classifier tells apart.

    Attributes:
      labels: the names of the classes, in the order of the logits.
      length: tokens of a text that it reads at most.
    """

    labels: tuple[str, ...]
    length: int


class Run(NamedTuple):
    """An opened run.

    Attributes:
      folder: where it is.
      config: every key, as the run last used it.
      tokenizer: a `tokenizers.Tokenizer`.
      model: the GPT, with its layers one by one (scan_layers off), as decoding needs.
      params: the weights to apply it with, on this process's first device.
      step: the step that they are from.
      classes: of a classifier; None for a language model.
    """

    folder: Path
    config: ConfigDict
    tokenizer: tokenizers.Tokenizer
    model: GPT
    params: dict
    step: int
    classes: "Classes | None" = None

    def __repr__(self) -> str:
        """Shows the run in five lines: a notebook would show every number of it."""
        cfg, task = self.model.cfg, self.config.task.get("name", "lm")
        if self.classes:
            task += f", {count(len(self.classes.labels), 'class', 'classes')}"
        lines = (
            f"run        {self.folder}, step {self.step}",
            f"model      {parameters(cfg):,} parameters, {cfg.n_layers} layers of "
            f"width {cfg.d_model}, context {cfg.context_length:,}",
            f"tokenizer  {self.tokenizer.kind}, {self.tokenizer.vocab_size:,} tokens",
            f"task       {task}",
            f"fields     {', '.join(self._fields)}",
        )
        return "\n".join(lines)


def open(
    folder: str | Path,
    *,
    step: int | str | None = None,
    weights: str = "",
    merge: bool = True,
    bits: int = 0,
    cache_dtype: str = "",
) -> Run:
    """Returns a run ready for use, whatever devices it was trained on.

    Args:
      folder: a run folder, here or in a store (gs://bucket/runs/a).
      step: a step; "best", the lowest validation loss; "latest", the newest sound
        checkpoint; or None, the best where there is one and else the latest.
      weights: "params", or "ema" for their moving average; "" = the average where the
        run keeps one (optimizer.ema), as its evaluations did; "base", those that the
        run started from, as it holds them (adapter.base_dtype), where it does (LoRA,
        or a reference).
      merge: whether what an adapter has learnt is added into the kernels, or stays
        beside them, which are then those of the base.
      bits: of the numbers that every token reads, 8 or 4, to write texts with; 0 = as
        they are.
      cache_dtype: of the keys and values that are kept then, "bfloat16" or "int8"; "" =
        as the config says.

    Raises:
      ValueError: this is not a run, or the checkpoint is damaged or lacks `weights`.
      FileNotFoundError: there is no such checkpoint.
    """
    folder = stores.fetched(folder)
    config = read_config(folder)
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    classes = read_classes(folder)
    cfg = model_config(config, tokenizer, classes)
    weights = weights or ("ema" if config.optimizer.ema else "params")
    store = Checkpoints(folder / "checkpoints", keep=None)
    started = weights == "base"
    weights = "params" if started else weights
    tree, meta, found = _load(store, step, weights)
    check_tokenizer(folder, tokenizer, meta)
    frozen = store.load_frozen(meta["frozen"]) if meta.get("frozen") else {}
    params = adapters.make({}, **config.adapter).join(tree[weights], frozen)
    if merge or started:
        params = adapters.merge(params, cfg.param_dtype)
    if started:
        params = _base(frozen, params, folder)
    cfg = replace(cfg, cache_dtype=cache_dtype or cfg.cache_dtype)
    model = GPT(_unscanned(cfg))
    params = unstack(params, cfg)
    if bits:  # what is declared is traced for it
        params = quantised.weights(params, declared(model.cfg), bits=bits)
    return Run(folder, config, tokenizer, model, params, found, classes)


def model_config(
    config: ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    classes: Classes | None = None,
) -> GPTConfig:
    """Returns the model of a config.

    Where vocab_size and n_classes are 0 they are those of the tokenizer, the classes.
    """
    fields = config.model.to_dict()
    if classes:
        fields["n_classes"] = fields["n_classes"] or len(classes.labels)
    fields["vocab_size"] = fields["vocab_size"] or tokenizer.vocab_size
    if fields["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(
            f"the model has {fields['vocab_size']} tokens but the tokenizer "
            f"{tokenizer.vocab_size}: they do not belong together"
        )
    return GPTConfig(**fields)


def create(
    workdir: str | Path,
    config: ConfigDict,
    tokenizer,
    classes: Classes | None = None,
) -> None:
    """Writes what a run is made of; last config.json, which makes the folder a run.

    What an earlier run, which got nowhere, said of its data goes.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in OF_DATA:
        (workdir / name).unlink(missing_ok=True)
    tokenizer.save(workdir / "tokenizer.json")
    if classes:
        files.write(workdir / "classes.json", json.dumps(classes._asdict()))
    files.write(workdir / "config.json", as_text(config))


def create_or_check(
    workdir: str | Path,
    config: ConfigDict,
    tokenizer,
    fingerprint: str,
    classes: Classes | None = None,
) -> bool:
    """Makes a new run folder, or checks that this config may go on in an old one.

    A folder whose run ended before its first checkpoint holds nothing to protect: it
    is made anew. Of a run that is there nothing changes; `go_on` does that.

    Returns:
      True when the run was there.

    Raises:
      ValueError: the config (beyond RESUMABLE), tokenizer or training data changed, or
        the folder has checkpoints but no config.
    """
    workdir = Path(workdir)
    if jax.process_index():
        return (workdir / "config.json").is_file()  # the first process checks
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; --workdir must name a folder")
    trained = any((workdir / "checkpoints").glob("*"))  # damaged ones count as well
    if not trained or not (workdir / "config.json").is_file():
        if trained:
            raise ValueError(
                f"{workdir} has checkpoints but no config.json: put that file back or "
                f"use another --workdir"
            )
        files.write(workdir / "data.json", json.dumps({"fingerprint": fingerprint}))
        create(workdir, config, tokenizer, classes)
        return False
    _refuse_changes(workdir, config, tokenizer, fingerprint)
    return True


def go_on(workdir: str | Path, config: ConfigDict, fingerprint: str) -> None:
    """Writes down what a run that was there goes on with."""
    files.write(Path(workdir) / "data.json", json.dumps({"fingerprint": fingerprint}))
    files.write(Path(workdir) / "config.json", as_text(config))


def fingerprint_of(workdir: str | Path) -> str | None:
    """Returns the fingerprint of a run's data; None where the run has none noted."""
    path = Path(workdir) / "data.json"
    return _noted(path, "fingerprint")[0] if path.is_file() else None


def read_classes(folder: str | Path) -> Classes | None:
    """Returns the classes of a classifier's run; None where a run has none."""
    path = Path(folder) / "classes.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Classes(tuple(map(str, found["labels"])), int(found["length"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not hold the classes of a run: {error}"
        ) from error


def add_samples(workdir: str | Path, step: int, texts: Sequence[str]) -> None:
    """Adds the texts of a step to samples.md; later steps, undone by a resume, go."""
    path = Path(workdir) / "samples.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    # Four backticks: a text may hold three of its own.
    sections = re.findall(r"^## Step (\d+)\n(.*?)^<!-- end -->\n", old, re.M | re.S)
    kept = [f"## Step {n}\n{body}" for n, body in sections if int(n) < step]
    blocks = "".join(f"\n````text\n{text}\n````\n" for text in texts)
    added = [*kept, f"## Step {step}\n{blocks}"]
    files.write(path, "".join(f"{section}<!-- end -->\n" for section in added))


def keep_test(workdir: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows that a run may not learn from to test.json; none, no file."""
    if rows and not jax.process_index():
        text = json.dumps(list(rows), ensure_ascii=False, indent=1)
        files.write(Path(workdir) / "test.json", text + "\n")


def end(workdir: str | Path, reason: str, step: int) -> None:
    """Notes that a run has ended for good after `step`, before its last step."""
    note = json.dumps({"reason": reason, "step": step})
    files.write(Path(workdir) / "ended.json", note)


def ended(workdir: str | Path) -> tuple[str, int] | None:
    """Returns (reason, step) as `end` noted them; None if the run has gone on since."""
    path = Path(workdir) / "ended.json"
    if not path.is_file():
        return None
    reason, step = _noted(path, "reason", "step")
    newest = Checkpoints(Path(workdir) / "checkpoints", keep=None).latest() or 0
    return (reason, step) if newest <= step else None


def _noted(path: Path, *keys: str) -> list[Any]:
    """Returns values of the JSON object in a file of the run folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [found[key] for key in keys]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put it back from a copy of the run"
        ) from error


@contextlib.contextmanager
def lock(
    workdir: str | Path, flag: str = "--workdir", *, patience_s: float = 0.0
) -> Iterator[None]:
    """Holds the right to write to a run folder; one process at a time has it.

    Args:
      workdir: the folder.
      flag: what its user named it with.
      patience_s: see `files.lock`.

    Raises:
      ValueError: another process holds it; the sentence has its pid.
    """
    if jax.process_index():  # the first process of a group locks for all
        yield
        return
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; {flag} must name a folder")
    if jax.process_count() > 1 and (address := stores.address_of(workdir)):
        raise ValueError(
            f"{address} is worked on in a folder of one machine, and several processes "
            f"need one that all see: mount the store, and give {flag} that"
        )
    path = workdir / LOCK
    with contextlib.ExitStack() as stack:
        try:
            before = stack.enter_context(files.lock(path, patience_s))
        except files.Held as held:
            raise ValueError(
                f"{workdir} is in use by process {held.pid} on {held.host}; wait for "
                f"it, stop it, or use another {flag}"
            ) from None
        stack.enter_context(stores.claim(workdir))
        if before:
            log.warning("took over %s from process %s on %s, which is gone",
                        path, before["pid"], before["host"])  # fmt: skip
        yield


def _load(store: Checkpoints, step: int | str | None, weights: str) -> tuple:
    if isinstance(step, str) and step.isdecimal():
        step = int(step)
    if not (step is None or isinstance(step, int) or step in ("best", "latest")):
        raise ValueError(f"step {step!r} is not a number, best or latest")
    best = store.best() if step in (None, "best") else None
    if step == "best" and best is None:
        raise ValueError(
            f"no checkpoint in {store.folder} has a validation loss; use latest"
        )
    chosen = step if isinstance(step, int) else best
    try:
        return store.load(only=[weights], step=chosen)
    except Damaged as error:
        if step is not None:
            raise
        log.warning("the best checkpoint is damaged, using the newest: %s", error)
        return store.load(only=[weights], step=None)


def _base(frozen: dict, params: dict, folder: Path) -> dict:
    """Returns the weights that a run started from; `params` says what they must be."""
    dtype = jax.tree.leaves(params)[0].dtype
    found = adapters.merge(adapters.reference(frozen), dtype)
    if jax.tree.structure(found) != jax.tree.structure(params):
        raise ValueError(
            f"{folder} does not hold the weights that it started from: only runs with "
            "adapter lora, or with a reference (task dpo, grpo), do"
        )
    return found


def _unscanned(cfg: GPTConfig) -> GPTConfig:
    fields = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    return GPTConfig(**{**fields, "scan_layers": False})


def check_tokenizer(folder: str | Path, tokenizer, meta: Mapping[str, Any]) -> None:
    """Refuses a tokenizer that is not the one of a checkpoint, as its `meta` has it.

    Raises:
      ValueError: the ids of one mean something else in the other.
    """
    stated = meta.get("tokenizer", tokenizer.sha256)  # older checkpoints do not say
    if stated != tokenizer.sha256:
        raise ValueError(
            f"{Path(folder) / 'tokenizer.json'} is not the tokenizer that the weights "
            f"of this run learnt: its sha256 is {tokenizer.sha256[:12]}..., theirs "
            f"{stated[:12]}...; put that file back"
        )


def _refuse_changes(workdir, config: ConfigDict, tokenizer, fingerprint: str) -> None:
    may = (*RESUMABLE, OF_TEXT) if config.allow_data_change else RESUMABLE
    lines = [
        line
        for line in difference(read_config(workdir), config)
        if not any(re.fullmatch(keys, line.split(":")[0]) for keys in may)
    ]
    if lines:
        raise ValueError(
            f"{workdir} was started with another config:\n  "
            + "\n  ".join(lines)
            + "\nset these keys back to go on, or use another --workdir"
        )
    old = tokenizers.load(workdir / "tokenizer.json")
    if old.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{workdir} was started with another tokenizer ({old.kind}, "
            f"{old.vocab_size} tokens) than this one ({tokenizer.kind}, "
            f"{tokenizer.vocab_size} tokens); use another --workdir"
        )
    stated = fingerprint_of(workdir)
    if stated == fingerprint:
        return
    found = f"its fingerprint was {stated} and is {fingerprint} now"
    if not config.allow_data_change:
        raise ValueError(
            f"{workdir} was started on other training data: {found}; put the data "
            "back, use another --workdir, or go on with --allow-data-change"
        )
    log.warning("%s goes on with other training data: %s", workdir, found)
