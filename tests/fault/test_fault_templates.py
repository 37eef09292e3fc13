"""docs/reliability.md, line 14: chat templates are programs of strangers."""

from __future__ import annotations

import time

import pytest

from latentkv.errors import TokenizerError
from latentkv.text import sandbox
from latentkv.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "x"}] * 300


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) recursive %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    ],
)
def test_line_14_a_template_that_takes_too_long_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(TokenizerError, match=r"seconds|characters"):
        ChatTemplate({"default": source}, {}).render(MESSAGES)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("grow", ["n.s ~ n.s", "n.s + n.s", "n.s * 2"])
def test_line_14_a_template_that_grows_without_end_is_stopped(grow: str) -> None:
    source = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = " + grow + " %}{% endfor %}"
    with pytest.raises(TokenizerError, match="too long"):
        ChatTemplate({"default": source}, {}).render(MESSAGES[:1])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_line_14_a_template_reaches_nothing_outside(source: str) -> None:
    with pytest.raises(TokenizerError):
        ChatTemplate({"default": source}, {}).render(MESSAGES[:1])


def test_line_14_loops_still_know_where_they_are() -> None:
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ', ' }}{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% for x in missing %}{% else %}none{% endfor %}"
        "{% for x in [[1, [2]]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}"
        "{% for x in [3, 1, 2] | sort if x > 1 %}{{ x }}{{ loop.revindex }}{% endfor %}{{ 'a' ~ 1 ~ 'b' }}"
    )
    text = ChatTemplate({"default": source}, {}).render([{"role": "user", "content": "x"}] * 2)
    assert text == "1/2, 2/2.a1none122231a1b"
