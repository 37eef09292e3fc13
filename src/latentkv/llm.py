"""`LLM`: load a model once, then generate, chat and score with it."""

from __future__ import annotations

import inspect
import weakref
from collections import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from torch import Tensor

from latentkv.completion import Completion, Piece, TextOutput, best_of, join_pieces, submit_for_text
from latentkv.engine import Constraint, Request, SamplingParams, Structure
from latentkv.engine.request import validate_token_ids
from latentkv.engine.scoring import score_text, sequence_logits
from latentkv.engine.thread import EngineThread
from latentkv.engine.worker import Worker
from latentkv.errors import EngineStoppedError, RankError, RequestError
from latentkv.llm_loading import load
from latentkv.llm_options import LoadOptions, named_end_ids
from latentkv.options import LLMOptions
from latentkv.parallel.process import prepare_process
from latentkv.prediction import Perplexity, Prediction
from latentkv.progress import progress_bar
from latentkv.text import Tokenizer
from latentkv.text.chat import text_length

if TYPE_CHECKING:
    from latentkv.text.grammar import GrammarCompiler

__all__ = ["LLM", "Completion", "Perplexity", "Piece", "Prediction"]

Prompt = str | Sequence[int]
_P = ParamSpec("_P")
_S = TypeVar("_S")

_LEFT_OUT = 4
"""Of so many characters of a conversation a chat template may write only one: some leave earlier reasoning out."""

# How the plain chat template opens the user's next turn; a model without chat training may well write it itself.
_PLAIN_NEXT_TURN = "\n\nUser:"


def _with_arguments_of(
    options: Callable[_P, LLMOptions],
) -> Callable[[Callable[[_S, LLMOptions], None]], Callable[Concatenate[_S, _P], None]]:
    """Let a method that takes options take their arguments instead, for readers, completion and type checkers alike."""

    def decorate(method: Callable[[_S, LLMOptions], None]) -> Callable[Concatenate[_S, _P], None]:
        def call(self: _S, *args: _P.args, **named: _P.kwargs) -> None:
            method(self, options(*args, **named))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(options).parameters.values()
        call.__signature__ = inspect.Signature([own, *parameters])  # pyright: ignore[reportFunctionMemberAccess]
        return call

    return decorate


class LLM:
    """A language model, loaded once, for any number of threads.

    It is loaded and run in a thread of its own, and requests of several threads share its steps.

    Its arguments are the fields of `LLMOptions`: `LLM("path/to/model", weights="int8", kv_cache_bytes=4 << 30)`. In all
    ranks but the first of a model in several processes this call does not return: it serves the first one, and ends
    the process (`SystemExit`) when that has ended.

    Attributes:
        folder: where the model was read from.
        config: what the model is.
        tokenizer: None for a folder without one, which serves token ids only.
        decoder: the model itself.
        cache: the paged cache; `cache.bytes_per_token` counts all layers, `cache.allocated_bytes` what is taken.
        max_context: as asked, or the model's.
        engine: what requests go through; `thread` alone may use it while there are any.
        thread: where the model was loaded and is run.
        store: what `cache_dir` holds, if there is one.
        packed_file: what the weights are mapped from, if they are.
        sampling_defaults: values that `SamplingParams` takes where it says None, by name, as `generation_config` has
            them; what is not named there changes nothing.
        ranks: this process among those that run the model together, if there are several.

    Raises:
        ConfigError: there is no such model, or it cannot be run as asked.
        CheckpointError: its weights are missing or damaged.
        TokenizerError: its tokenizer cannot be read or does not match it.
        CacheError: the cache does not fit, or `cache_dir` or `packed_dir` cannot be used.
        RankError: another process of the model is gone, or did not come.
    """

    @_with_arguments_of(LLMOptions)
    def __init__(self, asked: LLMOptions) -> None:
        options = LoadOptions.of(asked)
        if options.num_ranks > 1:
            prepare_process()
        worker = Worker(threads=options.threads)
        weakref.finalize(self, worker.stop)
        try:
            loaded = worker.call(lambda: load(options))
        except BaseException:
            worker.stop()
            raise
        self.folder, self.config, self.tokenizer = loaded.folder, loaded.config, loaded.tokenizer
        self.decoder, self.packed_file = loaded.decoder, loaded.packed_file
        self.cache, self.max_context, self.store = loaded.cache, loaded.max_context, loaded.store
        self.engine, self.ranks = loaded.engine, loaded.ranks
        self.sampling_defaults = loaded.sampling_defaults
        self.thread = EngineThread(
            self.engine,
            max_open=None,
            stall_seconds=None,
            worker=worker,
            why_late=self.ranks.watch.late if self.ranks else None,
        )
        if self.ranks:
            self.ranks.watch.when_lost(self.thread.die_of)
        self.thread.start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete one prompt or many, together.

        Args:
            prompts: a string or a list of token ids; or a list of such.
            sampling_params: for all prompts, or one for each; None is `SamplingParams()`.
            progress: show a bar on stderr.

        Returns:
            One completion a prompt, in order; where `n` asks for several, those of a prompt one after another.

        Raises:
            RequestError: a prompt or a parameter is out of range, or a structure cannot be compiled; then nothing has
                run.
        """
        requests = self._requests(_as_list(prompts), sampling_params)
        choices = [choice for request in requests for choice in request.choices()]
        pieces: list[list[Piece]] = [[] for _ in choices]
        with (
            closing(self._run(choices, whole=not progress)) as steps,
            progress_bar(len(choices), shown=progress) as bar,
        ):
            for index, new in steps:
                pieces[index] += new
                bar.add(sum(len(piece.token_ids) for piece in new), finished=new[-1].finish_reason is not None)
        completions = iter([join_pieces(choice, parts) for choice, parts in zip(choices, pieces, strict=True)])
        return [
            completion
            for request in requests
            for completion in best_of(list(islice(completions, request.params.num_choices)), request.params)
        ]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Piece]:
        """Complete one prompt, a piece at a time: never half a character, never text of or past a stop string.

        The pieces together are what `generate` returns. Dropping the iterator ends the completion.

        Raises:
            RequestError: as `generate`, at once; or several completions were asked for.
        """
        request = self.request(prompt, sampling_params)
        if request.params.num_choices > 1:
            raise RequestError("stream() gives one completion: use generate() for n or best_of above 1.")
        return (piece for _, new in self._run([request]) for piece in new)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template_variables: Any,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: dicts with "role" and "content", oldest first.
            sampling_params: as in `generate`.
            template_variables: JSON values for the checkpoint's chat template, such as enable_thinking=False.

        Raises:
            RequestError: as `generate`.
            TokenizerError: the messages are malformed, or the template refuses them.
        """
        prompt = self.chat_tokens(self.chat_text(messages, **template_variables))
        return self.generate(prompt, self.chat_params(sampling_params))[0]

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template_variables: Any,
    ) -> Iterator[Piece]:
        """As `chat`, a piece at a time."""
        prompt = self.chat_tokens(self.chat_text(messages, **template_variables))
        return self.stream(prompt, self.chat_params(sampling_params))

    def request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Request:
        """What `generate` would run, validated.

        Raises:
            RequestError: as `generate`.
        """
        params = _params(sampling_params).with_defaults(self.sampling_defaults)
        if params.stop:
            self._require_tokenizer("A stop string")
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        return Request.create(
            ids,
            params,
            vocab_size=self.config.vocab_size,
            max_context=self.max_context,
            constraint=None if params.structure is None else self.compile(params.structure),
        )

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **template_variables: Any) -> str:
        """A conversation as the one text that the model continues.

        With `add_generation_prompt=False` it opens no answer; with `continue_final_message=True` it ends with the text
        of the last message.

        Raises:
            RequestError: the model has no tokenizer.
            TokenizerError: as `chat`.
        """
        tokenizer = self._require_tokenizer("A conversation")
        self.require_not_too_long(text_length(messages), _LEFT_OUT)
        return tokenizer.apply_chat_template(messages, **template_variables)

    @property
    def unnamed_turn_end(self) -> str | None:
        """The token that ends completions because the chat template closes turns with it, and no file names it."""
        added = self.engine.eos_ids - named_end_ids(self.config, self.tokenizer)
        return self.tokenizer.piece(min(added)) if self.tokenizer and added else None

    def chat_tokens(self, text: str, *, add_bos: bool = False) -> list[int]:
        """The token ids of what `chat_text` gave, which has its begin token already where it needs one."""
        tokenizer = self._require_tokenizer("A conversation")
        self.require_not_too_long(len(text))
        return tokenizer.encode(text, add_bos=add_bos, allow_special=True)

    def chat_params(self, sampling_params: SamplingParams | None = None) -> SamplingParams:
        """What `chat` makes of its parameters: where a model knows no turns, the next one's opening is a stop."""
        params = _params(sampling_params)
        if self._require_tokenizer("A conversation").chat_template_source == "plain":
            params = replace(params, stop=(*params.stop, _PLAIN_NEXT_TURN))
        return params

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [T, V] that follow each of `token_ids`, read through the cache.

        Raises:
            RequestError: there are none, more than max_context, or some outside the vocabulary.
        """
        ids = validate_token_ids(token_ids, vocab_size=self.config.vocab_size)
        if len(ids) > self.max_context:
            raise RequestError(f"{len(ids):,} tokens do not fit into the context of {self.max_context:,}: give fewer.")
        return self.thread.call(lambda: sequence_logits(self.engine.runner, ids))

    def perplexity(self, text: str) -> Perplexity:
        """How well the model predicts `text`, as `predict` finds it."""
        return self.predict(text).perplexity

    def predict(self, text: str) -> Prediction:
        """What the model expects at each place of `text`, with BOS before it (unscored).

        A text longer than max_context is read in windows of max_context tokens at half stride; each token is scored
        once, in the first window that holds it.

        Raises:
            RequestError: the text is empty, or the model has no tokenizer, or no token to begin a text with.
        """
        tokenizer = self._require_tokenizer("A perplexity of text")
        if not isinstance(cast(object, text), str) or not text:
            raise RequestError("Perplexity needs a text of at least one character.")
        ids = [self.first_token, *tokenizer.encode(text, add_bos=False)]
        if len(ids) < 2:
            raise RequestError("The tokenizer makes no token of this text, so there is nothing to score.")
        validate_token_ids(ids, vocab_size=self.config.vocab_size)
        score = self.thread.call(lambda: score_text(self.engine.runner, ids, self.max_context))
        perplexity = Perplexity.of(score.nats, len(ids) - 1, len(text.encode()))
        return Prediction(perplexity, tuple(score.likeliest.tolist()))

    @property
    def first_token(self) -> int:
        """What stands before a text that is scored: BOS; where a model has none, an end token, which begins a text in
        training as well.

        Raises:
            RequestError: the model names neither.
        """
        named = None if self.tokenizer is None else self.tokenizer.bos_id
        for token in (named, self.config.bos_token_id, *sorted(self.config.eos_token_ids)):
            if token is not None:
                return token
        raise RequestError("The model names no BOS or EOS token to begin a text with: score token ids with logits().")

    def compile(self, structure: Structure) -> Constraint:
        """What the engine needs of a structure; kept for later requests.

        Raises:
            RequestError: it is malformed, asks for what cannot be enforced, allows no text, or is too much work; or the
                model has no tokenizer.
            TokenizerError: the tokenizer's tokens stand for no text of their own.
        """
        return self._grammars.compile(structure.kind, structure.source)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        from latentkv.text.grammar import GrammarCompiler  # a slow import that few requests need

        tokenizer = self._require_tokenizer("A structure")
        return GrammarCompiler(tokenizer, self.config.vocab_size, self.engine.eos_ids)

    def close(self) -> None:
        """Write what still waits to go into `cache_dir`, and let another process write there. The end of the program
        does so too.

        Where other processes have some of the layers, they end, and nothing can be run any more.

        Raises:
            RankError: one of these processes is gone.
        """
        try:
            self.thread.call(self.engine.close)
        except RankError:
            raise
        except EngineStoppedError:  # its thread has ended, so the engine is free
            self.engine.close()

    def _run(self, requests: Sequence[Request], *, whole: bool = False) -> abc.Generator[tuple[int, list[Piece]]]:
        """Run requests; yields (which, what is new of it), with `whole` only once it has ended.

        Raises:
            RequestError: one could not fit even into an empty cache; at once.
        """
        for request in requests:
            self.engine.require_fits(request)
        return self._pieces(requests, whole)

    def _pieces(self, requests: Sequence[Request], whole: bool) -> abc.Generator[tuple[int, list[Piece]]]:
        arrived: SimpleQueue[tuple[int, list[Piece] | Exception]] = SimpleQueue()
        collected: list[list[Piece]] = [[] for _ in requests]

        def deliver(index: int, piece: Piece | Exception) -> None:  # in the engine's thread
            if isinstance(piece, Exception):
                arrived.put((index, piece))
                return
            collected[index].append(piece)
            if piece.finish_reason or not whole:
                arrived.put((index, collected[index]))
                collected[index] = []

        outputs = [TextOutput(self.tokenizer, request) for request in requests]
        tickets = submit_for_text(self.thread, requests, outputs, deliver)
        unfinished = len(tickets)
        try:
            while unfinished:
                index, new = arrived.get()
                if isinstance(new, Exception):
                    raise new
                unfinished -= new[-1].finish_reason is not None
                yield index, new
        finally:
            if unfinished:
                for ticket in tickets:
                    self.thread.abort(ticket, wait=True)

    def _requests(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if not isinstance(sampling_params, Sequence):
            sampling_params = [_params(sampling_params)] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts came with {len(sampling_params)} sampling_params: give one, or one for each."
            )
        return [self.request(prompt, given) for prompt, given in zip(prompts, sampling_params, strict=True)]

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self._require_tokenizer("A prompt in words")
        if not prompt:
            raise RequestError("The prompt is empty: give at least one character.")
        self.require_not_too_long(len(prompt))
        return tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)

    def require_not_too_long(self, characters: int, times: int = 1) -> None:
        """Refuse a text that is `times` as long as one that could fit into the context, before time is spent on it.

        Raises:
            RequestError: it has too many characters, whatever its tokens are; or the model has no tokenizer.
        """
        most = self.max_context * self._require_tokenizer("A text").longest_token
        if characters > times * most:
            raise RequestError(
                f"The prompt has {characters:,} characters, and a context of {self.max_context:,} tokens holds at most "
                f"{most:,}: shorten it, or load the model with a larger max_context if it has one."
            )

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and {self.folder} has none: give token ids.")
        return self.tokenizer


def _params(given: SamplingParams | None) -> SamplingParams:
    if given is not None and not isinstance(cast(object, given), SamplingParams):
        raise RequestError(f"sampling_params must be SamplingParams(...) or None, not {type(given).__name__}.")
    return given or SamplingParams()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt (a string, or a list that begins with a token id) as a list of prompts."""
    if not isinstance(cast(object, prompts), Sequence):
        raise RequestError(f"A prompt is a string or a list of token ids, not {type(prompts).__name__}.")
    if not prompts:
        raise RequestError("The prompt is empty: give a string, a list of token ids, or a list of such.")
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [cast(Prompt, prompts)]
    return cast("Sequence[Prompt]", prompts)
