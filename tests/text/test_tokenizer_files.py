import json
from pathlib import Path
from typing import Any

import folders_for_text_tests as folders
import pytest
from folders_for_text_tests import CORPUS, TEXTS
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer

from latentkv.errors import TokenizerError
from latentkv.text import has_tokenizer, load_tokenizer, require_match
from latentkv.text.bpe_trainer import train_bpe
from latentkv.text.mistral_pattern import fix_mistral_pattern


def write(folder: Path, files: dict[str, Any], tokenizer: Tokenizer | None = None) -> Path:
    """A folder of settings around a byte-level tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (tokenizer or train_bpe(CORPUS, 300, special_tokens=["<s>", "</s>"])).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, content in ({"tokenizer_config.json": {}} | files).items():
        merged = config | content if name == "tokenizer_config.json" else content
        (folder / name).write_text(json.dumps(merged), encoding="utf-8")
    return folder


def check(folder: Path) -> None:
    """Ids, names and what is skipped are those of transformers."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id})
    for token in theirs.get_added_vocab():
        text = f"a {token}b{token} c"
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"]


ADDED = {"<|im_end|>": 300, "<note>": 301}
IMAGE = {"image_token": "<|media_pad|>", "video_token": "<|video|>"}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": ADDED, "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        {"added_tokens.json": ADDED, "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}},
        {"added_tokens.json": ADDED, "tokenizer_config.json": {"extra_special_tokens": ["<note>"]}},
        {"tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<a>", "<b>"]}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<a>", "<b>"]}},
        {"tokenizer_config.json": {"extra_special_tokens": IMAGE}},
        {"tokenizer_config.json": {"model_specific_special_tokens": IMAGE}},
        {"tokenizer_config.json": IMAGE},
        {"special_tokens_map.json": {"extra_special_tokens": ["<a>"]}},
    ],
    ids=str,
)
def test_tokens_that_other_files_name_are_those_of_transformers(tmp_path: Path, files: dict[str, Any]) -> None:
    check(write(tmp_path / "t", files))


def test_a_plain_token_of_tokenizer_json_becomes_special_where_it_is_named(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 300, special_tokens=["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<|media_pad|>", special=False)])
    folder = write(tmp_path / "t", {"tokenizer_config.json": {"extra_special_tokens": IMAGE}}, tokenizer)
    ours = load_tokenizer(folder)
    assert ours.decode([300]) == ""
    assert ours.vocab_size == 302


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"<x>": 400}}, r"added_tokens\.json gives the token '<x>' the id 400"),
        ({"added_tokens.json": {"<x>": True}}, r"added_tokens\.json: '<x>' must be a token id"),
        ({"added_tokens.json": {"<x>": "300"}}, r"added_tokens\.json: '<x>' must be a token id"),
        ({"added_tokens.json": {"<x>": -1}}, r"added_tokens\.json: '<x>' must have a token id"),
        ({"added_tokens.json": {"<x>": 300, "<y>": 300}}, "the same id 300"),
        ({"tokenizer_config.json": {"extra_special_tokens": "<x>"}}, "extra_special_tokens must hold tokens"),
        ({"tokenizer_config.json": {"extra_special_tokens": [3]}}, "extra_special_tokens must be a token's text"),
        ({"tokenizer_config.json": {"model_specific_special_tokens": ["<x>"]}}, "must hold tokens"),
        ({"tokenizer_config.json": {"fix_mistral_regex": "yes"}}, "fix_mistral_regex must be true or false"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "must be an object of tokens"),
        ({"tokenizer_config.json": {"tokenizer_class": 3}}, "tokenizer_class must be the name of a class"),
        ({"chat_template.json": {"template": "x"}}, r"chat_template\.json of .* has no chat_template"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_had_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(write(tmp_path / "t", files))


def test_a_token_for_padding_may_lie_past_the_embeddings_and_one_that_ends_texts_may_not(tmp_path: Path) -> None:
    padded = load_tokenizer(write(tmp_path / "p", {"tokenizer_config.json": {"pad_token": "<pad>"}}))
    assert padded.vocab_size == 301
    require_match(padded, 300)
    with pytest.raises(TokenizerError, match="ids go up to 299, the model's vocabulary has 299"):
        require_match(padded, 299)
    ended = load_tokenizer(write(tmp_path / "e", {"tokenizer_config.json": {"eos_token": "<|im_end|>"}}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: eos_token '<\|im_end\|>' has the id 300"):
        require_match(ended, 300)


def test_chat_templates_come_from_the_first_place_that_has_one(tmp_path: Path) -> None:
    def written() -> str:
        return load_tokenizer(tmp_path / "t").apply_chat_template([{"role": "user", "content": "hi"}])

    folder = write(tmp_path / "t", {"chat_template.json": {"chat_template": "processor"}})
    assert written() == "processor"
    (folder / "chat_template.json").write_text('{"chat_template": [{"name": "default", "template": "list"}]}')
    assert written() == "list"
    write(folder, {"tokenizer_config.json": {"chat_template": "config"}})
    assert written() == "config"
    (folder / "chat_template.jinja").write_text("jinja")
    assert written() == "jinja"


def vocab_merges(folder: Path, files: dict[str, Any]) -> Path:
    write(folder, files)
    train_bpe(CORPUS, 420, special_tokens=["<s>", "</s>"]).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, "deepseek_v3"),
        ({"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True, "add_prefix_space": True}, "deepseek_v3"),
        ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "pad_token": "<|pad|>"}, "deepseek_v3"),
        ({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}, "qwen2"),
    ],
)
def test_vocab_and_merges_are_read_as_in_transformers(tmp_path: Path, config: dict[str, Any], model_type: str) -> None:
    folder = vocab_merges(tmp_path / "v", {"tokenizer_config.json": config, "config.json": {"model_type": model_type}})
    check(folder)


def test_vocab_and_merges_alone_are_read_as_tokenizers_reads_them(tmp_path: Path) -> None:
    folder = vocab_merges(tmp_path / "v", {"tokenizer_config.json": {"bos_token": None, "eos_token": None}})
    ours = load_tokenizer(folder)
    theirs = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert ours.eos_ids == set()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("merges.txt", None, r"has vocab\.json but no merges\.txt"),
        ("vocab.json", None, r"has merges\.txt but no vocab\.json"),
        ("merges.txt", "#version: 0.2\na b c\n", r"merges\.txt, line 2, is no merge"),
        ("merges.txt", "zz zz\n", r"merges\.txt does not fit the vocab\.json"),
        ("vocab.json", "[]", "holds no JSON object but a list"),
        ("vocab.json", '{"a": true}', r"vocab\.json: 'a' must be a token id"),
        ("vocab.json", '{"a": 0, "b": 0}', "ids twice or far apart"),
        ("vocab.json", '{"a": 0, "b": 5000000}', "ids twice or far apart"),
        ("vocab.json", '{"a": 0}', "no byte-level vocabulary"),
        ("tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizer"}', "of a CLIPTokenizer, which is not read here"),
    ],
)
def test_vocab_and_merges_that_cannot_be_used_are_named(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    folder = vocab_merges(tmp_path / "v", {})
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    assert has_tokenizer(folder)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tekken.json", "vocab.txt"])
def test_tokenizers_of_other_kinds_are_named_with_what_helps(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert has_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=rf"has a {name} .*AutoTokenizer\.from_pretrained.*save_pretrained"):
        load_tokenizer(tmp_path)


def large() -> Tokenizer:
    """A vocabulary of the size from which transformers looks at Mistral's pattern."""
    content = json.loads(train_bpe(CORPUS, 300, special_tokens=["<s>", "</s>"]).to_str())
    content["model"]["vocab"] |= {f"\0{i}": i for i in range(300, 100_301)}
    content["post_processor"] = None
    return Tokenizer.from_str(json.dumps(content))


def test_mistrals_pattern_is_put_right_where_the_files_ask_for_it(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "transformers_version": "4.57.2"}
    flag = {"fix_mistral_regex": True}
    folder = write(tmp_path / "m", {"config.json": config, "tokenizer_config.json": flag}, tokenizer := large())
    text = "'tt MyClass l'homme 123/x/\n"  # a contraction of the wrong pattern, and none of the right one
    fixed = load_tokenizer(folder).encode(text)
    assert fixed == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert fixed != tokenizer.encode(text).ids


def test_mistrals_pattern_is_left_where_it_is_not_meant() -> None:
    content = json.loads(large().to_str())
    before = json.dumps(content)
    for config in ({"model_type": "mistral", "transformers_version": "5.1.0"}, {"model_type": "llama"}, {}):
        assert not fix_mistral_pattern(content, config)
        assert json.dumps(content) == before
    small = json.loads(train_bpe(CORPUS, 300, special_tokens=["<s>", "</s>"]).to_str())
    assert not fix_mistral_pattern(small, {"model_type": "mistral"})
    assert fix_mistral_pattern(content, {"model_type": "mistral"})
    assert json.dumps(content) != before


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", "</s>"),
        # Nothing closes an answer: the next question's opening does.
        ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{% endif %}{{ m.content }}{% endfor %}", "<|user|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('only system messages') }}", None),
        ("{% for m in messages %}{{ m.content }} the end<|im_end|>{% endfor %}", None),
        (None, None),
    ],
)
def test_the_turn_end_is_what_the_template_writes_behind_an_answer(
    tmp_path: Path, template: str | None, token: str | None
) -> None:
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>"]
    files = {} if template is None else {"tokenizer_config.json": {"chat_template": template}}
    tokenizer = load_tokenizer(write(tmp_path / "t", files, train_bpe(CORPUS, 300, special_tokens=special)))
    assert tokenizer.turn_end_id == (None if token is None else tokenizer.token_id(token))


def test_a_kimi_folder_ends_turns_where_its_template_does(tmp_path: Path) -> None:
    folder = folders.kimi(tmp_path / "k")
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.turn_end_id == tokenizer.token_id("<|im_end|>")
    assert tokenizer.turn_end_id not in tokenizer.eos_ids
