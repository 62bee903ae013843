"""Names of tensors: Meta's, timm's and Hugging Face's layouts of a DINOv2 transformer -> timm's.

Differences that are more than a name:

- Meta's block chunks (``blocks.0.3.``) count chunk and block; the chunk is dropped;
- Meta's and Hugging Face's giant model packs its SwiGLU as ``w12``/``weights_in`` and ``w3``/``weights_out``;
- Hugging Face splits query, key and value; timm stacks them in this order;
- models with registers: timm keeps the position of the class token inside the class token.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMES = (
    (r"^(?:module\.|backbone\.|model\.|dinov2(?:_with_registers)?\.)", ""),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(?:w12|weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:w3|weights_out)\.", ".mlp.fc2."),
)
_SPLIT = re.compile(r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")
_IGNORED = ("mask_token", "head.", "classifier.")  # inference never uses them


def to_timm_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict to timm's names; tensors that inference never uses are left out.

    Args:
        tensors: in any of the three layouts, or another timm model's, which passes unchanged.

    Returns:
        A new dict; tensors are shared where nothing but the name changes.
    """
    renamed = {_rename(name): tensor for name, tensor in tensors.items()}
    translated = {name: tensor for name, tensor in renamed.items() if not name.startswith(_IGNORED)}
    _stack_query_key_value(translated)
    _merge_class_position(translated)
    return translated


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _stack_query_key_value(tensors: dict[str, Tensor]) -> None:
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in list(tensors):
        if match := _SPLIT.match(name):
            block, role, kind = match.groups()
            parts.setdefault((block, kind), {})[role] = tensors.pop(name)
    for (block, kind), roles in parts.items():
        if len(roles) == 3:  # otherwise the stacked tensor is reported as missing
            tensors[f"{block}.attn.qkv.{kind}"] = torch.cat([roles[role] for role in ("query", "key", "value")])


def _merge_class_position(tensors: dict[str, Tensor]) -> None:
    if "register_tokens" not in tensors:
        return
    position = tensors["pos_embed"]
    tensors["reg_token"] = tensors.pop("register_tokens")
    tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
    tensors["pos_embed"] = position[:, 1:]
