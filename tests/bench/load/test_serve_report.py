from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from latentkv.bench.load.client import Answer, Failure
from latentkv.bench.load.load import Level, LevelRun
from latentkv.bench.load.measures import LevelResult, summarise
from latentkv.bench.load.plot import plot_serve
from latentkv.bench.load.report import describe_load, latency_table, serve_remarks, throughput_table
from latentkv.bench.load.run import ServeReport

EIGHT = Level(concurrency=8)


def level(count: int = 100, failure: Failure | None = None, load: Level = EIGHT, **changes) -> LevelResult:
    answers = [
        Answer(0.0, 0.0, [] if failure else [0.1234, 0.2], 0.25, 10, None, 2, failure=failure) for _ in range(count)
    ]
    return replace(summarise(LevelRun(load, 0.0, answers, sent=count, seconds=0.5)), **changes)


def report(*levels: LevelResult, **changes) -> ServeReport:
    plain = ServeReport(
        url="http://host",
        model="org/name [v2]",
        endpoint="chat",
        fields={},
        workload={"prompt tokens": "64", "seed": 0},
        characters_per_token=4.0,
        warmup=1,
        client_cpu="A CPU",
        client_load_before=0.5,
        levels=list(levels),
        notes=[],
        interrupted=False,
    )
    return replace(plain, **changes)


def printed(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_a_quiet_measurement_needs_no_remark():
    assert serve_remarks(report(level())) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"client_share": 0.93}, "concurrency 8: the client used 93% of a core"),
        ({"latest_ms": 1234.5}, "concurrency 8: a request was sent 1,234 ms late"),
        ({"cached_share": 0.5}, "concurrency 8: the server had 50% of the prompts' tokens cached"),
        ({"completed": 99}, "p99 of fewer than 100 requests is little else than the slowest (8)."),
    ],
)
def test_numbers_that_mislead_come_with_a_remark(changes: dict, said: str):
    (remark,) = serve_remarks(report(level(**changes)))
    assert said in remark


def test_errors_an_interruption_and_notes_are_remarks():
    remarks = serve_remarks(
        report(level(failure=Failure("timeout", "slow")), level(unfinished=3), notes=["a note"], interrupted=True)
    )
    assert remarks[0] == "concurrency 8: 100 x timeout (slow)"
    assert "3 requests were cut off" in remarks[1]
    assert remarks[-1] == "a note"


def test_tables_show_names_as_they_are_and_times_with_three_digits():
    assert "org/name [v2] at http://host" in printed(throughput_table(report(level())))
    latency = printed(latency_table(report(level())))
    assert "76.6" in latency  # ms from chunk to chunk
    assert "123" in latency
    assert "123.4" not in latency


def test_a_level_where_all_failed_is_a_row_too():
    failed = report(level(failure=Failure("timeout", "slow")))
    assert "100" in printed(throughput_table(failed))
    assert printed(latency_table(failed)).count(" 0 ") == 4


def test_the_last_line_says_what_was_asked_and_from_where():
    assert describe_load(report(level())) == "/v1/chat/completions, prompt tokens 64, seed 0; client on A CPU"
    assert "load 2.5 before" in describe_load(report(level(), client_load_before=2.5))


@pytest.mark.parametrize("load", [Level(concurrency=8), Level(rate=0.5)])
@pytest.mark.parametrize("failure", [None, Failure("timeout", "slow")])
def test_anything_can_be_drawn(tmp_path: Path, load: Level, failure: Failure | None):
    plot_serve(report(level(load=load), level(load=load, failure=failure)), tmp_path / "a.png")
    plot_serve(report(level(load=load, failure=failure)), tmp_path / "b.png")
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "b.png"}
