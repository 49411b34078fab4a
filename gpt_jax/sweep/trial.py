"""What the process of one trial does: train, report, and write down how it ended."""

import contextlib
import json
import math
import runpy
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_jax import metrics, model, runs, tokenizers, train
from gpt_jax.criterion import Criterion
from gpt_jax.sweep import record
from gpt_jax.sweep import storage as storages


def run(order: dict[str, Any]) -> int:
    """Trains a trial and writes outcome.json, unless it was stopped by a signal.

    Args:
      order: "folder", "config" (every key), "criterion"; "after": the "names" of what
        is measured afterwards, and the sweep "file" that says how; and for a pruned
        sweep "storage", "study", "id" (of the trial in it), "pruner".

    Returns:
      The exit code: 0 whenever there is an outcome, whatever it is.
    """
    folder = Path(order["folder"])
    config = runs.as_config(order["config"])
    (folder / record.OUTCOME).unlink(missing_ok=True)
    try:
        # The process that trained here before may still be saving.
        with runs.lock(folder, patience_s=config.grace_s):
            pass
        result = train.train(config, folder, report=reporter(order))
    except FloatingPointError as error:
        return _end(order, status="diverged", reason=_sentence(error))
    except ValueError as error:  # the same again would end the same
        return _end(order, status="failed", reason=_sentence(error), final=True)
    except Exception as error:  # the edge of a process: the log has the traceback
        traceback.print_exc()
        return _end(order, status="failed", reason=_sentence(error))
    if result.reason == "signal":
        return result.exit_code
    ended = how(result, order["criterion"][0])
    if ended["status"] == "done" and order["after"]["names"]:
        functions = runpy.run_path(order["after"]["file"])["after"]
        ended |= measured(
            folder, {name: functions[name] for name in order["after"]["names"]}
        )
    return _end(order, **ended)


def measured(
    folder: Path, functions: Mapping[str, Callable[[Path], float]]
) -> dict[str, Any]:
    """Measures a run that is done, and writes that into its record.

    Returns:
      "after": what was found; or how the trial failed.
    """
    found: dict[str, float] = {}
    for name, measure in functions.items():
        try:
            found[name] = float(measure(folder))
        except Exception as error:  # whatever a function of the user raises
            traceback.print_exc()
            reason = f"it is trained, but {name} was not measured: {_sentence(error)}"
            return {"status": "failed", "reason": reason, "final": True}
    last = metrics.read(folder)[-1]
    spent = {key: last[key] for key in ("tokens", "seconds") if key in last}
    config = runs.read_config(folder)
    writer = metrics.Writer(
        folder,
        tensorboard=config.tensorboard,
        wandb=config.wandb,
        config=config.to_dict(),
        resume_step=max(last["step"], 1),  # nothing of it is dropped
    )
    with contextlib.closing(writer):
        writer.write(last["step"], **spent, **found)
    return {"after": found}


def how(result: train.Result, metric: str) -> dict[str, str]:
    """Returns the status and the reason of a run that `train` ended."""
    if result.reason == "pruned":
        reason = f"pruned after step {result.step}"
        return {"status": "pruned", "reason": reason}
    if result.reason == "diverged":
        reason = f"{metric} was not finite at step {result.step}"
        return {"status": "diverged", "reason": reason}
    return {"status": "done", "reason": result.reason}


def outcome(
    folder: Path, criterion: Criterion, *, status: str, reason: str, **more: Any
) -> dict:
    """Returns how a trial ended, with what its record says of the metric."""
    found = record.measure(folder, criterion)
    if status == "done" and found["value"] is None:
        names = ", ".join(found["names"]) or "nothing"
        status = "failed"
        more |= {"no_metric": True, "final": True}
        reason = (
            f"the metric {criterion.metric!r} never appeared; the record has {names}"
        )
    return {"status": status, "reason": reason, **found, **size(folder), **more}


def size(folder: Path) -> dict[str, float]:
    """Returns what a run's numbers of tokens mean, where it became a run.

    Returns:
      "parameters"; "flops_per_token" of training; "bytes_per_token" of the validation
      text, where its loss is per token.
    """
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return {}
    config, classes = runs.read_config(folder), runs.read_classes(folder)
    length = config.data.seq_len or config.model.context_length
    what = (json.dumps(config.model.to_dict()), classes, length)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    if (key := (*what, text)) not in _sizes:  # the same for most trials of a sweep
        tokenizer = tokenizers.load(folder / "tokenizer.json")
        cfg = runs.model_config(config, tokenizer, classes)
        parameters = model.count(cfg)
        flops = metrics.flops_per_token(
            parameters,
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            head_dim=cfg.head_dim,
            seq_len=length,
        )
        _sizes[key] = {"parameters": parameters, "flops_per_token": flops}
    rows = metrics.read(folder) if (folder / metrics.FILE).is_file() else []
    for row in rows:
        if row.get("val_loss") and row.get("val_bpb"):
            bits = row["val_loss"] / math.log(2)
            return {**_sizes[key], "bytes_per_token": bits / row["val_bpb"]}
    return dict(_sizes[key])


_sizes: dict[tuple, dict[str, float]] = {}


def line(name: str, metric: str, outcome: dict) -> str:
    """Returns the line that tells of a trial's end."""
    told = outcome["status"] in ("done", "pruned") and outcome["value"] is not None
    said = f"{metric} {outcome['value']:.4f}" if told else outcome["reason"]
    return f"{outcome['status']:9s} {name}: {said}"


def reporter(order: dict[str, Any]) -> Callable[[int, dict[str, float]], str]:
    """Returns what `train` calls after each evaluation; it ends hopeless trials."""
    metric = order["criterion"][0]
    judge = _pruner(order) if order.get("pruner") else lambda reached, value: ""
    by = (order.get("pruner") or {}).get("by", "steps")

    def report(step: int, numbers: dict[str, float]) -> str:
        value = numbers.get(metric)
        if value is None or not step:
            return ""
        reached = numbers["tokens"] if by == "tokens" else step
        return judge(int(reached), value) if math.isfinite(value) else "diverged"

    return report


def _pruner(order: dict[str, Any]) -> Callable[[int, float], str]:
    import optuna

    storage = storages.open_storage(order["storage"])
    pruner = storages.make_pruner(order["pruner"], order["config"]["steps"])
    # The sampler is not used: a trial's values are in the storage.
    sampler = optuna.samplers.RandomSampler()
    opened = optuna.load_study(
        study_name=order["study"], storage=storage, sampler=sampler, pruner=pruner
    )
    trial = optuna.trial.Trial(opened, order["id"])

    last = order["pruner"].get("last") or math.inf

    def judge(reached: int, value: float) -> str:
        trial.report(value, reached)
        return "pruned" if reached <= last and trial.should_prune() else ""

    return judge


def _end(order: dict[str, Any], **ended: Any) -> int:
    folder = Path(order["folder"])
    found = outcome(folder, Criterion(*order["criterion"]), **ended)
    record.write(folder / record.OUTCOME, found)
    print(f"{found['status']}: {found['reason']}", flush=True)
    return 0


def _sentence(error: BaseException) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
