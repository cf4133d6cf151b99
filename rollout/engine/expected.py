"""Which tensors a snapshot must hold, so that loading it can leave nothing of the old version."""

from collections.abc import Mapping
from typing import Any

from databus.messages import Manifest


class ExpectedTensors:
    """Names and shapes of a model's weights; tied weights are one tensor with several names."""

    def __init__(self, model: Any) -> None:
        """model: a transformers model with its weights tied; may lie on the meta device."""
        from transformers.core_model_loading import revert_weight_conversion

        state: Mapping[str, Any] = model.state_dict(keep_vars=True)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._identities: dict[str, tuple[int, int]] = {}
        for name, tensor in state.items():
            # What transformers keeps in one tensor may be several in a checkpoint, and in a snapshot: experts are.
            stored = revert_weight_conversion(model, {name: tensor.to("meta")})
            for index, (part, shaped) in enumerate(stored.items()):
                self._shapes[part] = tuple(shaped.shape)
                self._identities[part] = (id(tensor), index)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @classmethod
    def of(cls, model: str) -> "ExpectedTensors":
        """Of a folder or hub id, without loading weights."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        skeleton.tie_weights()
        return cls(skeleton)

    def check(self, manifest: Manifest) -> None:
        """Raises: ValueError for an unknown or missing tensor, or another shape. Tied weights need one name."""
        for spec in manifest.tensors:
            if spec.name not in self._shapes:
                raise ValueError(f"unknown tensor {spec.name!r}")
            if self._shapes[spec.name] != spec.shape:
                raise ValueError(f"tensor {spec.name!r} is {spec.shape}, the model's is {self._shapes[spec.name]}")
        given = {self._identities[spec.name] for spec in manifest.tensors}
        missing = [name for name, identity in self._identities.items() if identity not in given]
        if missing:
            raise ValueError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
