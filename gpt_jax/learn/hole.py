"""A hole: a function whose body the reader writes, and how what they wrote is judged.

The judge compares with the real function: values, shapes, gradients, under jit and
vmap. Where they differ it tries the usual mistakes, which are functions as well: the
one that computes what the reader's computes is the one that they made.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

IMPORTS = "import jax\nimport jax.numpy as jnp\nimport numpy as np"
CLOSE = 1e-4  # relative, and of the largest number: rounding differs, ideas do not


class Mistake(NamedTuple):
    """A usual mistake: what it is, in a sentence, and a function that makes it."""

    told: str
    made: Callable


class Verdict(NamedTuple):
    """What became of a check: whether it is right, and a line for each thing said."""

    right: bool
    lines: list[str]


class Hole:
    """A function of the package, to be written anew.

    Attributes:
      name: of the function.
      chapter: of Raschka's book whose subject it is; 0 = none.
      real: the function; its body is the package's own.
      cases: () -> tuples of arguments, all different.
      grads: which arguments a gradient is taken for.
      batched: whether it is also tried under vmap, over its array arguments.
      traced: whether it is also tried under jit; not where it is no array program.
      mistakes: the usual ones, the likelier first.
    """

    def __init__(
        self,
        real: Callable,
        chapter: int,
        cases: Callable[[], Sequence[tuple]],
        grads: tuple[int, ...],
        batched: bool,
        traced: bool,
    ):
        self.name, self.real = real.__name__, real
        self.chapter, self.cases, self.grads = chapter, cases, grads
        self.batched, self.traced = batched, traced
        self.mistakes: list[Mistake] = []

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (self.real.__doc__ or "").partition("\n")[0]

    def mistake(self, told: str) -> Callable[[Callable], Callable]:
        """Adds a usual mistake: a decorator of a function that makes it."""

        def add(made: Callable) -> Callable:
            self.mistakes.append(Mistake(told, made))
            return made

        return add

    def source(self, head: str) -> str:
        """Returns the file that a reader begins with: the function without its body."""
        body = inspect.getdoc(self.real) or ""
        lines = "\n".join(f"    {line}".rstrip() for line in body.split("\n"))
        lines = lines.strip()
        end = "\n    " if "\n" in body else ""
        return (
            f'"""{head}"""\n\n{IMPORTS}\n\n\n'
            f"def {self.name}{inspect.signature(self.real)}:\n"
            f'    """{lines}{end}"""\n'
            f'    raise NotImplementedError("write {self.name}")\n'
        )

    def check(self, mine: Callable) -> Verdict:
        """Compares a reader's function with the real one."""
        wanted = list(inspect.signature(self.real).parameters)
        if list(inspect.signature(mine).parameters) != wanted:
            shown = ", ".join(wanted)
            return Verdict(False, [f"{self.name} must take ({shown}), in this order"])
        lines = []
        for what, run in self._trials():
            try:
                told = self._differs(run, mine)
            except NotImplementedError:
                return Verdict(False, [f"{self.name} is not written yet"])
            if told:
                return Verdict(False, [*lines, f"{what}: {told}"])
            lines.append(f"{what}: right")
        return Verdict(True, lines)

    def _trials(self) -> Iterator[tuple[str, Callable]]:
        """Yields (name, run): `run(function)` returns what is to be compared."""
        cases = list(self.cases())
        yield "values", lambda f: [f(*case) for case in cases]
        if self.traced:
            # A static argument of another value is a program of its own: one does.
            yield "jit", lambda f: [self._compiled(f)(*cases[0])]
        if self.grads:  # of whole programs: operation by operation they take long
            yield (
                "gradients",
                lambda f: [
                    self._compiled(_slopes(f, self.grads))(*case) for case in cases
                ],
            )
        if self.batched:
            twice = [jnp.stack([x, x[::-1]]) for x in cases[0]]
            yield "vmap", lambda f: jax.jit(jax.vmap(f))(*twice)

    def _compiled(self, f: Callable) -> Callable:
        """Returns a function as one program; one of ours is quicker so."""
        if not self.traced:
            return f
        case = self.cases()[0]
        static = tuple(i for i, x in enumerate(case) if not _is_array(x))
        return jax.jit(f, static_argnums=static)

    def _differs(self, run: Callable, mine: Callable) -> str:
        """Returns what is wrong with the reader's, "" if nothing is."""
        try:
            found = run(mine)
        except NotImplementedError:
            raise
        except Exception as error:  # whatever the reader's code raises
            return f"it raises {type(error).__name__}: {_first_line(error)}"
        if alike(found, wanted := run(self._compiled(self.real))):
            return ""
        for told, made in self.mistakes:
            try:
                if alike(found, run(self._compiled(made))):
                    return told
            except Exception:  # a mistake that cannot be made here was not made
                continue
        return _difference(found, wanted)


def hole(
    chapter: int,
    cases: Callable[[], Sequence[tuple]],
    *,
    grads: tuple[int, ...] = (),
    batched: bool = False,
    traced: bool = True,
) -> Callable[[Callable], Hole]:
    """Makes a hole of a function: a decorator; see `Hole`."""
    return lambda real: Hole(real, chapter, cases, grads, batched, traced)


def alike(found: Any, wanted: Any) -> bool:
    """Whether two trees have one structure, the same shapes, and close numbers."""
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(wanted)
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        return False
    return all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


def normal(seed: int, *shape: int) -> jax.Array:
    """Returns random normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _close(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or (a.dtype == bool) != (b.dtype == bool):
        return False
    if not (np.issubdtype(a.dtype, np.number) or a.dtype == bool):
        return bool((a == b).all())
    finite = b[np.isfinite(b)] if b.size else b
    size = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(
        np.allclose(a, b, rtol=CLOSE, atol=CLOSE * max(size, 1e-6), equal_nan=True)
    )


def _slopes(f: Callable, grads: tuple[int, ...]) -> Callable:
    """Returns the gradients of a function's results, weighted by fixed numbers."""

    def total(*args):
        rng, sums = np.random.default_rng(1), jnp.zeros(())
        for x in jax.tree.leaves(f(*args)):
            if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
                sums += (x * rng.normal(size=np.shape(x)).astype(np.float32)).sum()
        return sums

    return jax.grad(total, argnums=grads)


def _difference(found: Any, wanted: Any) -> str:
    """Returns how two results differ where no usual mistake explains it."""
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(wanted)
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        return f"it returns {len(ours)} things in another form than the {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape:
            return f"it returns the shape {a.shape}; wanted is {b.shape}"
        if not _close(a, b):
            if not np.issubdtype(b.dtype, np.number):
                return f"it returns {a.tolist()!r}; wanted is {b.tolist()!r}"
            if not np.isfinite(a).all() and np.isfinite(b).all():
                return "it returns numbers that are not finite"
            gap = np.abs(np.nan_to_num(a - b, nan=np.inf))
            place = np.unravel_index(gap.argmax(), gap.shape)
            at = f" at {tuple(map(int, place))}" if place else ""
            return f"it returns {a[place]:.5g}{at}; wanted is {b[place]:.5g}"
    return "it differs"


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) or (
        isinstance(x, dict | list) and all(map(_is_array, jax.tree.leaves(x)))
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
