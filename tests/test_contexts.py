"""The other arguments of blocks: what batches share, what they keep for themselves, what blocks pass on."""

import torch

from packager.model.contexts import Context, OutputOf, own_contexts, shared_contexts


def test_batches_share_equal_tensors_and_keep_their_own_of_others():
    mask = torch.ones(4, 4)
    first = [Context(args=(torch.zeros(2),), kwargs={"mask": mask, "tables": (torch.ones(3), torch.zeros(3))})]
    second = [Context(args=(torch.ones(2),), kwargs={"mask": mask.clone(), "tables": (torch.ones(3), torch.ones(3))})]
    (shared,) = shared_contexts(second, first)
    assert shared.kwargs["mask"] is mask
    assert shared.kwargs["tables"][0] is first[0].kwargs["tables"][0]
    assert torch.equal(shared.args[0], torch.ones(2)), "a batch must not get another batch's argument"
    assert torch.equal(shared.kwargs["tables"][1], torch.ones(3))


def test_a_block_takes_what_an_earlier_block_returned():
    outputs: dict[OutputOf, torch.Tensor] = {}
    giver = Context(kwargs={}, block=0, passed=(1,), outputs=outputs)
    taker = Context(args=(OutputOf(block=0, item=1),), kwargs={"mask": None}, block=1, outputs=outputs)
    mine = own_contexts([giver, taker])
    mine[0].keep((torch.zeros(1), torch.ones(2)))
    args, kwargs = mine[1].given()
    assert torch.equal(args[0], torch.ones(2))
    assert kwargs == {"mask": None}
    assert not outputs, "each variant has its own"
