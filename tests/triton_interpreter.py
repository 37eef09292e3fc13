"""Triton's interpreter, which stands in where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter patch Triton's language for a kernel, but not for each call of a function from a kernel.

    That is a third of its time, and changes nothing but for the first such call, whose module may name more of the
    language than the kernel's does.
    """
    from triton.runtime import interpreter

    known: set[frozenset[int]] = set()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        named = frozenset(map(id, self.fn.__globals__.values())) & {id(interpreter.tl), id(interpreter.tl.core)}
        if named not in known:
            known.add(named)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
