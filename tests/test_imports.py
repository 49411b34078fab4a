"""Who may import whom, what an import may do, and that every module has its tests."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports go down at least one floor. Doors (experiments) stand on top of all.
FLOORS = (
    "names settings options sampling files screen devices weights mesh commands "
    "configs",
    "memory plaintext stores paths downloads special rope dropout native quantised",
    "model attention tokenizers chat rows corpora data losses adapters optimizer "
    "sharding programs processes checkpoint metrics seeds signals criterion "
    "sequential pace generation",
    "prepare instructions sample runs plots labelled classify pretrained words",
    "tasks evaluate microscope fork",
    "step checks train",
    "population serve reopen calibration scaling",
    "sweep report estimate doctor learn duel sensitivity",
    "__main__",
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names.split()}
SIDEWAYS = {
    ("settings", "names"),
    ("commands", "names"),
    ("configs", "commands"),
    ("model", "attention"),
    ("quantised", "native"),
    ("checkpoint", "processes"),
    ("corpora", "rows"),
    ("train", "step"),
    ("train", "checks"),
}
# A worker's process gives its environment to the processes that it starts.
HANDS_ON_ITS_ENVIRONMENT = {"gpt_jax/sweep/worker.py"}
# The first is copied into exports and run from there; the other chooses a door.
PROGRAMS = ("gpt_jax/pretrained/runner.py", "gpt_jax/__main__.py")
KNOW_CONFIG_DICT = {"train", "runs", "population", "sweep", "estimate"}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, path: Path) -> set[str]:
    """Returns the dotted names that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*package, *filter(None, [base])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def noun(name: str) -> str:
    """gpt_jax.tasks.lm and gpt_jax.tasks are both `tasks`."""
    return name.split(".")[1] if "." in name else ""


def noun_of(path: Path) -> str:
    return path.relative_to(ROOT / "gpt_jax").parts[0].removesuffix(".py")


def edges(folder: str):
    """Yields (file, imported dotted name)."""
    for path in modules(folder):
        for name in sorted(imported(ast.parse(path.read_text()), path)):
            yield path, name


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def none(wrong) -> None:
    """Fails with every wrong line in full."""
    lines = list(wrong)
    assert not lines, "\n".join(["", *lines])


def test_every_module_of_the_library_has_a_floor():
    nouns = {noun_of(path) for path in modules("gpt_jax")} - {"__init__"}
    none(sorted(nouns - FLOOR.keys()))


def test_imports_go_down_at_least_one_floor():
    wrong = []
    for path, name in edges("gpt_jax"):
        here, there = noun_of(path), noun(name)
        if not name.startswith("gpt_jax.") or here == there or there == "__version__":
            continue
        down = FLOOR.get(there, 99) < FLOOR.get(here, -1)
        if not down and (here, there) not in SIDEWAYS:
            wrong.append(f"{relative(path)} imports {name}")
    none(wrong)


def test_the_library_knows_neither_configs_nor_doors():
    above = ("configs", "experiments", "tests")
    none(
        f"{relative(path)} imports {name}"
        for path, name in edges("gpt_jax")
        if name.split(".")[0] in above
    )


def test_configs_import_only_ml_collections_common_and_the_ground():
    """And common what it reads a run's config.json with, budget the machine's speed."""
    none(
        f"{relative(path)} imports {name}"
        for path, name in edges("configs")
        if name.split(".")[0] != "ml_collections"
        and not f"{name}.".startswith("configs.common.")
        and not (path.stem == "common" and name.split(".")[0] in ("json", "pathlib"))
        and not (path.stem == "common" and name in ("gpt_jax.files", "gpt_jax.stores"))
        and not (path.stem == "budget" and name in ("math", "gpt_jax.calibration"))
        and name != "gpt_jax.names"
    )


def test_config_dict_stops_at_the_modules_that_unpack_it():
    none(
        f"{relative(path)} imports {name}"
        for path, name in edges("gpt_jax")
        if name.split(".")[0] == "ml_collections"
        and noun_of(path) not in KNOW_CONFIG_DICT
    )


def test_only_doors_read_flags_arguments_and_the_environment():
    wrong = []
    for path in modules("gpt_jax") + modules("configs"):
        if relative(path) in (*HANDS_ON_ITS_ENVIRONMENT, *PROGRAMS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("os.environ", "os.getenv", "sys.argv", "flags.FLAGS"):
                    wrong.append(f"{relative(path)}:{node.lineno} reads {name}")
    for path, name in [*edges("gpt_jax"), *edges("configs")]:
        if name in ("os.environ", "os.getenv", "sys.argv") or name == "absl.flags":
            wrong.append(f"{relative(path)} imports {name}")
    none(wrong)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter at the root, without the tests' own XLA settings."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )


# jax refuses a new number of CPU devices as soon as a backend exists.
IMPORT_ALL = """
import importlib, sys
import jax
for count, name in enumerate(sys.argv[1:], start=2):
    importlib.import_module(name)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        sys.exit(f"importing {name} started a backend")
"""


def test_importing_a_module_starts_no_backend():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules("gpt_jax")
    ]
    done = run_python("-c", IMPORT_ALL, *names)
    assert done.returncode == 0, done.stderr


DOORS = [
    path.stem
    for path in modules("experiments")
    if path.parent.name == "experiments" and path.stem not in ("__init__", "door")
]

HELP = """
import runpy, sys
door = sys.argv[1]
sys.argv = [door, "--help"]
try:
    runpy.run_module(f"experiments.{door}", run_name="__main__", alter_sys=True)
except SystemExit as leave:
    assert leave.code in (0, None), f"exit code {leave.code}"
heavy = sorted({"jax", "flax", "gpt_jax.train", "torch"} & set(sys.modules))
assert not heavy, f"--help imported {heavy}"
"""


@pytest.mark.parametrize("door", DOORS)
def test_help_of_a_door_is_shown_without_jax(door):
    done = run_python("-c", HELP, door)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_module_has_its_test_file():
    missing = []
    for path in modules("gpt_jax"):
        mirrors = {noun_of(path), path.stem} - {"__init__", "__main__"}
        if mirrors and not any((ROOT / f"tests/test_{m}.py").exists() for m in mirrors):
            missing.append(f"{relative(path)} has no tests/test_{noun_of(path)}.py")
    none(missing)
