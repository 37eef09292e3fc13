"""`Engine`: many requests through one model and one cache, step by step."""

from __future__ import annotations

import time
from collections import abc, deque
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, count
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from latentkv.engine.constraint import ConstraintState, blocked_tokens
from latentkv.engine.drafts import Drafter, Wish
from latentkv.engine.flight import Flight, Reading
from latentkv.engine.pace import Pace
from latentkv.engine.request import Request
from latentkv.engine.runner import PREFILL_CHUNK, Runner
from latentkv.engine.sampler import NextToken, TokenLogprobs, sample, token_logprobs
from latentkv.engine.scheduler import MAX_RUNNING, Scheduler, Share
from latentkv.engine.sequence import Sequence
from latentkv.engine.snapshots import EVERY
from latentkv.errors import CacheError, RequestError, StageError
from latentkv.models.decoder import Decoder
from latentkv.models.transfer import take_rows
from latentkv.state import PagedCache, PageStore

if TYPE_CHECKING:
    from latentkv.parallel import Pipeline

LOADING_SECONDS = 0.05
"""That a step waits for pages of the store where there is nothing else to do."""

FinishReason = Literal["stop", "length"]
EndsText = Callable[[int], bool]


@dataclass(frozen=True)
class Event:
    """One new token.

    Attributes:
        index: which request.
        token_id: the token.
        logprobs: where the request asked for them.
        prompt_logprobs: on the first event, where the request asked for them: of the prompt's tokens but the first.
        cached_tokens: on the first event: of the prompt's tokens, those that did not have to be read.
        finish_reason: "stop" (an end token, or the text ended), "length" (no more tokens allowed), None (goes on).
            Where a structure allows no further token, it is "stop" if the text is complete, else "length".
    """

    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None


_Inbox = deque[Event | BaseException]


@dataclass(frozen=True)
class _Job:
    """A request on its way; one that is preempted keeps its tokens, and with them its state."""

    request: Request
    sequence: Sequence
    ends_text: EndsText
    end_ids: frozenset[int]
    state: ConstraintState | None
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict[int, TokenLogprobs])  # by position


class Engine:
    """Runs requests through a model and its cache. Use it from one thread.

    A request may come, end or be given up between any two steps. What a request produces does not depend on the others.

    Args:
        decoder: the model, in eval mode.
        cache: made of the decoder's specs, on its device.
        eos_ids: tokens that end a completion, unless the request ignores them.
        step_tokens: tokens that one step reads, about: it bounds a step's memory.
        step_seconds: time that one step takes, about: steps read fewer tokens where more would take longer.
        max_running: requests that take part in steps at once; the others wait.
        drafter: proposes tokens that the model checks several at once; the result is the same, sooner.
        most_drafted: tokens of a draft.
        store: where prefixes go, and are looked for when they are not in memory; it is closed with this.
        snapshot_every: pages of a prompt after which the state of recurrent layers is kept to go on from.
        pipeline: through the stages of the other ranks, where the decoder is only the first one.

    Raises:
        CacheError: recurrent layers of the cache have no room for drafts of so many tokens.

    Attributes:
        runner: for reading texts beside the requests.
        counters: what has been done.
        finished_steps: steps that were read to their ends.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        eos_ids: Collection[int] = (),
        *,
        step_tokens: int = PREFILL_CHUNK,
        step_seconds: float | None = None,
        max_running: int = MAX_RUNNING,
        drafter: Drafter | None = None,
        most_drafted: int = 4,
        store: PageStore | None = None,
        snapshot_every: int = EVERY,
        pipeline: Pipeline | None = None,
    ) -> None:
        _require_room_for_drafts(cache, most_drafted if drafter else 0)
        self.cache = cache
        self.runner = Runner(decoder, cache, pipeline)
        self.eos_ids = frozenset(eos_ids)
        self._pace = Pace(step_tokens, step_seconds)
        self._drafter = drafter
        self._most_drafted = most_drafted
        self._scheduler = Scheduler(
            cache,
            max_running=max_running,
            store=store,
            forget=drafter.forget if drafter else None,
            snapshot_every=snapshot_every,
        )
        self.counters = self._scheduler.counters
        self._jobs: dict[int, _Job] = {}
        self._inboxes: dict[int, _Inbox] = {}  # of requests that belong to a run
        self._indices = count()
        self.finished_steps = 0
        self._flights: deque[Flight] = deque()
        self._finished = 0.0  # when the last step was

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for pages."""
        return len(self._scheduler.waiting)

    def __contains__(self, index: int) -> bool:
        """Whether a request is on its way."""
        return index in self._jobs

    def require_fits(self, request: Request) -> None:
        """Raise `RequestError` for a request that could not fit even into an empty cache. From any thread."""
        needed = self.cache.pages_for(len(request.prompt_token_ids) + request.max_new_tokens)
        if needed > self.cache.num_pages:
            raise RequestError(
                f"A prompt of {len(request.prompt_token_ids):,} tokens and max_tokens={request.max_new_tokens:,} "
                f"need more than the {self.cache.num_pages * self.cache.page_size:,} tokens that the cache holds: "
                "lower max_tokens, shorten the prompt, or load the model with a larger kv_cache_bytes."
            )

    def add(self, request: Request, ends_text: EndsText | None = None, *, salt: str = "") -> int:
        """Take a request in.

        Args:
            request: what to run.
            ends_text: called with each new token but end tokens; True ends the completion. The engine knows no strings,
                so this is where stop strings come in.
            salt: only requests of the same salt read each other's prefixes from the cache.

        Returns:
            The index that its events carry.

        Raises:
            RequestError: it could not fit even into an empty cache.
        """
        self.require_fits(request)
        sequence = Sequence(next(self._indices), list(request.prompt_token_ids))
        shares = request.params.prompt_logprobs is None  # else all of the prompt must be read
        end_ids = frozenset(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            end_ids |= self.eos_ids
        state = request.constraint.start() if request.constraint else None
        self._jobs[sequence.index] = _Job(request, sequence, ends_text or _never, end_ids, state)
        self._scheduler.add(sequence, salt if shares else None)
        self.counters.prompt_tokens += len(sequence.tokens)
        return sequence.index

    def abort(self, index: int) -> None:
        """Give a request up: its pages are free at once, no event of it follows. One that has ended stays so."""
        if index in self._jobs:
            self._end(index)
            self._inboxes.pop(index, None)

    def step(self) -> list[Event]:
        """Read one step's tokens: the next token of every completion on its way, and a part of the prompts.

        Where other ranks have some of the layers, as many steps are under way at once as there are ranks, each with its
        part of the completions; this begins one, or ends the oldest.

        Returns:
            The new tokens, in the order in which the requests came; none while there are only prompts to read, or
            nothing to do. Where all wait for pages of the store, it waits a moment with them.

        Raises:
            CacheError: nothing can run, because others hold the cache's pages.
            RankError: another rank is gone.
            Exception: whatever the model raised; the requests that took part are given up.
        """
        if len(self._flights) < self.runner.depth:
            shares = self._scheduler.plan(self._pace.budget, groups=self.runner.depth, busy=self._busy())
            if shares:
                self._begin(shares)
                if len(self._flights) < self.runner.depth:
                    return []
            elif not self._flights:
                if not self._scheduler.wait_for_loading(LOADING_SECONDS):
                    self._require_idle()
                return []
        events = self._finish(self._flights.popleft())
        for event in events:
            if event.finish_reason:
                self._end(event.index)
        return events

    def _busy(self) -> set[Sequence]:
        """Sequences under way that cannot take part in another step, though there may be more of a prompt to read.

        What a recurrent state is copied from, or a draft is made of, has to be there when the next tokens are read.
        """
        if self.cache.slots is None and self._drafter is None:
            return set()
        return {sequence for flight in self._flights for sequence in flight.sequences}

    def close(self) -> None:
        """Write what waits to be stored, and go on without the store: another process may write there now.

        Other ranks end, where there are any, and no step can be read any more.

        Raises:
            RankError: one of them is gone.
        """
        self._scheduler.close()
        self.runner.close()

    def _begin(self, shares: SequenceOf[Share]) -> None:
        """Send a step on its way."""
        sequences, counts = [sequence for sequence, _ in shares], [tokens for _, tokens in shares]
        flight = Flight(
            sequences,
            counts,
            starts=[each.num_cached for each in sequences],
            drafted=[len(each.draft) for each in sequences],
            times_given_back=[each.times_given_back for each in sequences],
            began=time.perf_counter(),
        )
        self.counters.steps += 1
        self.counters.read_tokens += sum(counts)
        self.counters.drafted_tokens += sum(flight.drafted)
        try:
            self.runner.submit(sequences, counts)
        except BaseException as error:
            for sequence in sequences:
                self._fail(sequence, error)
            raise
        self._flights.append(flight)

    def _finish(self, flight: Flight) -> list[Event]:
        """Take what has come of a step; the requests that took part and are still on their way fail if it has."""
        try:
            events = self._take_states(flight, self.runner.collect())
        except BaseException as error:
            concerned = [
                sequence
                for sequence, times in zip(flight.sequences, flight.times_given_back, strict=True)
                if sequence.index in self._jobs and sequence.times_given_back == times
            ]
            for sequence in concerned:
                self._fail(sequence, error)
            if not concerned and isinstance(error, StageError):
                return []  # of requests that were given up before, as those of a prompt whose earlier part has failed
            raise
        self.finished_steps += 1
        now = time.perf_counter()
        self._pace.took(sum(flight.counts), now - max(flight.began, self._finished))
        self._finished = now
        return events

    def _take_states(self, flight: Flight, hidden: Tensor) -> list[Event]:
        """Choose the next tokens of the sequences that have been read to their ends, by the states [T, D] of a step."""
        readings = [
            each
            for each in flight.readings(hidden)
            # One that was given up meanwhile, or has to be read again, needs none of it.
            if each.sequence.index in self._jobs and each.sequence.times_given_back == each.times_given_back
        ]
        for each in readings:
            self._score_prompt(each)
        asked = sorted((each for each in readings if each.reaches_end), key=lambda each: each.sequence.index)
        # A draft asks what follows each of its tokens, and the one before it.
        rows = [row for each in asked for row in range(each.stop - 1 - each.drafted, each.stop)]
        events: list[Event] = []
        if rows:
            logits = self.runner.logits_on_host(take_rows(hidden, rows))
            events = self._choose([each.sequence for each in asked], logits)
        if readings:
            self._draft(readings, events, time.perf_counter() - flight.began)
        for each in readings:
            self._scheduler.have_read(each.sequence, min(each.end, each.sequence.num_cached))
        return events

    def _draft(self, readings: list[Reading], events: list[Event], seconds: float) -> None:
        """Have the next tokens of sequences drafted, after a step that has taken so long."""
        if self._drafter is None:
            return
        ended = {event.index for event in events if event.finish_reason}
        most = self._most_drafted if self._scheduler.may_draft else 0
        wishes = [
            self._wish(
                each.sequence,
                each.hidden[: each.sequence.num_cached - each.start],
                each.drafted,
                0 if each.sequence.index in ended else most,
            )
            for each in readings
        ]
        for wish, draft in zip(wishes, self._drafter.propose(wishes, seconds), strict=True):
            wish.sequence.draft = draft

    def run(
        self, requests: SequenceOf[Request], ends_text: Callable[[int, int], bool] | None = None
    ) -> abc.Generator[Event]:
        """Produce the tokens of `requests`, step by step; several such runs may be under way.

        Args:
            requests: what to run.
            ends_text: called with (which of the requests, new token), as in `add`.

        Returns:
            An iterator of events, whose indices count the requests from 0. Pages are given back as each request ends,
            and all of them when the iterator is exhausted, closed or dropped, or when a step fails.

        Raises:
            RequestError: a request could not fit even into an empty cache. Nothing has run then.
        """
        for request in requests:
            self.require_fits(request)
        return self._run(requests, ends_text or _never_of)

    def _run(self, requests: SequenceOf[Request], ends_text: Callable[[int, int], bool]) -> abc.Generator[Event]:
        inbox: _Inbox = deque()
        unfinished: dict[int, int] = {}
        try:
            for i, request in enumerate(requests):
                index = self.add(request, partial(ends_text, i))
                unfinished[index] = i
                self._inboxes[index] = inbox
            while unfinished:
                if not inbox:
                    self._deliver(self.step())
                    continue
                event = inbox.popleft()
                if isinstance(event, BaseException):
                    raise event
                own = unfinished.pop(event.index) if event.finish_reason else unfinished[event.index]
                yield replace(event, index=own)
        finally:
            for index in unfinished:
                self.abort(index)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            inbox = self._inboxes.pop(event.index) if event.finish_reason else self._inboxes[event.index]
            inbox.append(event)

    def _choose(self, asked: SequenceOf[Sequence], logits: Tensor) -> list[Event]:
        """Append the next tokens: those of all sequences are chosen together, as if every draft were right.

        Args:
            asked: the sequences.
            logits: those [T, V] that follow the last token of each, and then those that follow the tokens of its draft.
        """
        wanted: list[NextToken] = []
        rows: list[int] = []
        firsts = [0, *accumulate(1 + len(each.draft) for each in asked)]
        for each, first in zip(asked, firsts, strict=False):
            job = self._jobs[each.index]
            # What a structure allows after a token of a draft is known once that has been accepted.
            for i in range(1 if job.state else 1 + len(each.draft)):
                wanted.append(self._next_token(job, [*each.tokens, *each.draft[:i]] if i else each.tokens))
                rows.append(first + i)
        chosen = sample(logits if len(rows) == len(logits) else logits[rows], wanted)
        tokens = dict(zip(rows, chosen, strict=True))
        pairs = zip(asked, firsts, strict=False)
        return [event for each, first in pairs for event in self._append(each, logits, first, tokens)]

    def _append(self, sequence: Sequence, logits: Tensor, first: int, tokens: Mapping[int, int]) -> list[Event]:
        """Append the token that was chosen, and further ones as long as the draft has foreseen them.

        Noise depends on the position alone, so a foreseen token is the one that would be chosen without a draft.

        Args:
            sequence: that the tokens belong to.
            logits: of all sequences.
            first: its first row of them.
            tokens: chosen for rows; one that is missing is chosen now.
        """
        job = self._jobs[sequence.index]
        draft, sequence.draft = sequence.draft, []
        events: list[Event] = []
        for i in range(1 + len(draft)):
            own = slice(first + i, first + i + 1)
            token = tokens.get(first + i)
            if token is None:
                token = sample(logits[own], [self._next_token(job, sequence.tokens)])[0]
            event = self._take(job, logits, own, token)
            events.append(event)
            if event.finish_reason or i == len(draft) or draft[i] != event.token_id:
                break
        # What was read of the draft's other tokens is overwritten by what comes instead.
        sequence.num_cached = len(sequence.tokens) - 1
        self.counters.generated_tokens += len(events)
        self.counters.accepted_tokens += len(events) - 1
        return events

    def _wish(self, sequence: Sequence, hidden: Tensor, drafted: int, most: int) -> Wish:
        """What is to be drafted, `most` tokens at most, after a step that has read tokens of states `hidden`."""
        job = self._jobs[sequence.index]
        if most:
            left = job.request.max_new_tokens - (len(sequence.tokens) - len(job.request.prompt_token_ids))
            most = self._scheduler.room_for_draft(sequence, min(most, left - 1))
        return Wish(
            sequence,
            hidden,
            most,
            choose=lambda draft, logits: sample(
                logits[None], [self._next_token(job, [*sequence.tokens, *draft], foreseen=True)]
            )[0],
            drafted=drafted,
            accepted=len(hidden) - 1 if drafted else 0,
        )

    def _next_token(self, job: _Job, tokens: SequenceOf[int], *, foreseen: bool = False) -> NextToken:
        """What decides which token follows `tokens`; a draft, which is `foreseen`, need not hold to the structure."""
        request, state = job.request, job.state
        blocked = None if state is None or foreseen else blocked_tokens(state, job.end_ids, torch.device("cpu"))
        return NextToken(
            request.params, request.seed, tokens, len(request.prompt_token_ids), end_ids=job.end_ids, blocked=blocked
        )

    def _take(self, job: _Job, logits: Tensor, row: slice, token: int) -> Event:
        """Append a token that was chosen from a row of these logits [T, V]."""
        params, tokens, state = job.request.params, job.sequence.tokens, job.state
        prompt_len = len(job.request.prompt_token_ids)
        tokens.append(token)
        logprobs = None if params.logprobs is None else token_logprobs(logits[row], [token], params.logprobs)[0]
        reason: FinishReason | None = None
        if token in job.end_ids or job.ends_text(token):
            reason = "stop"
        elif state is not None and not state.accept(token):
            reason = "stop" if state.may_end else "length"
        elif len(tokens) - prompt_len == job.request.max_new_tokens:
            reason = "length"
        of_prompt = found = None
        if len(tokens) == prompt_len + 1:
            found = job.sequence.num_found
            if params.prompt_logprobs is not None:
                of_prompt = [job.prompt_logprobs[position] for position in range(1, prompt_len)]
        return Event(job.sequence.index, token, logprobs, of_prompt, found, reason)

    def _score_prompt(self, reading: Reading) -> None:
        """Keep what the states of the tokens that were just read say of the prompt's tokens after them."""
        job = self._jobs[reading.sequence.index]
        count, prompt = job.request.params.prompt_logprobs, job.request.prompt_token_ids
        if count is None:
            return
        first = reading.start + 1
        targets = prompt[first : reading.end + 1]
        for rows, part in self.runner.logits_in_parts(reading.hidden[: len(targets)]):
            scores = token_logprobs(part, targets[rows], count)
            job.prompt_logprobs.update(enumerate(scores, start=first + rows.start))

    def _end(self, index: int) -> None:
        self._scheduler.remove(self._jobs.pop(index).sequence)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        if sequence.index in self._jobs:
            self._end(sequence.index)
            inbox = self._inboxes.pop(sequence.index, None)
            if inbox is not None:
                inbox.append(error)

    def _require_idle(self) -> None:
        if self._scheduler.waiting:
            slots = self.cache.slots
            held = f" (and all but {slots.free_slots} of {slots.num_slots} slots)" if slots else ""
            raise CacheError(
                f"All but {self.cache.pool.free_pages} of {self.cache.num_pages} cache pages{held} are held elsewhere, "
                "and no request can go on: let them go, or load the model with a larger kv_cache_bytes."
            )


def _require_room_for_drafts(cache: PagedCache, most_drafted: int) -> None:
    if cache.longest_draft < most_drafted:
        raise CacheError(
            f"The cache has room for drafts of {cache.longest_draft} tokens, not {most_drafted}: "
            "make the cache of ModelConfig.specs with most_drafted."
        )


def _never(token: int) -> bool:
    return False


def _never_of(index: int, token: int) -> bool:
    return False
