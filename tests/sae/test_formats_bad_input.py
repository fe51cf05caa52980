"""Files that are damaged, hostile or absent, and names that lead elsewhere: each is refused with a reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.sae import formats
from trimtab.sae.formats import _files
from trimtab.sae.modeling import TopKSAE, TopKSAEConfig

D_IN, N_LATENTS, K = 7, 19, 4


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def dictionary() -> TopKSAE:
    return TopKSAE(TopKSAEConfig(d_in=D_IN, n_latents=N_LATENTS, k=K, metadata={"model_name": "m"}))


def change(directory: Path, **changes: Any) -> None:
    path = directory / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def tensors(directory: Path, **changes: Tensor | None) -> None:
    path = directory / "sae_weights.safetensors"
    found = {**load_file(path), **changes}
    save_file({name: value for name, value in found.items() if value is not None}, path)


def raw(text: str | bytes) -> Callable[[Path], object]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda directory: (directory / "cfg.json").write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no cfg": (lambda d: (d / "cfg.json").unlink(), r"cfg.json is missing"),
    "no weights": (lambda d: (d / "sae_weights.safetensors").unlink(), r"sae_weights.safetensors is missing"),
    "cfg is a directory": (
        lambda d: ((d / "cfg.json").unlink(), (d / "cfg.json").mkdir()),
        r"cfg.json is not a regular file",
    ),
    "cfg is a pipe": (
        lambda d: ((d / "cfg.json").unlink(), os.mkfifo(d / "cfg.json")),
        r"cfg.json is not a regular file",
    ),
    "cfg not UTF-8": (raw(b'{"k": "\xff"}'), r"cfg.json is not UTF-8"),
    "cfg not JSON": (raw("{"), r"cfg.json is not valid JSON"),
    "cfg empty": (raw(""), r"cfg.json is not valid JSON"),
    "cfg nested deep": (raw("[" * 200_000), r"cfg.json is not valid JSON"),
    "cfg with an endless integer": (raw('{"k": ' + "9" * 10_000 + "}"), r"cfg.json is not valid JSON"),
    "cfg a list": (raw("[1]"), r"cfg.json holds \[1\]; accepted: a JSON object"),
    "k NaN": (lambda d: change(d, k=float("nan")), r"cfg.json: k is NaN or infinite; accepted: finite numbers"),
    "metadata infinite": (
        lambda d: change(d, metadata={"a": [0, float("inf")]}),
        r"cfg.json: metadata.a.1 is NaN or infinite",
    ),
    "overflow": (raw('{"k": 1e999}'), r"cfg.json: k is NaN or infinite"),
    "no architecture": (lambda d: raw('{"k": 1}')(d), r"cfg.json: architecture is missing; accepted: a string"),
    "other architecture": (
        lambda d: change(d, architecture="gated"),
        r"cfg.json: architecture='gated' is not known.*Accepted: topk, topk_transcoder",
    ),
    "architecture a number": (lambda d: change(d, architecture=3), r"architecture=3; accepted: a string"),
    "d_in a string": (lambda d: change(d, d_in="7"), r"cfg.json: d_in='7'; accepted: an integer"),
    "d_in null": (lambda d: change(d, d_in=None), r"d_in=None; accepted: an integer"),
    "d_sae fractional": (lambda d: change(d, d_sae=19.0), r"d_sae=19.0; accepted: an integer"),
    "k true": (lambda d: change(d, k=True), r"k=True; accepted: an integer"),
    "k zero": (lambda d: change(d, k=0), r"k=0; accepted: an integer of 1 or more"),
    "d_sae negative": (lambda d: change(d, d_sae=-19), r"d_sae=-19; accepted: an integer of 1 or more"),
    "d_sae huge": (lambda d: change(d, d_sae=10**30), r"cfg.json: n_latents=10+ times width 7 is beyond"),
    "d_sae large": (lambda d: change(d, d_sae=10**9), r"has shape \[.*cfg.json asks for \[.*1000000000"),
    "k beyond d_sae": (lambda d: change(d, k=20), r"cfg.json: k=20 must not exceed n_latents=19 \(n_latents is d_sae"),
    "k missing": (
        lambda d: raw('{"architecture": "topk", "d_in": 7, "d_sae": 19}')(d),
        r"cfg.json: k is missing; accepted: an integer",
    ),
    "flag a string": (
        lambda d: change(d, apply_b_dec_to_input="false"),
        r"apply_b_dec_to_input='false'; accepted: true or false",
    ),
    "rescale a number": (
        lambda d: change(d, rescale_acts_by_decoder_norm=1),
        r"rescale_acts_by_decoder_norm=1; accepted: true or false",
    ),
    "dtype unknown": (lambda d: change(d, dtype="float8"), r"cfg.json: dtype='float8' is not known.*float32"),
    "layer norm": (
        lambda d: change(d, normalize_activations="layer_norm"),
        r"normalize_activations='layer_norm': no weights can express it; accepted: 'none'",
    ),
    "average norm": (
        lambda d: change(d, normalize_activations="expected_average_only_in"),
        r"normalize_activations='expected_average_only_in': its scale is not in the file; accepted: 'none'",
    ),
    "other norm": (lambda d: change(d, normalize_activations="x"), r"normalize_activations='x': it is not known"),
    "heads": (lambda d: change(d, reshape_activations="hook_z"), r"reshape_activations='hook_z'; accepted: 'none'"),
    "metadata a list": (lambda d: change(d, metadata=[1]), r"metadata=\[1\]; accepted: an object"),
    "long value": (lambda d: change(d, k="x" * 10**6), r"^.{0,300}accepted: an integer$"),
    "transcoder without d_out": (lambda d: change(d, architecture="topk_transcoder"), r"d_out is missing"),
    "transcoder that subtracts": (
        lambda d: change(d, architecture="topk_transcoder", d_out=7),
        r"apply_b_dec_to_input=True has no meaning with transcoder",
    ),
    "transposed": (
        lambda d: tensors(d, W_enc=random(N_LATENTS, D_IN)),
        r"W_enc has shape \[19, 7\]; cfg.json asks for \[7, 19\]",
    ),
    "flat": (lambda d: tensors(d, b_enc=random(N_LATENTS, 1)), r"b_enc has shape \[19, 1\]; cfg.json asks for \[19\]"),
    "a tensor missing": (
        lambda d: tensors(d, b_dec=None),
        r"tensor b_dec is missing; accepted: W_enc, b_enc, W_dec, b_dec",
    ),
    "a tensor too many": (
        lambda d: tensors(d, threshold=random(N_LATENTS)),
        r"tensor 'threshold' is not known; accepted: W_enc, b_enc, W_dec, b_dec",
    ),
    "integers": (
        lambda d: tensors(d, b_dec=torch.zeros(D_IN, dtype=torch.int32)),
        r"b_dec has dtype I32; accepted: BF16, F16, F32, F64",
    ),
    "weights cut": (lambda d: cut(d / "sae_weights.safetensors", 0.7), r"truncated or not a safetensors file"),
    "weights cut in the header": (lambda d: cut(d / "sae_weights.safetensors", 0.05), r"truncated or not"),
    "weights empty": (lambda d: cut(d / "sae_weights.safetensors", 0.0), r"truncated or not a safetensors file"),
    "weights a pickle": (
        lambda d: torch.save({"W_enc": torch.zeros(1)}, d / "sae_weights.safetensors"),
        r"truncated or not a safetensors file",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_files_are_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    formats.write_saelens(dictionary(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TrimtabError, match=message):
        formats.read_saelens(tmp_path)


def test_a_configuration_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.write_saelens(dictionary(), tmp_path)
    monkeypatch.setattr(_files, "MAX_JSON_BYTES", 100)
    with pytest.raises(TrimtabError, match=r"cfg.json is larger than 100 bytes"):
        formats.read_saelens(tmp_path)


def test_unknown_keys_are_never_used(tmp_path: Path) -> None:
    formats.write_saelens(dictionary(), tmp_path)
    expected = formats.read_saelens(tmp_path)
    change(tmp_path, __class__="os.system", d_out=3, transcoder=True, n_latents=1, seed=5, device="cuda:99")
    sae = formats.read_saelens(tmp_path)
    assert sae.config == expected.config
    assert torch.equal(sae.encoder, expected.encoder)


# ---------------------------------------------------------------- names that lead elsewhere


ESCAPES = ["../outside", "a/../../outside", "/etc", "..", "C:\\outside", "..\\outside", "a\0b"]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_lead_out_of_the_directory_are_refused(name: str, tmp_path: Path) -> None:
    formats.write_saelens(dictionary(), tmp_path / "outside")
    (tmp_path / "run").mkdir()
    with pytest.raises(TrimtabError, match=r"subfolder=.* must be a relative path without"):
        TopKSAE.from_pretrained(tmp_path / "run", subfolder=name)
    with pytest.raises(TrimtabError, match=r"hookpoint=.* must be a relative path without"):
        formats.read_sparsify(tmp_path / "run", name)
    with pytest.raises(TrimtabError, match=r"hookpoint=.* must be a relative path without"):
        formats.write_sparsify(dictionary(), tmp_path / "run", name)


def test_links_that_lead_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    formats.write_saelens(dictionary(), tmp_path / "outside")
    formats.write_sparsify(dictionary(), tmp_path, "outside")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "run" / "inner").symlink_to(tmp_path / "run")
    with pytest.raises(TrimtabError, match=r"subfolder='link' leads out of .* through a link"):
        TopKSAE.from_pretrained(tmp_path / "run", subfolder="link")
    with pytest.raises(TrimtabError, match=r"hookpoint='link' leads out of .* through a link"):
        formats.read_sparsify(tmp_path / "run", "link")
    with pytest.raises(TrimtabError, match=r"hookpoint='link' leads out of .* through a link"):
        formats.write_sparsify(dictionary(), tmp_path / "run", "link")
    formats.write_saelens(dictionary(), tmp_path / "run" / "resid.9")
    assert TopKSAE.from_pretrained(tmp_path / "run", subfolder="inner/resid.9").config.k == K


# ---------------------------------------------------------------- the hub


def hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub of one repository in the hub's cache layout (files are links to blobs); the calls that it gets."""
    calls: list[dict[str, Any]] = []
    formats.write_saelens(dictionary(), tmp_path / "blobs")
    (tmp_path / "snapshot" / "resid.9").mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / "resid.9" / path.name).symlink_to(path)

    def download(repo_id: str, **arguments: Any) -> str:
        calls.append({"repo_id": repo_id, **arguments})
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("trimtab.sae.formats.hub.snapshot_download", download)
    return calls


def test_only_the_files_of_the_dictionary_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_snapshot(tmp_path, monkeypatch)
    sae = TopKSAE.from_pretrained("owner/name", subfolder="resid.9", revision="v1", token="t", cache_dir="c")
    assert sae.config.metadata["model_name"] == "m"
    [call] = calls
    names = ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
    assert call["allow_patterns"] == [f"resid.9/{name}" for name in names]
    assert (call["repo_id"], call["revision"], call["token"], call["cache_dir"]) == ("owner/name", "v1", "t", "c")
    with pytest.raises(TrimtabError, match=r"'owner/name' has no cfg.json there: subfolder='' is not known"):
        TopKSAE.from_pretrained("owner/name")
    assert calls[1]["allow_patterns"] == names


def test_a_pattern_in_a_subfolder_is_a_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_snapshot(tmp_path, monkeypatch)
    with pytest.raises(TrimtabError, match=r"subfolder='\*' is not known.*Accepted: resid.9"):
        TopKSAE.from_pretrained("owner/name", subfolder="*")
    assert calls[0]["allow_patterns"][0] == "[*]/cfg.json"


@pytest.mark.parametrize("name", ["./no/such/directory", "owner/name/more", "a b", ""])
def test_a_name_that_is_neither_directory_nor_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: pytest.fail("the network was tried"))
    with pytest.raises(TrimtabError):
        TopKSAE.from_pretrained(name)


def test_a_repository_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("trimtab.sae.formats.hub.snapshot_download", refuse)
    with pytest.raises(
        TrimtabError, match=r"'a/b' \(revision 'main'\) is neither a directory here nor .*no connection"
    ):
        TopKSAE.from_pretrained("a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrimtabError, match=r"is a file; accepted: the directory that holds cfg.json"):
        TopKSAE.from_pretrained(tmp_path / "file")


# ---------------------------------------------------------------- sparsify's files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, r"cfg.json: activation='groupmax' is not known. Accepted: topk"),
        ({"skip_connection": True}, r"cfg.json: skip_connection=true is not a TopK dictionary; accepted: false"),
        ({"signed": True}, r"signed=true is not a TopK dictionary"),
        ({"num_latents": -1}, r"num_latents=-1; accepted: 0 or more"),
        ({"num_latents": 0, "expansion_factor": 0}, r"expansion_factor=0; accepted: an integer of 1 or more"),
        ({"num_latents": 0, "expansion_factor": 10**30}, r"cfg.json: n_latents=70* times width 7 is beyond"),
        ({"num_latents": 10**8}, r"has shape \[.*cfg.json asks for \[.*100000000"),
        ({"num_latents": 3}, r"cfg.json: k=4 must not exceed n_latents=3"),
        ({"k": 2.5}, r"cfg.json: k=2.5; accepted: an integer"),
        ({"transcode": "no"}, r"transcode='no'; accepted: true or false"),
    ],
)
def test_bad_sparsify_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    formats.write_sparsify(dictionary(), tmp_path, "layers.9")
    change(tmp_path / "layers.9", **changes)
    with pytest.raises(TrimtabError, match=message):
        formats.read_sparsify(tmp_path, "layers.9")


def test_a_skip_matrix_in_the_file_is_refused(tmp_path: Path) -> None:
    formats.write_sparsify(dictionary(), tmp_path, "layers.9")
    path = tmp_path / "layers.9" / "sae.safetensors"
    save_file({**load_file(path), "W_skip": random(D_IN, D_IN)}, path)
    with pytest.raises(TrimtabError, match=r"tensor 'W_skip' is not known; accepted: encoder.weight"):
        formats.read_sparsify(tmp_path, "layers.9")
