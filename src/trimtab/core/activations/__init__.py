"""Name, read and edit the activations of any transformers model, without knowing its class.

    states = read(model, ["resid.6", "attn.9"], {"input_ids": ids})   # nothing after layer 9's attention runs
    with edit(model, {"resid.6": lambda x: x + vector}):
        model.generate(**prompt)

Places are "embed" (the residual stream that enters block 0), "resid.l" (the output of block l), "attn.l" and
"mlp.l" (what they add to the residual stream, after Gemma's post-norms). `anatomy` finds them in a model,
`hooks` meets the model while it runs. An architecture whose blocks are not found takes `layers=`: its list of
blocks, or the dotted path of the list.
"""

from trimtab.core.activations.anatomy import Place, hf_module_name, n_layers, places, tl_hook_name
from trimtab.core.activations.hooks import edit, read, recording

__all__ = ["Place", "edit", "hf_module_name", "n_layers", "places", "read", "recording", "tl_hook_name"]
