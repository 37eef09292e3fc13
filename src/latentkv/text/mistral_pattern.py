"""The pattern of Mistral's newer tokenizers, which some published `tokenizer.json` files have wrong."""

from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

MODEL_TYPES = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
SMALLEST_VOCABULARY = 100_000
# How these models cut text: a fact of theirs, stated by Mistral in tekken.json.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fix_mistral_pattern(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Puts the right pattern in, where `fix_mistral_regex` asks for it and `transformers` would do so.

    That is for large vocabularies beside a config.json of one of Mistral's models that a version before 5 wrote: later
    ones wrote the right pattern.

    Args:
        tokenizer: is changed in place.
        config: the model's config.json.
    """
    cutting = tokenizer.pre_tokenizer
    if cutting is None or tokenizer.get_vocab_size() <= SMALLEST_VOCABULARY or not config:
        return
    version, model_type = config.get("transformers_version"), config.get("model_type")
    if (version and str(version).split(".")[0] not in ("0", "1", "2", "3", "4")) or (
        model_type is not None and model_type not in MODEL_TYPES
    ):
        return
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    if isinstance(cutting, pre_tokenizers.Sequence):
        cutting[0] = split
        return
    if isinstance(cutting, pre_tokenizers.Metaspace):
        cutting = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, cutting])
