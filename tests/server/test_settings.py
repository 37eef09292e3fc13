from pathlib import Path

import pytest

from latentkv.errors import ConfigError
from latentkv.server.settings import ServerSettings, read_keys


def test_keys_come_from_a_file_and_the_environment_each_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of alice\nalice-key-1\n\n  bob#key#22 \n  # nobody\n")
    assert read_keys(file, "carol-key-3, alice-key-1,") == ("carol-key-3", "alice-key-1", "bob#key#22")
    assert read_keys(None, None) == ()


@pytest.mark.parametrize("text", ["", "# nothing but comments\n\n"])
def test_a_file_or_a_variable_without_a_key_is_refused_rather_than_letting_everybody_in(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match="names no API key"):
        read_keys(file, None)
    with pytest.raises(ConfigError, match="empty"):
        read_keys(None, " , ")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing", None)


@pytest.mark.parametrize("key", ["hunter2", "not ascii: ä", "with\ttab-in-it"])
def test_a_key_that_could_not_be_sent_or_is_easily_guessed_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerSettings(api_keys=(key,))
    assert key not in str(caught.value)
    assert "a-good-long-key" not in repr(ServerSettings(api_keys=("a-good-long-key",)))
