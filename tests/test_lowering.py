"""Programs for GPUs and TPUs, lowered without either and without their packages.

JAX lowers for devices that are not there; what their compilers make of it is for
`make test-compilers`. CPU devices stand in for them.
"""

import math
import re
from collections import Counter
from functools import cache, partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from gpt_jax import attention, data, sharding, train
from gpt_jax import mesh as meshes
from gpt_jax.estimate import dry, targets
from gpt_jax.estimate import program as programs
from tests.golden import bits

LOWERED = {"gpu": "cuda", "tpu": "tpu"}
CUDNN = re.compile(r"custom_call @(__cudnn\$[\w$]+)")
SPLASH = "custom_call @tpu_custom_call"
slow = pytest.mark.slow
everywhere = pytest.mark.parametrize("platform", LOWERED)


def mesh(axes=(1, 1, 1)):
    """A mesh of CPU devices that stand in for others."""
    return sharding.arranged(axes, jax.devices()[: math.prod(axes)])


class Lowered:
    """A program for a platform: its trace, and its text.

    Attributes:
      jaxpr: traced.
      text: StableHLO.
    """

    def __init__(self, platform, run, *arguments):
        with targets.answers(), mock.patch.object(meshes, "platform", lambda: platform):
            traced = run.trace(*arguments)
            self.jaxpr = traced.jaxpr
            lowered = traced.lower(lowering_platforms=(LOWERED[platform],))
        self.text = lowered.as_text()

    @property
    def kernels(self) -> Counter:
        """How often cuDNN's and written kernels are called."""
        found = Counter(CUDNN.findall(self.text))
        splash = self.text.count(SPLASH)
        return found + Counter({"splash": splash} if splash else {})

    @property
    def wide(self) -> set[str]:
        """Where matrix products are made of float32."""
        return {p.where for p in programs.products(self.jaxpr) if p.dtype == "float32"}

    @property
    def callbacks(self) -> list[str]:
        """Which calls go to the host."""
        return re.findall(r"custom_call @(\w*callback\w*)", self.text)
