"""How a step is laid out for recurrent layers."""

import torch

from latentkv.models.batch import Batch, SlotUse

TOKENS, STARTS, PAGES = [[1, 2, 3], [4], [5, 6]], [0, 9, 4], [[7], [2, 3], [1]]


def test_a_batch_says_where_states_lie_and_how_many_tokens_change_them():
    uses = [SlotUse(4, 0, 3), SlotUse(1, 2, 1), SlotUse(0, 0, 1)]
    batch = Batch.build(TOKENS, STARTS, PAGES, page_size=8, slots=uses)
    assert batch.slot_ids.tolist() == [4, 1, 0] and batch.slot_ids.dtype == torch.int32
    assert batch.pending.tolist() == [0, 2, 0] and batch.committed.tolist() == [3, 1, 1]
    begins = batch.stop[batch.q_start[:-1].long()] == 1
    assert begins.tolist() == [True, False, False]
    part, rows = batch.part(1, 3)
    assert rows == slice(3, 6)
    assert [part.slot_ids.tolist(), part.pending.tolist(), part.committed.tolist()] == [[1, 0], [2, 0], [1, 1]]


def test_a_batch_without_recurrent_layers_says_nothing_of_them():
    batch = Batch.build(TOKENS, STARTS, PAGES, page_size=8)
    assert batch.slot_ids is batch.pending is batch.committed is None
    assert batch.part(0, 1)[0].slot_ids is None


def test_a_batch_that_is_cut_for_attention_is_none_for_recurrent_layers():
    batch = Batch.build(TOKENS, STARTS, PAGES, page_size=8, slots=[SlotUse(b, 0, 1) for b in range(3)])
    assert batch.cut(2).query_lens == (2, 1, 1, 2)
    assert batch.cut(2).slot_ids is batch.cut(2).pending is batch.cut(2).committed is None
