"""A command's options, made of its signature: a plain function whose docstring is the help becomes one that typer runs.

- A parameter that stands before `/` is an argument, any other an option of its name; `Flag` says more where need be.
- A parameter whose type is a dataclass stands for the dataclass's fields, under a heading of its name, and so does a
  field. Before `/` those of its fields that Python takes by position are arguments too, besides being options.
- Help is what the `Args:` of the function or the `Attributes:` of the dataclass say. There `name` becomes --name,
  quotes go, and a last clause "None is all of them" becomes the default that is shown.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from latentkv.errors import LatentKVError, RequestError
from latentkv.option_types import Flag
from latentkv.ranges import Range

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_NO_FLAG = Flag()
_KINDS = (Path, str, bool, int, float)
"""What texts are made into; of several that a type allows, the first."""
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): ((?:.|\n(?!    \w+: )(?=     |\n))*)", re.MULTILINE)


class Preset:
    """How a command takes a dataclass of options: without some fields, and with other defaults.

    Args:
        without: fields that the command does not offer.
        defaults: by field, those that are the command's own; ... asks for a value.
    """

    def __init__(self, *without: str, **defaults: Any) -> None:
        self.without = without
        self.defaults = defaults

    @classmethod
    def of(cls, presets: Sequence[Preset]) -> Preset:
        """All of them as one, the last word on a field counting."""
        defaults = {name: value for preset in presets for name, value in preset.defaults.items()}
        return cls(*(name for preset in presets for name in preset.without), **defaults)


def command(function: Callable[..., object]) -> Callable[..., None]:
    """What typer is to call instead of this function."""
    hints, own = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    text, help_of = _read_docstring(function)
    taken: dict[str, _Option | _Group] = {}
    for name, parameter in own.items():
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        taken[name] = _Group.of(hints[name], positional) or _Option.of(
            name, hints[name], parameter.default, help_of.get(name, ""), None, positional
        )
    options = [option for each in taken.values() for option in each.options()]
    arguments = [option for option in options if option.positional]

    def run(ctx: typer.Context, **given: Any) -> None:
        _let_the_line_count(ctx, options, given)
        _place_arguments(ctx, arguments, given)
        values = {name: each.value(given) for name, each in taken.items()}
        unnamed = [values.pop(name) for name, each in own.items() if each.kind is each.POSITIONAL_ONLY]
        function(*unnamed, **values)

    run.__name__, run.__doc__ = function.__name__, text
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    flexible = any(option.is_option for option in arguments)
    parameters = [parameter for option in options for parameter in option.parameters(flexible)]
    run.__signature__ = inspect.Signature([context, *parameters])  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {"ctx": typer.Context}
    return run


def as_words(options: object) -> list[str]:
    """Options of a dataclass as the words of a command line, those left out that are as they would be anyway."""
    group = _Group.of(type(options), positional=False)
    words: list[str] = []
    for option in group.options() if group else ():
        value = getattr(options, option.name)
        if value != option.default:
            words += option.words(value)
    return words


@dataclass(frozen=True)
class _Group:
    """A dataclass whose fields are options, or such dataclasses in turn."""

    kind: type
    taken: Mapping[str, _Option | _Group]

    @classmethod
    def of(cls, hint: Any, positional: bool) -> _Group | None:
        """The fields that a parameter or a field of this type offers; None where it is no dataclass."""
        kind, notes = _unwrap(hint)
        if not (isinstance(kind, type) and is_dataclass(kind)):
            return None
        preset = Preset.of([note for note in notes if isinstance(note, Preset)])
        return cls(kind, dict(_fields(kind, preset, positional)))

    def options(self) -> Iterator[_Option]:
        """All of them, in order."""
        for each in self.taken.values():
            yield from each.options()

    def value(self, given: Mapping[str, Any]) -> Any:
        """The dataclass, made of what was given."""
        return self.kind(**{name: each.value(given) for name, each in self.taken.items()})


@dataclass(frozen=True)
class _Option:
    """One field or parameter as the command line has it.

    Attributes:
        kind: what its texts are made into, one of `_KINDS`.
        many: it may be given again and again.
        default: `inspect.Parameter.empty` where it must be given.
        unset: in words, what the default None (or its like) means.
        cleared: in words, what None means where `flag.without` asks for it.
        panel: the heading it stands under.
        positional: it is an argument.
    """

    name: str
    kind: type
    many: bool
    default: Any
    help: str
    unset: str | None
    cleared: str | None
    panel: str | None
    positional: bool
    flag: Flag
    range: Range | None

    @classmethod
    def of(cls, name: str, hint: Any, default: Any, help: str, panel: str | None, positional: bool) -> _Option:
        kind, notes = _unwrap(hint)
        flag = _merge([note for note in notes if isinstance(note, Flag)])
        many = get_origin(kind) in (tuple, list) and flag.read is None
        if many:
            kind = get_args(kind)[0]
        help, cleared = _cut(help, r"None (?!is )(?P<cut>\w[^.;]*)") if flag.without else (help, None)
        help, unset = (
            _cut(help, rf'"?{default}"? is (?P<cut>[^;]+)') if default is None or flag.without else (help, None)
        )
        return cls(
            name=name,
            kind=str if flag.read else _kind_of(kind),
            many=many,
            default=default,
            help=_as_help(help),
            unset=_plain(unset) if unset and (default is None or flag.without) else None,
            cleared=cleared and _as_help(cleared),
            panel=panel,
            positional=positional,
            flag=flag,
            range=next((note for note in notes if isinstance(note, Range)), None),
        )

    @property
    def is_option(self) -> bool:
        """Whether it has a flag; an argument has one where it is named."""
        return not self.positional or bool(self.flag.names)

    def options(self) -> Iterator[_Option]:
        """Itself, as a group gives all of its own."""
        yield self

    def parameters(self, flexible: bool) -> Iterator[inspect.Parameter]:
        """What typer reads; with `flexible` arguments are missed in `run`, not by typer."""
        kind: Any = list[self.kind] if self.many else self.kind
        about: dict[str, Any] = {"help": self.help, "metavar": self.flag.metavar, "show_default": self._shown()}
        if self.flag.exists:
            about |= {"exists": True, "dir_okay": not self.flag.file}
        if self.positional:
            default = None if flexible else self._default()
            argument: dict[str, Any] = {**about, "metavar": self.flag.metavar or self.name.upper()}
            yield _parameter(self.name, kind, typer.Argument(**argument), default)
        if self.is_option:
            about |= {"rich_help_panel": self.panel, "envvar": self.flag.envvar, "show_envvar": bool(self.flag.envvar)}
            if self.flag.callback:
                about |= {"callback": self.flag.callback, "is_eager": True}
            if self.range:
                about |= {"min": self.range.low, "max": None if math.isinf(self.range.high) else self.range.high}
            name, default = (f"{self.name}_option", None) if self.positional else (self.name, self._default())
            yield _parameter(name, kind, typer.Option(*self._names(), **about), default)
        if self.flag.without:
            without = typer.Option(self.flag.without, help=self.cleared, rich_help_panel=self.panel)
            yield _parameter(_python_name(self.flag.without), bool, without, False)

    def value(self, given: Mapping[str, Any]) -> Any:
        """What the function gets."""
        value = given[self.name]
        if self.flag.without and given[_python_name(self.flag.without)]:
            if value is not None:
                raise RequestError(f"{self.flag.without} excludes {self._names()[0]}: choose.")
            return None
        if value is None or (self.many and not value):
            return () if self.default is inspect.Parameter.empty else self.default
        if self.many:
            return tuple(value)
        if self.flag.read is None:
            return Path(value) if self.kind is Path else value  # its text may have been meant for another place
        try:
            return self.flag.read(value)
        except LatentKVError as error:
            raise type(error)(f"{self._names()[0]}: {error}") from None

    def words(self, value: Any) -> list[str]:
        """What makes the command line give this value."""
        name = self._names()[0].split("/")[0]
        if value is None and self.flag.without:
            return [self.flag.without]
        if self.kind is bool:
            return [name] if value else [f"--no-{name[2:]}"]
        values: Any = value if self.many else [value]
        return [word for each in values for word in (name, str(each))]

    def _names(self) -> tuple[str, ...]:
        if self.flag.names:
            return tuple(self.flag.names)
        plain = self.name.replace("_", "-")
        negative = f"/--no-{plain}" if self.kind is bool and self.default is not False else ""
        return (f"--{plain}{negative}",)

    def _default(self) -> Any:
        if self.flag.without or self.default is None or self.default == ():
            return None
        shown = self.flag.read is not None and self.default is not inspect.Parameter.empty
        return self.flag.show(self.default) if shown else self.default

    def _shown(self) -> str | bool:
        return self.default is not inspect.Parameter.empty if self.unset is None else self.unset


def _let_the_line_count(ctx: typer.Context, options: Sequence[_Option], given: dict[str, Any]) -> None:
    """Of two ways to say one thing drop that of a file of defaults, where the command line has the other."""
    for option in options:
        ways = [option.name, f"{option.name}_option", option.flag.without and _python_name(option.flag.without)]
        said = {way: ctx.get_parameter_source(way) for way in ways if way in given and given[way] not in (None, False)}
        if len({source.name for source in said.values() if source}) > 1:
            for way, source in said.items():
                if source and source.name == "DEFAULT_MAP":
                    given[way] = None


def _place_arguments(ctx: typer.Context, arguments: Sequence[_Option], given: dict[str, Any]) -> None:
    """Give each argument its text: one that is given by its flag leaves its place to those after it."""
    texts = [given[option.name] for option in arguments]
    for at, option in enumerate(arguments):
        by_flag = given.pop(f"{option.name}_option", None) if option.is_option else None
        if by_flag is not None:
            texts.insert(at, by_flag)
            if texts.pop() is not None:
                ctx.fail(f"{option.name.upper()} is given twice: as an argument and by {option.flag.names[0]}.")
    for option, text in zip(arguments, texts, strict=True):
        if text is None and option.default is inspect.Parameter.empty:
            ctx.fail(f"Missing argument '{option.name.upper()}'.")
        given[option.name] = text


def _fields(cls: type[DataclassInstance], preset: Preset, positional: bool) -> Iterator[tuple[str, _Option | _Group]]:
    """The fields of a dataclass that are offered, those of its bases under their own headings."""
    hints = get_type_hints(cls, include_extras=True)
    help_of: dict[str, str] = {}
    owner: dict[str, type] = {}
    for base in reversed(cls.__mro__):
        help_of |= _read_docstring(base)[1]
        owner |= dict.fromkeys(vars(base).get("__annotations__", {}), base)
    for field in fields(cls):
        _, notes = _unwrap(hint := hints[field.name])
        if field.name in preset.without or not field.init or not all(n.offered for n in notes if isinstance(n, Flag)):
            continue
        default = preset.defaults.get(field.name, _default_of(field))
        default = inspect.Parameter.empty if default is ... else default
        argument, heading = positional and not field.kw_only, _heading(owner[field.name], cls)
        yield (
            field.name,
            _Group.of(hint, argument)
            or _Option.of(field.name, hint, default, help_of.get(field.name, ""), heading, argument),
        )


def _default_of(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is MISSING else field.default_factory()


def _heading(owner: type, cls: type) -> str | None:
    """ "Model options" for the fields of `ModelOptions`, and for those of a base that has another kind of name."""
    below = [each.__name__ for each in reversed(cls.__mro__) if issubclass(each, owner)]
    name = next((name for name in below if name.endswith(("Options", "Params", "Settings"))), None)
    return name and re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize()


def _unwrap(hint: Any) -> tuple[Any, list[object]]:
    """A type without None and notes, and the notes; of several types the one that texts become."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        kind, more = _unwrap(inner)
        return kind, [*notes, *more]
    if get_origin(hint) in (Union, UnionType):
        members = [_unwrap(member) for member in get_args(hint) if member is not NoneType]
        best = min(members, key=lambda member: _KINDS.index(member[0]) if member[0] in _KINDS else len(_KINDS))
        return best[0], [note for member in members for note in member[1]]
    return hint, []


def _kind_of(kind: Any) -> type:
    if get_origin(kind) is Literal:
        return str
    if kind not in _KINDS:
        raise TypeError(f"No text of the command line can become a {kind}: give its Flag a way to read one.")
    return kind


def _merge(flags: Sequence[Flag]) -> Flag:
    """What several notes of one field say, the first word on each matter counting."""
    said: dict[str, Any] = {}
    for flag in flags:
        for name, value in vars(flag).items():
            if value != getattr(_NO_FLAG, name):
                said.setdefault(name, value)
    return Flag(**said)


def _parameter(name: str, kind: Any, about: object, default: Any) -> inspect.Parameter:
    if default is None:
        kind = kind | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, about], default=default)


def _python_name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _read_docstring(documented: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its sections, and the entries of Args or Attributes in one line each."""
    text, *sections = _SECTION.split(inspect.cleandoc(documented.__doc__ or ""))
    entries: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title in ("Args", "Attributes"):
            entries |= {match[1]: " ".join(match[2].split()) for match in _ENTRY.finditer(body)}
    return text.strip(), entries


def _cut(help: str, pattern: str) -> tuple[str, str | None]:
    """A clause taken out of a help text, and what of it the pattern calls `cut`."""
    match = re.search(rf"[;,.:] {pattern}(?=;|\.?$)", help)
    return (help[: match.start()] + help[match.end() :], match["cut"].rstrip(".")) if match else (help, None)


def _plain(text: str) -> str:
    """Without the marks of code: `kv_dtype` is --kv-dtype, "auto" is auto."""
    text = re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), text)
    return re.sub(r'"([\w.:-]+)"', r"\1", text)


def _as_help(text: str) -> str:
    plain = _plain(text).strip()
    return plain and plain[0].upper() + plain[1:].rstrip(".;") + "."
