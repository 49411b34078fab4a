"""Sides that the tests of the benchmark start as processes."""

import os
import sys
import time

from experiments.benches.worker import require


def counting(*, step=1.0, seconds=0.0, flops=0.0):
    """Its values are step, 2 * step, 3 * step, ..."""
    value = 0.0

    def go():
        nonlocal value
        time.sleep(seconds)
        value += step
        return {"value": value, "half": value / 2}

    return go, {"flops": flops, "word": "ready"}


def chatty():
    print("a library says hello")
    os.write(1, b"from C as well\n")
    return lambda: (print("and again"), {"value": 1.0})[1], {}


def needs_what_nobody_has():
    require("sys", "surely_no_such_package")
    return counting()


def broken():
    raise ValueError("the weights do not fit")


def dies():
    sys.stderr.write("out of memory, more or less\n")
    sys.stderr.flush()
    os._exit(9)


def knows(*, key):
    return None, {"found": os.environ.get(key)}


def stuck():
    return lambda: time.sleep(60), {}
