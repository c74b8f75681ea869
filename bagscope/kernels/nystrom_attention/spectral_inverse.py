"""The pseudo-inverse from eigenvectors: on a processor half of what the iteration costs.

With S Sᵀ = U (c Λ) Uᵀ every A and P of `pseudo_inverse` is a function of Λ in U, and

    Z = Sᵀ U g(Λ) Uᵀ / c,   g = Π p(a_k),  a₀ = λ,  a ← a p(a),  p(a) = ¼ (13 − 15 a + 7 a² − a³)

The gradient of S Sᵀ is U (F ∘ (Uᵀ G U)) Uᵀ, G that of U g(Λ) Uᵀ and F the divided differences
(g(λ_i) − g(λ_j)) / (λ_i − λ_j). These are made of those of p, polynomials themselves, so that
eigenvalues may be close, or the same.

Shapes as there. Two products of m × m beside the eigenvectors, four on the way back; U is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.nystrom_attention.pseudo_inverse import Start


class SpectralInverse:
    """Z of one bag, as U and Sᵀ U."""

    def __init__(
        self, s: Tensor, iterations: int, shared_start: bool, kept: Tensor, *, is_filled: bool
    ) -> None:
        """Make U in `kept` (1, H, m, m), or find it there."""
        self.s, self.iterations = s, iterations
        self.start = Start.of(s, shared_start)
        self.u = kept[0]
        # S Sᵀ and its vectors in float64: there the small eigenvalues, which count most, survive.
        exact = s.double()
        if not is_filled:
            square = exact @ exact.mT
            # A head that is not finite has no eigenvectors, and is no error: a loss will tell.
            is_odd = ~square.isfinite().all(-1).all(-1)[:, None, None]
            vectors = torch.linalg.eigh(square.masked_fill(is_odd, 0.0))[1]
            self.u.copy_(vectors.masked_fill_(is_odd, float("nan")))
        self.b = (exact.mT @ self.u.double()).to(s.dtype)
        # More exact than the eigenvalues that come with the vectors, where these are small.
        self.value = self.b.square().sum(-2)[..., None] / self.start.c
        self.g = torch.ones_like(self.value)
        a = self.value
        for _ in range(iterations):
            p = _p(a)
            self.g, a = self.g * p, a * p
        self.g /= self.start.c

    @staticmethod
    def matrices(iterations: int) -> int:
        """Return how many matrices (H, m, m) are kept of one bag."""
        return 1

    def times(self, x: Tensor) -> Tensor:
        """Return Z X."""
        return self.b @ (self.g * (self.u.mT @ x))

    def asked(self, rows: Tensor) -> Tensor:
        """Return R Z."""
        return (self.u @ (self.g * (self.b.mT @ rows.mT))).mT

    def times_backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of X and of S, given that of Z X."""
        return self.asked(grad.mT).mT, self._of_s(grad, x)

    def asked_backward(self, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of R and of S, given that of R Z."""
        return self.times(grad.mT).mT, self._of_s(rows.mT, grad.mT)

    def _of_s(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of S that Σ left ∘ (Z right) has, both (H, m, r)."""
        along, across = self.b.mT @ left, self.u.mT @ right
        bent = self.g * across
        both = torch.cat([along, across], -1) @ torch.cat([across, along], -1).mT
        both.mul_(self._differences()).div_(self.start.c**2)
        found = self.u @ torch.baddbmm(bent @ left.mT, both, self.b.mT)
        # c divides Z, and S Sᵀ within it.
        value = (along * bent).sum((1, 2), keepdim=True)
        of_values = both.diagonal(dim1=-2, dim2=-1)[..., None] * self.value
        value += 0.5 * self.start.c * of_values.sum((1, 2), keepdim=True)
        return self.start.add_of_scale(found, value)

    def _differences(self) -> Tensor:
        """Return F (H, m, m)."""
        a, g = self.value, torch.ones_like(self.value)
        of_a = of_g = None
        for _ in range(self.iterations):
            y, p = a.mT, _p(a)
            left = torch.cat([7.0 * a - a * a - 15.0, 7.0 - a, -torch.ones_like(a)], -1)
            of_p = 0.25 * left @ torch.cat([torch.ones_like(y), y, y * y], -2)
            if of_a is None or of_g is None:
                of_g, of_a = of_p, p + y * of_p
            else:
                # Of a product: (g p)[x, y] = g[x, y] p(x) + g(y) p[x, y].
                of_p *= of_a
                of_g = of_g.mul_(p).addcmul_(of_p, g.mT)
                of_a = of_a.mul_(p).addcmul_(of_p, y)
            a, g = a * p, g * p
        assert of_g is not None, "there is an iteration"
        return of_g


def _p(a: Tensor) -> Tensor:
    return 0.25 * (13.0 - a * (15.0 - a * (7.0 - a)))
