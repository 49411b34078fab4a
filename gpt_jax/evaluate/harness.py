"""Runs on EleutherAI's lm-evaluation-harness (the package lm-eval; torch not needed).

import lm_eval
from gpt_jax.evaluate import harness

lm = harness.model("runs/a")
lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])
"""

from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import commands, runs, sample, sampling, screen
from gpt_jax.evaluate import likelihood

MAX_NEW = 256  # tokens, where a task does not say: the harness's own choice


def model(folder: str | Path, *, step=None, weights: str = "", seed: int = 0) -> Any:
    """Returns the model of a run as an `lm_eval.api.model.TemplateLM`.

    Args:
      folder: a run folder.
      step: see `runs.open`.
      weights: see `runs.open`.
      seed: of tasks that sample.

    Raises:
      ValueError: lm-eval is not installed; what `runs.open` raises; or the tokenizer
        has no token that a text begins after, which the harness needs.
    """
    return adapt(runs.open(folder, step=step, weights=weights), seed=seed)


def evaluate(lm: Any, tasks: list[str], *, include: str, limit: int) -> dict[str, Any]:
    """Returns the results of tasks by name, as the harness tells them.

    Args:
      lm: see `model`.
      tasks: names that the harness knows.
      include: a folder of further tasks (YAML), or "".
      limit: at most so many examples of a task; 0 = all.

    Raises:
      ValueError: lm-eval is not installed, or knows no such task.
    """
    _installed()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"the harness knows no task {', '.join(unknown)}; a task of your own is a "
            "YAML file in the folder that --lm_eval_tasks names"
        )
    found = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit or None,
        bootstrap_iters=1000,
        log_samples=False,
    )
    assert found is not None  # only a process other than the first gets none
    return found["results"]


def adapt(run: runs.Run, *, seed: int) -> Any:
    """Returns an opened run as an `lm_eval.api.model.TemplateLM`; see `model`."""
    _installed()
    from lm_eval.api.model import TemplateLM

    first = likelihood.beginning(run.tokenizer)
    if first is None:
        raise ValueError(
            "the harness predicts a text's first token too, from a token that texts "
            f"begin after; the {run.tokenizer.kind} tokenizer of {run.folder} has none"
        )
    scorer = likelihood.scorer(run.model, run.params)
    context = run.model.cfg.context_length

    class Adapter(TemplateLM):
        """A run as the harness sees it."""

        tokenizer_name = run.tokenizer.sha256[:16]

        @property
        def eot_token_id(self) -> int:
            return first

        @property
        def max_length(self) -> int:
            return context

        def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
            del kwargs
            opening = run.tokenizer.opening if add_special_tokens is not False else []
            return [*opening, *run.tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests, **kwargs) -> list:
            del kwargs
            spans = [
                likelihood.fit(before, after, context) for _, before, after in requests
            ]
            with screen.counted("log-likelihoods", len(spans)) as show:
                return [tuple(s) for s in likelihood.scores(scorer, spans, show)]

        def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
            texts = [[first, *run.tokenizer.encode(r.args[0])] for r in requests]
            parts = [
                list(likelihood.windows(np.array(text), length=context, stride=context))
                if len(text) > 1
                else []
                for text in texts
            ]
            spans = [span for part in parts for span in part]
            with screen.counted("windows of text", len(spans)) as show:
                found = likelihood.scores(scorer, spans, show)
                return [sum(next(found).logp for _ in part) for part in parts]

        def generate_until(self, requests, disable_tqdm=False) -> list[str]:
            with screen.counted("texts", len(requests)) as show:
                return [_text(run, r.args, seed, show) for r in requests]

    return Adapter()


def _text(run: runs.Run, request: tuple, seed: int, show) -> str:
    """Returns what follows a prompt; a prompt that is too long loses its beginning."""
    prompt, options = request
    most = int(options.get("max_gen_toks", MAX_NEW))
    sampled = bool(options.get("do_sample", False))
    room = run.model.cfg.context_length - most
    if room < 1:
        raise ValueError(
            f"a task wants {most} new tokens but the model's context is "
            f"{run.model.cfg.context_length}; give the task a smaller max_gen_toks"
        )
    ids = [*run.tokenizer.opening, *run.tokenizer.encode(prompt)]
    until = options.get("until") or []
    chosen = {"temperature": 0.0}
    for name, setting in sampling.SETTINGS.items():
        chosen[name] = setting.kind(options.get(name, chosen.get(name, setting.off)))
    (done,) = sample.texts(
        model=run.model,
        params=run.params,
        tokenizer=run.tokenizer,
        prompts=[ids[-room:]],
        count=1,
        seed=seed,
        stop=[until] if isinstance(until, str) else [text for text in until if text],
        **sampling.settings(most, **(chosen if sampled else {"temperature": 0.0})),
    )
    show(1)
    return done.text


def _installed() -> None:
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(
            "the EleutherAI harness needs the package lm-eval, which is not "
            "installed: pip install "
            f"{'lm-eval' if commands.INSTALLED else '-r requirements-lm-eval.txt'}"
        ) from error
    del lm_eval
