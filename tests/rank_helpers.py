"""What gloo of this torch can do."""

import torch
import torch.distributed as dist

from stepkto_kernels import shards

NO_MEANS = "gloo of this torch takes the sum where FSDP2 asks for the mean"  # torch 2.8's


def takes_means(group: dist.ProcessGroup) -> bool:
    """All ranks of `group` have to ask."""
    out = torch.zeros(1)
    shards._reduce_scatter(out, torch.ones(group.size()), op=dist.ReduceOp.AVG, group=group)
    return out.item() == 1
