"""What a boosted dictionary gains on its domain and costs on general text, beside its base.

Source: SAE Boost, arXiv 2507.12990, sections 4 and 5. With EV and the loss increase (spliced less clean, nats a token)
of `trimtab.sae.metrics`, for the base and for the boosted dictionary on both texts:

    gain      (EV_boosted - EV_base) / EV_base on the domain,    change    the same on general text

New latents should keep still on general text: their L0 there, and the share of them that ever fires there, say whether
they do; their largest cosine to an old decoder row says whether they are new.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae.boosted import BoostedSAE
from trimtab.sae.harvest import Harvest
from trimtab.sae.metrics import Evaluation, evaluate
from trimtab.sae.modeling import TopKSAE

__all__ = ["BoostReport", "boost_report"]

LARGEST_DROP = 0.01
"""Of general explained variance, relative, beyond which a report warns."""

LARGEST_L0 = 0.5
"""Of new latents on general text, beyond which a report warns."""


@dataclass(frozen=True, kw_only=True)
class BoostReport:
    """Evaluations of base and boosted dictionary on both texts, and what the new latents do.

    new_l0: (general, domain), new latents above 0 of a token, mean. firing_on_general: share of new latents that fire
    at all on the general text. largest_cosine: [new latents] of each decoder row with those of the base.
    """

    base_general: Evaluation
    base_domain: Evaluation
    boosted_general: Evaluation
    boosted_domain: Evaluation
    new_l0: tuple[float, float]
    firing_on_general: float
    largest_cosine: Float[Tensor, " new"]

    @property
    def gain(self) -> float:
        """Relative change of the domain's explained variance; NaN where the base explains nothing."""
        return _relative(self.base_domain, self.boosted_domain)

    @property
    def change(self) -> float:
        """Relative change of the general text's explained variance; NaN where the base explains nothing."""
        return _relative(self.base_general, self.boosted_general)

    @property
    def warnings(self) -> list[str]:
        """What a user should know before he publishes it; empty if nothing."""
        found = []
        if not self.change > -LARGEST_DROP:
            found.append(
                f"explained variance of general text changes by {self.change:+.1%}: more domain tokens, or general "
                "text mixed in, would help"
            )
        if self.new_l0[0] > LARGEST_L0:
            found.append(f"{self.new_l0[0]:.2f} new latents fire on a token of general text; {LARGEST_L0} is much")
        return found

    def summary(self) -> dict[str, float]:
        """Every number, by name."""
        figures = {
            "gain": self.gain,
            "change": self.change,
            "new_l0_general": self.new_l0[0],
            "new_l0_domain": self.new_l0[1],
            "firing_on_general": self.firing_on_general,
            "largest_cosine_mean": self.largest_cosine.mean().item(),
        }
        for name in ("base_general", "base_domain", "boosted_general", "boosted_domain"):
            evaluation: Evaluation = getattr(self, name)
            figures[f"{name}_explained_variance"] = evaluation.explained_variance
            if evaluation.ce_spliced is not None and evaluation.ce_clean is not None:
                figures[f"{name}_loss_increase"] = evaluation.ce_spliced - evaluation.ce_clean
        return figures


@torch.no_grad()
def boost_report(
    boosted: BoostedSAE,
    *,
    general: Harvest,
    domain: Harvest,
    place: str,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
) -> BoostReport:
    """Measure `boosted` and its base on held-out text of both kinds; domains that are off count as absent.

    tokens, ce_tokens: as for `trimtab.sae.metrics.evaluate`, which says what is raised; and TrimtabError where all
    domains are off.
    """
    if not any(boosted.enabled.values()):
        raise TrimtabError(f"domains {list(boosted.enabled)} are all off: there is nothing to report")
    pair: tuple[TopKSAE | BoostedSAE, ...] = (boosted.base, boosted)
    old, new = (
        [evaluate(sae, text, place=place, tokens=tokens, ce_tokens=ce_tokens) for text in (general, domain)]
        for sae in pair
    )
    first = boosted.base.config.n_latents
    on: list[Tensor] = [residual.decoder for name, residual in boosted.residuals.items() if boosted.enabled[name]]
    rows = torch.nn.functional.normalize(torch.cat(on).float(), dim=-1)
    base = torch.nn.functional.normalize(boosted.base.decoder.float(), dim=-1)
    used = torch.cat([torch.full((r.config.n_latents,), boosted.enabled[n]) for n, r in boosted.residuals.items()])
    return BoostReport(
        base_general=old[0],
        base_domain=old[1],
        boosted_general=new[0],
        boosted_domain=new[1],
        new_l0=(new[0].densities[first:].sum().item(), new[1].densities[first:].sum().item()),
        firing_on_general=(new[0].densities[first:][used] > 0).double().mean().item(),
        largest_cosine=torch.cat([(part @ base.T).amax(-1) for part in rows.split(1024)]),
    )


def _relative(base: Evaluation, boosted: Evaluation) -> float:
    if not base.explained_variance > 0:
        return float("nan")
    return (boosted.explained_variance - base.explained_variance) / base.explained_variance
