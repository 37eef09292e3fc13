"""docs/reliability.md, lines 14 and 21: chat templates are programs of strangers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from forked_program import ForkedProgram
from latentkv.errors import TemplateLimitError, TokenizerError
from latentkv.text import template_process
from latentkv.text.chat import ChatTemplate
from latentkv.text.template_process import RENDER_MEMORY, TemplateProcesses, template_processes
from worker_processes import worker_processes

MESSAGES = [{"role": "user", "content": "x"}] * 300

TOO_LONG = [
    "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(30) }}",
    # Each of these is one call of a library, which never comes back to look at a clock.
    "{% set n = namespace(v=7) %}{% for i in range(40) %}{% set n.v = n.v*n.v %}{% endfor %}{{ 1 if n.v else 0 }}",
    "{{ 2**100000000 }}",
    "{% set n = namespace(v=[1]) %}{% for i in range(30) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v | string }}",
    "{{ (['a' * 4000] * 4000) | join | replace('a', 'bb') | wordwrap(2) | length }}",
]
TOO_LARGE = [  # or too long: which limit is met first depends on how fast the machine is
    "{% for a in range(99999) recursive %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "{{ ('%01500000000d' % 1) | length }}",
    "{{ ('%*d' % (1500000000, 1)) | length }}",
    "{{ '{:>1500000000}'.format(1) | length }}",
    "{% if 0 %}{{ 'x'.ljust(1500000000) }}{% endif %}{{ 'x' | center(1500000000) | length }}",
    "{{ '%02000000000d' % 1 }}",
    "{{ ('a' * 4000000).replace('a', 'b' * 400) | length }}",
    "{{ [[[[[1]]]]] | tojson(indent=300000000) | length }}",
    "{{ 'x' * 1000000000 }}",
    *(
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = " + grow + " %}{% endfor %}"
        for grow in ("n.s ~ n.s", "n.s + n.s", "n.s * 2", "n.s.replace('x', 'xx')")
    ),
]


@pytest.fixture
def own() -> Iterator[TemplateProcesses]:
    processes = TemplateProcesses()
    yield processes
    processes._begin()  # whose processes end with their sockets


def children() -> set[int]:
    return worker_processes("template_worker.py")


@pytest.mark.parametrize("source", TOO_LONG)
def test_lines_14_and_21_a_template_that_takes_too_long_is_stopped(source: str) -> None:
    with pytest.raises(TemplateLimitError, match=r"takes more than 0\.4 s: "):
        ChatTemplate({"default": source}, {}).render(MESSAGES)


@pytest.mark.parametrize("source", TOO_LARGE)
def test_lines_14_and_21_a_template_that_takes_too_much_memory_is_stopped(source: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(TemplateLimitError, match=r"takes more than (192 MiB|0\.4 s)"):
        ChatTemplate({"default": source}, {}).render(MESSAGES[:1])
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert RENDER_MEMORY + (64 << 20) <= 256 << 20


def test_line_21_a_template_that_writes_without_end_is_stopped() -> None:
    source = "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"
    with pytest.raises(TokenizerError, match="more than 16777216 characters"):
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


def test_line_21_one_that_takes_too_long_with_tool_calls_is_tried_once_and_not_in_every_style() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tried = children()
    with pytest.raises(TemplateLimitError):
        ChatTemplate({"default": TOO_LONG[1]}, {}).render([{"role": "assistant", "tool_calls": [call]}])
    assert len(children() - tried) <= 1


def test_a_process_serves_one_after_another_and_is_replaced_when_it_was_stopped(own: TemplateProcesses) -> None:
    before = children()
    assert [own.render("{{ a }}", {"a": i}) for i in range(3)] == ["0", "1", "2"]
    (first,) = children() - before
    with pytest.raises(TokenizerError, match="failed: no"):
        own.render("{{ raise_exception('no') }}", {})
    assert children() - before == {first}
    with pytest.raises(TemplateLimitError):
        own.render(TOO_LONG[1], {})
    assert own.render("{{ a }}", {"a": 4}) == "4"
    (second,) = children() - before
    assert second != first


def test_a_process_that_was_killed_from_outside_is_replaced(own: TemplateProcesses) -> None:
    before = children()
    own.render("", {})
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert own.render("{{ 1 + 1 }}", {}) == "2"


def test_many_threads_share_a_bounded_number_of_processes(own: TemplateProcesses) -> None:
    before, most = children(), 0
    with ThreadPoolExecutor(16) as pool:
        answers = [
            pool.submit(own.render, "{% for i in range(3000) %}{% endfor %}{{ a }}", {"a": i}) for i in range(64)
        ]
        while not all(answer.done() for answer in answers):
            most = max(most, len(children() - before))
    assert [answer.result() for answer in answers] == [str(i) for i in range(64)]
    assert 1 <= most <= template_process.MAX_PROCESSES


def test_text_that_is_no_valid_unicode_comes_back_as_it_is(own: TemplateProcesses) -> None:
    text = "\ud800 \x00 \U0001f600 ü"
    assert own.render("{{ a }}", {"a": text}) == text


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_has_processes_of_its_own(own: TemplateProcesses) -> None:
    own.render("", {})
    reading, writing = os.pipe()
    with own._slots:  # as if a thread were amid a render
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writing, own.render("{{ a }}", {"a": "child"}).encode())
            finally:
                os._exit(0)
    os.close(writing)
    assert own.render("{{ a }}", {"a": "parent"}) == "parent"
    assert os.read(reading, 100) == b"child"
    os.close(reading)
    os.waitpid(pid, 0)


PARENT = """
import psutil, sys, time
from latentkv.text.template_process import template_processes
template_processes().render("", {})
print(psutil.Process().children()[0].pid, flush=True)
if sys.argv[1] == "busy":
    template_processes().render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
time.sleep(60)
"""


@pytest.mark.parametrize("doing", ["idle", "busy"])
def test_the_process_ends_with_the_one_that_started_it_even_by_kill_9(doing: str) -> None:
    with ForkedProgram(PARENT, doing) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
    worker.wait(timeout=20)


def test_line_14_it_is_told_nothing_of_the_environment(own: TemplateProcesses, monkeypatch) -> None:
    monkeypatch.setenv("LATENTKV_API_KEYS", "a-secret")
    before = children()
    own.render("", {})
    (pid,) = children() - before
    assert not psutil.Process(pid).environ().keys() - {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LC_CTYPE"}


def test_line_21_others_are_served_while_a_template_takes_its_time(own: TemplateProcesses, monkeypatch) -> None:
    before = children()
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 60.0)
    with ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(own.render, TOO_LONG[2], {})
        while not (busy := children() - before):
            time.sleep(0.001)
        assert own.render("{{ a | tojson }}", {"a": [1, None]}) == json.dumps([1, None])
        assert not bomb.done()
        os.kill(busy.pop(), signal.SIGKILL)
        with pytest.raises(TemplateLimitError, match="was stopped"):
            bomb.result()


def test_all_templates_share_their_processes() -> None:
    assert template_processes() is template_processes()
