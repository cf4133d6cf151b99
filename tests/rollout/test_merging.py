"""An adapter and the model's folder make whole weights: the same bits everywhere, and never twice."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from databus.messages import AdaptedWeight, Adapter, Sampling
from rollout.base_weights import BaseWeights
from rollout.config import RolloutConfig
from rollout.engine.base import GenerateRequest, Snapshot
from rollout.engine.expected import ExpectedTensors
from rollout.engine.small_engine import SmallEngine
from rollout.engine.tensors import tensors
from rollout.merging import MergingPull, merge
from rollout.weight_source import PullError

RANK, SCALE = 4, 2.0
WEIGHTS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")


def draw(seed: int, out: int, into: int, rank: int, spread: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """base, a, b; elements differ in size by 2 to the power of up to `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def one(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-spread, spread + 1, shape, generator=generator)
        return torch.randn(shape, generator=generator) * 2.0**exponents

    return one(out, into), one(rank, into), one(out, rank)


SIZES = {
    "seed": st.integers(0, 10**6),
    "out": st.integers(1, 9),
    "into": st.integers(1, 9),
    "rank": st.sampled_from([1, 2, 3, 8, 33, 128]),
    "spread": st.integers(0, 12),
}


@given(**SIZES)
@settings(max_examples=50, deadline=None)
def test_a_merge_is_the_products_to_float_tolerance(seed: int, out: int, into: int, rank: int, spread: int) -> None:
    base, a, b = draw(seed, out, into, rank, spread)
    expected = base.double() + SCALE * (b.double() @ a.double())
    bound = b.abs().amax(1, keepdim=True).double() * a.abs().amax(0, keepdim=True).double() * rank * SCALE
    assert ((merge(base, a, b, SCALE).double() - expected).abs() <= 2.0**-20 * bound + 2.0**-23 * expected.abs()).all()


@given(**SIZES)
@settings(max_examples=50, deadline=None)
def test_a_merge_does_not_depend_on_the_order_of_its_sums(
    seed: int, out: int, into: int, rank: int, spread: int
) -> None:
    """Machines that sum in another order, as their matrix products do, get the same bits."""
    base, a, b = draw(seed, out, into, rank, spread)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(merge(base, a, b, SCALE), merge(base, a[order], b[:, order], SCALE))


def test_large_matrices_are_merged_by_blocks() -> None:
    base, a, b = draw(0, 300, 3000, RANK)
    whole = merge(base, a, b, SCALE)
    assert torch.equal(whole[250:], merge(base[250:], a, b[250:], SCALE))
    assert torch.allclose(whole, base + SCALE * b @ a, atol=1e-5)


def test_nothing_learnt_changes_nothing() -> None:
    base, a, b = draw(0, 20, 30, RANK)
    assert torch.equal(merge(base, a, torch.zeros_like(b), SCALE), base)


# ---------------------------------------------------------------- the pull


def factors_of(base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.{factor}": torch.randn(shape, generator=generator)
        for name in WEIGHTS
        for factor, shape in (("lora_A", (RANK, base[name].shape[1])), ("lora_B", (base[name].shape[0], RANK)))
    }


def adapter_of(base: Mapping[str, torch.Tensor]) -> Adapter:
    digests = {name: xxhash.xxh3_64_intdigest(base[name].numpy().data) for name in WEIGHTS}
    return Adapter(
        scale=SCALE, weights=tuple(AdaptedWeight(name=name, base_xxh3=each) for name, each in digests.items())
    )


@pytest.fixture
def base(tiny_model: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_model / "model.safetensors")


@pytest.fixture
def published(make_snapshot: Callable, base: dict[str, torch.Tensor]) -> Callable:
    """A `Pull` that finds adapters; those of version V are drawn from the seed V."""

    def pull(address: str, version: int, num_bytes: int, stop: threading.Event) -> Snapshot:
        snapshot = make_snapshot(factors_of(base, version), version)
        manifest = msgspec.structs.replace(snapshot.manifest, adapter=adapter_of(base))
        return Snapshot(version=version, manifest=manifest, fd=snapshot.fd)

    return pull


def pulled(merging: MergingPull, version: int, stop: threading.Event | None = None) -> Snapshot:
    return merging("ipc://unused", version, 0, stop or threading.Event())


def weights_in(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """A copy; the snapshot is closed."""
    weights = {name: tensor.clone() for name, tensor in tensors(snapshot.manifest, snapshot.map())}
    snapshot.close()
    return weights


def test_a_version_is_the_folder_and_its_adapter_alone(
    tiny_model: Path, base: dict[str, torch.Tensor], published: Callable
) -> None:
    merging = MergingPull(published, str(tiny_model), "float32")
    for version, before in ((3, 0), (5, 3), (3, 5)):  # a learner that came back publishes older ones
        snapshot = pulled(merging, version)
        weights = weights_in(snapshot)
        factors = factors_of(base, version)
        assert snapshot.version == snapshot.manifest.version == version
        assert (snapshot.changed, snapshot.base_version) == (frozenset(WEIGHTS), before)
        assert snapshot.manifest.adapter is None
        ExpectedTensors.of(str(tiny_model)).check(snapshot.manifest)
        for name, tensor in weights.items():
            expected = base[name]
            if name in WEIGHTS:
                expected = merge(expected, factors[f"{name}.lora_A"], factors[f"{name}.lora_B"], SCALE)
                assert not torch.equal(expected, base[name])
            assert torch.equal(tensor, expected), name


def test_what_is_served_in_bfloat16_is_merged_before_it_is_rounded(tiny_model: Path, published: Callable) -> None:
    whole, rounded = (
        weights_in(pulled(MergingPull(published, str(tiny_model), d), 1)) for d in ("float32", "bfloat16")
    )
    for name, tensor in whole.items():
        assert torch.equal(rounded[name], tensor.bfloat16()), name


def test_the_engine_takes_it(tiny_model: Path, published: Callable, reference: Callable) -> None:
    async def scenario() -> None:
        engine = SmallEngine(RolloutConfig(engine="small", context_tokens=64), str(tiny_model), seed=0, version=0)
        await engine.start()
        try:
            merging = MergingPull(published, str(tiny_model), "float32")
            weights, snapshot = weights_in(pulled(merging, 1)), pulled(merging, 1)
            await engine.update(snapshot)
            snapshot.close()
            group = GenerateRequest(group_id="g", prompt_ids=(6, 13, 8), group_size=2, sampling=Sampling(max_tokens=9))
            for completion in await engine.generate(group):
                said = reference(weights, group.prompt_ids, completion, 1.0)
                assert abs(said - completion.logprobs).max() < 1e-4
        finally:
            await engine.close()

    asyncio.run(scenario())


def test_whole_weights_go_through(make_snapshot: Callable) -> None:
    given = make_snapshot({"a": torch.ones(3)}, 4)
    assert pulled(MergingPull(lambda *_: given, "no such model", "float32"), 4) is given
    given.close()


def refused(published: Callable, model: Path, change: Callable[[Snapshot], Snapshot]) -> str:
    with pytest.raises(PullError) as raised:
        pulled(MergingPull(lambda *words: change(published(*words)), str(model), "float32"), 1)
    assert "\n" not in str(raised.value)
    assert not [link for fd in os.scandir("/proc/self/fd") if "memfd:merged" in (link := os.path.realpath(fd.path))]
    return str(raised.value)


def same(snapshot: Snapshot) -> Snapshot:
    return snapshot


def test_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, base: dict[str, torch.Tensor], published: Callable
) -> None:
    """One number in one tensor that is adapted."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    other = {name: tensor.clone() for name, tensor in base.items()}
    other[WEIGHTS[1]][0, 0] += 1e-3
    save_file(other, model / "model.safetensors", metadata={"format": "pt"})
    said = refused(published, model, same)
    assert f"tensor {WEIGHTS[1]!r} of model={model} is not the one that the learner adapts" in said


def test_a_model_without_safetensors_is_refused(tiny_model: Path, tmp_path: Path, published: Callable) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert f"model={model} has no weights as safetensors" in refused(published, model, same)


@pytest.mark.parametrize(
    ("factor", "replaced", "says"),
    [
        ("lora_A", torch.zeros(RANK, 3), "its adapter (64, 4) · (4, 3)"),
        ("lora_B", torch.zeros(64, RANK + 1), "its adapter (64, 5) · (4, "),
        ("lora_B", torch.zeros(64, RANK).bfloat16(), "lora_B' is missing, or no float32 matrix"),
        ("lora_A", None, "lora_A' is missing, or no float32 matrix"),
        ("lora_A", torch.full((RANK, 64), torch.inf), "lora_A' has numbers that are not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    factor: str,
    replaced: torch.Tensor | None,
    says: str,
    tiny_model: Path,
    base: dict[str, torch.Tensor],
    make_snapshot: Callable,
    published: Callable,
) -> None:
    def change(snapshot: Snapshot) -> Snapshot:
        snapshot.close()
        factors = factors_of(base, 1)
        del factors[f"{WEIGHTS[0]}.{factor}"]
        more = {} if replaced is None else {f"{WEIGHTS[0]}.{factor}": replaced}
        wrong = make_snapshot(factors | more, 1)
        manifest = msgspec.structs.replace(wrong.manifest, adapter=snapshot.manifest.adapter)
        return Snapshot(version=1, manifest=manifest, fd=wrong.fd)

    assert says in refused(published, tiny_model, change)


def test_a_merge_that_is_given_up_ends(tiny_model: Path, published: Callable) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(PullError, match="given up"):
        pulled(MergingPull(published, str(tiny_model), "float32"), 1, stop)


def test_weights_in_several_files_are_found(tiny_model: Path, tmp_path: Path, base: dict[str, torch.Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    parts = BaseWeights(str(tmp_path))
    assert set(parts.names) == base.keys()
    for name, tensor in base.items():
        assert torch.equal(parts[name], tensor)
    parts.close()
