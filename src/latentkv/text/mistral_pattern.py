"""The pattern of Mistral's newer tokenizers, which some published `tokenizer.json` files have wrong."""

from typing import Any, cast

from latentkv.text.known_patterns import TEKKEN

MODEL_TYPES = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
SMALLEST_VOCABULARY = 100_000


def fix_mistral_pattern(content: dict[str, Any], config: dict[str, Any]) -> bool:
    """Puts the right pattern in, where `fix_mistral_regex` asks for it and `transformers` would do so.

    That is for large vocabularies beside a config.json of one of Mistral's models that a version before 5 wrote: later
    ones wrote the right pattern.

    Args:
        content: of the tokenizer.json; is changed in place.
        config: the model's config.json.

    Returns:
        Whether it was changed.
    """
    cutting = content.get("pre_tokenizer")
    if not isinstance(cutting, dict) or _vocabulary_size(content) <= SMALLEST_VOCABULARY or not config:
        return False
    version, model_type = config.get("transformers_version"), config.get("model_type")
    if (version and str(version).split(".")[0] not in ("0", "1", "2", "3", "4")) or (
        model_type is not None and model_type not in MODEL_TYPES
    ):
        return False
    # How these models cut text: a fact of theirs, stated by Mistral in tekken.json.
    split = {"type": "Split", "pattern": {"Regex": TEKKEN}, "behavior": "Isolated", "invert": False}
    match cast("dict[str, Any]", cutting):
        case {"type": "Sequence", "pretokenizers": [_, *others]}:
            steps = [split, *others]
        case {"type": "Metaspace"}:
            steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
        case other:
            steps = [split, other]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return True


def _vocabulary_size(content: dict[str, Any]) -> int:
    match content:
        case {"model": {"vocab": dict() | list() as vocab}, "added_tokens": list() as added}:
            names = {piece[0] if isinstance(piece, list) else piece for piece in vocab}
            return len(names | {token.get("content") for token in added if isinstance(token, dict)})
        case _:
            return 0
