"""`latentkv run-batch` answers every line once, however often it is interrupted."""

from __future__ import annotations

import json
import signal

import pytest

from latentkv.batch.answers import AnswerFile


@pytest.fixture
def files(tmp_path):
    asked = tmp_path / "in.jsonl"
    lines = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"A {i}", "max_tokens": 3},
        }
        for i in range(6)
    ]
    lines[4]["body"]["temperature"] = -1
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return asked, tmp_path / "new" / "out.jsonl"


def answered(path):
    return {answer["custom_id"]: answer["response"] for answer in map(json.loads, path.read_text().splitlines())}


def test_every_request_is_answered_and_failures_are_counted(latentkv, model_folder, files):
    result = latentkv("run-batch", *files, "-m", model_folder, "--kv-cache-bytes", "1MiB")
    assert result.exit_code == 0, result.stderr
    assert "all 6 requests are answered" in result.stderr and "1 of them with an error" in result.stderr
    found = answered(files[1])
    assert found.keys() == {f"r{i}" for i in range(6)}
    assert [found[f"r{i}"]["status_code"] for i in range(6)] == [200, 200, 200, 200, 400, 200]
    assert found["r0"]["body"]["model"] == model_folder.name
    assert found["r0"]["request_id"]
    before = files[1].read_bytes()
    again = latentkv("run-batch", *files, "-m", "/no/such/model")  # which is not looked at: nothing is left to do
    assert again.exit_code == 0 and "all 6 requests are answered" in again.stderr
    assert files[1].read_bytes() == before


def test_what_requests_leave_open_of_sampling_is_said_once(latentkv, model_folder, files):
    command = ("run-batch", files[0], "-m", model_folder, "--kv-cache-bytes", "1MiB", "--temperature", 0)
    texts = []
    for i in range(2):
        result = latentkv(*command[:2], files[1].with_name(f"{i}.jsonl"), *command[2:])
        assert result.exit_code == 0, result.stderr
        assert "what requests leave open of sampling: temperature 0" in result.stderr
        texts.append({k: r["body"].get("choices") for k, r in answered(files[1].with_name(f"{i}.jsonl")).items()})
    assert texts[0] == texts[1]
    refused = latentkv("run-batch", *files, "-m", model_folder, "--temperature", -1)
    assert refused.exit_code == 2 and "temperature=-1" in refused.stderr


def test_after_ctrl_c_the_same_command_goes_on(latentkv, model_folder, files, monkeypatch):
    command = ("run-batch", *files, "-m", model_folder, "--kv-cache-bytes", "1MiB", "--max-running", 1)
    add, count = AnswerFile.add, 0

    def interrupted(self, *answer):
        nonlocal count
        add(self, *answer)
        count += 1
        if count == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerFile, "add", interrupted)
    result = latentkv(*command)
    assert result.exit_code == 130, result.stderr
    done = answered(files[1])
    assert f"{len(done)} of 6 requests are answered and kept" in result.stderr
    assert "the same command goes on" in result.stderr
    assert 2 <= len(done) < 6
    with files[1].open("ab") as file:
        file.write(b'{"id": "batch_req_0')
    again = latentkv(*command)
    assert again.exit_code == 0, again.stderr
    assert f"{len(done)} of 6 requests are answered" in again.stderr
    found = answered(files[1])
    assert len(found) == 6 and len(files[1].read_text().splitlines()) == 6
    assert all(found[name] == response for name, response in done.items())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda asked, out: asked.write_text(""), "holds no request"),
        (lambda asked, out: asked.write_text(asked.read_text() * 2), "line 7, has the custom_id 'r0' of line 1"),
        (
            lambda asked, out: asked.write_text(asked.read_text().replace("/v1/completions", "/v1/embeddings")),
            "line 1,",
        ),
        (lambda asked, out: out.write_text("A diary.\n"), "line 1, is not valid JSON"),
    ],
)
def test_files_are_looked_at_before_the_model(latentkv, files, damage, said):
    files[1].parent.mkdir()
    damage(*files)
    result = latentkv("run-batch", *files, "-m", "/no/such/model")
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
