"""`latentkv chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from latentkv.cli.flags import Preset
from latentkv.cli.generate import OWN_DEFAULTS, Sampling
from latentkv.cli.loading import cache_summary, load_model, sampling_note, turn_end_note
from latentkv.cli.terminal import console
from latentkv.errors import LatentKVError, RequestError
from latentkv.options import LLMOptions

if TYPE_CHECKING:
    from rich.console import Console

    from latentkv.cli.conversation import Conversation

HELP = """\
/help          this list
/reset         start anew (the system message stays)
/system TEXT   set the system message; without TEXT: remove it
/save FILE     write the conversation as JSON
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer. Anything else goes to the model."""

# Marked for readline as taking no room (\001, \002), so that editing a line knows where it begins.
PROMPT = "\001\033[1;36m\002you>\001\033[0m\002 "


def chat(
    options: LLMOptions,
    /,
    sampling: Annotated[Sampling, Preset("logprobs", max_tokens=512)],
    *,
    system: str = "",
) -> None:
    """Talk with a model. Lines can also be piped in, one message each.

    Example: latentkv chat --model path/to/model --system "Answer in one sentence."

    Args:
        options: the model.
        sampling: how tokens are chosen.
        system: a system message: instructions that stay in force.
    """
    from latentkv.cli.conversation import Conversation

    llm = load_model(options)
    conversation = Conversation(llm, sampling.with_defaults(llm.sampling_defaults or OWN_DEFAULTS), system)
    notes = console(stderr=True)
    notes.print(f"{llm.folder.name}; {cache_summary(llm)}", style="dim")
    if llm.sampling_defaults:
        notes.print(sampling_note(llm), style="dim")
    if conversation.has_plain_template:
        notes.print(
            "This model has no chat template: a plain one (User: ... Assistant: ...) is used, so it may just write on.",
            style="yellow",
        )
    if llm.unnamed_turn_end is not None:
        notes.print(turn_end_note(llm.unnamed_turn_end), style="dim", markup=False)
    _Terminal(conversation, notes).run()


class _Terminal:
    """Reads lines until the end, and lets the model answer those that are no commands."""

    def __init__(self, conversation: Conversation, notes: Console) -> None:
        self.conversation = conversation
        self.notes = notes
        self.interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Talk until /quit or the end of the input. Errors end it only where no one is there to try again."""
        if self.interactive:
            with suppress(ImportError):  # where there is one, it gives input() line editing and history
                import_module("readline")
            self.notes.print("/help lists the commands.", style="dim")
        while True:
            try:
                line = self._read()
                if line is None or not self._obey(line):
                    return
            except (LatentKVError, OSError) as error:
                if not self.interactive:
                    raise
                self.notes.print(f"error: {error}", style="red", markup=False)

    def _read(self) -> str | None:
        """The next line that says something; None at the end of the input."""
        while True:
            try:
                line = input(PROMPT if self.interactive else "").strip()
            except EOFError:
                return None
            except UnicodeDecodeError as error:
                raise RequestError(f"The input is not UTF-8 text ({error.reason} at byte {error.start}).") from error
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.notes.print("\n/quit or Ctrl-D leaves.", style="dim")
                continue
            if line:
                return line

    def _obey(self, line: str) -> bool:
        """Do what a line asks; False to leave."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                self.notes.print(HELP, markup=False)
            case "/reset":
                self.conversation.reset()
                self.notes.print("The conversation starts anew.", style="dim")
            case "/system":
                self.conversation.system = rest
                self.notes.print("The system message is set." if rest else "No system message any more.", style="dim")
            case "/save":
                self._save(rest)
            case _ if command.startswith("/") and command.count("/") == 1:
                self.notes.print(f"There is no command {command}; /help lists them.", style="red", markup=False)
            case _:
                self._answer(line)
        return True

    def _save(self, name: str) -> None:
        if not name:
            self.notes.print("Name a file: /save talk.json", style="red")
            return
        self.conversation.save(Path(name).expanduser())
        self.notes.print(f"Saved in {name}", style="dim", markup=False)

    def _answer(self, text: str) -> None:
        forgotten = self.conversation.say(text)
        if forgotten:
            self.notes.print(
                f"The {self.conversation.room:,} tokens that there is room for are full: "
                f"the oldest {forgotten} messages are forgotten (/reset starts anew).",
                style="yellow",
            )
        pieces = self.conversation.answer()
        started = False
        try:
            for piece in pieces:
                shown = piece if started else piece.lstrip()
                started = started or bool(shown)
                print(shown, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.notes.print(" [stopped]", style="dim", markup=False, end="")
        finally:
            pieces.close()
        print(flush=True)
