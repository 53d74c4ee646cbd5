"""What the training loop works with.

One need not read this to understand Bone.
"""

import dataclasses
from collections.abc import Mapping

import torch

from checkpointer import Checkpointer
from passes import Passes
from plan import RunPlan
from run_log import Log
from run_state import Progress
from rwkv6 import RWKV


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop works with."""

    plan: RunPlan
    device: torch.device
    model: RWKV
    passes: Passes  # how batches pass through the model: precision, chunks, ranks
    optimizer: torch.optim.Optimizer
    progress: Progress
    log: Log
    checkpointer: Checkpointer
    save_dtype: Mapping[str, torch.dtype]  # of each tensor in a checkpoint
