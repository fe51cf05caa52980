"""KronSAE's encoder: latents that are pairwise soft ANDs of a few projections a head.

Source: "Kronecker Factorization Improves Efficiency and Interpretability of Sparse Autoencoders", arXiv 2505.22255v3,
sections 3 and 4 and appendix H (the authors' listing).

Symbols: h heads of m base and n extension pre-latents; F = h m n latents; x [d] the input; for head k

    u = P^k x + b_P   [m],    v = Q^k x + b_Q   [n],    p = relu(u),  q = relu(v)
    z[i, j] = mAND(u_i, v_j) = sqrt(p_i q_j + eps)  where p_i > 0 and q_j > 0,  else 0
    latent f = k m n + i n + j,     f(x) = the K largest of all F latents

eps = 1e-5 keeps the gradient finite, dz/du_i = q_j / (2 z); the listing adds it to silent latents too, which then have
the value sqrt(eps) (`mask_inactive=False`). "relu_product" p_i q_j and "product" u_i v_j are the paper's ablations; of
the latter too only positive latents count.

Two-stage TopK (ours): every activation here is largest at a corner of a head's rectangle [min u, max u] x [min v,
max v], so a latent among the K largest lies in one of the K heads with the largest corners (each of K better heads
would supply a better latent). Only those K m n products are formed, never F; the result is that of the full TopK, up
to ties. Within a layer of the encoder the rows are held component by component, row r h + k for component r of head k
(P's m components, then Q's n), so that a head's maximum is a maximum of a few contiguous vectors; files hold the
listing's order, row k (m + n) + r.

`KronSAE` is a TopK dictionary with this encoder; its files are in SAELens's layout under the architecture "kron_topk",
which `import trimtab.sae.saelens` makes known to SAELens.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import TrimtabError, unknown
from trimtab.sae import kernels
from trimtab.sae.encodings import Latents, Pullback, blocks
from trimtab.sae.kernels import Precision
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "KronEncoding",
    "KronSAE",
    "KronSAEConfig",
    "flops_kron",
    "flops_topk",
    "head_major",
    "initial_weights",
    "latents_dense",
]

Activation = Literal["mand", "relu_product", "product"]
ACTIVATIONS = get_args(Activation)


@dataclass(frozen=True, kw_only=True)
class KronEncoding:
    """The shape of a KronSAE's encoder: h heads, m base and n extension pre-latents each.

    Raises TrimtabError for values other than the module's docstring has; warns where (m, n) saves nothing.
    """

    h: int
    m: int
    n: int
    eps: float = 1e-5
    activation: Activation = "mand"
    mask_inactive: bool = True

    def __post_init__(self) -> None:
        for name in ("h", "m", "n"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TrimtabError(f"{name}={value!r} must be a positive integer")
        object.__setattr__(self, "eps", float(self.eps))
        if not 0 <= self.eps < float("inf"):
            raise TrimtabError(f"eps={self.eps!r} must be 0 or above")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.m + self.n >= self.m * self.n:
            warnings.warn(
                f"m={self.m}, n={self.n}: {self.m + self.n} encoder rows for {self.m * self.n} latents a head; a dense "
                "encoder has no more",
                stacklevel=3,
            )

    @property
    def n_latents(self) -> int:
        return self.h * self.m * self.n

    @property
    def rows(self) -> int:
        """Rows of the encoder's matrix."""
        return self.h * (self.m + self.n)

    @property
    def blocks(self) -> int:
        """Components of a head, for each of which the encoder has a row of every head."""
        return self.m + self.n

    def part(self, parts: int) -> KronEncoding:
        """The encoding of h / `parts` heads."""
        return replace(self, h=self.h // parts) if parts > 1 else self

    def rows_of(self, indices: Int[Tensor, "*any"]) -> tuple[Int[Tensor, "*any"], Int[Tensor, "*any"]]:
        """The encoder rows of each latent: of its base and of its extension pre-latent."""
        head = indices.div(self.m * self.n, rounding_mode="floor")
        base = indices.div(self.n, rounding_mode="floor") % self.m
        return base * self.h + head, (self.m + indices % self.n) * self.h + head

    def values(self, u: Tensor, v: Tensor) -> Tensor:
        """z of pre-latents, in float32 at least."""
        wide = torch.promote_types(u.dtype, torch.float32)
        if self.activation == "product":
            return u.to(wide) * v.to(wide)
        p, q = u.to(wide).relu(), v.to(wide).relu()
        if self.activation == "relu_product":
            return p * q
        z = (p * q + self.eps).sqrt()
        return z.where((p > 0) & (q > 0), 0.0) if self.mask_inactive else z

    def slopes(self, u: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """dz/du and dz/dv where z was kept (0 elsewhere)."""
        if self.activation == "product":
            return v * (z > 0), u * (z > 0)
        p, q = u.relu(), v.relu()
        if self.activation == "relu_product":
            return q * (p > 0), p * (q > 0)
        half = torch.where((p > 0) & (q > 0), 0.5 / z.clamp_min(torch.finfo(z.dtype).tiny), 0.0)
        return q * half, p * half

    def top(
        self,
        x: Float[Tensor, "tokens d"],
        encoder: Float[Tensor, "rows d"],
        bias: Float[Tensor, " rows"],
        k: int,
        *,
        precision: Precision = "float32",
        among: Int[Tensor, " some"] | None = None,
    ) -> tuple[Latents, Pullback]:
        """The k largest latents of each token, of all or of those `among`, and what carries their gradient back."""
        product_dtype = x.dtype if precision == "float32" else torch.bfloat16
        candidates = kernels.candidates(k, self.n_latents if among is None else len(among), precision)
        tokens = x.shape[0]
        indices = torch.empty(tokens, candidates, dtype=torch.int64, device=x.device)
        u, v = x.new_empty(tokens, candidates), x.new_empty(tokens, candidates)
        weight, shift = encoder.to(product_dtype).T, bias.to(product_dtype)
        heads = min(candidates, self.h)
        width = max(self.rows, len(among) if among is not None else heads * self.m * self.n)
        for block in blocks(tokens, width):
            pre = torch.addmm(shift, x[block].to(product_dtype), weight)
            if self.activation != "product":
                pre.relu_()
            best = self._best(pre, candidates) if among is None else self._best_among(pre, candidates, among)
            base, extension = self.rows_of(best)
            indices[block], u[block], v[block] = best, pre.gather(1, base), pre.gather(1, extension)
        base, extension = self.rows_of(indices)
        if precision == "screened":
            u, v = (kernels.row_products(x, encoder, rows) + bias[rows] for rows in (base, extension))
            chosen = self.values(u, v).topk(k, dim=-1, sorted=False).indices
            indices, base, extension, u, v = (t.gather(-1, chosen) for t in (indices, base, extension, u, v))
        z = self.values(u, v)

        def pullback(d_values: Tensor) -> tuple[Tensor, Tensor]:
            du, dv = self.slopes(u, v, z)
            return torch.cat([d_values * du, d_values * dv], -1), torch.cat([base, extension], -1)

        return Latents(z.relu().to(x.dtype), indices), pullback

    def _best(self, pre: Float[Tensor, "tokens rows"], k: int) -> Int[Tensor, "tokens k"]:
        """Indices of the k largest latents, through the heads with the largest corners.

        Latents are ordered as the products of their pre-latents (u v, or p q) are: every activation rises with those.
        """
        pre = _wide(pre).view(len(pre), self.m + self.n, self.h)
        u, v = pre[:, : self.m], pre[:, self.m :]
        top_heads = torch.arange(self.h, device=pre.device).expand(len(pre), -1)
        if self.h > k:
            top_heads = self._corners(u, v).topk(k, dim=-1, sorted=False).indices
            u, v = (t.gather(2, top_heads[:, None].expand(-1, t.shape[1], -1)) for t in (u, v))
        products = u[:, :, None] * v[:, None]  # [tokens, m, n, heads], in the order of z
        flat = products.flatten(1).topk(k, dim=-1, sorted=False).indices
        slot = flat % u.shape[2]
        pair = flat.div(u.shape[2], rounding_mode="floor")
        return top_heads.gather(1, slot) * (self.m * self.n) + pair

    def _corners(self, u: Tensor, v: Tensor) -> Tensor:
        """The largest product of each head."""
        largest = u.amax(1), v.amax(1)
        if self.activation != "product":
            return largest[0] * largest[1]
        smallest = u.amin(1), v.amin(1)
        corners = [a * b for a in (largest[0], smallest[0]) for b in (largest[1], smallest[1])]
        return torch.stack(corners).amax(0)

    def _best_among(self, pre: Tensor, k: int, among: Tensor) -> Tensor:
        base, extension = self.rows_of(among)
        pre = _wide(pre)
        products = pre.index_select(1, base).mul_(pre.index_select(1, extension))
        return among[products.topk(k, dim=-1, sorted=False).indices]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def latents_dense(
    x: Float[Tensor, "tokens d"],
    encoder: Float[Tensor, "rows d"],
    bias: Float[Tensor, " rows"],
    encoding: KronEncoding,
) -> Float[Tensor, "tokens n_latents"]:
    """All F latents before TopK: the specification, differentiated by autograd."""
    pre = (x @ encoder.T + bias).view(len(x), encoding.m + encoding.n, encoding.h)
    u, v = pre[:, : encoding.m].movedim(-1, 1), pre[:, encoding.m :].movedim(-1, 1)
    return encoding.values(u[..., :, None], v[..., None, :]).flatten(1)


def initial_weights(
    encoding: KronEncoding, d_in: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "n_latents d"]]:
    """Encoder entries N(0, 1) / sqrt(2 F); decoder rows the sum of both pre-latents' rows, of norm 1 (listing)."""
    encoder = torch.randn(encoding.rows, d_in, generator=generator) / (2 * encoding.n_latents) ** 0.5
    base, extension = encoding.rows_of(torch.arange(encoding.n_latents))
    decoder = encoder[base] + encoder[extension]
    return encoder, decoder / decoder.norm(dim=-1, keepdim=True)


def head_major(rows: Float[Tensor, "rows *width"], encoding: KronEncoding, *, inverse: bool = False) -> Tensor:
    """Encoder rows, or biases, from the order of this module to that of the authors' listing; `inverse`: back."""
    parts = encoding.m + encoding.n
    shape = (encoding.h, parts) if inverse else (parts, encoding.h)
    return rows.unflatten(0, shape).transpose(0, 1).flatten(0, 1)


def flops_topk(d: int, n_latents: int, k: int) -> int:
    """Multiply-accumulates a token, forward, of a dense TopK dictionary (section 3.3)."""
    return d * n_latents + k * d


def flops_kron(d: int, h: int, m: int, n: int, k: int) -> int:
    """Multiply-accumulates a token, forward, of a KronSAE (section 3.3)."""
    return d * h * (m + n) + h * m * n + k * d


@dataclass(frozen=True, kw_only=True)
class KronSAEConfig(TopKSAEConfig):
    """The shape of a KronSAE; `h`, `m`, `n`, `eps`, `activation` and `mask_inactive` are those of `KronEncoding`.

    n_latents: h m n, not given.
    apply_b_dec_to_input: not in the paper, whose encoder reads x as it is.
    """

    h: int
    m: int
    n: int
    eps: float = 1e-5
    activation: Activation = "mand"
    mask_inactive: bool = True
    apply_b_dec_to_input: bool = False
    n_latents: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_latents", self.encoding.n_latents)
        object.__setattr__(self, "eps", self.encoding.eps)
        super().__post_init__()

    @functools.cached_property
    def encoding(self) -> KronEncoding:
        """The shape of the encoder."""
        return KronEncoding(
            h=self.h, m=self.m, n=self.n, eps=self.eps, activation=self.activation, mask_inactive=self.mask_inactive
        )

    @property
    def rows(self) -> int:
        """h (m + n)."""
        return self.encoding.rows


class KronSAE(TopKSAE):
    """A TopK dictionary whose encoder is a KronSAE's: `encoder` [h (m + n), d_in] and `encoder_bias` [h (m + n)].

    `W_enc` [d_in, h (m + n)] and `b_enc` are copies in the order of the authors' listing. A fresh one has the listing's
    initial weights: encoder entries N(0, 1) / sqrt(2 F), decoder rows the normalised sums of their two encoder rows.
    """

    config: KronSAEConfig

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """The listing's initial weights, zero biases; a transcoder's decoder gets random unit rows."""
        generator = torch.Generator().manual_seed(seed)
        encoder, decoder = initial_weights(self.config.encoding, self.config.d_in, generator)
        if self.config.transcoder:
            decoder = torch.randn(self.decoder.shape, generator=generator)
            decoder = decoder / decoder.norm(dim=-1, keepdim=True)
        self.encoder.copy_(encoder)
        self.decoder.copy_(decoder)
        self.encoder_bias.zero_()
        self.decoder_bias.zero_()

    @property
    def W_enc(self) -> Float[Tensor, "d_in rows"]:
        return head_major(self.encoder, self.config.encoding).T

    @property
    def b_enc(self) -> Float[Tensor, " rows"]:
        return head_major(self.encoder_bias, self.config.encoding)

    @torch.no_grad()
    def scale_latents(self, scale: float) -> None:
        """Make every latent `scale` times as large, exactly: mAND's eps grows with the square of it."""
        mand = self.config.activation == "mand"
        each = scale if mand else scale**0.5  # the products are of degree 2 in the pre-latents
        self.encoder.mul_(each)
        self.encoder_bias.mul_(each)
        if mand:
            self.config = replace(self.config, eps=self.config.eps * scale**2)
