"""What a traced or compiled program is made of: its products, calls, collectives.

`Program` reads the text of a compiled one (`jax.stages.Compiled.as_text`), for any
platform; `products` counts in the trace, which is before all compilers.
"""

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

# ------------------------------------------------------------- the program's text

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?([^,}]+)")
NAME = re.compile(r"%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
CHANNEL = re.compile(r"channel_id=(\d+)")
GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)")
TARGET = re.compile(r'custom_call_target="([^"]+)"')
OP = re.compile(r'op_name="([^"]*)"')

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "ragged-all-to-all"),
)
CALLS = ("while", "conditional", "call")
FAST = "S(1)"  # in a layout: the array lies in a TPU's own fast memory


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: its result's.
      shape: of the result, with its layout.
      kind: what it does.
      rest: operands and attributes.
    """

    name: str
    shape: str
    kind: str
    rest: str

    @property
    def op(self) -> str:
        """Where in the model it comes from."""
        found = OP.search(self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        depth = end = 0
        while end < len(self.rest) and depth >= 0:
            depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
            end += 1
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = TARGET.search(self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: all-reduce, ...
      times: how often it runs: loops count.
      bytes: of one, of the larger side, whole or gathered.
      group: the devices of one of its groups, by number; () = all.
    """

    kind: str
    times: int
    bytes: float
    group: tuple[int, ...]


class Program:
    """A compiled program, read from its text.

    Attributes:
      computations: instructions by the name of the computation.
      entry: the name of the first.
      shapes: the result of each instruction.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, here = "", []
        for line in text.splitlines():
            if match := COMPUTATION.match(line):
                here = self.computations.setdefault(match[2], [])
                self.entry = match[2] if match[1] else self.entry
            elif match := INSTRUCTION.match(line):
                here.append(Instruction(*match.groups()))
            elif here and line.strip(" }"):  # an attribute of several lines
                last = here[-1]
                here[-1] = last._replace(rest=f"{last.rest} {line.strip()}")
        self.shapes = {
            one.name: one.shape for body in self.computations.values() for one in body
        }

    def walk(self, *, within: bool = False) -> Iterator[tuple[int, Instruction]]:
        """Yields (how often it runs, instruction), in loops and branches too.

        A loop whose length is not known counts once. `within` looks into fusions.
        """

        def visit(name: str, times: int) -> Iterator[tuple[int, Instruction]]:
            for one in self.computations.get(name, ()):
                yield times, one
                if not within and one.kind not in CALLS:
                    continue
                again = self.trips(one) if one.kind == "while" else 1
                for called in CALLED.findall(one.rest):
                    for inner in NAME.findall(called):
                        yield from visit(inner, times * again)

        return visit(self.entry, 1)

    def trips(self, loop: Instruction) -> int:
        """Returns how often a loop goes round; 1 where the program does not say."""
        if known := TRIPS.search(loop.rest):
            return int(known[1])
        # Else it counts up to the constant that its condition compares with.
        found, ahead = [], CONDITION.findall(loop.rest)
        while ahead:
            for one in self.computations.get(ahead.pop(), ()):
                if one.kind == "constant" and one.shape.startswith("s32[]"):
                    found += [int(n) for n in re.findall(r"^(\d+)\)", one.rest)]
                ahead += re.findall(r"calls=%?([\w.\-]+)", one.rest)
        return max(found, default=1) or 1

    def collectives(self) -> list[Collective]:
        """Returns the collectives; what several fusions do a part of counts once."""
        found, seen = [], set()
        for times, one in self.walk(within=True):
            kind = one.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = CHANNEL.search(one.rest)
            key = (kind, channel[1]) if channel else (kind, one.name)
            if key in seen:
                continue
            seen.add(key)
            taken = sum(size(self.shapes.get(name, "")) for name in one.operands)
            larger = max(
                taken, size(one.shape) - (taken if "-start" in one.kind else 0)
            )
            found.append(Collective(kind, times, larger, group(one.rest)))
        return found

    def calls(self) -> Counter[str]:
        """Returns how often each of the libraries' and hand-written kernels runs."""
        found: Counter[str] = Counter()
        for times, one in self.walk(within=True):
            if one.kind == "custom-call":
                found[one.target] += times
        return found

    @functools.cached_property
    def _by_name(self) -> dict[str, Instruction]:
        return {one.name: one for body in self.computations.values() for one in body}

    def fused(self, one: Instruction) -> list[Instruction]:
        """Returns what a fusion is made of, fusions within it written out."""
        found = []
        for called in re.findall(r"calls=%?([\w.\-]+)", one.rest):
            for inner in self.computations.get(called, ()):
                found += [inner, *self.fused(inner)]
        return found

    def traffic(self, one: Instruction) -> float:
        """Returns the bytes of memory that an instruction reads and writes.

        Of an array that is only sliced, or written in part, that part.
        """
        called = re.search(r"calls=%?([\w.\-]+)", one.rest)
        if one.kind.endswith("-start"):  # a copy: what arrives
            return physical(one.shape.lstrip("(").partition(", ")[0]) or physical(
                self.shapes.get(one.operands[0], "")
            )
        if one.kind == "fusion" and called:
            body = self.computations[called[1]]
            outer = [self.shapes.get(name, "") for name in one.operands]
            return self._read(body, outer) + self._written(body[-1], one.shape)
        if one.kind == "dynamic-update-slice":
            return 2 * physical(self.shapes.get(one.operands[1], ""))
        if one.kind in ("dynamic-slice", "slice", "gather"):
            return 2 * physical(one.shape)
        taken = (physical(self.shapes.get(name, "")) for name in one.operands)
        return physical(one.shape) + sum(taken)

    def _read(self, body: list[Instruction], outer: list[str]) -> float:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for one in body:
            for name in one.operands:
                users[name].append(one)

        def part(name: str, shape: str) -> float:
            total = 0.0
            for user in users[name]:
                first = user.operands[0] == name
                if user.kind in ("dynamic-slice", "gather", "slice"):
                    total += size(user.shape)
                elif first and user.kind in ("dynamic-update-slice", "scatter"):
                    continue
                elif user.kind == "bitcast":
                    total += part(user.name, user.shape)
                else:
                    return size(shape)
            return min(total, size(shape))

        total = 0.0
        for one in body:
            if one.kind == "parameter":
                number = int(one.rest.partition(")")[0])
                given = outer[number] if number < len(outer) else one.shape
                if FAST not in given and (whole := size(one.shape)):
                    share = part(one.name, one.shape) / whole
                    total += share * physical(given)
        return total

    def _written(self, root: Instruction, shape: str) -> float:
        ahead = self._by_name
        if root.kind == "tuple":
            shapes = [
                found[0] for found in re.finditer(r"\w+\[[^\]]*\](\{[^}]*\})?", shape)
            ]
            pairs = zip(root.operands, shapes, strict=False)
            return sum(self._written(ahead[name], own) for name, own in pairs)
        if root.kind == "bitcast" and root.operands[0] in ahead:
            return self._written(ahead[root.operands[0]], shape)
        if FAST in shape:
            return 0.0
        if root.kind in ("dynamic-update-slice", "scatter"):
            update = root.operands[1 if root.kind != "scatter" else -1]
            return size(self.shapes.get(update, "")) * (1 + (root.kind == "scatter"))
        return physical(shape)


def size(shape: str) -> float:
    """Returns the bytes of a shape, f32[8,128] or a tuple of such."""
    return sum(
        _width(kind) * math.prod(_lengths(dims))
        for kind, dims, _ in ARRAY.findall(shape)
    )


def physical(shape: str) -> float:
    """Returns the bytes of memory that a shape takes: with the padding of a TPU's
    tiles, and nothing of what lies in its fast memory."""
    total = 0.0
    for kind, dims, layout in ARRAY.findall(shape):
        lengths = _lengths(dims)
        if FAST in layout:
            continue
        order, _, tiling = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        minor = [int(n) for n in order.split(",") if n]
        if tile:
            sides = _lengths(tile[1])[::-1]
            for side, axis in zip(sides, minor, strict=False):
                lengths[axis] = -(-lengths[axis] // side) * side
        total += _width(kind) * math.prod(lengths)
    return total


def _lengths(dims: str) -> list[int]:
    return [int(n) for n in dims.split(",") if n]


def _width(kind: str) -> float:
    bits = re.search(r"\d+", kind)
    if kind == "pred":
        return 1.0
    return int(bits[0]) / 8 if bits else 0.0


def group(rest: str) -> tuple[int, ...]:
    """Returns the devices of a collective's first group; () where it does not say.

    XLA writes {{0,1},{2,3}}, or [2,2]<=[4] (a shape that the numbers are cut into), or
    mesh['a'=2,'b'=2] {'b'} (the axes that are joined).
    """
    found = GROUPS.search(rest)
    if found is None:
        return ()
    text = found[1]
    if axes := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", text):
        lengths = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        joined = re.findall(r"'(\w+)'", axes[2])
        steps = dict(zip(lengths, _steps(list(lengths.values())), strict=True))
        ranges = [range(lengths[name]) for name in joined]
        return tuple(
            sum(i * steps[name] for i, name in zip(place, joined, strict=True))
            for place in itertools.product(*ranges)
        )
    if cut := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = _lengths(cut[1]), _lengths(cut[2])
        order = _lengths(cut[3]) if cut[3] else list(range(len(source)))
        steps = _steps(source)
        turned = itertools.product(*(range(source[axis]) for axis in order))
        numbers = (
            sum(i * steps[axis] for i, axis in zip(place, order, strict=True))
            for place in turned
        )
        return tuple(itertools.islice(numbers, shape[-1]))
    first = re.match(r"\{\{([\d,]*)\}", text)
    return tuple(_lengths(first[1])) if first else ()


def _steps(lengths: list[int]) -> list[int]:
    return [math.prod(lengths[i + 1 :]) for i in range(len(lengths))]


# ------------------------------------------------------------- the trace


class Product(NamedTuple):
    """A matrix product of a traced program.

    Attributes:
      where: the place in the model, as JAX's name stack says it.
      dtype: the wider of its operands'.
      flops: over all devices, loops counted.
    """

    where: str
    dtype: str
    flops: float


def equations(jaxpr: Any, *, kernels: bool = False) -> Iterator[tuple[Any, str, float]]:
    """Yields (equation, place, times) of a trace, within calls and loops too.

    What a `while` repeats counts once; what each of several devices does within a
    `shard_map` counts for each. `kernels` looks into Pallas kernels.
    """

    def visit(jaxpr: Any, where: str, times: float) -> Iterator[tuple[Any, str, float]]:
        for eqn in jaxpr.eqns:
            own = f"{where}/{eqn.source_info.name_stack}".strip("/")
            yield eqn, own, times
            again = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            if eqn.primitive.name == "shard_map":
                again = math.prod(eqn.params["mesh"].shape[a] for a in _manual(eqn))
            if eqn.primitive.name == "pallas_call" and not kernels:
                continue
            for inner in core.jaxprs_in_params(eqn.params):
                yield from visit(inner, own, times * again)

    return visit(getattr(jaxpr, "jaxpr", jaxpr), "", 1)


def _manual(eqn: Any) -> Any:
    """Returns the axes of a `shard_map`; newer versions of JAX call them otherwise."""
    names = ("newly_manual_axes", "manual_axes")
    return next(eqn.params[name] for name in names if name in eqn.params)


def products(jaxpr: Any) -> list[Product]:
    """Returns the matrix products of a trace; those of written kernels are left out."""
    found = []
    for eqn, where, times in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, right = (v.aval for v in eqn.invars)
            depth = math.prod(left.shape[axis] for axis in contracted)
            flops = 2 * math.prod(eqn.outvars[0].aval.shape) * depth * times
            wider = max(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
            found.append(Product(where, str(wider), flops))
    return found
