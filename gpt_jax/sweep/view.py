"""What a sweep shows while it runs: a table on a terminal, else plain lines."""

import time

from gpt_jax import screen
from gpt_jax.sweep.study import ENDED, Study

PLAIN_EVERY_S = 30.0  # the least time between two summary lines in a log file


class View:
    """Shows running trials, how many ended how, the best so far, and the time left."""

    def __init__(self, *, total: int):
        """Args: the number of trials."""
        self._total, self._began = total, time.monotonic()
        self._ended_before: int | None = None  # by an earlier sitting
        self._area = screen.Area(
            screen.story(), transient=False, line_every_s=PLAIN_EVERY_S
        )

    def update(self, study: Study, steps: dict[str, tuple]) -> None:
        """Shows the state; `steps`: of running trials (step, last step, value, s)."""
        if self._ended_before is None:
            self._ended_before = _count(study, *ENDED)
        self._area.show(lambda: self._summary(study), lambda: self._table(study, steps))

    def print(self, text: str) -> None:
        """Prints a line above the table."""
        self._area.print(text)

    def close(self, study: Study) -> None:
        """Leaves the last state on the screen."""
        if self._ended_before is not None:
            self._area.keep(
                lambda: self._summary(study), lambda: self._table(study, {})
            )
        self._area.close()

    def _summary(self, study: Study) -> str:
        ended = _count(study, *ENDED)
        parts = [
            f"{ended}/{screen.count(self._total, 'trial')}",
            f"{_count(study, 'running')} running",
        ]
        for status in ENDED:
            if number := _count(study, status):
                parts.append(f"{number} {status}")
        if (best := study.best()) and best.mean:
            over = f", {best.mean.n} seeds" if best.mean.n > 1 else ""
            parts.append(f"best {best.mean.value:.4f} ({best.name}{over})")
        if left := self._left(ended):
            parts.append(f"{left} left")
        return ", ".join(parts)

    def _left(self, ended: int) -> str:
        """Returns the time left, going by the trials that ended in this sitting."""
        here = ended - (self._ended_before or 0)
        if not here or ended >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / here * (self._total - ended)
        return screen.clock(seconds)

    def _table(self, study: Study, steps: dict[str, tuple]):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        running = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("running", "", "step", "value", "time"):
            right = title in ("step", "value", "time")
            justify = "right" if right else "left"
            running.add_column(title, justify=justify, no_wrap=right)
        for trial in study.trials.values():
            if trial.status != "running":
                continue
            step, end, value, seconds = steps.get(trial.name, (0, 0, None, 0))
            running.add_row(
                trial.name,
                ProgressBar(total=max(end, 1), completed=step, width=20),
                f"{step:,}/{end:,}" if end else "starts",
                "" if value is None else f"{value:.4f}",
                f"{int(seconds) // 60}:{int(seconds) % 60:02}" if end else "",
            )
        ended = _count(study, *ENDED)
        whole = Table.grid()
        whole.add_row(Text(self._summary(study), style="bold"))
        whole.add_row(ProgressBar(total=self._total, completed=ended, width=40))
        if running.row_count:
            whole.add_row(running)
        return whole


def _count(study: Study, *statuses: str) -> int:
    return sum(study.counts[status] for status in statuses)
