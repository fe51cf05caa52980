"""Shards against the model run by hand, shuffling against counting, the cache against the harvest itself."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from trimtab.core.errors import TrimtabError
from trimtab.core.text import TextSource, pack
from trimtab.sae import harvest as harvest_module
from trimtab.sae.harvest import Harvest, HarvestConfig, ShardCache, TensorShards
from trimtab.sae.shuffle import ShuffledActivations

CONFIG = HarvestConfig(context=12, sequences_per_forward=3, shard_tokens=60, sink_norm_ratio=None)


def documents(count: int = 40, seed: int = 0) -> list[str]:
    """Documents of one to thirty words of the tiny tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(0, 60, (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture
def make(tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    """Makes a new harvest of the tiny Llama, as a new process would."""

    def harvest(*places: str, config: HarvestConfig = CONFIG, text: Any = None) -> Harvest:
        source = TextSource(documents() if text is None else text)
        return Harvest(tiny_llama, tiny_tokenizer, source, places or ("resid.1",), config)

    return harvest


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[place], b[place]) for place in a)


# -- rows ------------------------------------------------------------------------------------------


def by_hand(model: Any, tokenizer: Any, index: int) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states of the sequences of shard `index`, and which of their tokens are text."""
    sequences = itertools.islice(pack(TextSource(documents()), tokenizer, 12, repeat=True), 5 * index, 5 * index + 5)
    ids = torch.stack([sequence.input_ids for sequence in sequences])
    keep = ~torch.isin(ids, torch.tensor([0, 1, 2, 3]))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return {"embed": states[0], "resid.0": states[1], "resid.1": states[2]}, keep


def test_rows_are_the_models_hidden_states_without_special_tokens(
    make: Any, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    live = make("resid.1", "embed", "resid.0")
    for index in (0, 1, 7):
        states, keep = by_hand(tiny_llama, tiny_tokenizer, index)
        assert 0 < keep.sum() < keep.numel()
        shard = live.shard(index)
        assert list(shard) == ["resid.1", "embed", "resid.0"]
        for place, rows in shard.items():
            torch.testing.assert_close(rows, states[place][keep], rtol=1e-5, atol=1e-6)


def test_rows_of_several_places_are_those_of_each_alone(make: Any) -> None:
    together = make("attn.1", "mlp.0", "resid.2").shard(1)
    assert len({len(rows) for rows in together.values()}) == 1
    for place, rows in together.items():
        assert torch.equal(make(place).shard(1)[place], rows)


def test_a_place_named_twice_is_read_once(make: Any) -> None:
    assert make("resid.1", "embed", "resid.1").places == ("resid.1", "embed")


def test_the_model_stops_after_the_last_place_and_is_in_evaluation_mode(make: Any, tiny_llama: Any) -> None:
    ran = []
    for name in ("model.layers.1", "model.layers.2", "lm_head"):
        tiny_llama.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: ran.append(name))
    tiny_llama.train()
    live = make("resid.1", "embed")
    live.shard(0)
    assert set(ran) == {"model.layers.1"}
    assert not tiny_llama.training


def test_half_precision_stays_as_the_model_has_it(make: Any, tiny_llama: Any) -> None:
    tiny_llama.to(torch.bfloat16)
    assert make("resid.0").shard(0)["resid.0"].dtype == torch.bfloat16


def test_a_masked_model_is_read_within_its_frame(tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
        )
    ).eval()
    live = Harvest(model, tiny_tokenizer, TextSource(documents()), ["resid.0", "resid.1"], CONFIG)
    states, keep = by_hand(model, tiny_tokenizer, 0)
    shard = live.shard(0)
    torch.testing.assert_close(shard["resid.0"], states["resid.0"][keep], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shard["resid.1"], states["resid.1"][keep], rtol=1e-5, atol=1e-6)


def test_attention_sinks_are_left_out_at_every_place(make: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    sink = tiny_tokenizer.convert_tokens_to_ids("w7")
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[sink] *= 300.0
    text = ["w7 w1 w2 w3 w4 w5", "w8 w9 w7"] * 40
    kept = make("embed", "mlp.1", config=HarvestConfig(context=12, shard_tokens=60, sink_norm_ratio=10.0), text=text)
    everything = make("embed", "mlp.1", config=CONFIG, text=text)
    large = everything.shard(0)["embed"].norm(dim=-1) > 1.0
    assert large.sum() > 5
    assert (everything.shard(0)["embed"][large] - tiny_llama.model.embed_tokens.weight[sink]).abs().max() == 0
    for place in ("embed", "mlp.1"):
        torch.testing.assert_close(kept.shard(0)[place], everything.shard(0)[place][~large])


def test_a_sink_is_judged_by_its_ratio_to_the_median(make: Any) -> None:
    everything = make("resid.1").shard(0)["resid.1"]
    norms = everything.norm(dim=-1)
    ratio = (norms.sort().values[-3:-1].mean() / norms.median()).item()  # between the second and the third largest
    one_pass = HarvestConfig(context=12, sequences_per_forward=5, shard_tokens=60, sink_norm_ratio=ratio)
    kept = make("resid.1", config=one_pass).shard(0)["resid.1"]
    assert ratio > 1
    torch.testing.assert_close(kept, everything[norms <= ratio * norms.median()])
    assert len(kept) == len(everything) - 2


# -- the same shard by every way -------------------------------------------------------------------


def test_a_shard_is_the_same_in_order_by_skipping_and_after_restoring(make: Any) -> None:
    in_order = make()
    shards = [in_order.shard(i) for i in range(9)]
    assert not torch.equal(shards[0]["resid.1"][:5], shards[1]["resid.1"][:5])
    assert equal(make().shard(8), shards[8])
    backwards = make()
    assert equal(backwards.shard(6), shards[6])
    assert equal(backwards.shard(2), shards[2])
    for i in (0, 3, 8):
        restored = make()
        restored.restore(json.loads(json.dumps(in_order.state(i))))
        assert equal(restored.shard(i), shards[i])
        assert make().state(i) == in_order.state(i)


def test_shards_go_on_into_the_next_pass_over_a_short_text(make: Any) -> None:
    text = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", "w14 w15"]
    live = make("embed", text=text)
    assert live.state(1)["start"][0] >= 2
    assert equal(make("embed", text=text).shard(3), [live.shard(i) for i in range(4)][3])


def test_an_interrupted_shard_leaves_no_wrong_position(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live, calls = make(), []
    read = harvest_module.act.read

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*arguments, **options)

    monkeypatch.setattr(harvest_module.act, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.shard(0)
    assert equal(live.shard(1), make().shard(1))


# -- bad input -------------------------------------------------------------------------------------


def test_a_place_that_is_not_there_lists_near_names(make: Any) -> None:
    with pytest.raises(TrimtabError, match=r"place='resid\.9' is not known\. Did you mean .*resid\.2"):
        make("resid.9")
    with pytest.raises(TrimtabError, match=r"place='residual\.1'"):
        make("resid.1", "residual.1")
    live = make("resid.1")
    with pytest.raises(TrimtabError, match=r"places=\[\] names nothing"):
        Harvest(live.model, live.tokenizer, live.source, [])


def test_a_model_without_blocks_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(TrimtabError, match="layers"):
        Harvest(nn.Sequential(nn.Linear(4, 4)), tiny_tokenizer, TextSource(documents()), ["resid.0"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_stop_the_harvest(make: Any, tiny_llama: Any, value: float) -> None:
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight[3, 3] = value
    assert torch.isfinite(make("resid.0").shard(2)["resid.0"]).all()
    with pytest.raises(TrimtabError, match=r"place 'resid\.1' hold NaN or infinity, in the text before"):
        make("resid.0", "resid.1").shard(2)


def test_an_infinite_token_is_no_attention_sink(make: Any, tiny_llama: Any) -> None:
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[7] = torch.inf  # one word: its norm is above any ratio of the median
    with pytest.raises(TrimtabError, match="hold NaN or infinity"):
        make("embed").shard(0)


def test_the_digest_of_a_model_does_not_name_its_reader(make: Any, tiny_llama: Any) -> None:
    before = make("resid.0").identity["model_sha256"]
    tiny_llama.config.transformers_version = "99.0"
    assert make("resid.0").identity["model_sha256"] == before
    tiny_llama.config.rms_norm_eps *= 2
    assert make("resid.0").identity["model_sha256"] != before


@pytest.mark.parametrize(("text", "message"), [([], "is empty"), (["w1 w2"], "too short")])
def test_too_little_text_is_refused(make: Any, text: list[str], message: str) -> None:
    live = make(text=text)
    for ask in (lambda: live.shard(0), lambda: live.state(3), lambda: next(live.forwards())):
        with pytest.raises(TrimtabError, match=message):
            ask()


def test_text_of_special_tokens_alone_yields_no_activations(make: Any) -> None:
    batches = ShuffledActivations(make(text=["<bos> <eos>"] * 50), batch_size=4)
    with pytest.raises(TrimtabError, match="every token is special or an attention sink"):
        next(batches)


# -- identity --------------------------------------------------------------------------------------


def test_identity_is_json_and_tells_apart_what_yields_other_rows(make: Any, tiny_llama: Any) -> None:
    identity = make().identity
    assert json.loads(json.dumps(identity)) == identity
    assert make().identity == identity
    others = [
        make("resid.0").identity,
        make(config=HarvestConfig(context=13, sequences_per_forward=3, shard_tokens=60, sink_norm_ratio=None)).identity,
        make(text=documents(seed=1)).identity,
    ]
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight += 0.01
    others.append(make().identity)
    assert identity not in others


# -- tensors ---------------------------------------------------------------------------------------


def test_tensors_are_served_again_and_again() -> None:
    rows = torch.arange(14.0).view(7, 2)
    shards = TensorShards({"x": rows, "y": rows[:, :1]}, shard_rows=3)
    assert shards.places == ("x", "y")
    assert [len(shards.shard(i)["x"]) for i in range(5)] == [3, 3, 1, 3, 3]
    assert equal(shards.shard(5), shards.shard(2))
    assert torch.equal(torch.cat([shards.shard(i)["x"] for i in range(3)]), rows)
    assert torch.equal(shards.shard(1)["y"], rows[3:6, :1])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"lengths \{\}"),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(4, 2)}, "equal length above 0"),
        ({"x": torch.zeros(0, 2)}, "equal length above 0"),
        ({"x": torch.tensor([[0.0, torch.nan]])}, "place 'x' hold NaN or infinity"),
    ],
)
def test_tensors_that_cannot_be_shards_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        TensorShards(tensors)


def test_a_shard_of_no_rows_is_refused() -> None:
    with pytest.raises(TrimtabError, match="shard_rows=0 must be at least 1"):
        TensorShards({"x": torch.zeros(3, 2)}, shard_rows=0)


# -- shuffling -------------------------------------------------------------------------------------


class Numbered:
    """Shards whose rows are numbered through: shard i has `sizes[i % len(sizes)]` of them; "y" is minus "x"."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.asked: list[int] = []

    identity: Mapping[str, Any] = {}
    places = ("x", "y")

    def first(self, index: int) -> int:
        whole, rest = divmod(index, len(self.sizes))
        return whole * sum(self.sizes) + sum(self.sizes[:rest])

    def shard(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        rows = torch.arange(self.first(index), self.first(index + 1))[:, None]
        return {"x": rows, "y": -rows}

    def state(self, index: int) -> dict[str, Any]:
        return {"index": index}

    def restore(self, state: Mapping[str, Any]) -> None:
        assert set(state) == {"index"}


sizes_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any).map(lambda sizes: [*sizes, 2])


def rows(batches: ShuffledActivations, count: int) -> list[list[int]]:
    return [next(batches)["x"][:, 0].tolist() for _ in range(count)]


@settings(deadline=None, max_examples=30)
@given(sizes=sizes_strategy, batch_size=st.integers(1, 25), seed=st.integers(0, 3))
def test_every_row_is_served_exactly_once(sizes: list[int], batch_size: int, seed: int) -> None:
    shards = Numbered(sizes)
    batches = ShuffledActivations(shards, batch_size=batch_size, seed=seed)
    served = list(itertools.chain.from_iterable(rows(batches, -(-60 // batch_size))))
    assert len(served) == -(-60 // batch_size) * batch_size
    assert len(set(served)) == len(served)
    # The last two shards that were asked for are still being served, those before them are done.
    assert set(range(shards.first(max(max(shards.asked) - 1, 0)))) <= set(served)
    assert max(served) < shards.first(max(shards.asked) + 1)


@settings(deadline=None, max_examples=30)
@given(sizes=sizes_strategy, batch_size=st.integers(1, 25), seed=st.integers(0, 3))
def test_after_every_batch_a_fresh_object_goes_on_with_the_same_rows(
    sizes: list[int], batch_size: int, seed: int
) -> None:
    batches = ShuffledActivations(Numbered(sizes), batch_size=batch_size, seed=seed)
    states, served = [batches.state_dict()], []
    for _ in range(12):
        served += rows(batches, 1)
        states.append(json.loads(json.dumps(batches.state_dict())))
    for i in range(len(served)):
        fresh = ShuffledActivations(Numbered(sizes), batch_size=batch_size, seed=seed)
        fresh.load_state_dict(states[i])
        assert rows(fresh, len(served) - i) == served[i:]
    batches.load_state_dict(states[0])
    assert rows(batches, len(served)) == served


def test_batches_mix_two_shards_and_every_seed_its_own_way() -> None:
    batches = ShuffledActivations(Numbered([100]), batch_size=25)
    served = rows(batches, 2 + 4 * 4)
    assert {row // 100 for batch in served[:2] for row in batch} == {0}
    for round_, first in enumerate(range(2, len(served), 4)):
        for batch in served[first : first + 4]:
            assert {row // 100 for row in batch} == {round_, round_ + 1}
            assert batch != sorted(batch)
    assert rows(ShuffledActivations(Numbered([100]), batch_size=25, seed=1), 18) != served


def test_places_stay_aligned() -> None:
    batches = ShuffledActivations(Numbered([7, 1, 5]), batch_size=6)
    for _ in range(20):
        batch = next(batches)
        assert list(batch) == ["x", "y"]
        assert torch.equal(batch["x"], -batch["y"])


def test_peeking_serves_nothing() -> None:
    batches = ShuffledActivations(Numbered([8]), batch_size=3)
    assert len(batches.peek()["x"]) == 4
    assert batches.state_dict()["offset"] == 0
    assert rows(batches, 5) == rows(ShuffledActivations(Numbered([8]), batch_size=3), 5)


def test_processes_take_shards_of_their_own() -> None:
    sizes = [5, 1, 8, 3]
    shards = [Numbered(sizes) for _ in range(3)]
    served = []
    for rank, source in enumerate(shards):
        batches = ShuffledActivations(source, batch_size=4, rank=rank, world=3)
        served.append({row for batch in rows(batches, 15) for row in batch})
        assert {index % 3 for index in source.asked} == {rank}
    assert sum(map(len, served)) == len(served[0] | served[1] | served[2])
    assert set(range(60)) <= served[0] | served[1] | served[2]


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
def test_another_number_of_processes_goes_on_and_serves_no_row_again(
    sizes: list[int], worlds: tuple[int, int, int]
) -> None:
    states: list[dict[str, Any]] = []
    seen: list[int] = []
    for world in worlds:
        ranks = [ShuffledActivations(Numbered(sizes), batch_size=3, rank=r, world=world) for r in range(world)]
        for rank in ranks:
            if states:
                rank.go_on_after(states)
        served = [rows(rank, 4) for rank in ranks]
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        seen += [row for batches in served for batch in batches for row in batch]
        again = ShuffledActivations(Numbered(sizes), batch_size=3, rank=0, world=world)
        again.load_state_dict(states[0])
        assert rows(again, 2) == rows(ranks[0], 2), "the new layout is resumed like any other"
    assert len(set(seen)) == len(seen)


def test_a_text_goes_on_after_another_number_of_processes(make: Any) -> None:
    two = [ShuffledActivations(make("resid.1"), batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    for batches in two:
        next(batches)
    one = ShuffledActivations(make("resid.1"), batch_size=4)
    one.go_on_after([batches.state_dict() for batches in two])
    rest = make("resid.1").shard(2)["resid.1"]
    found = next(one)["resid.1"]
    assert (found[:, None] == rest).all(-1).any(1).all()


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_a_row(batch_size: int) -> None:
    with pytest.raises(TrimtabError, match=f"batch_size={batch_size} must be at least 1"):
        ShuffledActivations(Numbered([3]), batch_size=batch_size)


def test_shards_without_rows_end_in_an_error_and_not_in_a_search_for_ever() -> None:
    with pytest.raises(TrimtabError, match="no activations"):
        next(ShuffledActivations(Numbered([0]), batch_size=1))


class Interrupted(Numbered):
    """Is interrupted, once, while it makes shard 3."""

    interrupted = False

    def shard(self, index: int) -> dict[str, Tensor]:
        if index == 3 and not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super().shard(index)


def test_a_batch_that_was_interrupted_is_served_when_one_goes_on() -> None:
    sizes, expected = [6, 4], rows(ShuffledActivations(Numbered([6, 4]), batch_size=4), 12)
    batches, served = ShuffledActivations(Interrupted(sizes), batch_size=4), []

    def serve_on() -> None:
        while True:
            served.append(next(batches)["x"][:, 0].tolist())

    with pytest.raises(KeyboardInterrupt):
        serve_on()
    fresh = ShuffledActivations(Numbered(sizes), batch_size=4)
    fresh.load_state_dict(batches.state_dict())
    count = 12 - len(served)
    assert 0 < count < 12
    assert served + rows(fresh, count) == expected
    assert served + rows(batches, count) == expected


def test_a_harvest_is_shuffled_and_resumed_in_the_same_order(make: Any) -> None:
    batches = ShuffledActivations(make("resid.0", "embed"), batch_size=17, seed=3)
    served, states = [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(batches.state_dict())))
        served.append(next(batches))
    assert states[-1]["round"] >= 3
    for i in (0, 4, 9, 13):
        fresh = ShuffledActivations(make("resid.0", "embed"), batch_size=17, seed=3)
        fresh.load_state_dict(states[i])
        assert all(equal(next(fresh), batch) for batch in served[i:])


# -- cache -----------------------------------------------------------------------------------------


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("model or text was read")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_second_run_reads_the_same_rows_without_the_model(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    live = make("resid.1", "embed")
    expected = [live.shard(i) for i in range(4)]
    first = ShardCache(make("resid.1", "embed"), tmp_path / "a" / "cache", dtype=dtype)
    written = [first.shard(i) for i in range(4)]
    monkeypatch.setattr(harvest_module.act, "read", refuse)
    second = ShardCache(make("resid.1", "embed"), tmp_path / "a" / "cache", dtype=dtype)
    assert second.places == ("resid.1", "embed")
    for i in range(4):
        shard = second.shard(i)
        assert equal(shard, written[i])
        assert equal(shard, {place: rows.to(dtype or rows.dtype) for place, rows in expected[i].items()})


def test_an_interrupted_harvest_goes_on_behind_the_cached_shards(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make()
    expected, expected_state = [whole.shard(i) for i in range(5)], whole.state(3)
    begun = ShardCache(make(), tmp_path)
    for i in range(3):
        begun.shard(i)
    resumed = ShardCache(make(), tmp_path)
    assert equal(resumed.shard(2), expected[2])
    with monkeypatch.context() as patch:  # the cached shard says where the next one begins: nothing is read for it
        patch.setattr(harvest_module, "pack", refuse)
        assert resumed.state(3) == expected_state
    assert equal(resumed.shard(3), expected[3])
    assert equal(resumed.shard(4), expected[4])
    assert equal(resumed.shard(0), expected[0])


def test_batches_from_the_cache_are_those_of_the_harvest_and_resume(make: Any, tmp_path: Path) -> None:
    def batches(cached: bool) -> ShuffledActivations:
        return ShuffledActivations(ShardCache(make(), tmp_path) if cached else make(), batch_size=16)

    live, cached = batches(False), batches(True)
    for _ in range(9):
        assert equal(next(live), next(cached))
    state = json.loads(json.dumps(cached.state_dict()))
    assert state == live.state_dict()
    fresh = batches(True)
    fresh.load_state_dict(state)
    for _ in range(5):
        assert equal(next(live), next(fresh))


def test_a_cached_shard_is_whole_or_not_there(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(make(), tmp_path)
    cache.shard(0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrimtabError, match=r"shard-000001\.safetensors' cannot be written.*No space left"):
            cache.shard(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "shard-000000.safetensors"]
    assert equal(ShardCache(make(), tmp_path).shard(0), make().shard(0))
    assert equal(cache.shard(1), make().shard(1))


def test_where_no_directory_can_be_is_bad_input(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrimtabError, match="cannot be written"):
        ShardCache(make(), tmp_path / "file")


def test_an_altered_shard_is_refused(make: Any, tmp_path: Path) -> None:
    ShardCache(make(), tmp_path).shard(0)
    path = tmp_path / "shard-000000.safetensors"
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[-7] ^= 1
    path.write_bytes(altered)
    with pytest.raises(TrimtabError, match=r"shard-000000\.safetensors' was altered.*delete it"):
        ShardCache(make(), tmp_path).shard(0)
    for content in (whole[:-5], whole[:4], b""):
        path.write_bytes(content)
        with pytest.raises(TrimtabError, match=r"shard-000000\.safetensors' cannot be read.*delete it"):
            ShardCache(make(), tmp_path).shard(0)
    path.unlink()
    assert equal(ShardCache(make(), tmp_path).shard(0), make().shard(0))


def test_the_cache_of_another_harvest_is_refused(make: Any, tmp_path: Path, tiny_llama: Any) -> None:
    ShardCache(make(), tmp_path).shard(0)
    wider = HarvestConfig(context=13, sequences_per_forward=3, shard_tokens=60, sink_norm_ratio=None)
    with pytest.raises(TrimtabError, match=r"another harvest: harvest is .*'context': 12.*'context': 13"):
        ShardCache(make(config=wider), tmp_path)
    with pytest.raises(TrimtabError, match=r"places is \['resid\.1'\] there, \['resid\.0'\] here"):
        ShardCache(make("resid.0"), tmp_path)
    with pytest.raises(TrimtabError, match=r"dtype is None there, 'torch\.bfloat16' here"):
        ShardCache(make(), tmp_path, dtype=torch.bfloat16)
    with pytest.raises(TrimtabError, match="text_sha256 is"):
        ShardCache(make(text=documents(seed=2)), tmp_path)
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight += 0.01
    with pytest.raises(TrimtabError, match="model_sha256 is"):
        ShardCache(make(), tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "3", ""])
def test_a_directory_of_something_else_is_refused(make: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(TrimtabError, match=r"cache\.json' is not the description of a cache"):
        ShardCache(make(), tmp_path)


def test_files_of_the_cache_are_plain_safetensors(make: Any, tmp_path: Path) -> None:
    shard = ShardCache(make("resid.1", "embed"), tmp_path).shard(2)
    assert equal(dict(sorted(load_file(tmp_path / "shard-000002.safetensors").items())), dict(sorted(shard.items())))
