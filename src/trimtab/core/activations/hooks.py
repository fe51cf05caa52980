"""Read, record and edit activations while a model runs, through hooks that are gone when the context ends.

All hooks on one module go through one `_Tap`, so that their order does not depend on who came first. At a
place the edits run first, in the order in which their contexts were entered; then every reader sees the
edited value, and so does all that the model computes from it, `output_hidden_states` included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.activations.anatomy import Layers, Place, Site, sites
from trimtab.core.errors import TrimtabError

__all__ = ["edit", "read", "recording"]


def read(
    model: nn.Module,
    places: str | Place | Iterable[str | Place],
    inputs: Mapping[str, Any],
    *,
    layers: Layers = None,
    stop: bool = True,
) -> dict[str, Tensor]:
    """Run `model(**inputs)` once and return the activations at `places`, by name, in the order asked for.

    Each is the model's own tensor, `[batch, position, d_model]` in its dtype, on its device, with its
    autograd history if grad mode is on. With `stop` the forward pass ends after the last place wanted, the
    rest of the model never runs and no KV cache is made; without, it runs to its end. Modes (training,
    autocast, inference) are the caller's. Raises `TrimtabError` for a place that the model lacks or that did
    not run, and for `past_key_values` with `stop`, which would fill the cache of the first layers only.
    """
    wanted = sites(model, places, layers)
    arguments = _without_cache(model, inputs) if stop else dict(inputs)
    found: dict[str, Tensor] = {}
    end = _Stop()

    def keep(name: str, tensor: Tensor) -> None:
        found.setdefault(name, tensor)
        if stop and len(found) == len(wanted):
            raise end

    with ExitStack() as stack:
        for site in wanted:
            stack.enter_context(_tapped(_Reader(site, keep)))
        try:
            model(**arguments)
        except _Stop as stopped:
            if stopped is not end:
                raise
    missing = [str(site.place) for site in wanted if str(site.place) not in found]
    if missing:
        raise TrimtabError(
            f"places={missing} did not run in this forward pass: either the model skips the block "
            f"(LayerDrop, in training) or it does not call the module."
        )
    return {str(site.place): found[str(site.place)] for site in wanted}


@contextmanager
def recording(
    model: nn.Module, places: str | Place | Iterable[str | Place], *, layers: Layers = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context, keep the activations at `places` of every forward pass, under `generate` too.

    Yields a dictionary from place to the list of tensors, one a forward pass, which grows as the model runs
    and stays when the context has ended. The tensors are as in `read`; the lists may be emptied at any time.
    """
    wanted = sites(model, places, layers)
    records: dict[str, list[Tensor]] = {str(site.place): [] for site in wanted}

    def keep(name: str, tensor: Tensor) -> None:
        records[name].append(tensor)

    with ExitStack() as stack:
        for site in wanted:
            stack.enter_context(_tapped(_Reader(site, keep)))
        yield records


@contextmanager
def edit(
    model: nn.Module, edits: Mapping[str | Place, Callable[[Tensor], Tensor]], *, layers: Layers = None
) -> Iterator[None]:
    """Within the context, replace the activation x at each place by `edits[place](x)`, in every forward pass.

    A function gets the tensor with its autograd history and returns one of the same shape, dtype and device;
    gradients flow through it. Contexts nest: the edits of one place apply in the order in which the contexts
    were entered, and `read` and `recording` see the edited value, whichever was entered first. Raises
    `TrimtabError` if a function returns something else, from within the model's forward pass.
    """
    with ExitStack() as stack:
        for place, function in edits.items():
            (site,) = sites(model, place, layers)
            stack.enter_context(_tapped(_Edit(site, function)))
        yield


class _Stop(BaseException):
    """Ends a forward pass from inside; not an Exception, so that no handler in a model swallows it."""


@dataclass(frozen=True, eq=False)
class _Edit:
    site: Site
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Reader:
    site: Site
    keep: Callable[[str, Tensor], None]


class _Tap:
    """The one hook on a module's output or first input: the edits of all open contexts, then the readers."""

    def __init__(self, site: Site) -> None:
        self.edits: list[_Edit] = []
        self.readers: list[_Reader] = []
        self.calls = 0
        self.stream_shape: torch.Size | None = None
        # Before all other hooks, so that what Transformers records (`output_hidden_states`) is edited too.
        if site.is_input:
            register = site.module.register_forward_pre_hook
            self.handles = [register(self._on_input, prepend=True, with_kwargs=True)]
        else:
            self.handles = [site.module.register_forward_hook(self._on_output, prepend=True)]
        if site.owner is not None:
            self.handles.append(site.owner.register_forward_pre_hook(self._restart))
        if site.path.endswith(".fc2"):
            # OPT runs its MLP with all positions of the batch on one axis; the place has the stream's shape.
            self.handles.append(site.block.register_forward_pre_hook(self._note_shape, with_kwargs=True))

    def _restart(self, owner: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls = 0

    def _note_shape(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stream_shape = (args[0] if args else kwargs["hidden_states"]).shape

    def _on_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._run(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._run(kwargs.get("hidden_states"))}

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._run(output[0]), *output[1:])
        return self._run(output)

    def _run(self, value: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        edits = [entry for entry in self.edits if entry.site.call in (None, call)]
        readers = [entry for entry in self.readers if entry.site.call in (None, call)]
        for site in [entry.site for entry in edits] + [entry.site for entry in readers]:
            _check_readable(site, value)
        if self.stream_shape is None or not (edits or readers):
            return _apply(edits, readers, value)
        return _apply(edits, readers, value.view(self.stream_shape)).reshape(value.shape)


def _apply(edits: list[_Edit], readers: list[_Reader], value: Any) -> Any:
    for entry in edits:
        value = _checked(entry.site, value, entry.function(value))
    for reader in readers:
        reader.keep(str(reader.site.place), value)
    # The model goes on with a copy of what was read, for it may add to its tensors in place. A `read` that
    # stops here has left already, and copies nothing.
    return value.clone() if readers else value


def _check_readable(site: Site, value: Any) -> None:
    if not isinstance(value, Tensor):
        side = "takes" if site.is_input else "gives"
        raise TrimtabError(
            f"place='{site.place}': {site.path} {side} {type(value).__name__}. Accepted: a tensor, as its "
            f"first argument or `hidden_states`, and as its output or the first of a tuple."
        )
    # What is inside a checkpoint runs again in the backward pass, when the context may have ended: a
    # recording would get entries twice, an edit be missing from the gradient. A block's own hooks are
    # outside, except in versions of Transformers (5.17 for one) that checkpoint the block's `__call__`.
    is_inside = site.module is not site.block or type(site.block).__call__ is not nn.Module.__call__
    if is_inside and site.block.training and getattr(site.block, "gradient_checkpointing", False):
        raise TrimtabError(
            f"place='{site.place}' is inside a block under gradient checkpointing, which runs it twice. "
            f"Accepted: gradient checkpointing off, or model.eval()."
        )


def _checked(site: Site, before: Tensor, after: Any) -> Tensor:
    if not isinstance(after, Tensor):
        raise TrimtabError(f"edits['{site.place}'] returned {type(after).__name__}. Accepted: a tensor.")
    for name, given, accepted in (
        ("shape", tuple(after.shape), tuple(before.shape)),
        ("dtype", after.dtype, before.dtype),
        ("device", after.device, before.device),
    ):
        if given != accepted:
            raise TrimtabError(f"edits['{site.place}'] returned {name}={given}. Accepted: {accepted}.")
    return after


# The taps of the contexts that are open, by module, side and what restarts their count; empty when none is.
_TAPS: dict[tuple[nn.Module, bool, nn.Module | None], _Tap] = {}


@contextmanager
def _tapped(entry: _Edit | _Reader) -> Iterator[None]:
    key = (entry.site.module, entry.site.is_input, entry.site.owner)
    if key not in _TAPS:
        _TAPS[key] = _Tap(entry.site)
    tap = _TAPS[key]
    entries: list[Any] = tap.edits if isinstance(entry, _Edit) else tap.readers
    entries.append(entry)
    try:
        yield
    finally:
        entries.remove(entry)
        if not tap.edits and not tap.readers:
            for handle in _TAPS.pop(key).handles:
                handle.remove()


def _without_cache(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass that will stop half way: nobody would read the cache."""
    if inputs.get("past_key_values") is not None:
        raise TrimtabError(
            "inputs['past_key_values'] with stop=True would be filled in the first layers only. Accepted: stop=False."
        )
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT hides the signature
    if "use_cache" in inspect.signature(unwrapped.forward).parameters:
        return {**inputs, "use_cache": False}
    return dict(inputs)
