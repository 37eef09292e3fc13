"""What a checkpoint's `generation_config.json` recommends for sampling, as defaults of `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from latentkv.errors import ConfigError, RequestError
from latentkv.json_files import read_json
from latentkv.sampling_params import SamplingParams

FILE = "generation_config.json"
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NONE: Mapping[str, Any] = MappingProxyType({})
_KEEP_ALL = -1
"""`top_k` of vLLM's, for what is 0 here."""


def sampling_defaults(asked: str | Path, model: Path) -> Mapping[str, Any]:
    """Defaults of `SamplingParams`, by the names of its fields; what is not named has none.

    Args:
        asked: "auto" reads the model's own file, "none" reads none; anything else is a folder with such a file, or one.
        model: folder of the model, or its GGUF file, which recommends nothing.

    Raises:
        ConfigError: the file that was asked for is missing, or a value of it is out of range.
    """
    is_own = str(asked) == "auto"
    if str(asked) == "none":
        return NONE
    file = model / FILE if is_own else Path(asked).expanduser()
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        if is_own:
            return NONE
        raise ConfigError(f'There is no {file}: name a folder that has a {FILE}, or say "auto" or "none".')
    return MappingProxyType(_read(file))


def describe(defaults: Mapping[str, Any]) -> str:
    """The defaults for one line: "temperature 0.6, top_p 0.95"."""
    return ", ".join(f"{name} {value:g}" for name, value in defaults.items())


def _read(file: Path) -> dict[str, Any]:
    given = read_json(file, ConfigError)
    found: dict[str, Any] = {name: given[name] for name in NAMES if given.get(name) is not None}
    if given.get("do_sample") is False:  # whatever else it says then is what transformers passes over, too
        found = {"temperature": 0.0, **{name: value for name, value in found.items() if name == "repetition_penalty"}}
    if found.get("top_k") == _KEEP_ALL:
        found["top_k"] = 0
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ConfigError(
            f'{file}: {str(error).rstrip(".")}; correct it, or load with generation_config="none".'
        ) from None
    return found
