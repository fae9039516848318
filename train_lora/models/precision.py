"""The numbers that the frozen base is stored in: float32, bfloat16, float16, 8 or 4 bits.

8 and 4 bits are bitsandbytes' (LLM.int8 and NF4) on the linear layers of the transformer blocks,
four fifths of SDXL's weights; convolutions and embeddings stay in bfloat16. Norms, a few thousand
numbers, are float32 everywhere. All but float32 are for storage: passes run under bf16 autocast.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Precision = Literal["fp32", "bf16", "fp16", "8bit", "4bit"]

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "8bit": torch.bfloat16,
    "4bit": torch.bfloat16,
}
"""Of what is not quantised."""
_QUANTISED = ("8bit", "4bit")
_DEVICES = ("cuda", "xpu", "cpu")
_MIN_CAPABILITY = (7, 5)  # Turing: the first with the int8 products of LLM.int8


def check_precision(precision: Precision, device: torch.device, option: str) -> None:
    """ValueError, naming the `option`, where library or hardware cannot do it."""
    if precision not in _QUANTISED:
        return
    needs_bitsandbytes(f'{option} "{precision}"')
    if device.type not in _DEVICES:
        raise ValueError(
            f'{option} is "{precision}", which bitsandbytes cannot do on {device.type}: '
            'set it to "bf16"'
        )
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _MIN_CAPABILITY:
            raise ValueError(
                f'{option} is "{precision}", which needs a GPU of compute capability 7.5 '
                f"(Turing) or newer, this one has {found[0]}.{found[1]}: "
                'set it to "bf16" or "fp16"'
            )


def needs_bitsandbytes(what: str) -> None:
    """ValueError where the library is missing."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{what} needs the library bitsandbytes, which is not installed: "
            "pip install '.[bitsandbytes]' -c constraints.txt"
        )


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is there, before diffusers and peft do, which they always do.

    On CPUs with bf16 instructions that import downloads a compiled kernel from the hub, or, without
    the library `kernels`, complains that it cannot. Nobody asked for either: its own code will do.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    loader, complaint = "kernels", logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, was_disabled = sys.modules.get(loader), complaint.disabled
    sys.modules[loader], complaint.disabled = None, True  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        complaint.disabled = was_disabled
        del sys.modules[loader]
        if before is not None:
            sys.modules[loader] = before


def set_precision(unet: UNet2DConditionModel, precision: Precision) -> UNet2DConditionModel:
    """`unet` itself, changed; quantised weights shrink when they are moved to their device."""
    nn.Module.to(unet, DTYPES[precision])  # diffusers' own would warn of modules that are not here
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float()
    if precision in _QUANTISED:
        for name, module in list(unet.named_modules()):
            if isinstance(module, nn.Linear) and _is_quantised(name):
                parent, _, child = name.rpartition(".")
                setattr(unet.get_submodule(parent), child, _quantised(module, precision))
        # What peft asks before it puts an adapter on such a layer.
        unet.is_loaded_in_8bit, unet.is_loaded_in_4bit = precision == "8bit", precision == "4bit"
    return unet


def _is_quantised(name: str) -> bool:
    return ".transformer_blocks." in name or name.endswith((".proj_in", ".proj_out"))


def _quantised(linear: nn.Linear, precision: Precision) -> nn.Module:
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features)
    weight = linear.weight.data
    layer: Any
    if precision == "8bit":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer
