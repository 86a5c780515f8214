"""Every Python block in the documentation runs, alone and as one of two ranks."""

import re

import pytest

from . import launched

PAGES = [launched.ROOT / "README.md", *sorted((launched.ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(f"import os; os.chdir({str(tmp_path)!r})\n{block}")
    result = launched.mpirun(2, str(script), timeout=120)
    assert result.status == 0, result.output


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_in_the_documentation_exist():
    makefile = (launched.ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^(?:    )?make ([\w.]+)|`make ([\w.]+)`", page.read_text(), re.M):
            name = "".join(target)
            assert re.search(rf"^({re.escape(name)}|\$\(VENV\)):", makefile, re.M), f"{page.name} names make {name}"


def test_tests_that_claims_name_exist():
    for line in (launched.ROOT / "docs" / "claims.md").read_text().splitlines():
        file = None
        for named, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?", line):
            file = named or file
            if named:
                assert (launched.ROOT / named).exists(), line
            if test:
                assert file, line
                assert f"def {test}" in (launched.ROOT / file).read_text(), line
