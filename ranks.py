"""Ranks, the processes that torchrun starts: how a batch is divided among them, and what they sum up."""

import functools
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Imported before any process group exists: its functions store the default group as a default argument
# and would keep it alive until exit.
import torch.distributed.nn

from records import UserError


def rank_variable(name: str, alone: int = 0) -> int:
    """RANK or the like, as torchrun sets it; `alone` for one process, whatever is left over in its shell."""
    world, value = (os.environ.get(each, "") for each in ("WORLD_SIZE", name))
    return int(value) if world.isdecimal() and int(world) > 1 and value.isdecimal() else alone


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: torchrun's, or (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.cache
def rank_group(size: int):
    """The group of `size` consecutive ranks to which this rank belongs; None for one."""
    return dist.new_subgroups(size)[0] if size > 1 else None


@dataclass(frozen=True)
class Division:
    """How an update of B images is divided."""

    per_rank: int  # images of each rank
    micro: int  # images per pass of a rank
    ghost: int | None  # images per ghost batch; None without batch norm
    ranks_per_ghost: int  # consecutive ranks whose images make up one ghost batch

    def own(self, rank: int) -> slice:
        """The images of a batch that are a rank's."""
        return slice(rank * self.per_rank, (rank + 1) * self.per_rank)


def divide_batch(bs: int, ghost: int | None, world: int, micro: int, device: str) -> Division:
    """Divide a batch among ranks and passes; `micro=0` chooses the fastest passes for the device's type.

    Every division gives the same update. Raises UserError for a batch that the ranks or the ghost batches do
    not divide, and for passes that would change the ghost batches.
    """
    per_rank = bs // world
    if bs % world:
        raise UserError(f"--bs {bs} should be a multiple of the {world} ranks")
    if ghost is None:
        return Division(per_rank, min(micro or (64 if device == "cpu" else per_rank), per_rank), None, 1)
    ghost = min(ghost or bs, bs)
    if bs % ghost:
        raise UserError(f"--bs {bs} should be a multiple of --ghost {ghost}, or smaller")
    if per_rank % ghost and (ghost % per_rank or world % (ghost // per_rank)):
        raise UserError(
            f"ghost batches of {ghost} cannot be made of {per_rank} images on each of {world} ranks"
        )
    local = min(ghost, per_rank)
    if micro % local:
        raise UserError(f"--micro {micro} should be a multiple of a ghost batch's {local} images on one rank")
    # A CPU's caches want passes of one ghost batch; a GPU wants all images at once.
    micro = min(micro or (local if device == "cpu" else per_rank), per_rank)
    return Division(per_rank, micro, ghost, max(1, ghost // per_rank))


def combine_ranks(sums: list[torch.Tensor], means: list[torch.Tensor]):
    """Replace 1-dim tensors by their sum over all ranks, and others by their mean, in one all-reduce."""
    flat = torch.cat([*sums, *(mean / dist.get_world_size() for mean in means)])
    dist.all_reduce(flat)
    tensors = [*sums, *means]
    torch._foreach_copy_(tensors, list(flat.split([len(tensor) for tensor in tensors])))


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over a group of ranks (None: this one alone), also for its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        if group:
            dist.all_reduce(x := x.clone(), group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient, ctx.group), None


class BatchNormOverRanks(torch.autograd.Function):
    """Batch norm over the equal batches of a group of GPUs, with PyTorch's own kernels.

    nn.SyncBatchNorm allows for batches of different sizes, and waits for the GPU to compare them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, group):
        ranks, images = dist.get_world_size(group), x.numel() // x.shape[1]
        mine = torch.cat(torch.batch_norm_stats(x, eps))  # mean and 1/deviation, float32
        every = mine.new_zeros(ranks, len(mine))
        every[dist.get_rank(group)] = mine
        dist.all_reduce(every, group=group)
        counts = mine.new_full((ranks,), images)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, *every.chunk(2, 1), running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.int())
        ctx.group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)
        *sums, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, True, True, True
        )
        dist.all_reduce(both := torch.cat(sums), group=ctx.group)
        inputs = torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, *both.chunk(2), counts)
        return inputs, weight_gradient, bias_gradient, None, None, None, None, None
