"""`Metrics`: what Prometheus reads. Names and meanings are vLLM's behind another prefix, so dashboards port."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from latentkv.engine.engine import Engine

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SAMPLES = 5  # of the engine's counters, a second apart, over which a speed is taken
# The metric, which of the engine's `Counters` it shows, what that is.
_TOTALS = (
    ("prompt_tokens", "prompt_tokens", "Tokens of all prompts."),
    ("generation_tokens", "generated_tokens", "Tokens of all completions."),
    ("num_preemptions", "preemptions", "Requests that gave their pages back and were read again."),
    ("prefix_cache_queries", "prefix_queries", "Prompt tokens that were looked for among known prefixes."),
    ("prefix_cache_hits", "prefix_hits", "Those that were found."),
    ("external_prefix_cache_queries", "store_queries", "Prompt tokens that were looked for in the cache folder."),
    ("external_prefix_cache_hits", "store_hits", "Those that were read from it."),
    ("cache_dir_written_bytes", "stored_bytes", "Bytes written to the cache folder."),
    ("cache_dir_read_bytes", "loaded_bytes", "Bytes read from it."),
    ("spec_decode_num_draft_tokens", "drafted_tokens", "Tokens that were drafted."),
    ("spec_decode_num_accepted_tokens", "accepted_tokens", "Those that were accepted."),
)


class _Intervals(Collector):
    """A histogram that takes several equal values at once, which costs as little as one.

    Args:
        name: of the metric.
        text: what it is.
        labels: of its series.
        bounds: the highest value of each bucket but the last.
    """

    def __init__(self, name: str, text: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Take a value in, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What Prometheus reads of it."""
        names = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


@dataclass
class RequestClock:
    """When things happened to one completion."""

    arrived: float
    last: float | None = None


class Metrics:
    """Everything that is counted, in a registry of its own.

    Args:
        engine: whose state is read when somebody asks for it.
        model: the label of every series.
        clock: the time that everything is told by, in seconds.
    """

    def __init__(self, engine: Engine, model: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.finished = 0
        self.started_at = time.time()
        self._engine = engine
        self._clock = clock
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=_SAMPLES)
        self._labels = {"model_name": model}
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._itl = _Intervals("latentkv:inter_token_latency_seconds", "Between two tokens.", self._labels, SECONDS)
        self.registry.register(self._itl)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens of a completion.", _TOKENS)
        self._success = Counter(
            "latentkv:request_success",
            "Finished completions.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._gauges = {
            name: Gauge(f"latentkv:{name}", text, ["model_name"], registry=self.registry).labels(**self._labels)
            for name, text in (
                ("num_requests_running", "Requests that hold pages."),
                ("num_requests_waiting", "Requests that wait for pages."),
                ("kv_cache_usage_perc", "Share of the cache's pages that requests hold; 1 is all."),
            )
        }
        self._totals = {
            counter: Counter(f"latentkv:{name}", text, ["model_name"], registry=self.registry).labels(**self._labels)
            for name, counter, text in _TOTALS
        }
        self._seen = dict.fromkeys(self._totals, 0)

    def tokens(self, clock: RequestClock, count: int) -> None:
        """A completion has so many new tokens, which are sent together."""
        now = self._clock()
        if clock.last is None:
            self._ttft.observe(now - clock.arrived)
        else:
            self._itl.observe((now - clock.last) / count, count)
        clock.last = now

    def finish(self, clock: RequestClock, prompt_tokens: int, tokens: int, reason: str) -> None:
        """A completion has ended."""
        self.finished += 1
        self._e2e.observe(self._clock() - clock.arrived)
        self._prompt.observe(prompt_tokens)
        self._generation.observe(tokens)
        self._success.labels(finished_reason=reason, **self._labels).inc()

    def give_up(self, count: int) -> None:
        """So many completions have not ended: their client left, they failed, or they took too long."""
        if count:
            self._success.labels(finished_reason="abort", **self._labels).inc(count)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        engine, counters = self._engine, self._engine.counters
        self._gauges["num_requests_running"].set(engine.num_running)
        self._gauges["num_requests_waiting"].set(engine.num_waiting)
        self._gauges["kv_cache_usage_perc"].set(1 - engine.cache.pool.free_pages / engine.cache.num_pages)
        for name in self._totals:
            total = getattr(counters, name)
            self._totals[name].inc(total - self._seen[name])
            self._seen[name] = total
        return generate_latest(self.registry)

    def sample(self) -> None:
        """Note how far the engine is; called about once a second, so that speeds are those of the last seconds."""
        self._samples.append((self._clock(), self._engine.counters.generated_tokens, self._engine.counters.read_tokens))

    def speeds(self) -> tuple[float, float]:
        """Generated and prompt tokens a second since the oldest sample that is kept."""
        if not self._samples:
            return 0.0, 0.0
        counters, now = self._engine.counters, self._clock()
        then, generated, read = self._samples[0]
        if now - then < 0.1:
            return 0.0, 0.0
        new, all_read = counters.generated_tokens - generated, counters.read_tokens - read
        return new / (now - then), max(all_read - new, 0) / (now - then)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"latentkv:{name}", text, ["model_name"], registry=self.registry, buckets=tuple(buckets))
        return histogram.labels(**self._labels)
