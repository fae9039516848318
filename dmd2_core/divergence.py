"""Which divergence the distribution matching gradient descends (f-distill, arXiv 2502.15681).

For D_f(p || q) = E_q[f(p / q)], with p the density of real images at a noise level and q that of
the student's samples at the same one, the gradient is that of KL(q || p), DMD's, with every sample
weighted by

    h(r) = f''(r) r^2,    r = p(x_t) / q(x_t).

| divergence         | f(r)                                  | h(r)        |
|--------------------|---------------------------------------|-------------|
| reverse KL         | -log r                                | 1           |
| softened reverse KL| (r + 1) log(1/2 + 1/(2r))             | 1 / (r + 1) |
| Jensen-Shannon     | r log r - (r + 1) log((r + 1) / 2)    | r / (r + 1) |
| forward KL         | r log r                               | r           |

Reverse KL seeks modes. Where h grows with r, samples that real images are dense at count more, and
the student is drawn less to few modes. A discriminator that is trained on both, noised alike, has
the logit log r at its optimum.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Divergence = Literal["reverse-kl", "softened-reverse-kl", "jensen-shannon", "forward-kl"]

LARGEST_RATIO = 10.0
"""r is taken within 1 / LARGEST_RATIO and LARGEST_RATIO: a discriminator that is sure is not right
about the tails. Public trainings use 0.1 to 10 or 20."""


@torch.no_grad()
def divergence_weight(divergence: Divergence, logits: Tensor) -> Tensor:
    """h(r) of each sample, not normalised: (B,) float32, like `logits`, its estimates of log r."""
    bound = math.log(LARGEST_RATIO)
    log_ratio = logits.float().clamp(-bound, bound)
    if divergence == "reverse-kl":
        return torch.ones_like(log_ratio)
    if divergence == "softened-reverse-kl":
        return torch.sigmoid(-log_ratio)
    if divergence == "jensen-shannon":
        return torch.sigmoid(log_ratio)
    if divergence == "forward-kl":
        return log_ratio.exp()
    raise ValueError(f"divergence is {divergence!r}: use one of {', '.join(get_args(Divergence))}")
