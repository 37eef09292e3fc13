"""docs/reliability.md, line 27: the test of a promise fails when what keeps the promise is taken out.

A mutation is a file of `mutations/`: what is taken out in a sentence, who must then find it (a test, or one of ruff's
rules), and the change to `src` as a diff. It is made in a copy of `src`, and the tests run with that copy in a process
of their own: the tree is never touched. When the code that a diff names has changed, make the diff anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = 28
OWN = 27  # what this file is about
SECONDS = 600  # a test that hangs without what was taken out ends by deadlines of its own, which are shorter

# What a test says when what it watches is broken, or an error of the package that should not have come to it. Anything
# else, an ImportError say, means that the diff is broken.
BROKEN_PROMISE = re.compile(r"latentkv\.errors\.|AssertionError|assert |Failed|TimeoutError|subprocess\.TimeoutExpired")

# Installed in place, the package is found by hooks that are asked before any path.
NO_HOOKS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
"""


@dataclass(frozen=True)
class Mutation:
    """What a file of `mutations/` says.

    Attributes:
        line: of docs/reliability.md.
        finders: tests by their ids, or "ruff" and a rule.
    """

    path: Path
    line: int
    finders: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Mutation:
        text = path.read_text("utf-8")
        head = re.match(r"Line (\d+): \S.*\.\n(?:.*\n)*?((?:Found by: .+\n)+)\n*diff ", text)
        assert head, f"{path.name} does not begin with 'Line N: sentence.', 'Found by: test or rule' and a diff"
        return cls(path, int(head[1]), tuple(re.findall(r"Found by: (.+)", head[2])))

    @property
    def tests(self) -> list[str]:
        return [finder for finder in self.finders if not finder.startswith("ruff ")]


MUTATIONS = [Mutation.read(path) for path in sorted((Path(__file__).parent / "mutations").glob("*.patch"))]


class Copy:
    """A copy of `src` that tests can be run with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = folder / "src" / "latentkv"
        shutil.copytree(ROOT / "src" / "latentkv", package, ignore=shutil.ignore_patterns("__pycache__"))
        native = importlib.util.find_spec("latentkv._native")
        assert native is not None and native.origin is not None
        shutil.copy(native.origin, package)
        (folder / "src" / "sitecustomize.py").write_text(NO_HOOKS)
        shutil.copy(ROOT / "pyproject.toml", folder)  # ruff's rules
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=self._environment, capture_output=True, text=True, timeout=SECONDS)

    def outcomes(self, *tests: str) -> tuple[list[str | None], str]:
        """What each case of `tests` failed with, None where it passed; and what pytest printed."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", f"--basetemp={self.folder / 'tmp'}"]
        done = self.run("-m", "pytest", *options, f"--junitxml={report}", *tests)
        printed = done.stdout[-6000:] + done.stderr[-2000:]
        assert done.returncode in (0, 1), f"the tests did not run:\n{printed}"
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
        assert cases
        for case in cases:
            found = [part.tag for part in case if part.tag in ("error", "skipped")]
            assert not found, f"{case.get('name')} was not run to its end ({found[0]}):\n{printed}"
        failures = [case.find("failure") for case in cases]
        return [None if failure is None else failure.get("message", "") for failure in failures], printed

    def found_by_ruff(self) -> set[str]:
        """Rules that ruff finds broken, as the project configures it."""
        done = self.run("-m", "ruff", "check", "--no-cache", "--output-format=json", "src/latentkv", cwd=self.folder)
        assert done.returncode in (0, 1), f"ruff did not run (it comes with latentkv[dev]): {done.stderr}"
        return {found["code"] for found in json.loads(done.stdout)}

    def apply(self, mutation: Mutation) -> None:
        done = git_apply(mutation, self.folder)
        assert done.returncode == 0, f"{mutation.path.name} no longer fits the source, make it anew: {done.stderr}"


def git_apply(mutation: Mutation, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Change `folder`/src; lines that have moved, and others around them, do no harm."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "-C1", *options, str(mutation.path)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_promise_has_a_mutation_and_is_written_down() -> None:
    promises = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    written = [int(number) for number in re.findall(r"^(\d+)\. ", promises, re.MULTILINE)]
    assert written == list(range(1, PROMISES + 1)) == sorted({mutation.line for mutation in MUTATIONS})


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.path.stem)
def test_a_mutation_fits_the_source_and_names_tests_that_exist(mutation: Mutation) -> None:
    done = git_apply(mutation, ROOT, "--check")
    assert done.returncode == 0, f"{mutation.path.name} no longer fits the source, make it anew: {done.stderr}"
    for test in mutation.tests:
        file, _, name = test.partition("[")[0].partition("::")
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), test


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy without a mutation, which is what its tests import, and in which nobody finds anything."""
    copy = Copy(tmp_path_factory.mktemp("unchanged"))
    where = copy.run("-c", "import latentkv, latentkv._native; print(latentkv.__file__, latentkv._native.__file__)")
    assert where.stdout.count(str(copy.folder)) == 2, where
    assert copy.found_by_ruff() == set()
    failures, printed = copy.outcomes(*sorted({test for mutation in MUTATIONS for test in mutation.tests}))
    assert set(failures) == {None}, printed
    return copy


def require_found(mutation: Mutation, copy: Copy) -> None:
    """Make the change in `copy`; its finders must find it there."""
    copy.apply(mutation)
    for finder in mutation.finders:
        if finder.startswith("ruff "):
            assert finder.removeprefix("ruff ") in copy.found_by_ruff()
            continue
        failures, printed = copy.outcomes(finder)
        assert any(failures), f"{finder} passes without what {mutation.path.name} takes out"
        for failure in filter(None, failures):
            assert BROKEN_PROMISE.match(failure), f"{finder} failed for another reason:\n{printed}"


@pytest.mark.mutation
@pytest.mark.parametrize(
    "mutation",
    [mutation for mutation in MUTATIONS if mutation.line != OWN],
    ids=lambda mutation: mutation.path.stem,
)
def test_what_keeps_a_promise_cannot_be_taken_out_unnoticed(
    mutation: Mutation, unchanged: Copy, tmp_path: Path
) -> None:
    require_found(mutation, Copy(tmp_path))


@pytest.mark.mutation
@pytest.mark.parametrize(
    ("name", "why"), [("27_harmless", "passes without what"), ("27_does_not_run", "the tests did not run")]
)
def test_line_27_a_mutation_that_no_test_finds_is_told(name: str, why: str, unchanged: Copy, tmp_path: Path) -> None:
    (mutation,) = [mutation for mutation in MUTATIONS if mutation.path.stem == name]
    with pytest.raises(AssertionError, match=why):
        require_found(mutation, Copy(tmp_path))
