"""Top contexts against brute force over every token of a small text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaModel

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource
from trimtab.sae.explanations import explain, latents_of_text
from trimtab.sae.firings import Context
from trimtab.sae.harvest import Harvest, HarvestConfig
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

CONFIG = HarvestConfig(context=16, sequences_per_forward=3, sink_norm_ratio=None)


def documents(count: int = 30) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    return [" ".join(f"w{i}" for i in torch.randint(0, 60, (9,), generator=generator).tolist()) for _ in range(count)]


def random_sae(n_latents: int = 24, k: int = 3) -> TopKSAE:
    sae = TopKSAE(TopKSAEConfig(d_in=32, n_latents=n_latents, k=k), seed=3)
    with torch.no_grad():
        sae.encoder.mul_(50)  # activations of the tiny model have a standard deviation of about 0.02
        sae.encoder_bias.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    return sae


@pytest.fixture
def harvest(tiny_llama: Any, tiny_tokenizer: Any) -> Callable[..., Harvest]:
    def make(*places: str, text: list[str] | None = None, config: HarvestConfig = CONFIG) -> Harvest:
        source = TextSource(documents() if text is None else text)
        return Harvest(tiny_llama, tiny_tokenizer, source, places or ("resid.1",), config)

    return make


def every_activation(sae: TopKSAE, live: Harvest, place: str = "resid.1") -> tuple[Tensor, Tensor]:
    """Token ids [sequences, context] and dense latents [sequences, context, n_latents], zero at special tokens."""
    forwards = list(live.forwards())
    ids = torch.cat([forward.input_ids for forward in forwards])
    states = torch.cat([forward.activations[place] for forward in forwards])
    return ids, sae.encode(states).detach() * (ids > 3)[..., None]


def contexts_by_hand(
    ids: Tensor, latent: Tensor, count: int, before: int, after: int
) -> list[tuple[list[int], list[float]]]:
    """The highest peaks whose windows do not touch a higher one's, by looking at all of them."""
    context = ids.shape[1]
    peaks = [(latent[s, t].item(), s, t) for s, t in (latent > 0).nonzero().tolist()]
    taken: set[tuple[int, int]] = set()
    chosen = []
    for _, s, t in sorted(peaks, key=lambda peak: -peak[0]):
        window = range(max(t - before, 0), min(t + after + 1, context))
        if not any((s, i) in taken for i in window):
            taken |= {(s, i) for i in window}
            chosen.append((ids[s, window].tolist(), latent[s, window].tolist()))
    return chosen[:count]


def test_entropy_and_multitoken_ratio_are_those_of_all_activations(harvest: Any) -> None:
    live, sae = harvest(), random_sae()
    found, _ = explain(sae, live, place="resid.1", contexts=3, before=3, after=2)
    ids, latents = every_activation(sae, live)
    for explanation in found:
        mass = torch.zeros(64, dtype=torch.float64)
        mass.index_add_(0, ids.flatten(), latents[..., explanation.latent].flatten().double())
        shares = mass[mass > 0] / mass.sum()
        assert explanation.token_entropy == pytest.approx(-(shares * shares.log()).sum().item(), abs=1e-5)
        ratios = [sum(v > 0 for v in c.activations) / len(c.activations) for c in explanation.contexts]
        assert explanation.multitoken_ratio == pytest.approx(sum(ratios) / len(ratios))
    entropies = [explanation.token_entropy for explanation in found]
    assert min(entropies) >= 0
    assert len(set(entropies)) > 5


@pytest.mark.parametrize(("count", "before", "after"), [(4, 3, 2), (1, 0, 0), (100, 1, 0), (8, 40, 40)])
def test_every_latent_is_explained_as_by_brute_force(harvest: Any, count: int, before: int, after: int) -> None:
    live, sae = harvest(), random_sae()
    told: list[int] = []
    found, densities = explain(
        sae, live, place="resid.1", contexts=count, before=before, after=after, advance=told.append
    )
    ids, latents = every_activation(sae, live)
    assert sum(told) == ids.numel()
    kept = (ids > 3).sum()
    torch.testing.assert_close(densities, (latents > 0).sum((0, 1)) / kept)
    alive = (densities > 0).nonzero()[:, 0].tolist()
    assert 10 < len(alive) <= 24
    assert [e.latent for e in found] == alive
    for explanation in found:
        column = latents[..., explanation.latent]
        assert explanation.density == densities[explanation.latent]
        assert explanation.max_activation == pytest.approx(column.max().item(), rel=1e-6)
        expected = contexts_by_hand(ids, column, count, before, after)
        assert [context.token_ids for context in explanation.contexts] == [tokens for tokens, _ in expected]
        for context, (_, values) in zip(explanation.contexts, expected, strict=True):
            assert context.activations == pytest.approx(values, rel=1e-5)


def test_a_planted_latent_is_found_where_it_was_planted(harvest: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    planted = tiny_tokenizer.convert_tokens_to_ids("w5")
    direction = torch.nn.functional.normalize(tiny_llama.model.embed_tokens.weight[planted], dim=0).detach()
    sae = random_sae()
    with torch.no_grad():
        sae.encoder[7], sae.encoder_bias[7] = 1e4 * direction, 0.0
        sae.encoder_bias[7] = -1e4 * 0.9 * (tiny_llama.model.embed_tokens.weight[planted] @ direction)
    found, _ = explain(sae, harvest("embed"), place="embed", contexts=50, before=2, after=1)
    (explanation,) = [e for e in found if e.latent == 7]
    ids, _ = every_activation(sae, harvest("embed"), "embed")
    assert len(explanation.contexts) > 3
    for context in explanation.contexts:
        assert {token for token, value in zip(*context, strict=True) if value > 0} == {planted}
    assert explanation.density == pytest.approx(((ids == planted).sum() / (ids > 3).sum()).item())


def test_peaks_fall_and_windows_stay_within_their_sequence(harvest: Any) -> None:
    found, _ = explain(random_sae(), harvest(), place="resid.1", before=5, after=5)
    for explanation in found:
        peaks = [max(context.activations) for context in explanation.contexts]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] == pytest.approx(explanation.max_activation)
        assert max(len(context.token_ids) for context in explanation.contexts) <= 11
        # <bos> opens every sequence and stands nowhere else.
        assert all(1 not in context.token_ids[1:] for context in explanation.contexts)


@pytest.mark.parametrize("n_latents", [1, 2, 5, 9])
def test_those_explained_are_evenly_spaced_in_order_of_density(harvest: Any, n_latents: int) -> None:
    live, sae = harvest(), random_sae()
    everything, densities = explain(sae, live, place="resid.1")
    found, same = explain(sae, live, place="resid.1", n_latents=n_latents)
    assert torch.equal(same, densities)
    order = sorted((e.latent for e in everything), key=lambda latent: (densities[latent].item(), latent))
    step = (len(order) - 1) / max(n_latents - 1, 1)
    assert [e.latent for e in found] == sorted(order[round(i * step)] for i in range(n_latents))
    by_latent = {e.latent: e for e in everything}
    assert all((e.contexts, e.density) == (by_latent[e.latent].contexts, by_latent[e.latent].density) for e in found)


def test_tokens_promoted_and_suppressed_are_those_of_the_unembedding(
    harvest: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    with torch.no_grad():
        tiny_llama.model.norm.weight.copy_(torch.linspace(0.5, 2, 32))
    sae = random_sae()
    found, _ = explain(sae, harvest(), place="resid.1", lens_tokens=3)
    for explanation in found[:5]:
        logits = tiny_llama.lm_head.weight @ (tiny_llama.model.norm.weight * sae.decoder[explanation.latent])
        for pairs, order in (
            (explanation.promoted, logits.argsort(descending=True)),
            (explanation.suppressed, logits.argsort()),
        ):
            assert [token for token, _ in pairs] == [tiny_tokenizer.decode([i]) for i in order[:3].tolist()]
            assert [logit for _, logit in pairs] == pytest.approx(logits[order[:3]].tolist(), rel=1e-4)


def test_a_model_without_a_head_promotes_nothing(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    bare = LlamaModel(tiny_llama.config).eval()
    live = Harvest(bare, tiny_tokenizer, TextSource(documents()), ["resid.1"], CONFIG)
    found, _ = explain(random_sae(), live, place="resid.1")
    assert found
    assert all((e.promoted, e.suppressed) == ([], []) for e in found)
    assert all(e.contexts for e in found)


def test_a_dictionary_that_never_fires_has_nothing_to_explain(harvest: Any) -> None:
    sae = random_sae()
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e6)
    found, densities = explain(sae, harvest(), place="resid.1")
    assert found == []
    assert torch.equal(densities, torch.zeros(24))


def test_tokens_limit_the_text_and_a_pass_of_special_tokens_alone_is_passed_over(harvest: Any) -> None:
    one = HarvestConfig(context=16, sequences_per_forward=1, sink_norm_ratio=None)
    live = harvest(text=["<bos> <eos> <bos>"] * 8 + documents(), config=one)
    told: list[int] = []
    found, densities = explain(random_sae(), live, place="resid.1", tokens=50, advance=told.append)
    assert told == [16] * 4
    assert found
    assert densities.sum() > 0


def test_what_cannot_be_explained_is_named(harvest: Any) -> None:
    with pytest.raises(TrimtabError, match=r"place='resid\.2' is not known\. Did you mean resid\.1"):
        explain(random_sae(), harvest(), place="resid.2")
    for name in ("tokens", "n_latents", "contexts"):
        with pytest.raises(TrimtabError, match=f"{name}=0 must be at least 1"):
            explain(random_sae(), harvest(), place="resid.1", **{name: 0})
    with pytest.raises(TrimtabError, match="only special tokens"):
        explain(random_sae(), harvest(text=["<bos> <eos>"] * 20), place="resid.1")
    with pytest.raises(TrimtabError, match="is empty"):
        explain(random_sae(), harvest(text=[]), place="resid.1")


# -- a text of one's own ---------------------------------------------------------------------------


def test_latents_of_a_text_are_those_of_its_hidden_states(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    sae = random_sae()
    found = latents_of_text(sae, tiny_llama, tiny_tokenizer, "w3 w1 <eos> w4", place="resid.1")
    ids = [1, *tiny_tokenizer.convert_tokens_to_ids(["w3", "w1", "<eos>", "w4"])]
    assert [row.token_id for row in found] == ids
    with torch.no_grad():
        states = tiny_llama(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    dense = sae.encode(states)
    for t, row in enumerate(found):
        fires = dense[t].nonzero()[:, 0].tolist() if t not in (0, 3) else []
        assert [latent for latent, _ in row.latents] == sorted(fires, key=lambda i: -dense[t, i].item())
        assert [value for _, value in row.latents] == pytest.approx([dense[t, i].item() for i, _ in row.latents])
    assert any(row.latents for row in found)


@pytest.mark.parametrize("text", ["", "<bos>", "<eos> <pad>"])
def test_a_text_without_tokens_is_refused(tiny_llama: Any, tiny_tokenizer: Any, text: str) -> None:
    with pytest.raises(TrimtabError, match="holds no token to read"):
        latents_of_text(random_sae(), tiny_llama, tiny_tokenizer, text, place="resid.1")


def test_a_context_is_a_pair_of_lists() -> None:
    assert Context([1], [0.5]) == ([1], [0.5])
