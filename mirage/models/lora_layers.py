"""What a LoRA adds to one layer: matrices for peft's layers, whole differences among them, and a layer for norms.

A difference of a weight is a LoRA of full rank, one of its two matrices the identity; that of a bias is the bias of the
second matrix. So peft scales, disables, blends, fuses and removes them like any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn


class LoraNorm(nn.Module, LoraLayer):
    """A norm whose weight and bias get differences; peft has none.

    The difference of the weight is B A with A a single one, that of the bias the bias of B.
    """

    # Of peft's classes, which have no types.
    base_layer: nn.Module
    lora_A: Any
    lora_B: Any
    scaling: dict[str, Any]
    lora_bias: dict[str, bool]
    merged_adapters: list[str]
    disable_adapters: bool
    merged: bool
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 1, lora_alpha: int = 1, **_: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return 1, module.weight.numel()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add a LoRA, of which there may be several."""
        config = copy.copy(config)
        config.lora_bias = config.lora_bias and getattr(self.get_base_layer(), "bias", None) is not None
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha, config, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what a LoRA adds to the weight."""
        matrices: Tensor = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
        return matrices[:, 0] * self.scaling[adapter]

    def _deltas(self, adapter: str) -> dict[str, Tensor]:
        deltas = {"weight": self.get_delta_weight(adapter)}
        if self.lora_bias[adapter]:
            deltas["bias"] = self.lora_B[adapter].bias * self.scaling[adapter]
        return deltas

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add LoRA to the weights themselves."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                self._add(adapter, 1.0, safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take what was merged out of the weights."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1.0, False)

    def _add(self, adapter: str, sign: float, safe: bool) -> None:
        base = self.get_base_layer()
        for name, delta in self._deltas(adapter).items():
            parameter = getattr(base, name)
            value = parameter.data + sign * delta.to(parameter.dtype)
            if safe and not value.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            parameter.data = value

    def forward(self, x: Tensor) -> Tensor:
        """Normalise as the base layer does, with the weight and bias that the active LoRA make of its own."""
        base = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.lora_A]
        if not names:
            return self.base_layer(x)  # type: ignore[no-any-return]
        changed: dict[str, Tensor] = {}
        for adapter in names:
            for name, delta in self._deltas(adapter).items():
                changed[name] = changed.get(name, getattr(base, name)) + delta
        result: Tensor = torch.func.functional_call(self.base_layer, changed, (x,))
        return result


def make_matrices(
    tensors: Mapping[str, Any], alpha: float, shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], float, int]:
    """Return a layer's matrices, its alpha and its rank, differences among them.

    Args:
        tensors: A (rank, in, ..), B (out, rank, ..), bias, diff and diff_b, as far as a file has them.
        alpha: of A and B.
        shape: of the layer's weight, (out, in) or (out, in, t, h, w).

    Returns:
        A, B and, where there is one, bias; they add alpha / rank times B A, and as many times the bias.
    """
    rows, columns, *kernel = shape
    ones = [1] * len(kernel)
    down, up, bias = (tensors.get(kind) for kind in ("A", "B", "bias"))
    if tensors.keys() & {"diff", "diff_b"}:  # which know no alpha: that of the matrices goes into these
        pairs = []
        if down is not None and up is not None:
            scale = alpha / down.shape[0]
            pairs.append((down.float(), up.float() * scale))
            bias = None if bias is None else bias.float() * scale
        if "diff" in tensors:
            pairs.append(_factor(tensors["diff"].float(), rows, columns, kernel))
        if not pairs:
            pairs.append((torch.zeros(1, columns, *kernel), torch.zeros(rows, 1, *ones)))
        down, up = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], 1)
        alpha = float(down.shape[0])
        if "diff_b" in tensors:
            bias = tensors["diff_b"].float() + (0 if bias is None else bias)
    assert down is not None and up is not None
    matrices = {"A": down, "B": up}
    if bias is not None and bias.float().any():
        matrices["bias"] = bias
    return matrices, alpha, int(down.shape[0])


def _factor(difference: Tensor, rows: int, columns: int, kernel: list[int]) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is a difference exactly, the smaller possible identity one of them."""
    ones = [1] * len(kernel)
    inputs = columns * math.prod(kernel)
    if rows <= inputs:
        return difference, torch.eye(rows).reshape(rows, rows, *ones)
    return torch.eye(inputs).reshape(inputs, columns, *kernel), difference.reshape(rows, inputs, *ones)


def make_lycoris(
    tensors: Mapping[str, Tensor], alpha: float | None, rank: int | None
) -> tuple[dict[str, Tensor], int | None]:
    """Return the factors of a layer of LoKr or LoHa with their scale multiplied in, and their rank.

    Args:
        tensors: `lokr_w1`, `hada_w1_a` and the like.
        alpha: None for a scale of 1.
        rank: that alpha is divided by; None takes it from the factors, and whole ones of LoKr have a scale of 1.

    Returns:
        The factors, float32, and their rank, None where LoKr's are whole.
    """
    factors = {kind: value.float() for kind, value in tensors.items() if kind.startswith(("lokr_", "hada_"))}
    lows = [kind for kind in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if kind in factors]
    own = int(factors[lows[0]].shape[0]) if lows else None
    divisor = own if rank is None else rank
    if alpha is not None and divisor is not None:
        scaled = next(kind for kind in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if kind in factors)
        factors[scaled] = factors[scaled] * (alpha / divisor)
    return factors, own
