"""`kda_attend` against the float64 reference; bit for bit the same however a sequence is cut, drafted or batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import KDAState, KDAWeights, kda_attend, kda_whole, reference
from latentkv.ops.native.recording import Recording

POISON = float("nan")
DRAFTS = 3


@dataclass(frozen=True)
class Layer:
    """Weights of one layer and the rows of one sequence."""

    weights: KDAWeights
    rows: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def random(
        cls, heads: int, dim: int, tokens: int, *, bounded: bool = True, dtype: torch.dtype = torch.float32
    ) -> Layer:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        width = heads * dim
        weights = KDAWeights(
            taps=draw(4, 3 * width, scale=0.5),
            log_rate=torch.rand(heads, generator=generator) * (2.0 if bounded else 4.0) - 2.0,
            gate_bias=draw(width),
            norm=(1 + draw(dim, scale=0.2)).to(dtype),
            norm_eps=1e-5,
            lower_bound=-5.0 if bounded else None,
        )
        rows = draw(tokens, 3 * width), draw(tokens, width), draw(tokens, heads), draw(tokens, width)
        return cls(weights, tuple(t.to(dtype) for t in rows))

    @property
    def heads(self) -> int:
        return self.weights.log_rate.shape[0]

    @property
    def dim(self) -> int:
        return self.weights.norm.shape[0]

    def state(self, slots: int) -> KDAState:
        """Of many sequences, full of what must not be read."""
        width = self.heads * self.dim
        kept = (self.heads, self.dim, self.dim), (3, 3 * width)
        waiting = (DRAFTS, 3 * width), (DRAFTS, width), (DRAFTS, self.heads)
        return KDAState(*(torch.full((slots, *shape), POISON) for shape in (*kept, *waiting)))

    def reference(self) -> tuple[Tensor, Tensor]:
        """What the rows give, and the matrices after them."""
        return reference.kda(
            *self.rows,
            **self.weights._asdict(),
            matrices=torch.zeros(self.heads, self.dim, self.dim),
            past=torch.zeros(3, 3 * self.heads * self.dim),
        )

    def step(
        self,
        state: KDAState,
        spans: Sequence[tuple[int, int]],
        slots: Sequence[int],
        *,
        pending: Sequence[int] | None = None,
        committed: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows first .. last - 1 of the same text for each sequence."""
        lens = [last - first for first, last in spans]
        bounds = [0, *torch.tensor(lens).cumsum(0).tolist()]
        rows = (torch.cat([t[first:last] for first, last in spans]) for t in self.rows)
        return kda_attend(
            *rows,
            self.weights,
            state,
            q_start=torch.tensor(bounds, dtype=torch.int32),
            stop=torch.tensor([t + 1 for first, last in spans for t in range(first, last)], dtype=torch.int32),
            slot_ids=torch.tensor(slots, dtype=torch.int32),
            pending=torch.tensor(pending or [0] * len(spans), dtype=torch.int32),
            committed=torch.tensor(committed or lens, dtype=torch.int32),
        )


def committed_part(state: KDAState, slot: int) -> list[Tensor]:
    return [state.matrices[slot].clone(), state.conv[slot].clone()]


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("heads, dim", [(1, 16), (2, 128), (3, 10), (2, 68)])
def test_a_sequence_gives_what_the_reference_gives(backend: str, heads: int, dim: int, bounded: bool) -> None:
    layer = Layer.random(heads, dim, 21, bounded=bounded)
    state = layer.state(2)
    out = layer.step(state, [(0, 21)], [1])
    expected, matrices = layer.reference()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state.matrices[1].double(), matrices, atol=2e-6, rtol=1e-5)
    assert torch.equal(state.conv[1], layer.rows[0][-3:])
    assert state.matrices[0].isnan().all()


def test_bf16_rows_are_computed_in_float32_and_rounded_once(backend: str) -> None:
    layer = Layer.random(2, 32, 20, dtype=torch.bfloat16)
    out = layer.step(layer.state(1), [(0, 20)], [0])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), layer.reference()[0], atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("gate", [-200.0, 200.0])
@pytest.mark.parametrize("bounded", [True, False])
def test_extreme_gates_stay_finite(backend: str, gate: float, bounded: bool) -> None:
    layer = Layer.random(1, 16, 40, bounded=bounded)
    layer.rows[1].fill_(gate)
    out = layer.step(state := layer.state(1), [(0, 40)], [0])
    assert out.isfinite().all() and state.matrices.isfinite().all()


@pytest.mark.parametrize("cuts", [[1] * 40, [3, 1, 13, 16, 7], [16, 17, 7], [39, 1]])
@pytest.mark.parametrize("dim", [20, 128])
def test_where_a_sequence_is_cut_changes_no_bit(backend: str, cuts: list[int], dim: int) -> None:
    layer = Layer.random(2, dim, 40, dtype=torch.bfloat16)
    whole, pieces = layer.state(1), layer.state(3)
    expected = layer.step(whole, [(0, 40)], [0])
    done, outs = 0, list[Tensor]()
    for length in cuts:
        outs.append(layer.step(pieces, [(done, done + length)], [2]))
        done += length
    assert torch.equal(torch.cat(outs), expected)
    for one, other in zip(committed_part(pieces, 2), committed_part(whole, 0), strict=True):
        assert torch.equal(one, other)


def test_what_else_is_in_the_batch_changes_no_bit(backend: str) -> None:
    layer = Layer.random(2, 32, 30)
    alone, together = layer.state(1), layer.state(4)
    expected = layer.step(alone, [(0, 30)], [0])
    out = layer.step(together, [(0, 1), (0, 30), (0, 7)], [3, 0, 2])
    assert torch.equal(out[1:31], expected)
    assert torch.equal(together.matrices[0], alone.matrices[0])
    assert together.matrices[1].isnan().all()


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_drafts_leave_no_trace_but_those_that_are_accepted(backend: str, accepted: int) -> None:
    layer = Layer.random(2, 20, 30)
    plain, drafted = layer.state(1), layer.state(1)
    expected = torch.cat([layer.step(plain, [(t, t + 1)], [0]) for t in range(20)])
    layer.step(drafted, [(0, 10)], [0])
    checked = layer.step(drafted, [(10, 14)], [0], committed=[1])
    assert torch.equal(checked, expected[10:14])
    now, end = 11 + accepted, min(20, 11 + accepted + 1)
    again = layer.step(drafted, [(now, end + 3)], [0], pending=[accepted], committed=[1])
    assert torch.equal(again[: 20 - now], expected[now : end + 3])
    rest = layer.step(drafted, [(end, 20)], [0])
    assert torch.equal(rest, expected[end:])
    for one, other in zip(committed_part(drafted, 0), committed_part(plain, 0), strict=True):
        assert torch.equal(one, other)


def test_a_sequence_that_begins_reads_nothing_of_its_slot(backend: str) -> None:
    layer = Layer.random(2, 16, 12)
    state = layer.state(1)
    layer.step(state, [(0, 12)], [0])
    first = committed_part(state, 0)
    layer.step(state, [(0, 12)], [0], pending=[0])
    assert torch.equal(state.matrices[0], first[0])


def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    layer = Layer.random(4, 128, 20)
    threads = torch.get_num_threads()
    outs = list[Tensor]()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            outs.append(layer.step(layer.state(2), [(0, 20), (0, 5)], [0, 1]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)


def test_whole_sequences_without_a_state_are_the_same_and_have_gradients() -> None:
    layer = Layer.random(2, 12, 9)
    rows = [t[None].clone().requires_grad_() for t in layer.rows]
    out = kda_whole(*rows, layer.weights)
    torch.testing.assert_close(out[0].double(), layer.reference()[0], atol=2e-5, rtol=1e-4)
    out.square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in rows)


def test_a_recorded_call_goes_on_from_the_state_that_it_left(backend: str) -> None:
    if backend == "torch":
        pytest.skip("there are native calls to record only where the kernels run")
    layer = Layer.random(2, 32, 8, dtype=torch.bfloat16)
    plain, recorded = layer.state(1), layer.state(1)
    expected = torch.cat([layer.step(plain, [(t, t + 1)], [0]) for t in range(8)])
    layer.step(recorded, [(0, 5)], [0])
    rows = [t[5:6].clone() for t in layer.rows]
    numbers = [torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [6], [0], [0], [1])]
    names = "q_start", "stop", "slot_ids", "pending", "committed"
    recording = Recording()
    with torch.inference_mode(), recording.record():
        out = kda_attend(*rows, layer.weights, recorded, **dict(zip(names, numbers, strict=True)))
    assert torch.equal(out, expected[5:6])
    for t in (6, 7):
        for memory, new in zip(rows, layer.rows, strict=True):
            memory.copy_(new[t : t + 1])
        recording.run()
        assert torch.equal(out, expected[t : t + 1])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"slots": [2]}, "sequence 0"),
        ({"slots": [-1]}, "sequence 0"),
        ({"pending": [DRAFTS + 1]}, "sequence 0"),
        ({"committed": [10]}, "sequence 0"),
        ({"committed": [1]}, "sequence 0"),
        ({"committed": [-1]}, "sequence 0"),
        ({"spans": [(1, 4), (1, 4)], "slots": [1, 1]}, "another sequence"),
    ],
)
def test_numbers_that_name_what_there_is_not_are_refused(
    backend: str, changed: dict[str, object], message: str
) -> None:
    layer = Layer.random(1, 16, 8)
    call: dict[str, object] = {"spans": [(0, 8)], "slots": [0]} | changed
    with pytest.raises(OpError, match=message):
        layer.step(layer.state(2), **call)  # pyright: ignore[reportArgumentType]


def test_shapes_and_dtypes_that_do_not_fit_are_refused_by_name(backend: str) -> None:
    layer = Layer.random(2, 16, 4)
    state = layer.state(1)
    for field in KDAState._fields:
        with pytest.raises(OpError, match=field):
            layer.step(state._replace(**{field: getattr(state, field).bfloat16()}), [(0, 4)], [0])
        with pytest.raises(OpError, match=field):
            layer.step(state._replace(**{field: getattr(state, field)[..., :-1]}), [(0, 4)], [0])
    for field in ("taps", "log_rate", "gate_bias"):
        weights = layer.weights._replace(**{field: getattr(layer.weights, field).bfloat16()})
        with pytest.raises(OpError, match=f"{field} must be float32"):
            Layer(weights, layer.rows).step(state, [(0, 4)], [0])
    for index, name in enumerate(("qkv", "gate", "beta", "output_gate")):
        rows = [t[:, :-1] if i == index else t for i, t in enumerate(layer.rows)]
        with pytest.raises(OpError, match=name):
            Layer(layer.weights, tuple(rows)).step(state, [(0, 4)], [0])
