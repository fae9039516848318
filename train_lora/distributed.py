"""Several processes that train one model: who they are, and what they exchange."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

Piece = TypeVar("Piece")
"""An index into a tensor."""


def join_processes(mixed_precision: str) -> Accelerator:
    """This process's place among those that torchrun or accelerate started; waits for the others.

    Only the main process goes on telling what it does; errors and warnings come from all.
    """
    from accelerate import Accelerator

    # Without this, processes on a machine without GPU would each train alone, all as "main".
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=mixed_precision
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), but accelerate sees "
            f"{accelerator.num_processes}; start them with torchrun, see docs/runs.md."
        )
    if not accelerator.is_main_process:
        logging.getLogger(__package__).setLevel(logging.WARNING)
    return accelerator


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients over all processes, in place; a no-op for one process.

    One flat float32 all-reduce, missing gradients as zeros: right with two adapters on one base,
    under checkpointing and accumulation, where one DDP wrapper is silently wrong, and 50 times
    faster than one reduction per tensor.
    """
    if not several() or not parameters:
        return
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.float().flatten() for piece in pieces])
    with reaching_the_others():
        dist.all_reduce(flat)
    flat /= dist.get_world_size()
    averaged: tuple[Tensor, ...] = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, averaged, strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)


def largest(number: int, device: torch.device) -> int:
    """The largest `number` of all processes, so that they decide alike."""
    if not several():
        return number
    shared = torch.tensor(number, device=device)
    with reaching_the_others():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def total(numbers: Tensor) -> Tensor:
    """The sum over all processes, element by element; `numbers` itself where there is one."""
    if not several():
        return numbers
    shared = numbers.clone()
    with reaching_the_others():
        dist.all_reduce(shared)
    return shared


def shared_out(
    pieces: Sequence[Piece], work: Callable[[Piece], Tensor], into: Tensor, *, together: bool
) -> Tensor:
    """`into[piece] = work(piece)` for all pieces, each done by one process; the result in all.

    `into`: zeros, on the device of the exchange. `together`: the work itself takes all processes
    (sharded networks), so that all do it equally often; what one does too often is not kept.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if several() else (1, 0)
    for first in range(0, len(pieces), ranks):
        number = first + rank
        if number < len(pieces):
            into[pieces[number]] = work(pieces[number])
        elif together:
            work(pieces[-1])
    return total(into)  # the others' pieces are zeros here


def wait_for_all(device: torch.device) -> None:
    """Returns when every process has come here."""
    largest(0, device)


def leave_processes() -> None:
    """Say goodbye to the other processes; none may be waiting for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def reaching_the_others() -> Iterator[None]:
    """A process that died shows as a failing exchange: one sentence instead of a backend's."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def telling_of_lost_processes() -> Iterator[None]:
    """The same around work that exchanges where it likes, as sharded networks do in each pass."""
    try:
        yield
    except RuntimeError as error:
        if not several() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> ConnectionError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
    return ConnectionError(
        f"Process {dist.get_rank()} lost the other processes of this run, one of which has "
        f"ended or cannot be reached; what it said last tells why ({reason}). "
        "What was saved is untouched: start the command again, or a training with --resume RUNDIR."
    )
