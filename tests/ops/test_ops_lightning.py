"""`lightning_attend` against the float64 reference; the same bits however a sequence is cut, drafted or batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latentkv.errors import OpError
from latentkv.ops import LightningState, LightningWeights, lightning_attend, lightning_whole, reference
from latentkv.ops.native.recording import Recording

POISON = float("nan")
DRAFTS = 3


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, and the rows and angles of one sequence."""

    weights: LightningWeights
    rows: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def random(
        cls, heads: int, dim: int, tokens: int, *, groups: int = 1, turned: int = 6, dtype: torch.dtype = torch.float32
    ) -> Layer:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        width = heads * dim
        weights = LightningWeights(
            log_decay=-torch.logspace(-2.5, 0.1, heads),
            query_norm=(1 + draw(dim, scale=0.2)).to(dtype),
            key_norm=(1 + draw(dim, scale=0.2)).to(dtype),
            output_norm=(1 + draw(width, scale=0.2)).to(dtype),
            norm_eps=1e-5,
            num_groups=groups,
        )
        angles = torch.arange(tokens)[:, None] * draw(turned // 2)
        rows = draw(tokens, 3 * width).to(dtype), draw(tokens, width).to(dtype), angles.cos(), angles.sin()
        return cls(weights, rows)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.weights.log_decay.shape[0], self.weights.query_norm.shape[0]

    def state(self, slots: int) -> LightningState:
        """Of many sequences, full of what must not be read."""
        heads, dim = self.sizes
        return LightningState(
            torch.full((slots, heads, dim, dim), POISON), torch.full((slots, DRAFTS, 2, heads * dim), POISON)
        )

    def reference(self) -> tuple[Tensor, Tensor]:
        """What the rows give, and the matrices after them."""
        heads, dim = self.sizes
        return reference.lightning(*self.rows, **self.weights._asdict(), matrices=torch.zeros(heads, dim, dim))

    def step(
        self,
        state: LightningState,
        spans: Sequence[tuple[int, int]],
        slots: Sequence[int],
        *,
        pending: Sequence[int] | None = None,
        committed: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows first .. last - 1 of the same text for each sequence."""
        lens = [last - first for first, last in spans]
        bounds = [0, *torch.tensor(lens).cumsum(0).tolist()]
        qkv, gate, cos, sin = (torch.cat([t[first:last] for first, last in spans]) for t in self.rows)
        return lightning_attend(
            qkv,
            gate,
            cos,
            sin,
            self.weights,
            state,
            q_start=torch.tensor(bounds, dtype=torch.int32),
            stop=torch.tensor([t + 1 for first, last in spans for t in range(first, last)], dtype=torch.int32),
            slot_ids=torch.tensor(slots, dtype=torch.int32),
            pending=torch.tensor(pending or [0] * len(spans), dtype=torch.int32),
            committed=torch.tensor(committed or lens, dtype=torch.int32),
        )


SIZES = [(1, 16, 1, 16), (2, 128, 2, 64), (3, 10, 1, 4), (4, 68, 2, 34), (6, 20, 6, 0), (5, 12, 3, 6)]


@pytest.mark.parametrize("heads, dim, groups, turned", SIZES)
def test_a_sequence_gives_what_the_reference_gives(
    backend: str, heads: int, dim: int, groups: int, turned: int
) -> None:
    layer = Layer.random(heads, dim, 21, groups=groups, turned=turned)
    state = layer.state(2)
    out = layer.step(state, [(0, 21)], [1])
    expected, matrices = layer.reference()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)
    largest = float(matrices.abs().max())  # keys are as long as sqrt(D)
    torch.testing.assert_close(state.matrices[1].double(), matrices, atol=1e-6 * largest, rtol=1e-5)
    assert state.matrices[0].isnan().all() and state.waiting.isnan().all()


def test_bf16_rows_are_computed_in_float32_and_rounded_once(backend: str) -> None:
    layer = Layer.random(2, 32, 20, dtype=torch.bfloat16)
    out = layer.step(layer.state(1), [(0, 20)], [0])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), layer.reference()[0], atol=1e-5, rtol=2**-8)


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
    assert torch.equal(pieces.matrices[2], whole.matrices[0])


def test_what_else_is_in_the_batch_changes_no_bit(backend: str) -> None:
    layer = Layer.random(2, 32, 30)
    alone, together = layer.state(1), layer.state(4)
    expected = layer.step(alone, [(0, 30)], [0])
    out = layer.step(together, [(0, 1), (0, 30), (0, 7)], [3, 0, 2])
    assert torch.equal(out[1:31], expected)
    assert torch.equal(together.matrices[0], alone.matrices[0])
    assert together.matrices[1].isnan().all()


@pytest.mark.parametrize("dim", [20, 128])
@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_drafts_leave_no_trace_but_those_that_are_accepted(backend: str, accepted: int, dim: int) -> None:
    layer = Layer.random(2, dim, 30)
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
    assert torch.equal(drafted.matrices, plain.matrices)


@pytest.mark.parametrize("dim", [20, 128])
def test_drafts_alone_take_in_what_has_waited_and_nothing_of_their_own(backend: str, dim: int) -> None:
    layer = Layer.random(2, dim, 12)
    plain, drafted = layer.state(1), layer.state(1)
    expected = layer.step(plain, [(0, 8)], [0])
    layer.step(drafted, [(0, 5)], [0])
    layer.step(drafted, [(5, 8)], [0], committed=[1])
    assert torch.equal(layer.step(drafted, [(8, 10)], [0], pending=[2], committed=[0])[:0], expected[:0])
    assert torch.equal(drafted.matrices, plain.matrices)
    begun = layer.state(1)
    layer.step(begun, [(0, 2)], [0], committed=[0])
    assert torch.equal(begun.matrices, torch.zeros_like(begun.matrices))


def test_a_sequence_that_begins_reads_nothing_of_its_slot(backend: str) -> None:
    layer = Layer.random(2, 16, 12)
    state = layer.state(1)
    layer.step(state, [(0, 12)], [0])
    first = state.matrices.clone()
    layer.step(state, [(0, 12)], [0], pending=[0])
    assert torch.equal(state.matrices, first)


def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    layer = Layer.random(4, 128, 20, groups=2)
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
    layer = Layer.random(4, 12, 9, groups=2)
    qkv, gate, cos, sin = (t[None].clone() for t in layer.rows)
    weights = layer.weights._replace(
        **{name: getattr(layer.weights, name).clone() for name in ("query_norm", "key_norm", "output_norm")}
    )
    learned = [qkv, gate, weights.query_norm, weights.key_norm, weights.output_norm]
    out = lightning_whole(qkv.requires_grad_(), gate.requires_grad_(), cos, sin, weights)
    torch.testing.assert_close(out[0].double(), layer.reference()[0], atol=2e-5, rtol=1e-4)
    for tensor in learned:
        tensor.requires_grad_()
    lightning_whole(qkv, gate, cos, sin, weights).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in learned)


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
        out = lightning_attend(*rows, layer.weights, recorded, **dict(zip(names, numbers, strict=True)))
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
    for field in LightningState._fields:
        with pytest.raises(OpError, match=field):
            layer.step(state._replace(**{field: getattr(state, field).bfloat16()}), [(0, 4)], [0])
        with pytest.raises(OpError, match=field):
            layer.step(state._replace(**{field: getattr(state, field)[..., :-1]}), [(0, 4)], [0])
    for change, message in (
        ({"log_decay": layer.weights.log_decay.bfloat16()}, "log_decay must be float32"),
        ({"key_norm": layer.weights.key_norm[1:]}, "key_norm"),
        ({"output_norm": layer.weights.output_norm[1:]}, "output_norm"),
        ({"output_norm": layer.weights.output_norm.bfloat16()}, "one dtype"),
        ({"num_groups": 3}, "3 groups"),
    ):
        with pytest.raises(OpError, match=message):
            Layer(layer.weights._replace(**change), layer.rows).step(state, [(0, 4)], [0])
    wide = torch.zeros(4, 9)
    for rows, message in (
        ((layer.rows[0][:, 1:], *layer.rows[1:]), "qkv"),
        ((layer.rows[0], layer.rows[1][:, 1:], *layer.rows[2:]), "output_gate"),
        ((layer.rows[0], layer.rows[1].bfloat16(), *layer.rows[2:]), "one dtype"),
        ((*layer.rows[:3], layer.rows[3][:, 1:]), "sin"),
        ((*layer.rows[:2], layer.rows[2].bfloat16(), layer.rows[3]), "cos must be float32"),
        ((*layer.rows[:2], wide, wide), "18 rotary dimensions"),
    ):
        with pytest.raises(OpError, match=message):
            Layer(layer.weights, rows).step(state, [(0, 4)], [0])
