"""RELIABILITY lines 12, 13 and 17: what the source must not contain."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import latentkv

FILES = sorted(Path(latentkv.__file__).parent.rglob("*.py"))


def test_there_is_source_to_look_at() -> None:
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_lines_12_13_and_17_no_pickle_no_torch_load_no_remote_code_and_no_check_by_assert(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Assert():
                pytest.fail(f"{path}:{node.lineno}: assert vanishes under python -O")
            case ast.Import(names=names):
                modules = {name.name.split(".")[0] for name in names}
                assert not modules & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
            case ast.ImportFrom(module=module):
                assert (module or "").split(".")[0] not in {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
            case ast.Call(func=ast.Attribute(attr="load", value=ast.Name(id="torch"))):
                pytest.fail(f"{path}:{node.lineno}: torch.load runs what a file says")
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile")):
                pytest.fail(f"{path}:{node.lineno}: runs text as code")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                pytest.fail(f"{path}: runs a checkpoint's code")
            case _:
                pass
