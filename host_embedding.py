"""An embedding that stays in the host's memory while a GPU trains the rest of the model.

One need not read this to understand Bone. A step needs the rows of its own tokens alone, some
megabytes of a table of half a gigabyte (7B). They are looked up on the host, and sent with the rest
of the batch (data.to_device). So this is for an embedding that is not trained.
"""

import torch
from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """Stand in a model for nn.Embedding: (B, T) ids, or the rows of them, -> (B, T, C).

    weight: (vocab, C), which is copied to the host; on the meta device it stays there. It is no
    parameter: moving the model leaves it where it is. device: of the rest of the model.
    """

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        self.weight = weight if weight.is_meta else weight.cpu()
        self.device = device

    def rows(self, idx: Tensor) -> Tensor:
        """Look up ids (B, T): their rows (B, T, C), on the host."""
        return self.weight[idx]

    def forward(self, idx: Tensor) -> Tensor:
        if idx.is_floating_point():
            return idx  # they have been looked up
        return self.rows(idx.cpu()).to(self.device)
