"""A snapshot's way into vLLM's model, whole or in part. Written against vLLM 0.32.0.

vLLM reloads layer by layer. A layer's tensors go to the meta device, what is loaded is queued, and once all of the
layer is there, it is filled, packed, and copied to where the kernels look for it. A layer of which only some came is
filled all the same, the rest of it with whatever lay in memory. So with each tensor that has changed, all others of its
layer are loaded: q with k and v, an expert with all experts. Which tensor ends up in which layer, and where in it, is
learnt from vLLM's own loaders, while a snapshot is loaded whole for the first time; tensor parallelism, fused and tied
weights are theirs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise
from vllm.platforms import current_platform

from rollout.engine.tensors import Source, tensors
from rollout.engine.vllm_places import Addresses, Copies, Places
from rollout.engine.vllm_reading import first_wrong, has_experts, note_packed, read_back


class WeightLoading:
    """Of one worker's model; with tensor parallelism each rank has its own."""

    def __init__(self, model_runner: Any) -> None:
        self._runner = model_runner
        self._model: torch.nn.Module = model_runner.get_model()
        self._places: Places | None = None

    def load(self, source: Source | None, changed: Iterable[str] | None = None) -> set[str] | None:
        """Load a snapshot. Args: source: None for what lies on disk. changed: only these differ from what the model
        has; None: any may.

        Returns: the tensors that were loaded; None: all. Raises: whatever vLLM's loaders raise; ValueError for a layer
        that was not given all that is its own. The model is then a mixture: `put_back`, and load another whole.
        """
        part = self._places.closure(changed) if self._places and changed is not None and source else None
        if part is None or source is None:
            self._load_whole(source)
            return None
        self._load_part(source, *part)
        return part[0]

    def _load_whole(self, source: Source | None) -> None:
        weights = None if source is None else list(tensors(*source))
        places = Places() if weights is not None and self._places is None else None
        with nullcontext() if weights is None or places is None else _noted(weights, places):
            self._runner.reload_weights(weights_iterator=None if weights is None else iter(weights))
        self._repack(set(self._model.modules()))
        if places is not None and source is not None:
            note_packed(places, source)
            self._places = places

    def _load_part(self, source: Source, names: set[str], layers: set[Any]) -> None:
        """Only the layers concerned leave the device: vLLM is given them as if they were a model."""
        if not layers:
            return
        part = torch.nn.ModuleList(sorted(layers, key=id))
        layerwise.initialize_layerwise_reload(part)
        with self._counted(layers):
            model: Any = self._model
            model.load_weights((name, tensor) for name, tensor in tensors(*source) if name in names)
            layerwise.finalize_layerwise_reload(part, self._runner.vllm_config.model_config)
        self._repack(layers)

    def put_back(self) -> None:
        """Undo what a failed load left: layers on the meta device, with half of their weights queued.

        Loading again would go on with that queue. The tensors put back may be old or new: all are loaded next.
        """
        for layer in self._model.modules():
            info = layerwise.get_layerwise_info(layer)
            if info.can_load():
                layerwise._place_kernel_tensors(layer, info)
                info.reset()

    # ------------------------------------------------------------ what vLLM 0.32.0 leaves undone on the CPU

    def _repack(self, layers: set[Any]) -> None:
        """A tied output layer keeps a packed copy of what was loaded into the embedding; experts stay unpacked.

        oneDNN multiplies by a copy that was made of the weight that both share, and reloading packs only layers that
        appear in the checkpoint. Experts are packed when their kernel is made, and not again: without an error it says
        something else of unpacked ones.
        """
        if not current_platform.is_cpu():
            return
        loaded = {id(parameter) for layer in layers for parameter in layer._parameters.values()}
        layer: Any
        for layer in self._model.modules():
            weight: Any = getattr(layer, "weight", None)
            if id(weight) in loaded and hasattr(layer, "cpu_linear") and weight.ndim == 2 and weight.numel():
                layer.quant_method.process_weights_after_loading(layer)
        for layer in layers:
            if has_experts(layer):
                layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    # ------------------------------------------------------------ what lies in the model

    def first_wrong(self, source: Source, names: set[str] | None = None) -> tuple[str, int]:
        return ("", 0) if self._places is None else first_wrong(self._places, source, names)

    def read_back(self, source: Source) -> Iterator[tuple[str, int, int]]:
        return read_back(self._places or Places(), source)

    @contextmanager
    def _counted(self, layers: set[Any]) -> Iterator[None]:
        """Raises: ValueError for a layer that got another number of elements than a whole snapshot gives it."""
        assert self._places is not None
        elements, done = self._places.elements, set()
        process = layerwise._layerwise_process

        def check(layer: Any, info: Any) -> None:
            if info.load_numel != elements.get(layer):
                raise ValueError(f"{_name_of(layer)} was given {info.load_numel} elements, not {elements.get(layer)}")
            done.add(layer)
            process(layer, info)

        with _processed_by(check):
            yield
        missed = layers - done
        if missed:
            raise ValueError(f"{_name_of(missed.pop())} was given nothing ({len(missed) + 1} layers in all)")


@contextmanager
def _noted(weights: Sequence[tuple[str, torch.Tensor]], places: Places) -> Iterator[None]:
    """What is loaded inside is noted in `places`."""
    addresses = Addresses(weights)
    process = layerwise._layerwise_process

    def note(layer: Any, info: Any) -> None:
        for _, arguments in info.loaded_weights:
            name = addresses.name_of(arguments.arguments.get("loaded_weight"))
            if name is None:
                places.strangers.add(layer)
            else:
                places.names[layer].add(name)
                places.layers[name].add(layer)
        places.elements[layer] = info.load_numel
        with Copies(layer, addresses, places):
            process(layer, info)

    with _processed_by(note):
        yield


@contextmanager
def _processed_by(process: Callable[[Any, Any], None]) -> Iterator[None]:
    """vLLM fills a layer that is complete in a function of its module's; it has no other place to look on."""
    original = layerwise._layerwise_process
    layerwise._layerwise_process = process
    try:
        yield
    finally:
        layerwise._layerwise_process = original


def _name_of(layer: torch.nn.Module) -> str:
    return getattr(layer, "prefix", "") or type(layer).__name__
