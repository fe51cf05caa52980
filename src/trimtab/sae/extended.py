"""Further latents inside a frozen dictionary: two baselines of SAE Boost, and none of its guarantees.

Source: "Teach Old SAEs New Domain Tricks with Boosting", arXiv 2507.12990, section 4, which names them.

Extended: F old latents that stay, F_r new ones that train, in one dictionary and under one budget k of both.

    f     = relu(BatchTopK(E x + b_E)) over all F + F_r latents       old ones compete, and may lose
    L     as in `trimtab.sae.functional`; its gradient is 0 for rows 0 … F of E, b_E and D, for b_D, and AuxK has new
          latents only

How the paper masks is not public; this is ours. New latents begin in one of two ways:

    random         D_l a random unit row, E_l along it with the mean norm of the old rows, b_l = 0
    most_active    copies of the F_r old latents of largest mean activation on the text, and a tenth of noise

Grafted: of a copy that was fine-tuned whole, the F_r latents of largest change 1 - cos(D_l, D_l of the base) are added
to the base as a residual dictionary, without training. What they take over of the base's work is then there twice.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.functional import Weights
from trimtab.sae.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from trimtab.sae.modeling import TopKSAE

__all__ = ["ExtendInit", "changes", "extend_weights", "graft", "restore"]

ExtendInit = Literal["random", "most_active"]

NOISE = 0.1
"""Norm of what is added to a copied row, as a share of the row's own."""

ROWS = 4096
"""Activations that are encoded at once."""


@torch.no_grad()
def extend_weights(
    weights: Weights, old: TopKSAE, x: Float[Tensor, "tokens d"], *, init: ExtendInit, seed: int
) -> None:
    """Turn fresh `weights` into those of `old` and, below them, new rows, as the module's docstring says.

    x: activations as `old` reads them; most_active looks at them. Raises TrimtabError where it would need more latents
    than `old` has.
    """
    first = old.config.n_latents
    for name in ("encoder", "encoder_bias", "decoder"):
        getattr(weights, name)[:first] = getattr(old, name)
    weights.decoder_bias.copy_(old.decoder_bias)
    encoder, bias, decoder = weights.encoder[first:], weights.encoder_bias[first:], weights.decoder[first:]
    if init == "random":
        encoder.mul_(old.encoder.norm(dim=-1).mean() / encoder.norm(dim=-1, keepdim=True))
        return
    if len(encoder) > first:
        raise TrimtabError(f"extend_init='most_active' copies {len(encoder)} latents; the dictionary has {first}")
    activity = torch.zeros(first, device=x.device)
    for part in x.split(ROWS):
        values, indices = old.encode_sparse(part)
        activity.index_add_(0, indices.flatten(), values.flatten())
    chosen = activity.topk(len(encoder)).indices
    norms = old.decoder[chosen].norm(dim=-1)  # ranking is by a, so a copy's decoder row may take norm 1
    generator = torch.Generator().manual_seed(seed)
    for rows, copied in ((encoder, old.encoder[chosen] * norms[:, None]), (decoder, old.decoder[chosen])):
        noise = F.normalize(torch.randn(rows.shape, generator=generator), dim=-1).to(rows.device)
        rows.copy_(copied + NOISE * copied.norm(dim=-1, keepdim=True) * noise)
    bias.copy_(old.encoder_bias[chosen] * norms)
    decoder.div_(decoder.norm(dim=-1, keepdim=True))


@torch.no_grad()
def restore(sae: TopKSAE, old: TopKSAE) -> None:
    """Give the first latents of `sae`, and its decoder bias, the very numbers that they have in `old`."""
    for name in ("encoder", "encoder_bias", "decoder"):
        getattr(sae, name)[: old.config.n_latents] = getattr(old, name)
    sae.decoder_bias.copy_(old.decoder_bias)


@torch.no_grad()
def changes(base: TopKSAE, tuned: TopKSAE) -> Float[Tensor, " n_latents"]:
    """1 - cosine of the decoder rows of each latent in `base` and in its fine-tuned copy."""
    if base.decoder.shape != tuned.decoder.shape:
        raise TrimtabError(
            f"tuned has a decoder of shape {tuple(tuned.decoder.shape)}; accepted: that of base, "
            f"{tuple(base.decoder.shape)}"
        )
    return 1 - F.cosine_similarity(base.decoder.float(), tuned.decoder.float(), dim=-1)


@torch.no_grad()
def graft(base: TopKSAE, tuned: JumpReLUSAE, count: int) -> JumpReLUSAE:
    """The `count` latents of `tuned` that changed most against `base`, by index, as a residual for `BoostedSAE`.

    They fire exactly where they fire in `tuned`, whose decoder bias is left behind. Raises TrimtabError for a `tuned`
    of another shape than `base`, a transcoder, or a count that it does not have.
    """
    if not 1 <= count <= base.config.n_latents:
        raise TrimtabError(f"count={count!r} must lie between 1 and n_latents={base.config.n_latents}")
    if tuned.config.transcoder:
        raise TrimtabError("tuned is a transcoder; accepted: an autoencoder")
    chosen = changes(base, tuned).topk(count).indices.sort().values
    residual = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=tuned.config.d_in, n_latents=count, apply_b_dec_to_input=False, metadata=tuned.config.metadata
        )
    ).to(tuned.device, tuned.dtype)
    for name in ("encoder", "encoder_bias", "decoder", "threshold"):
        getattr(residual, name).copy_(getattr(tuned, name)[chosen])
    if tuned.config.apply_b_dec_to_input:
        residual.encoder_bias.sub_(residual.encoder @ tuned.decoder_bias)
    return residual
