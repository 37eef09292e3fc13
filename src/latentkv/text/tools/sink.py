"""Where a parser puts what it reads: deltas, with the whitespace around markers left out."""

from latentkv.text.tools.deltas import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart


class Sink:
    """Collects deltas; what follows the like of it is joined to it.

    Args:
        hold_space: hold whitespace at the end of the content back, because a marker may follow that it belongs to.
    """

    def __init__(self, *, hold_space: bool) -> None:
        self.num_calls = 0
        self._content = _Trimmed(hold_space)
        self._reasoning = _Trimmed(True)
        self._out: list[tuple[Delta, list[str]]] = []

    def content(self, text: str) -> None:
        """More of the answer."""
        self._text(Content(""), self._content.feed(text))

    def reasoning(self, text: str) -> None:
        """More reasoning."""
        self._text(Reasoning(""), self._reasoning.feed(text))

    def begin_reasoning(self) -> None:
        """The tag that opens reasoning: whitespace on both sides of it goes."""
        self._content.cut()
        self._reasoning.cut()

    def end_reasoning(self) -> None:
        """The tag that closes reasoning: likewise."""
        self._reasoning.cut()
        self._content.cut()

    def start_call(self, call_id: str, name: str) -> None:
        """A call is certain."""
        self._content.cut()
        self._out.append((ToolCallStart(self.num_calls, call_id, name), []))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the call that started last."""
        self._text(ToolCallArguments(self.num_calls - 1, ""), text)

    def finish(self) -> None:
        """Gives back the whitespace that is still held."""
        self._text(Reasoning(""), self._reasoning.rest())
        self._text(Content(""), self._content.rest())

    def take(self) -> list[Delta]:
        """The deltas since they were last taken."""
        deltas: list[Delta] = []
        for delta, parts in self._out:
            match delta:
                case Content():
                    deltas.append(Content("".join(parts)))
                case Reasoning():
                    deltas.append(Reasoning("".join(parts)))
                case ToolCallArguments(index):
                    deltas.append(ToolCallArguments(index, "".join(parts)))
                case ToolCallStart():
                    deltas.append(delta)
        self._out.clear()
        return deltas

    def _text(self, kind: Delta, text: str) -> None:
        if not text:
            return
        if not self._out or self._out[-1][0] != kind:
            self._out.append((kind, []))
        self._out[-1][1].append(text)


class _Trimmed:
    """Text without the whitespace before and after cuts."""

    def __init__(self, hold: bool) -> None:
        self._hold = hold
        self._at_cut = False
        self._held: list[str] = []

    def cut(self) -> None:
        self._held.clear()
        self._at_cut = True

    def feed(self, text: str) -> str:
        if self._at_cut:
            text = text.lstrip()
            self._at_cut = not text
        if not self._hold:
            return text
        kept = text.rstrip()
        if not kept:
            self._held += [text] if text else []
            return ""
        before = self.rest()
        self._held += [text[len(kept) :]] if len(kept) < len(text) else []
        return before + kept

    def rest(self) -> str:
        rest = "".join(self._held)
        self._held.clear()
        return rest
