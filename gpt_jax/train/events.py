"""What happens between steps: lines, evaluations, samples, checkpoints, the end."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gpt_jax import (
    checks,
    data,
    evaluate,
    files,
    plots,
    processes,
    runs,
    sample,
    sharding,
    tasks,
    words,
)
from gpt_jax.step import TrainState, averaged
from gpt_jax.train.feed import train_batches
from gpt_jax.train.job import (
    Job,
    Result,
    Totals,
    bytes_of,
    due,
    ends_by,
    eval_rows,
    last_step,
    rhythm_of,
    tokens_per_step,
)


def before_the_first(
    job: Job, state: TrainState, totals: Totals, step: int
) -> tuple[dict[str, float], Totals]:
    """Does what is due at the step that a sitting begins at, where it is not done."""
    numbers: dict[str, float] = {}
    rhythm = rhythm_of(job.config, job.task)
    evaluates = step == 0 or rhythm.evaluates(step)
    if evaluates and totals.evaluated < step:  # new, or interrupted just there
        numbers, totals = evaluate_now(job, state, totals, step)
    if step == 0:
        sample_now(job, state, totals, step, due(step, job.config.sample_every))
    if rhythm.end == 0 == step:  # a start, which can be sampled and gone on with
        save(job, state, totals, step, numbers.get("val_loss"))
    return numbers, totals


def spent(job: Job, totals: Totals, seconds: float) -> Totals:
    """Returns the totals after one more step."""
    tokens = totals.tokens + tokens_per_step(job.config, job.task)
    return totals._replace(tokens=tokens, seconds=seconds)


def ended(job: Job, totals: Totals, step: int) -> str:
    """Returns why the run ends after `step`, before its last one, or "" to go on."""
    config = job.config
    if step % job.task.updates:  # a resumed run begins with a new rollout
        return ""
    if job.stop.look(0 < config.max_seconds <= totals.seconds):
        return "signal"
    if job.stop.late:
        return "max_seconds"
    if config.patience and totals.stale >= config.patience:
        return "patience"
    return ""


def log(job: Job, totals: Totals, step: int, pending: list) -> dict[str, float]:
    """Writes the means of the steps since the last line; the loop's only wait.

    Raises:
      FloatingPointError: too many updates in a row were skipped.
    """
    sums, infos = zip(*jax.device_get(pending), strict=True)
    first = step - len(infos) + 1
    for at, (part, said) in enumerate(zip(sums, infos, strict=True), start=first):
        if said.get("spike"):
            loss = part["loss"] / part["weight"]
            job.bar.print(f"step {at}: loss {loss:.4f} is a spike; update skipped")
        elif said["skipped_in_a_row"]:
            job.bar.print(f"step {at}: not finite; update skipped")
    info: dict = {name: float(value) for name, value in infos[-1].items()}
    in_a_row = [int(info["skipped_in_a_row"]) for info in infos]
    info.pop("spike", None)
    del info["skipped_in_a_row"]
    info["skipped"] = int(info["skipped"])
    if (worst := max(in_a_row)) >= job.config.max_skipped:
        raise give_up(job, worst, first + in_a_row.index(worst))
    if info["skipped"] >= step == last_step(job.config, job.task):
        raise give_up(job, worst, first + in_a_row.index(worst))
    finite = [part for part in sums if math.isfinite(part["loss"])]
    numbers = dict(info)
    if finite:
        means = evaluate.means(evaluate.add(finite))
        means.pop("perplexity", None)  # train_loss says the same
        numbers |= {f"train_{name}": value for name, value in means.items()}
    numbers |= job.rate.measure(totals.tokens)
    write(job, totals, step, numbers)
    job.bar.update(step, **numbers)
    return numbers


def write(job: Job, totals: Totals, step: int, numbers: dict[str, float]) -> None:
    """Records numbers; a line that a full disk refuses is written with a later one."""
    spent = {"tokens": totals.tokens, "seconds": totals.seconds}
    if job.config.max_bytes:
        spent["bytes"] = bytes_of(job.task, totals.tokens)
    with save_errors(job):
        job.writer.write(step, **spent, **numbers)


def give_up(job: Job, worst: int, step: int) -> FloatingPointError:
    """Returns why a run cannot go on after `worst` skipped updates; keeps their data.

    `skipped-<step>.npz` in the run folder holds the last batch, the steps and, for each
    of them, the numbers of its examples [steps, batch_size].
    """
    steps = np.arange(step - worst + 1, step + 1)
    size, seed, examples = job.config.batch_size, job.config.seed, job.task.train
    ids = [data.members(len(examples), size, seed, int(s) - 1) for s in steps]
    path = job.workdir / f"skipped-{step}.npz"
    batches = train_batches(job, start=step - 1)
    kept: dict[str, Any] = {**next(batches), "steps": steps, "examples": np.array(ids)}
    batches.close()
    if processes.index() == 0:  # its share of the batch
        with save_errors(job), files.draft(path) as part, part.open("wb") as file:
            np.savez(file, **kept)
    shown = ", ".join(map(str, ids[-1][:8])) + ", ..." * (size > 8)
    spikes = " or spikes" if job.config.spike_window else ""
    return FloatingPointError(
        f"{worst} updates in a row were not finite{spikes}, the last at step {step} "
        f"(batch {step - 1} of seed {seed}, examples {shown}: see {path}); none was "
        "applied: start again with a lower hyper.lr or a longer hyper.warmup_steps in "
        f"another --workdir; --config.init_from={job.workdir} takes the last good "
        "weights"
    )


def weights_of(job: Job, state: TrainState) -> tuple[Any, Any]:
    """Returns (weights, frozen) on the mesh; the moving average where one is kept."""
    params, frozen = job.strategy.view((averaged(state), state.frozen))
    return job.join(params, frozen), frozen


def evaluate_now(
    job: Job, state: TrainState, totals: Totals, step: int
) -> tuple[dict[str, float], Totals]:
    """Evaluates every named set, writes the numbers, and keeps the best loss."""
    weights, frozen = weights_of(job, state)
    numbers: dict[str, float] = {}
    for name, examples in job.task.evals.items():
        job.bar.doing(f"evaluating {name}")
        means = evaluate.evaluate(
            weights,
            frozen,
            eval_batches(job, examples),
            job.hyper,
            compiled=job.eval_fn,
            mesh=job.strategy.mesh,
            interrupted=job.stop.look,
        )
        if means is None:
            return {}, totals
        numbers |= {f"{name}_{key}": value for key, value in means.items()}
    return numbers, record(job, totals, step, numbers)


def record(job: Job, totals: Totals, step: int, numbers: dict[str, float]) -> Totals:
    """Writes and shows the numbers of an evaluation; returns the totals with it."""
    loss = numbers.get("val_loss", math.inf)
    better = loss < totals.best
    totals = totals._replace(
        best=loss if better else totals.best,
        stale=0 if better else totals.stale + 1,
        evaluated=step,
    )
    since = {"evaluated_since": totals.since} if totals.since else {}
    write(job, totals, step, numbers | since)
    job.bar.print(
        f"step {step}: "
        + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
    )
    job.rate.pause()
    return totals


def eval_batches(job: Job, examples) -> Iterator[tasks.Batch]:
    """Returns the batches of one evaluation, as large as one device likes them."""
    devices = job.strategy.mesh.size
    return data.once(
        examples,
        batch_size=eval_rows(job.config, job.task, len(examples), devices),
        at_most=job.config.eval_windows,
    )


def sample_now(
    job: Job, state: TrainState, totals: Totals, step: int, wanted: bool
) -> None:
    """Writes samples to samples.md and shows them, when wanted."""
    if not (wanted and job.config.sample_every) or job.stop:
        return
    prompt = first_prompt(job.task, job.config.sample.prompt)
    ids = job.task.prompt(prompt) if job.task.prompt else None
    weights, _ = weights_of(job, state)
    texts = sample.texts(
        model=job.task.model,
        params=sharding.for_decoding(weights, job.strategy),
        tokenizer=job.task.tokenizer,
        prompts=[ids or prompt],
        count=job.config.sample.count,
        seed=job.config.seed,
        stop=job.task.stop,
        **checks.sample_settings(job.config.sample),
    )
    prompt += "\n" if ids else ""
    if processes.index() == 0:
        whole = [prompt + text.text for text in texts]
        with save_errors(job):
            runs.add_samples(job.workdir, step, whole)
            job.writer.samples(step, whole)
    for text in texts:
        job.bar.print(f"--- sample after step {step}\n{prompt}{text.text}\n---")
    known = job.task.known_words if job.config.sample.words else None
    if known and processes.index() == 0:
        share = words.share([(prompt, text.text) for text in texts], known())
        if share is not None:
            write(job, totals, step, {"sample_words": share})
            job.bar.print(f"{share:.0%} of its words are words of the text")
    job.rate.pause()


def first_prompt(task: tasks.Task, prompt: str) -> str:
    """Returns the prompt of the samples; an empty one may need a character of the text.

    Raises:
      ValueError: the prompt has characters that the tokenizer never saw.
    """
    if task.tokenizer.encode(prompt) or task.tokenizer.eos_id is not None:
        return prompt
    return task.tokenizer.decode([int(task.train[0]["tokens"][0])])


def save(
    job: Job, state: TrainState, totals: Totals, step: int, metric: float | None
) -> None:
    """Starts an asynchronous checkpoint of everything that a resume needs."""
    view = job.strategy.view(state._replace(frozen={}))
    meta = {
        "totals": totals._asdict(),
        "fingerprint": job.task.fingerprint,
        "tokenizer": job.task.tokenizer.sha256,
    }
    if job.frozen:
        meta["frozen"] = job.frozen
    with save_errors(job):
        job.saves.wait()
    with save_errors(job):
        job.saves.save(step, view, metric=metric, meta=meta, since=totals.since)


@contextlib.contextmanager
def save_errors(job: Job) -> Iterator[None]:
    """Lets a failure to write pass, told, where on_save_error is "continue"."""
    try:
        yield
    except OSError as error:
        # One of several cannot decide alone, and a lost process is no full disk.
        if job.config.on_save_error == "stop" or processes.count() > 1:
            raise
        job.bar.print(f"training goes on, though: {error}")


def check_saves(job: Job) -> None:
    """Notices a checkpoint that could not be written."""
    with save_errors(job):
        job.saves.check()


def finish(
    job: Job, totals: Totals, step: int, reason: str, numbers: dict[str, float]
) -> Result:
    """Waits for the last checkpoint, draws the curve, and says how the run ended."""
    cut = job.stop and totals.evaluated < step  # before its last evaluation
    reason = reason or ("signal" if cut else ends_by(job.config, job.task))
    job.saves.wait()
    last = processes.first(job.saves.latest) or 0
    if last < step:  # what was to be passed over may not be the last one
        raise OSError(
            f"the checkpoint of step {step}, the last one, is not in "
            f"{job.saves.folder} (the newest there is {last}); the same command goes "
            "on from that"
        )
    if processes.index() == 0:
        plots.of_run(job.workdir)
    code = job.stop.exit_code if job.stop else 0
    return Result(reason=reason, step=step, numbers=numbers, exit_code=code)


def profiler(job: Job, start: int, end: int, steps: int) -> Callable[[int], None]:
    """Returns what the loop calls after each step to trace `steps` of them."""
    steps = 0 if processes.index() else steps  # the first process speaks for all
    first = max(start, min(start + 5, end - steps))  # past compilation, if it fits
    last = min(first + steps, end)

    def trace(step: int) -> None:
        if first >= last or step not in (first, last):
            return
        try:
            if step == first:
                jax.profiler.start_trace(str(job.workdir / "profile"))
                return
            jax.profiler.stop_trace()
            job.bar.print(f"profile written to {job.workdir / 'profile'}")
        except (OSError, RuntimeError) as error:  # a full disk, or none is running
            job.bar.print(f"training goes on without a profile: {error}")

    return trace
