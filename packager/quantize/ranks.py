"""The devices that share the calibration rows of a sweep: one rank each, a thread with its own model and activations.

The ranks of a group do the same blocks in step. They meet in `SweepRank.exchange`, which is a barrier: of the threads,
and of the GPUs' queues. A rank reads a tensor of another one by copying it from GPU to GPU (`SweepRank.pull`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from packager.quantize.gptq.hessian import Hessian, PanelSum, ProductSums, hessian_of_sum
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.row_parts import add_up, batches_of_rank, part_of
from packager.quantize.gptq.target_correction import InputShift, shift_of_sum

_T = TypeVar("_T")


class RankStopped(Exception):  # noqa: N818
    """Internal signal: another rank of the group failed, and this one ends. The error is the other rank's."""


class RankGroup:
    """The ranks of one share of the variants.

    Args:
        devices: one for each rank.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self.posted: list[Any] = [None] * len(devices)
        self._barrier = Barrier(len(devices))

    def ranks(self) -> "list[SweepRank]":
        """Return the ranks."""
        return [SweepRank(self, number) for number in range(len(self.devices))]

    def wait(self) -> None:
        """Wait until every rank waits.

        Raises:
            RankStopped: a rank has failed.
        """
        try:
            self._barrier.wait()
        except BrokenBarrierError:
            raise RankStopped from None

    def abort(self) -> None:
        """End the other ranks: those that wait for this one, and later those that would."""
        self._barrier.abort()


class SweepRank:
    """One rank, used by its own thread.

    Args:
        group: of which it is one.
        number: its place in the group; it has the rows after those of the ranks before it.

    Attributes:
        device: where it computes.
        size: ranks of the group.
    """

    def __init__(self, group: RankGroup, number: int) -> None:
        self._group, self.number = group, number
        self.device, self.size = group.devices[number], len(group.devices)
        self._copying: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads and writes the variant's store."""
        return self.number == 0

    @contextmanager
    def ending_others(self) -> Iterator[None]:
        """End the other ranks if the body fails."""
        try:
            yield
        except BaseException:
            self._group.abort()
            raise

    def batches(self, num_batches: int) -> range:
        """Return which batches are this rank's."""
        return batches_of_rank(self.number, self.size, num_batches)

    def parts(self, num_batches: int) -> list[int]:
        """Return the part of each of this rank's batches."""
        return [part_of(batch, num_batches) for batch in self.batches(num_batches)]

    def exchange(self, value: _T) -> list[_T]:
        """Return the values of all ranks, in their order; what this rank's GPU does next comes after their work.

        Raises:
            RankStopped: a rank has failed.
        """
        if self.size == 1:
            return [value]
        done = self._stream().record_event() if self.device.type == "cuda" else None
        self._group.posted[self.number] = value, done
        self._group.wait()
        posted: list[tuple[_T, torch.cuda.Event | None]] = list(self._group.posted)
        self._group.wait()
        self._group.posted[self.number] = None  # a tensor is not kept until the next exchange
        for number, (_, event) in enumerate(posted):
            if event is not None and number != self.number:
                self._stream().wait_event(event)
        return [each for each, _ in posted]

    def any(self, flag: bool) -> bool:
        """Return whether the flag of any rank is set; see `exchange`."""
        return any(self.exchange(flag))

    def total(self, numbers: Sequence[float]) -> float:
        """Return the sum of every rank's numbers, added one after the other in the order of the batches."""
        return sum(chain.from_iterable(self.exchange(numbers)))

    def pull(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """Return a tensor of any rank on this rank's device, a copy unless it is there already.

        Call it after the exchange that passed the tensor on.

        Args:
            tensor: of any rank.
            into: where the copy is made, in any case; None allocates it.
        """
        if tensor.device == self.device:
            return tensor if into is None else into.copy_(tensor)
        # torch copies on the current stream of the source; the other rank's own would make the copy wait for its work.
        source = tensor.device
        if source not in self._copying:
            self._copying[source] = torch.cuda.Stream(source)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copying[source]):
            copy = tensor.to(self.device, non_blocking=True) if into is None else into.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copying[source])
        return copy

    def hessian(self, hessian: Hessian, owners: Collection[int]) -> Tensor | None:
        """Return H of all ranks' inputs on the ranks `owners`, and None on the others.

        Each rank adds up a piece of the sums; the owners collect the pieces. The sums are those of one device:
        `row_parts` says why.

        Args:
            hessian: of this rank's inputs; it is empty afterwards.
            owners: the ranks that need H.

        Raises:
            QuantizeError: no input arrived.
            RankStopped: a rank has failed.
        """
        found = self._total(hessian, owners)
        return None if found is None else hessian_of_sum(*found)

    def shift(self, shift: InputShift | None, owners: Collection[int]) -> Tensor | None:
        """Return S of all ranks' inputs on the ranks `owners`, and None on the others or without a shift."""
        found = None if shift is None else self._total(shift, owners)
        return None if found is None else shift_of_sum(*found)

    def _total(self, products: ProductSums, owners: Collection[int]) -> tuple[PanelSum | None, int] | None:
        """Return the sum over all ranks' inputs, None if there were none, and their number; None where not needed."""
        if self.size == 1:
            return products.take_total(), products.num_tokens
        everyone = self.exchange((products.take_sums(), products.num_tokens))
        num_tokens = sum(tokens for _, tokens in everyone)
        sums = {
            parts: self.pull(self._piece_of(total)) for parts, total in merged([each for each, _ in everyone]).items()
        }
        piece = add_up(sums, torch.add) if sums else None
        del everyone, sums
        pieces = [each for each in self.exchange(piece) if each is not None]
        if self.number not in owners:
            return None
        if not pieces:
            return None, num_tokens
        total = torch.empty(sum(map(len, pieces)), dtype=torch.float32, device=self.device)
        for each, place in zip(pieces, torch.split(total, [len(each) for each in pieces]), strict=True):
            self.pull(each, place)
        return products.panels_of(total), num_tokens

    def _piece_of(self, total: Tensor) -> Tensor:
        """Return the part of a sum that this rank adds up for all."""
        return total[len(total) * self.number // self.size : len(total) * (self.number + 1) // self.size]

    def every_input(self, inputs: Sequence[RoutedInputs]) -> list[RoutedInputs]:
        """Return the experts' inputs of all ranks on this rank's device, in the order of the batches."""
        return [self._pull_inputs(each) for each in chain.from_iterable(self.exchange(inputs))]

    def _pull_inputs(self, inputs: RoutedInputs) -> RoutedInputs:
        routing = inputs.routing
        pulled = replace(routing, pairs=self.pull(routing.pairs), bounds=self.pull(routing.bounds))
        return replace(inputs, rows=self.pull(inputs.rows), routing=pulled)

    def copy_from_owners(self, owned: "Sequence[Owned]") -> None:
        """Overwrite tensors that other ranks own by what their owners have; every rank names the same ones."""
        if self.size == 1:
            return
        everyone = self.exchange([each.tensor for each in owned])
        for number, each in enumerate(owned):
            if each.owner != self.number:
                self.pull(everyone[each.owner][number], each.tensor)

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A tensor of which every rank has a copy, and the rank that computes it."""

    tensor: Tensor
    owner: int


def alone(device: torch.device) -> SweepRank:
    """Return the only rank of a group."""
    return RankGroup([device]).ranks()[0]


def connect(devices: Sequence[torch.device]) -> None:
    """Have torch open the ways between the GPUs; call it from one thread, before the ranks start.

    torch opens a way at the first copy, and two threads must not open one at the same time.
    """
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    for source in gpus:
        for target in gpus:
            if source != target:
                torch.zeros(1, device=source).to(target)


def merged(everyone: Sequence[Mapping[Any, _T]]) -> dict[Any, _T]:
    """Return the entries of all ranks' mappings, which have no key in common, sorted by key."""
    return dict(sorted(chain.from_iterable(cast(Any, each).items() for each in everyone)))
