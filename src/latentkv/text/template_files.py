"""Where a folder keeps its chat templates."""

from pathlib import Path
from typing import Any, cast

from latentkv.errors import TokenizerError


def read_templates(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> dict[str, str]:
    """Jinja sources by name, from the first of these that there is.

    Files of their own (`chat_template.jinja`, `additional_chat_templates/*.jinja`), `chat_template` of
    `tokenizer_config.json`, and the same key of `chat_template.json`, which multimodal checkpoints have.

    Args:
        folder: of the checkpoint.
        config: its `tokenizer_config.json`.
        processor: its `chat_template.json`.

    Raises:
        TokenizerError: a file cannot be read, or holds something else than templates.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    if config.get("chat_template") is not None:
        return _inline(config["chat_template"], "tokenizer_config.json")
    if processor and "chat_template" not in processor:
        raise TokenizerError(
            f"chat_template.json of {folder} has no chat_template, only {', '.join(sorted(processor))[:80]}: "
            "put the template there, or into a chat_template.jinja."
        )
    return {} if processor.get("chat_template") is None else _inline(processor["chat_template"], "chat_template.json")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"Cannot read the chat template {path}: {error}.") from error


def _inline(value: Any, file: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [cast("dict[str, Any]", entry) for entry in cast("list[Any]", value) if isinstance(entry, dict)]
        if len(entries) == len(cast("list[Any]", value)):
            value = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(value, dict):
        sources = cast("dict[Any, Any]", value)
        if all(isinstance(name, str) and isinstance(source, str) for name, source in sources.items()):
            return cast("dict[str, str]", sources)
    raise TokenizerError(
        f"{file}: chat_template must be a jinja template, an object of named ones, or a list of "
        f'{{"name": ..., "template": ...}}, not {value!r:.60}.'
    )
