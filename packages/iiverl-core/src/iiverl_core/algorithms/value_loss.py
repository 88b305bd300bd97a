"""The critic's loss: squared error, clipped like the policy's.

With V the critic's value, V_old the one before the step's first update, and R the return,

    L = ½ max((V - R)², (clip(V, V_old - c, V_old + c) - R)²)

for each token (Schulman et al.'s PPO as OpenAI's baselines implement it; Huang et al. 2022, "The 37 implementation
details of PPO", detail 9). A value more than c away from V_old gets no gradient if moving further would bring it nearer
to the return.
"""

import torch
from torch import Tensor


def value_loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token, (T,), with gradient to `values_T`, and which tokens are clipped, (T,) bool."""
    unclipped_T = (values_T - returns_T).square()
    clipped_values_T = values_T.clamp(old_values_T - clip, old_values_T + clip)
    clipped_T = (clipped_values_T - returns_T).square()
    return torch.maximum(unclipped_T, clipped_T) / 2, clipped_T > unclipped_T
