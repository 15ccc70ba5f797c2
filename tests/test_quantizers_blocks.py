"""Blocks of a tensor: every value once, in place, whatever the order in memory."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcq_ray.quantizers.blocks import NUM_VALUES, blocks


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 4),
    rest=st.sampled_from([(), (1,), (3, 1000), (7, 150, 150), (300, 300)]),
    channels_last=st.booleans(),
)
def test_a_chain_in_blocks_gives_what_it_gives_on_the_whole(
    count: int, rest: tuple[int, ...], channels_last: bool
) -> None:
    value = torch.randn(count, *rest, generator=torch.Generator().manual_seed(count))
    if channels_last and value.ndim == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(value)
    for out, part in blocks(result, value):
        torch.mul(part, 3, out=out).add_(1)
    assert torch.equal(result, value * 3 + 1)


def test_blocks_are_views_of_no_more_than_so_many_values_each() -> None:
    value = torch.zeros(3, NUM_VALUES - 1)
    sizes = []
    for (part,) in blocks(value):
        part += 1
        sizes.append(part.numel())
    assert sizes == [NUM_VALUES, NUM_VALUES, NUM_VALUES - 3]
    assert torch.equal(value, torch.ones_like(value))


def test_tensors_in_unlike_orders_or_with_gaps_come_whole() -> None:
    square = torch.randn(400, 400)
    for tensors in ((square, square.t()), (square[:, ::2], square[:, ::2]), (square.expand(4, 400, 400),)):
        assert [len(part) for part in blocks(*tensors)] == [len(tensors)]
        ((first, *_),) = blocks(*tensors)
        assert first is tensors[0]


def test_a_graph_that_is_recorded_has_no_blocks() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            result = torch.empty_like(value)
            for out, part in blocks(result, value):
                torch.mul(part, 2, out=out)
            return result

    sizes = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Doubled(), (torch.randn(2, NUM_VALUES // 4),), dynamic_shapes=(sizes,)).module()
    value = torch.randn(9, NUM_VALUES // 4)
    assert torch.equal(program(value), 2 * value)
