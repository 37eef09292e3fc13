"""Where the assistant's turn ends, told from how the chat template writes one."""

from typing import Any

from latentkv.errors import LatentKVError
from latentkv.text.backends import Backend
from latentkv.text.chat import ChatTemplate

# Words that no template writes of its own accord.
_QUESTION, _ANSWER = "qvexorima", "awzylentu"
_MOST_AFTER = 200
"""Characters looked at behind an answer."""


def find_turn_end(template: ChatTemplate, backend: Backend) -> int | None:
    """The token that a template writes right behind an answer, spaces apart.

    Where nothing follows the last answer of a conversation, it is what stands between an answer and the next question:
    a model that was trained on such turns writes it when its own is over.

    Returns:
        Its id; None if the template writes no such token, or cannot write so plain a conversation.
    """
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    for messages in ([question, answer], [question, answer, question]):
        behind = _behind_answer(template, messages)
        if behind:
            first = backend.encode(behind[:_MOST_AFTER], frame=False, allow_special=True)[:1]
            return first[0] if first and first[0] in backend.added_ids else None
    return None


def _behind_answer(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    try:
        text = template.render(messages, add_generation_prompt=False)
    except LatentKVError:  # some templates refuse conversations of this form
        return ""
    return text.partition(_ANSWER)[2].strip()
