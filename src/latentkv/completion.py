"""What came out: the engine's tokens as text, whole (`Completion`) or as they come (`Piece`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from latentkv.engine import Event, FinishReason, Request, SamplingParams, TokenLogprobs
from latentkv.engine.thread import EngineThread, Submission
from latentkv.text import StopMatcher, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Completion:
    """What came out of one prompt.

    Attributes:
        text: the new text, cut before a stop string; "" where the model has no tokenizer.
        token_ids: every new token, the end token or those of a stop string included.
        logprobs: one entry a new token, None unless asked for.
        finish_reason: "stop" (an end token or a stop string) or "length" (max_tokens or the context is used up).
        prompt_token_ids: what the model read.
        seed: of the sampling; the same seed gives the same text again.
        prompt_logprobs: of the prompt's tokens but the first, None unless asked for.
        cached_tokens: of the prompt's tokens, those that did not have to be read.
        stop_string: of `SamplingParams.stop`, the one that ended the text, if one did.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    seed: int
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    stop_string: str | None = None


@dataclass(frozen=True)
class Piece:
    """What one step adds to a streamed completion.

    Attributes:
        text: whole characters that are certain to stay, often none.
        token_ids: the new tokens.
        logprobs: one entry a new token, None unless asked for.
        prompt_logprobs: on the first piece, of the prompt's tokens but the first, None unless asked for.
        finish_reason: set on the last piece.
        cached_tokens: on the first piece: of the prompt's tokens, those that did not have to be read.
        stop_string: on the last piece: of `SamplingParams.stop`, the one that ended the text, if one did.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    stop_string: str | None = None


class TextOutput:
    """The tokens of one request as text, stop strings cut off.

    Args:
        tokenizer: None gives no text.
        request: whose tokens will come.
        keep: special tokens that stay in the text, as `StreamDecoder` takes them.
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request, keep: Collection[str] = ()) -> None:
        self._stops = StopMatcher(request.params.stop)
        self._decoder = StreamDecoder(tokenizer, keep=keep) if tokenizer else None
        self._text = ""
        self._of_prompt = ""
        if self._decoder and tokenizer:
            # Decoding begins with the prompt's last token, because decoders drop the space before a first word.
            last = request.prompt_token_ids[-1]
            if not self._decoder.push(last):
                self._of_prompt = tokenizer.decode([last])

    def push(self, token_id: int) -> bool:
        """Take the next token; True when a stop string is complete."""
        if self._decoder:
            self._add(self._decoder.push(token_id))
        return self._stops.matched is not None

    def finish(self) -> bool:
        """Take the end; True when the text ended in a stop string."""
        if self._decoder and self._stops.matched is None:
            self._add(self._decoder.finish())
            self._text += self._stops.finish()
        return self._stops.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that the text ended in."""
        return self._stops.matched

    def take(self) -> str:
        """The text that became certain since it was last taken."""
        text, self._text = self._text, ""
        return text

    def _add(self, text: str) -> None:
        if text and self._of_prompt:
            text, self._of_prompt = text.removeprefix(self._of_prompt), ""
        self._text += self._stops.push(text)


def piece_of(event: Event, output: TextOutput) -> Piece:
    """What an event adds to the text; `output` was told of its token already."""
    reason = event.finish_reason
    if reason and output.finish():
        reason = "stop"
    logprobs = None if event.logprobs is None else [event.logprobs]
    stop = output.stop_string if reason else None
    return Piece(output.take(), [event.token_id], logprobs, event.prompt_logprobs, reason, event.cached_tokens, stop)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one request that follow one another, as one."""
    if len(pieces) == 1:
        return pieces[0]
    first, last = pieces[0], pieces[-1]
    return Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        None if first.logprobs is None else [entry for piece in pieces for entry in piece.logprobs or ()],
        first.prompt_logprobs,
        last.finish_reason,
        first.cached_tokens,
        last.stop_string,
    )


Deliver = Callable[[int, "Piece | Exception"], None]
"""Takes (which request, what is new of it), in the engine's thread: it must be quick."""


def submit_for_text(
    thread: EngineThread,
    requests: Sequence[Request],
    outputs: Sequence[TextOutput],
    deliver: Deliver,
    *,
    salt: str = "",
) -> list[int]:
    """Let requests run, all or none; what comes out of each is delivered as text.

    Args:
        thread: of the engine.
        requests: what to run.
        outputs: one a request, new.
        deliver: called with each piece; the last of a request has a finish_reason or is an error.
        salt: as in `EngineThread.submit`.

    Returns:
        A ticket a request, to give it up by.

    Raises:
        LatentKVError: as `EngineThread.submit`.
    """
    pairs = zip(requests, outputs, strict=True)
    readers = [_Reader(index, output, deliver) for index, (_, output) in enumerate(pairs)]
    return thread.submit_all(
        [Submission(request, reader, reader.ends_text) for request, reader in zip(requests, readers, strict=True)],
        salt=salt,
    )


class _Reader:
    """Hears of one request in the engine's thread, amid steps of many: what it raises must not harm the others."""

    def __init__(self, index: int, output: TextOutput, deliver: Deliver) -> None:
        self._index = index
        self._output = output
        self._deliver = deliver
        self._failure: Exception | None = None

    def ends_text(self, token: int) -> bool:
        """Take the next token; True ends the request."""
        try:
            return self._output.push(token)
        except Exception as error:
            self._failure = error
            return True

    def __call__(self, event: Event | Exception) -> None:
        """Deliver what an event adds to the text."""
        if self._failure is not None:
            event = self._failure
        try:
            piece = event if isinstance(event, Exception) else piece_of(event, self._output)
        except Exception as error:
            piece = error
        self._deliver(self._index, piece)


def join_pieces(request: Request, pieces: list[Piece]) -> Completion:
    """All pieces of one request, put together."""
    whole = joined(pieces)
    return Completion(
        text=whole.text,
        token_ids=list(whole.token_ids),
        logprobs=whole.logprobs,
        finish_reason=whole.finish_reason or "length",
        prompt_token_ids=list(request.prompt_token_ids),
        seed=request.seed,
        prompt_logprobs=whole.prompt_logprobs,
        cached_tokens=whole.cached_tokens or 0,
        stop_string=whole.stop_string,
    )


def best_of(completions: list[Completion], params: SamplingParams) -> list[Completion]:
    """The `n` likeliest a token of all completions of a prompt, or all where as many were made."""
    if len(completions) == params.n:
        return completions
    ranked = sorted(completions, key=_mean_logprob, reverse=True)[: params.n]
    return ranked if params.logprobs is not None else [replace(each, logprobs=None) for each in ranked]


def _mean_logprob(completion: Completion) -> float:
    logprobs = [entry.logprob for entry in completion.logprobs or ()]
    return sum(logprobs) / len(logprobs)
