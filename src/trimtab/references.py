"""The papers that the methods come from, and their BibTeX.

`docs/citations.bib` is made from this module by `python -m trimtab.methods --bibtex`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["REFERENCES", "Reference"]


@dataclass(frozen=True)
class Reference:
    """One paper: `authors` as BibTeX wants them, `venue` where it appeared ("arXiv" if nowhere else)."""

    arxiv: str
    year: int
    venue: str
    title: str
    authors: str

    @property
    def key(self) -> str:
        """The BibTeX key: the first author's family name, the year, the first word of the title."""
        family = self.authors.split(",")[0].replace(" ", "")
        first_word = re.split(r"[^A-Za-z]", self.title, maxsplit=1)[0]
        return f"{family}{self.year}{first_word}".lower()

    def bibtex(self) -> str:
        """The BibTeX entry, ending in a newline."""
        kind, booktitle = "misc", ""
        if self.venue != "arXiv":
            kind, booktitle = "inproceedings", f"  booktitle     = {{{self.venue}}},\n"
        return (
            f"@{kind}{{{self.key},\n"
            f"  title         = {{{{{self.title}}}}},\n"
            f"  author        = {{{self.authors}}},\n"
            f"{booktitle}"
            f"  year          = {{{self.year}}},\n"
            f"  eprint        = {{{self.arxiv}}},\n"
            f"  archiveprefix = {{arXiv}},\n"
            f"}}\n"
        )


REFERENCES: tuple[Reference, ...] = (
    Reference(
        "2010.06993",
        2020,
        "arXiv",
        "Weight Squeezing: Reparameterization for Knowledge Transfer and Model Compression",
        "Chumachenko, Artem and Gavrilov, Daniil and Balagansky, Nikita and Kalaidin, Pavel",
    ),
    Reference(
        "2204.03276",
        2022,
        "NeurIPS",
        "PALBERT: Teaching ALBERT to Ponder",
        "Balagansky, Nikita and Gavrilov, Daniil",
    ),
    Reference(
        "2205.07276",
        2022,
        "NeurIPS Workshop on Transfer Learning for Natural Language Processing",
        "Classifiers are Better Experts for Controllable Text Generation",
        "Sitdikov, Askhat and Balagansky, Nikita and Gavrilov, Daniil and Markov, Alexander",
    ),
    Reference(
        "2211.12092",
        2022,
        "arXiv",
        "Linear Interpolation In Parameter Space is Good Enough for Fine-Tuned Language Models",
        "Rofin, Mark and Balagansky, Nikita and Gavrilov, Daniil",
    ),
    Reference(
        "2305.10818",
        2023,
        "arXiv",
        "Diffusion Language Models Generation Can Be Halted Early",
        "Lo Cicero Vaina, Sofia Maria and Balagansky, Nikita and Gavrilov, Daniil",
    ),
    Reference(
        "2305.10835",
        2023,
        "arXiv",
        "Ahead-of-Time P-Tuning",
        "Gavrilov, Daniil and Balagansky, Nikita",
    ),
    Reference(
        "2402.10644",
        2024,
        "ACL",
        "Linear Transformers with Learnable Kernel Functions are Better In-Context Models",
        (
            "Aksenov, Yaroslav and Balagansky, Nikita and Lo Cicero Vaina, Sofia Maria and "
            "Shaposhnikov, Boris and Gorbatovski, Alexey and Gavrilov, Daniil"
        ),
    ),
    Reference(
        "2404.09656",
        2025,
        "ICLR",
        "Learn Your Reference Model for Real Good Alignment",
        (
            "Gorbatovski, Alexey and Shaposhnikov, Boris and Malakhov, Alexey and Surnachev, Nikita and "
            "Aksenov, Yaroslav and Maksimov, Ian and Balagansky, Nikita and Gavrilov, Daniil"
        ),
    ),
    Reference(
        "2410.07656",
        2025,
        "ICLR",
        "Mechanistic Permutability: Match Features Across Layers",
        "Balagansky, Nikita and Maksimov, Ian and Gavrilov, Daniil",
    ),
    Reference(
        "2502.03032",
        2025,
        "ICML",
        "Analyze Feature Flow to Enhance Interpretation and Steering in Language Models",
        "Laptev, Daniil and Balagansky, Nikita and Aksenov, Yaroslav and Gavrilov, Daniil",
    ),
    Reference(
        "2502.09245",
        2025,
        "arXiv",
        "You Do Not Fully Utilize Transformer's Representation Capacity",
        ("Gerasimov, Gleb and Aksenov, Yaroslav and Balagansky, Nikita and Sinii, Viacheslav and Gavrilov, Daniil"),
    ),
    Reference(
        "2505.18706",
        2025,
        "EMNLP",
        "Steering LLM Reasoning Through Bias-Only Adaptation",
        (
            "Sinii, Viacheslav and Gorbatovski, Alexey and Cherepanov, Artem and Shaposhnikov, Boris and "
            "Balagansky, Nikita and Gavrilov, Daniil"
        ),
    ),
    Reference(
        "2505.22255",
        2025,
        "arXiv",
        "Kronecker Factorization Improves Efficiency and Interpretability of Sparse Autoencoders",
        ("Kurochkin, Vadim and Aksenov, Yaroslav and Laptev, Daniil and Gavrilov, Daniil and Balagansky, Nikita"),
    ),
    Reference(
        "2505.24473",
        2025,
        "EMNLP",
        ("Train One Sparse Autoencoder Across Multiple Sparsity Budgets to Preserve Interpretability and Accuracy"),
        (
            "Balagansky, Nikita and Aksenov, Yaroslav and Laptev, Daniil and Kurochkin, Vadim and "
            "Gerasimov, Gleb and Koriagin, Nikita and Gavrilov, Daniil"
        ),
    ),
    Reference(
        "2507.12990",
        2025,
        "COLM",
        "Teach Old SAEs New Domain Tricks with Boosting",
        (
            "Koriagin, Nikita and Aksenov, Yaroslav and Laptev, Daniil and Gerasimov, Gleb and "
            "Balagansky, Nikita and Gavrilov, Daniil"
        ),
    ),
    Reference(
        "2508.12061",
        2025,
        "arXiv",
        "VARAN: Variational Inference for Self-Supervised Speech Models Fine-Tuning on Downstream Tasks",
        "Diatlova, Daria and Balagansky, Nikita and Varlamov, Alexander and Spirin, Egor",
    ),
    Reference(
        "2509.06608",
        2025,
        "arXiv",
        "Small Vectors, Big Effects: A Mechanistic Study of RL-Induced Reasoning via Steering Vectors",
        (
            "Sinii, Viacheslav and Balagansky, Nikita and Gerasimov, Gleb and Laptev, Daniil and "
            "Aksenov, Yaroslav and Kurochkin, Vadim and Gorbatovski, Alexey and Shaposhnikov, Boris and "
            "Gavrilov, Daniil"
        ),
    ),
    Reference(
        "2510.08369",
        2026,
        "ICML",
        "Guided Star-Shaped Masked Diffusion",
        (
            "Meshchaninov, Viacheslav and Shibaev, Egor and Makoian, Artem and Klimov, Ivan and "
            "Balagansky, Nikita and Gavrilov, Daniil and Alanov, Aibek and Vetrov, Dmitry"
        ),
    ),
    Reference(
        "2603.02765",
        2026,
        "arXiv",
        "Next Embedding Prediction Makes World Models Stronger",
        "Bredis, George and Balagansky, Nikita and Gavrilov, Daniil and Rakhimov, Ruslan",
    ),
    Reference(
        "2605.31159",
        2026,
        "arXiv",
        "Trust-Region Behavior Blending for On-Policy Distillation",
        (
            "Plyusov, Daniil and Gorbatovski, Alexey and Malakhov, Alexey and Balagansky, Nikita and "
            "Shaposhnikov, Boris and Korotyshova, Daria and Gavrilov, Daniil"
        ),
    ),
)
