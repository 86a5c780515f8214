"""The documentation's site, and what is packed and declared."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hvd_localsgd

from . import launched

DOCS = launched.ROOT / "docs"
PACKAGE = sorted((launched.ROOT / "hvd_localsgd").rglob("*.py"))


def test_the_site_is_built_without_a_warning(tmp_path):
    """mkdocs.yml makes every warning an error: pages that no menu has, links and names that lead nowhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = launched.start(command, 400, {"NO_MKDOCS_2_WARNING": "1"})
    assert result.status == 0, result.output
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "HVD_LOCALSGD_STALL_WARNING" in page or "stall_warning" in page  # docstrings are there


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: hvd_localsgd\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(set(hvd_localsgd.__all__) - {"__version__"})


def words(text):
    """What of a printed line is the same every time: the longest stretch without names and numbers, in single spaces."""
    parts = re.split(r"[…\d]+|'\w*'|rank \S+ on \S+|\{[^}]*\}|\S*/\S*", text)
    return max((" ".join(part.split()).strip(" :;,.()") for part in parts), key=len)


def test_what_troubleshooting_quotes_is_what_is_printed():
    """Above the last heading, where it is ours and not Open MPI's."""
    page = (DOCS / "troubleshooting.md").read_text().split("## Messages that mean nothing")[0]
    source = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                source.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                source.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
    printed = " ".join(" ".join(source).split())
    quoted = []
    for heading, below in re.findall(r"^### (.*)\n\n(.*)", page, re.M):
        if not re.match("Open MPI's", below):
            quoted += re.findall(r"`([^`]+)`", heading)
    assert len(quoted) > 20
    missing = [text for text in quoted if words(text) not in printed]
    assert not missing


def test_whatever_is_imported_is_declared():
    project = pytest.importorskip("tomllib").loads((launched.ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[<>=\[ ]", each)[0].replace("-", "_").lower().removesuffix("_python") for each in declared}
    imported = set()
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"hvd_localsgd"} <= names


def test_the_wheel_has_what_is_needed_and_no_more(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=launched.ROOT, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    own = {str(path.relative_to(launched.ROOT)) for path in PACKAGE}
    own |= {"hvd_localsgd/py.typed", "hvd_localsgd/backends/codecs.cc", "hvd_localsgd/backends/tensorflow/kernel.cc"}
    assert {name for name in inside if ".dist-info/" not in name} == own


def test_the_conda_recipe_says_what_the_project_says():
    project = pytest.importorskip("tomllib").loads((launched.ROOT / "pyproject.toml").read_text())["project"]
    recipe = (launched.ROOT / "packaging" / "conda" / "meta.yaml").read_text()
    assert f'version = "{hvd_localsgd.__version__}"' in recipe
    needed = {
        each.replace(" ", "") for each in re.findall(r"^    - (.*)$", recipe.split("  run:")[1].split("test:")[0], re.M)
    }
    assert needed == {*project["dependencies"], "python>=3.10", *project["optional-dependencies"]["tensorflow"]}


def test_shell_and_yaml_files_are_clean():
    files = [".ci/run", "tests/slurm_cluster", "benchmarks/cluster/run"]
    files += [
        str(path) for kind in ("sbatch", "lsf", "pbs") for path in (launched.ROOT / "examples").rglob(f"*.{kind}")
    ]
    assert len(files) > 8
    shell = launched.start([str(Path(sys.executable).with_name("shellcheck")), "--severity=warning", *files], 60)
    assert shell.status == 0, shell.output
    rules = "{extends: relaxed, rules: {line-length: disable}}"
    yaml = ["examples", ".github", "mkdocs.yml", "CITATION.cff"]
    lint = launched.start([sys.executable, "-m", "yamllint", "--strict", "-d", rules, *yaml], 60)
    assert lint.status == 0, lint.output
