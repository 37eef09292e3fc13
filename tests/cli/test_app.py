"""The command line as a program: light to start, honest exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from forked_program import MAIN, ForkedProgram, run_forked
from latentkv.cli.app import main
from latentkv.errors import ConfigError

OFFLINE = "import huggingface_hub.constants as hub; hub.HF_HUB_OFFLINE = True; "


@pytest.mark.parametrize(
    "args",
    [
        *[["--help"], ["--version"], ["plan", "--help"]],
        *(pytest.param(args, marks=pytest.mark.slow) for args in (["generate", "--help"], ["train", "-h"])),
    ],
)
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys, atexit\n"
        "heavy = ('torch', 'numpy', 'tokenizers', 'safetensors', 'huggingface_hub', 'matplotlib', 'jinja2')\n"
        "atexit.register(lambda: print('IMPORTED', [m for m in heavy if m in sys.modules]))\n"
        "from latentkv.cli.app import main\n"
        f"sys.argv[1:] = {args!r}\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "IMPORTED []" in done.stdout


def test_help_names_every_command(latentkv):
    result = latentkv("--help")
    assert result.exit_code == 0
    for command in ("generate", "chat", "plan", "inspect", "train", "bench", "doctor"):
        assert f" {command} " in result.output


def test_version_is_printed(latentkv):
    result = latentkv("--version")
    assert result.exit_code == 0
    assert result.output.startswith("latentkv ")


def test_the_module_is_the_command():
    asked = [sys.executable, "-m", "latentkv", "--version"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("latentkv ")


@pytest.mark.parametrize("args", [["nonsense"], ["bench", "nonsense"], ["plan", "--batch", "many"], ["--nonsense"]])
def test_wrong_usage_exits_with_2(latentkv, args):
    assert latentkv(*args).exit_code == 2


def test_an_error_is_one_line_on_stderr_and_exit_2():
    code, printed, said = run_forked(OFFLINE + MAIN, "plan", "no-such-model")
    assert code == 2
    assert printed == ""
    assert said.startswith("error: ") and said.count("\n") == 1


def test_debug_shows_the_traceback():
    code, _, said = run_forked(OFFLINE + MAIN, "plan", "no-such-model", "--debug")
    assert code != 0
    assert "Traceback" in said and "ConfigError" in said


@pytest.mark.parametrize("args", [["--debug", "plan", "no-such-model"], ["plan", "no-such-model", "--debug"]])
def test_debug_lets_the_error_through_wherever_it_stands(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["latentkv", *args])
    with pytest.raises(ConfigError):
        main()


def test_debug_after_a_double_dash_is_text(latentkv, model_folder):
    result = latentkv("generate", "-m", model_folder, "-n", 1, "--", "--debug")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    "args", [["generate", "hello", "-m", "no-one/no-such-model"], ["plan", "no-one/no-such-model"]]
)
def test_a_repo_that_cannot_be_fetched_is_one_line(args, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["latentkv", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "no-one/no-such-model" in error and error.count("\n") == 1


def test_interrupting_exits_with_130(model_folder):
    with ForkedProgram(MAIN, "chat", "-m", model_folder) as process:
        process.stderr.readline()  # the model is loaded, and chat waits for a line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_closed_pipe_is_no_error(model_folder):
    generate = f'"{sys.executable}" -c "{MAIN}" generate hello -m "{model_folder}" -n 50'
    done = subprocess.run(f"{generate} | true", shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
