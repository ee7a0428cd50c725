"""An encoder that looks again: what the chosen latents leave over is added to what it reads, and it chooses anew.

    u_0 = x        u_t+1 = u_t + step * (x - z_t W_dec)        p_t = u_t W_enc + b_enc        z_t = choose(p_t)

x is centred. Each step is one of iterative shrinkage-thresholding (ISTA) with W_enc as the gradient's matrix: latents
that explain the same part of x compete for it, which one product alone cannot see.
Source: Daubechies, Defrise and De Mol 2004, "An iterative thresholding algorithm for linear inverse problems"; as an
encoder Gregor and LeCun 2010, "Learning fast approximations of sparse coding", here without matrices of its own.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor


def refined(
    x: Float[Tensor, "n d_in"],
    decode: Callable[[Float[Tensor, "n d_in"], int], Float[Tensor, "n d_in"]],
    n_steps: int,
    step: float,
) -> Float[Tensor, "n d_in"]:
    """What the encoder reads in place of x (centred) after so many steps. decode: (u_t, t) -> z_t W_dec."""
    u = x
    for t in range(n_steps):
        u = u + step * (x - decode(u, t))
    return u
