"""What pyproject.toml cannot say: in a wheel the doors and configs are in the package.

A clone has them beside it, where people look for them. Installed so, they would be the
top-level names `configs` and `experiments` in everybody's environment.
"""

from setuptools import find_namespace_packages, setup


def folders(*names: str) -> list[str]:
    """Returns folders of the clone and all below them, as packages are called."""
    return find_namespace_packages(
        include=[pattern for name in names for pattern in (name, f"{name}.*")],
        exclude=["*__pycache__*"],
    )


beside = {
    f"gpt_jax._root.{name}": name.replace(".", "/")
    for name in folders("configs", "experiments")
}
setup(packages=[*folders("gpt_jax"), *beside], package_dir=beside)
