"""What a backward pass finds ready of its forward pass, told from a trace.

JAX decides which arrays a backward pass needs: differentiation and `remat` leave them
as outputs of the traced forward pass. XLA keeps those of a scan as they are. Elsewhere
it fuses: what is cheap to compute again from kept arrays is not kept, unless a matrix
product has it as an operand and so had to write it anyway.

Shapes: T query and key positions
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call")
VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice"}
# Element-wise work that XLA repeats rather than keep its result; division, tanh and
# square roots it keeps.
CHEAP = VIEWS | {
    *("add", "sub", "mul", "neg", "max", "min", "exp", "select_n", "integer_pow"),
    *("square", "sign", "convert_element_type", "copy", "not", "and", "or"),
    *("eq", "ne", "lt", "le", "gt", "ge", "concatenate", "pad", "iota"),
}
SMALL = 64  # an array so many times smaller than another costs nothing beside it


class Saved(NamedTuple):
    """Bytes that wait for the backward pass.

    Attributes:
      activations: of what depends on the examples.
      casts: of weights in another form: rounded, turned.
    """

    activations: float
    casts: float


class Node(NamedTuple):
    """A value of the trace: what makes it, of which others."""

    made_by: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    bytes: int


def saved(
    forward: Callable,
    params: Any,
    frozen: Any,
    *examples: Any,
    fuses: bool,
    scores: int,
) -> Saved:
    """Returns what differentiating `forward(params, frozen, *examples)` keeps.

    Args:
      forward: traced, not run.
      params: shapes of weights that train; what is kept of them as they are is free.
      frozen: shapes of those that do not.
      examples: shapes of all that depends on the batch.
      fuses: XLA sees forward and backward pass as one program (no scan, no remat).
      scores: T where attention is fused and keeps no [T, T] scores; else 0.
    """

    def residuals(params, *rest):
        return jax.vjp(lambda params: forward(params, *rest), params)[1]

    closed = jax.make_jaxpr(residuals)(params, frozen, *examples)
    given = len(jax.tree.leaves((params, frozen)))
    nodes, outputs = _graph(closed)
    of_examples = _reached(nodes, set(range(given, len(closed.in_avals))))
    kept = dict.fromkeys(i for i in outputs if nodes[i].made_by != "")
    if scores:
        kept = {i: None for i in kept if not _is_score(nodes[i].shape, scores)}
    kept = {i: None for i in kept if not _is_view(nodes, i)}
    if fuses:
        operands = {
            i for node in nodes if node.made_by == "dot_general" for i in node.inputs
        }
        waits = {i for i in kept if i in operands or nodes[i].made_by not in CHEAP}
        for i in sorted(kept):  # inputs come before what is made of them
            if i not in waits and not _derivable(nodes, i, waits):
                waits.add(i)
        kept = dict.fromkeys(waits)
    sums = [0, 0]
    for i in kept:
        sums[i not in of_examples] += nodes[i].bytes
    return Saved(*sums)


def _graph(closed: Any) -> tuple[list[Node], list[int]]:
    """Returns all values, calls of functions written out, and which are returned."""
    nodes: list[Node] = []

    def new(aval, made_by: str, inputs: tuple[int, ...]) -> int:
        size = getattr(aval.dtype, "itemsize", 4)
        amount = math.prod(aval.shape) * size
        nodes.append(Node(made_by, inputs, aval.shape, amount))
        return len(nodes) - 1

    def walk(jaxpr, ids: dict) -> list[int]:
        def read(v) -> int:
            return new(v.aval, "", ()) if isinstance(v, core.Literal) else ids[v]

        for v in jaxpr.constvars:
            ids[v] = new(v.aval, "", ())
        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name in CALLS and inner is not None:
                inner = getattr(inner, "jaxpr", inner)
                made = walk(inner, dict(zip(inner.invars, inputs, strict=True)))
            else:
                name = eqn.primitive.name
                made = [new(v.aval, name, inputs) for v in eqn.outvars]
            ids.update(zip(eqn.outvars, made, strict=True))
        return list(map(read, jaxpr.outvars))

    jaxpr = closed.jaxpr
    arguments = {v: new(v.aval, "", ()) for v in jaxpr.invars}
    return nodes, walk(jaxpr, arguments)


def _reached(nodes: list[Node], roots: set[int]) -> set[int]:
    """Returns the values that depend on one of `roots`."""
    found = set(roots)
    for i, node in enumerate(nodes):
        if any(j in found for j in node.inputs):
            found.add(i)
    return found


def _is_score(shape: tuple[int, ...], T: int) -> bool:
    return len(shape) >= 5 and shape[-2:] == (T, T)


def _is_view(nodes: list[Node], i: int) -> bool:
    """Whether a value is a part of the program's arguments, seen in another shape."""
    while nodes[i].made_by in ("reshape", "squeeze", "expand_dims"):
        i = nodes[i].inputs[0]
    return nodes[i].made_by == ""


def _derivable(nodes: list[Node], i: int, kept: set[int]) -> bool:
    """Whether cheap work makes a value of kept ones, of arguments and of small ones."""
    ahead, seen, limit = [i], set(kept), nodes[i].bytes / SMALL
    while ahead:
        i = ahead.pop()
        if nodes[i].made_by not in CHEAP:
            return False
        inputs = {j for j in nodes[i].inputs if j not in seen}
        seen |= inputs
        ahead += [j for j in inputs if nodes[j].made_by and nodes[j].bytes > limit]
    return True
