"""docs/help.md says what the program says."""

from pathlib import Path

from latentkv.cli.help_page import help_page

PAGE = Path(__file__).parents[2] / "docs" / "help.md"


def test_the_page_is_what_the_program_says():
    assert PAGE.read_text() == help_page(), "write it anew: python -m latentkv.cli.help_page > docs/help.md"
