"""Dictionaries on disk and on the hub: SAELens's directory format, which is also ours, and sparsify's.

Files hold safetensors and JSON; nothing is unpickled. Sizes are checked against the header of the tensor file before
anything of that size is allocated, and names of sub-directories may not lead out of the directory they are in.
"""

from trimtab.sae.formats.card import model_card
from trimtab.sae.formats.hub import fetch
from trimtab.sae.formats.saelens import export_saelens, read_saelens, write_saelens
from trimtab.sae.formats.sparsify import read_sparsify, write_sparsify

__all__ = [
    "export_saelens",
    "fetch",
    "model_card",
    "read_saelens",
    "read_sparsify",
    "write_saelens",
    "write_sparsify",
]
