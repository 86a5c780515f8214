"""The house is as docs/architecture.md draws it: who imports whom, and what is not loaded."""

import ast
import re
import sys

import grimp
import pytest

from hvd_localsgd.tools import launch  # noqa: F401  (the launcher of these tests must not need TensorFlow either)

from . import launched

PACKAGE = "hvd_localsgd"
HEAVY = ("keras", "tensorflow", "mpi4py", "horovod")


def drawn(heading: str) -> set[tuple[str, str]]:
    """The arrows of the picture under a heading of docs/architecture.md: lines of ``name -> name name``."""
    page = (launched.ROOT / "docs" / "architecture.md").read_text()
    (picture,) = re.findall(rf"^## {re.escape(heading)}.*?^```\n(.*?)^```", page, re.M | re.S)
    lines = [line.split("->") for line in picture.splitlines() if "->" in line]
    return {(source.split()[0], target) for source, targets in lines for target in targets.split("#")[0].split()}


def imported(root: str) -> set[tuple[str, str]]:
    """The arrows between the folders and files right below ``root``, lazy imports too."""
    graph = grimp.build_graph(PACKAGE)

    def room(module: str) -> str | None:
        return module.removeprefix(root + ".").split(".")[0] if module.startswith(root + ".") else None

    pairs = {
        (room(module), room(target))
        for module in graph.modules
        for target in graph.find_modules_directly_imported_by(module)
    }
    return {(a, b) for a, b in pairs if a and b and a != b}


@pytest.mark.parametrize(("heading", "root"), [("The wings", PACKAGE), ("The core", f"{PACKAGE}.core")])
def test_the_picture_in_the_documentation_is_the_code(heading, root):
    assert drawn(heading) == imported(root)


@pytest.mark.parametrize("root", [PACKAGE, f"{PACKAGE}.core"])
def test_arrows_only_go_down(root):
    arrows = imported(root)
    while lowest := {target for _, target in arrows} - {source for source, _ in arrows}:
        arrows = {(source, target) for source, target in arrows if target not in lowest}
    assert not arrows, "in a circle"


def test_front_ends_write_nothing_of_the_engines():
    package = launched.ROOT / PACKAGE
    written = {
        f"{path.name}: {ast.unparse(target)}"
        for path in [*sorted((package / "frontends").glob("*.py")), package / "averager.py"]
        for target in ast.walk(ast.parse(path.read_text()))
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
        if ast.unparse(target.value).split(".")[-1] in ("engine", "_engine")
    }
    assert not written, "the engine is told by calls"


def run_without(modules: tuple[str, ...], program: str) -> launched.Result:
    """In a process where importing these is an error."""
    block = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); "
    return launched.start([sys.executable, "-c", block + program], 60)


def test_the_core_needs_numpy_alone():
    result = run_without(
        (*HEAVY, "rich"),
        "from importlib.metadata import packages_distributions as p; import hvd_localsgd.core; "
        "print(sorted({m.split('.')[0] for m, v in sys.modules.items() if v} & set(p())))",
    )
    assert result.status == 0, result.output
    assert set(eval(result.output)) <= {"numpy", PACKAGE, "setuptools", "_distutils_hack"}, result.output


@pytest.mark.parametrize(
    "command",
    [
        "['--version']",
        "['run', '-np', '1', '--', '/dev/null']",
        "['plan', *'--samples 100 --epochs 1 --ranks 2 --batch 1 --compute-ms 1 --model-mb 1 --bandwidth 1'.split()]",
    ],
)
def test_the_command_loads_neither_tensorflow_nor_mpi(command):
    program = f"from hvd_localsgd.tools import cli; sys.exit(cli.main({command}))"
    result = run_without(HEAVY, program)
    assert result.status == 0, result.output


def test_importing_the_package_loads_nothing():
    result = run_without((*HEAVY, "numpy", "rich"), "import hvd_localsgd; print(len(dir(hvd_localsgd)))")
    assert result.status == 0, result.output


def test_only_one_file_knows_mpi_and_one_horovod():
    for module, owner in (("mpi4py", "mpi.py"), ("horovod", "horovod.py")):
        files = [
            path.name
            for path in (launched.ROOT / PACKAGE).rglob("*.py")
            if re.search(rf"^\s*(from|import) {module}\b", path.read_text(), re.M)
        ]
        assert files == [owner]


def test_a_loop_of_numpy_needs_neither_keras_nor_tensorflow():
    program = """
import numpy as np
import hvd_localsgd as lsgd

weights, options = np.array([2.0]), {"outer": lsgd.Nesterov(0.5, 0.0), "guard": lsgd.Outliers(), "include": lsgd.Names("*")}
with lsgd.ModelAverager([weights], lsgd.Constant(2), **options) as averager:
    for _ in range(4):
        weights -= 0.25
        averager.step()
print(lsgd.SyncSteps([3, 5]).interval(lsgd.Now(0)), weights)
"""
    result = run_without(("keras", "tensorflow", "horovod"), program)
    assert result.status == 0, result.output
    assert result.output.split("\n")[-2] == "3 [1.5]", "half of each change of 0.5, twice"


def test_names_are_known_to_a_keras_that_was_only_half_imported_when_this_package_was():
    program = """
import sys, types
sys.modules["keras"] = types.ModuleType("keras")
import hvd_localsgd as lsgd
del sys.modules["keras"]
import keras
find = keras.saving.get_registered_object
print(find("hvd_localsgd>Constant"), lsgd.LocalSGDCallback and find("hvd_localsgd>Constant") is lsgd.Constant)
"""
    result = run_without((), program)
    assert result.status == 0, result.output
    assert result.output.split("\n")[-2] == "None True"
