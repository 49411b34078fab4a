"""What a server tells Prometheus.

Rates are made there, as usual: rate(gpt_jax_generated_tokens_total[1m]) is tokens a
second. Times to the first token and whole answers are histograms, by model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from gpt_jax.serve import fields
from gpt_jax.serve.engine import Engine

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
PATHS = {  # any other path is counted as one, or strangers could make many
    *fields.PATHS.values(),
    *("/v1/models", "/metrics", "/health", "/healthz", "/readyz", "/version", "/"),
}


class Numbers:
    """The numbers of one server."""

    def __init__(self, engines: Mapping[str, Engine]):
        """Takes the engines by name, whose own counts are read when asked for."""
        import prometheus_client as prometheus

        self._registry = prometheus.CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._answers = prometheus.Counter(
            "gpt_jax_answers", "Answers.", ["path", "status"], **options
        )
        options["buckets"] = SECONDS
        self._first = prometheus.Histogram(
            "gpt_jax_time_to_first_token_seconds",
            "From a request to the first token of its answer.",
            ["model"],
            **options,
        )
        self._done = prometheus.Histogram(
            "gpt_jax_request_seconds",
            "From a request to its end.",
            ["model"],
            **options,
        )
        self._engines = engines
        self._registry.register(self)  # type: ignore[arg-type]  # has collect

    def answered(self, path: str, status: int) -> None:
        """Counts an answer."""
        shown = path if path in PATHS else "other"
        self._answers.labels(shown, str(status)).inc()

    def first(self, model: str, seconds: float) -> None:
        """Notes how long a first token took."""
        self._first.labels(model).observe(seconds)

    def done(self, model: str, seconds: float) -> None:
        """Notes how long an answer took."""
        self._done.labels(model).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Returns all numbers in Prometheus' text format, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator:
        """Yields the engines' counts; Prometheus calls it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts = {
            "generated_tokens": ("Tokens chosen.", lambda e: e.tokens),
            "prompt_tokens": ("Prompt tokens run.", lambda e: e.prompted),
            "cached_tokens": (
                "Prompt tokens kept of earlier ones.",
                lambda e: e.cached,
            ),
            "decode_steps": ("Decode steps.", lambda e: e.steps),
        }
        gauges = {
            "running": ("Requests that have a slot.", lambda e: e.running),
            "waiting": ("Requests that wait for one.", lambda e: e.waiting),
            "slots": ("Requests that can run at once.", lambda e: e.most),
        }
        for family, table in (
            (CounterMetricFamily, counts),
            (GaugeMetricFamily, gauges),
        ):
            for name, (what, value) in table.items():
                made = family(f"gpt_jax_{name}", what, labels=["model"])
                for model, engine in self._engines.items():
                    made.add_metric([model], value(engine))
                yield made
