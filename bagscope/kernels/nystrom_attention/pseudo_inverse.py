"""The pseudo-inverse of Nyström attention, applied to what it is multiplied with.

    Z₀ = Sᵀ / c,    Z ← Z P,   P = ¼ (13 I − 15 A + 7 A² − A³),   A = S Z

with c = max column sum · max row sum. The last P is not made but applied, by three narrow products.
Z₀ is Sᵀ / c and every A a polynomial of S Sᵀ, hence symmetric: so is what matters of its gradient,
which saves a quarter of the products on the way back. (With A ← A P in place of S Z half of the
products would do, at ten times the rounding errors.)

Shapes: S (H, m, m), rows sum to one; X (H, m, r), R (H, r, m). K iterations take 4 K − 3 products
of m × m, their gradient 6 K − 4. Kept in between are 2 K − 1 matrices, all A and P; K − 1 products
make every Z of them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Start:
    """What the iteration's start is divided by, and how it depends on S.

    Attributes:
        c: (H or 1, 1, 1).
        widest: (H or 1, 1, 1) the largest sum of a column.
        is_widest: (H, 1, m) each column's share in it.
    """

    c: Tensor
    widest: Tensor
    is_widest: Tensor

    @classmethod
    def of(cls, s: Tensor, is_shared: bool) -> Start:
        """Return that of each head, or of all heads."""
        columns, rows = s.sum(-2), s.sum(-1)
        dims = (0, 1) if is_shared else 1
        widest = columns.amax(dims, keepdim=True)[..., None]
        is_widest = (columns[:, None] == widest).to(s.dtype)
        is_widest /= is_widest.sum((0, 2) if is_shared else 2, keepdim=True)
        return cls(widest * rows.amax(dims, keepdim=True)[..., None], widest, is_widest)

    def add_of_scale(self, of_s: Tensor, value: Tensor) -> Tensor:
        """Add to the gradient of S that of c, given −c times its derivative per head (H, 1, 1)."""
        if len(self.c) == 1:
            value = value.sum(0, keepdim=True)
        # c grows with its widest column; the sums of rows are one whatever S is.
        return of_s.sub_(value / self.widest * self.is_widest)


class IteratedInverse:
    """Z of one bag, as the A, Z and P of all iterations."""

    def __init__(
        self, s: Tensor, iterations: int, shared_start: bool, kept: Tensor, *, is_filled: bool
    ) -> None:
        """Make A and P in `kept` (2 K − 1, H, m, m), or find them there."""
        self.s, self.start = s, Start.of(s, shared_start)
        self.a, self.p = kept[:iterations], kept[iterations:]
        self.z: list[Tensor] = [s.mT / self.start.c]
        for k in range(iterations):
            if k:
                self.z.append(self.z[k - 1] @ self.p[k - 1])
            if is_filled:
                continue
            a = torch.bmm(s, self.z[k], out=self.a[k])
            if k + 1 < iterations:
                square = a @ a
                p = torch.sub(square, a, alpha=15 / 7, out=self.p[k])
                p.baddbmm_(square, a, beta=1.75, alpha=-0.25)
                p.diagonal(dim1=-2, dim2=-1).add_(3.25)

    @staticmethod
    def matrices(iterations: int) -> int:
        """Return how many matrices (H, m, m) are kept of one bag."""
        return 2 * iterations - 1

    def times(self, x: Tensor) -> Tensor:
        """Return Z X."""
        return self.z[-1] @ _step(self.a[-1], x)

    def asked(self, rows: Tensor) -> Tensor:
        """Return R Z."""
        return _step(self.a[-1].mT, (rows @ self.z[-1]).mT).mT

    def times_backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of X and of S, given that of Z X."""
        stepped = _step(self.a[-1], x)
        of_x, of_a = _step_backward(self.a[-1], x, self.z[-1].mT @ grad)
        return of_x, self._of_s(of_a, grad @ stepped.mT)

    def asked_backward(self, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of R and of S, given that of R Z."""
        first = (rows @ self.z[-1]).mT
        of_first, of_a = _step_backward(self.a[-1].mT, first, grad.mT)
        return of_first.mT @ self.z[-1].mT, self._of_s(of_a.mT, rows.mT @ of_first.mT)

    def _of_s(self, of_a: Tensor, of_z: Tensor) -> Tensor:
        """Return the gradient of S, given those of the last A and Z by what follows them."""
        found = torch.zeros_like(self.s)
        for k in reversed(range(len(self.z))):
            found.baddbmm_(of_a, self.z[k].mT)
            of_z = torch.baddbmm(of_z, self.s.mT, of_a)
            if k:
                of_p = self.z[k - 1].mT @ of_z
                of_z = of_z @ self.p[k - 1].mT
                of_a = _cubic_backward(self.a[k - 1], of_p)
        value = (of_z * self.z[0]).sum((1, 2), keepdim=True)
        return self.start.add_of_scale(found.add_(of_z.mT / self.start.c), value)


def _cubic_backward(a: Tensor, grad: Tensor) -> Tensor:
    """Return the symmetric gradient of A, given that of ¼ (13 I − 15 A + 7 A² − A³)."""
    grad = (grad + grad.mT).mul_(0.125)
    once = a @ grad
    twice = a @ torch.add(once, once.mT, alpha=0.5)
    once.mul_(7.0).sub_(twice)
    return torch.add(once, once.mT).sub_(grad, alpha=15.0)


def _step(a: Tensor, x: Tensor) -> Tensor:
    """Return ¼ (13 I − A (15 I − A (7 I − A))) X."""
    found = torch.baddbmm(x, a, x, beta=7.0, alpha=-1.0)
    found = torch.baddbmm(x, a, found, beta=15.0, alpha=-1.0)
    return torch.baddbmm(x, a, found, beta=3.25, alpha=-0.25)


def _step_backward(a: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of X and of A, given that of `_step`."""
    once = a.mT @ grad
    twice = a.mT @ once
    of_x = torch.sub(13.0 * grad, once, alpha=15.0).add_(twice, alpha=7.0)
    of_x = of_x.baddbmm_(a.mT, twice, alpha=-1.0).mul_(0.25)
    inner = torch.baddbmm(x, a, x, beta=7.0, alpha=-1.0)
    outer = torch.baddbmm(x, a, inner, beta=-15.0)
    left, right = torch.cat([grad, once, twice], -1), torch.cat([outer, inner, -x], -1)
    return of_x, (left @ right.mT).mul_(0.25)
