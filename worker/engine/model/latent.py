"""Multi-head latent attention with its own KV layout (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The keys and values of all heads are products of one latent of each token, and the rotated part of a key is the same for
all heads. So an entry of the KV cache is the latent and that part, once. The products that expand a latent are
absorbed: the query of a head is multiplied by the weights of its keys, and what a head mixes, by those of its values.
Every row is computed so, in a prompt too, so a row's bits are those alone, in a batch, in a tree and in any chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.engine.cpu.kernels import Kernels, product_array
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.cpu.stable_weight import packed_weight
from worker.engine.model.architecture import layers_of

LATENT = "basic_latent"  # attribute of an attention module: its LatentHeads
_REFERENCE = "eager"  # attention of transformers' own forward, which expands latents
_SIZES = ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")


class LatentHeads(nn.Module):
    """The absorbed products of one layer: the weights of keys and of values, [heads, key or value size, latent]."""

    def __init__(self, attention: Any) -> None:
        """Read the weights of `attention.kv_b_proj`, [heads * (key size + value size), latent]."""
        super().__init__()
        self._owner = [attention]  # in a list: no module of this one
        self._key_dim, self._value_dim, self.latent_dim = (int(getattr(attention, name)) for name in _SIZES)
        self._packed: tuple[_PackedHeads, _PackedHeads] | None = None

    def absorbed(self, query: Tensor) -> Tensor:
        """Return queries [heads, n, latent + rotated] of `query` [heads, n, key size + rotated]."""
        plain, rotated = query[..., : self._key_dim], query[..., self._key_dim :]
        if self._packed is not None:
            return torch.cat([self._packed[0](plain), rotated], -1)
        return torch.cat([torch.bmm(plain, self._weights()[0]), rotated], -1)

    def values(self, mixed: Tensor) -> Tensor:
        """Return [n, heads, value size] of the latents that heads mixed, [n, heads, latent or more]."""
        latents = mixed[..., : self.latent_dim].transpose(0, 1)
        if self._packed is not None:
            return self._packed[1](latents).transpose(0, 1)
        return torch.bmm(latents, self._weights()[1].transpose(1, 2)).transpose(0, 1)

    def pack(self, kernels: Kernels) -> None:
        """Multiply by packed weights from now on, and drop those of `kv_b_proj`."""
        if self._packed is not None:
            return
        keys, values = self._weights()
        self._packed = _PackedHeads(keys.transpose(1, 2), kernels), _PackedHeads(values, kernels)
        self._owner[0].kv_b_proj = nn.Identity()

    def stored(self) -> list[Tensor]:
        """Return the packed weights."""
        return [part for heads in self._packed or () for part in heads.stored()]

    def _weights(self) -> tuple[Tensor, Tensor]:
        whole = self._owner[0].kv_b_proj.weight.detach().view(-1, self._key_dim + self._value_dim, self.latent_dim)
        keys, values = whole.split([self._key_dim, self._value_dim], 1)
        return keys, values


class _PackedHeads:
    """One packed weight for each head; a row's result does not depend on the other rows."""

    def __init__(self, weights: Tensor, kernels: Kernels) -> None:
        self._heads: list[PackedLinear] = []
        for weight in weights:  # [columns, inputs]
            packed = packed_weight(weight.contiguous())
            assert packed is not None, "holds_latents() has looked at the sizes"
            self._heads.append(packed)
        self._products = product_array([head.product for head in self._heads])
        self._kernels, self._columns = kernels, weights.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [heads, n, columns] of each head with its `x` [heads, n, inputs]."""
        rows = x.contiguous()
        out = x.new_empty(len(rows), rows.shape[1], self._columns)
        self._kernels.multiply_each(self._products, len(rows), rows.data_ptr(), out.data_ptr(), rows.shape[1])
        return out

    def stored(self) -> list[Tensor]:
        return [part for head in self._heads for part in head.stored()]


def holds_latents(model: PreTrainedModel) -> bool:
    """Return whether the KV cache of a model holds latents: every layer has latents that expand."""
    return len(_latent_layers(model)) == layers_of(model.config.get_text_config())


def hold_latents(model: PreTrainedModel) -> None:
    """Make every layer of a loaded model pass latents to attention, if `holds_latents`."""
    if not holds_latents(model):
        return
    for attention in _latent_layers(model):
        setattr(attention, LATENT, LatentHeads(attention))
        attention.expand_kv = _passing_latents(attention, attention.expand_kv)


def pack_latents(model: nn.Module, kernels: Kernels) -> None:
    """Pack the absorbed products of a CPU model."""
    for module in list(model.modules()):
        if isinstance(module, LatentHeads):
            module.pack(kernels)


def _latent_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _expands_latents(module)]


def _expands_latents(module: Any) -> bool:
    """Return whether a module is latent attention as transformers writes it, of sizes that the kernels multiply."""
    projection = getattr(module, "kv_b_proj", None)
    sizes = [getattr(module, name, None) for name in _SIZES]
    return (
        callable(getattr(module, "expand_kv", None))
        and type(projection) is nn.Linear
        and getattr(projection, "bias", None) is None
        and all(isinstance(size, int) and size % 2 == 0 for size in sizes)
    )


def _passing_latents(attention: Any, expand: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in place of `expand_kv`: latents [1, 1, n, latent] and rotated parts become keys and values."""

    def expand_kv(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        if attention.config._attn_implementation == _REFERENCE:
            expanded: tuple[Tensor, Tensor] = expand(latents, rotated)
            return expanded
        keys = torch.cat((latents, rotated), -1)
        return keys, keys

    return expand_kv
