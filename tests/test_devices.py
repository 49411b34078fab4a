"""What is known of accelerators, by the names that they have."""

import jax
import pytest

from gpt_jax import devices


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("Tesla T4", 65),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_peaks_are_found_by_the_names_that_devices_have(kind, tera):
    assert devices.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce GTX 750", "NVIDIA L400", ""])
def test_unknown_devices_have_no_peak(kind):
    assert devices.peak_flops(kind) is None


def test_this_device_kind_is_a_string_that_the_table_takes():
    devices.peak_flops(jax.devices()[0].device_kind)


def test_memory_goes_by_the_name_too():
    known = {
        "NVIDIA A100-SXM4-40GB": (40, 1.555e12),
        "NVIDIA A100-SXM4-80GB": (80, 2.039e12),
        "Tesla V100-SXM2-16GB": (16, 0.9e12),
        "NVIDIA H100 80GB HBM3": (80, 3.35e12),
        "NVIDIA H100 PCIe": (80, 2.0e12),
        "NVIDIA GH200 480GB": (96, 4.0e12),
        "TPU v3": (16, 0.45e12),
    }
    for kind, wanted in known.items():
        found = devices.of_kind(kind)
        assert found and (found.gigabytes, found.bandwidth) == wanted, kind


def test_every_accelerator_is_found_by_its_name():
    """A pattern that stands before a more special one would hide it."""
    for name, known in devices.ACCELERATORS.items():
        assert devices.of_kind(name.replace("-", " ")) is known, name
