"""Load one rank's shard of a model whose layers our kernels hold: a smaller transformers model of its own.

A shard has a share of the KV heads with their query heads, and of the inner columns. Embeddings, norms and biases
behind a split sum are whole on every rank; so is the output layer, until fusing the layers deals out its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from worker.engine.cpu.fused_layers import decoder_layers
from worker.engine.cpu.fused_model import KNOWN
from worker.engine.cpu.kernels import kernels
from worker.engine.model.architecture import SHARD
from worker.engine.shards.exchange import Exchange
from worker.engine.shards.shard import Shard, added, parts_of

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # layers that are split by their outputs
_INPUTS = ("o_proj", "down_proj")  # by their inputs
_DTYPES = (torch.bfloat16, torch.float32)  # of the fused layers
_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # what the ranks divide


def splits_exactly(config: PretrainedConfig, ranks: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether our kernels run a model on this many ranks with the bits that it has on one.

    `config` is that of a model whose heads this many ranks divide.
    """
    return (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in KNOWN
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and (_splits_on_gpus(config, dtype) if device.type == "cuda" else _splits_on_cpus(config, ranks, dtype))
    )


def _splits_on_cpus(config: PretrainedConfig, ranks: int, dtype: torch.dtype) -> bool:
    compiled = kernels(dtype)
    return (
        compiled is not None and _head_dim(config) % compiled.panel == 0 and config.intermediate_size % (2 * ranks) == 0
    )


def _splits_on_gpus(config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Return whether all parts of a sum have as many inputs, which the Triton kernels need."""
    parts = parts_of(config.num_attention_heads, config.num_key_value_heads)
    inputs = (config.num_attention_heads * _head_dim(config), config.intermediate_size)
    return dtype in _DTYPES and all(count % parts == 0 for count in inputs)


def shared_axis(name: str) -> int | None:
    """Return the axis along which ranks share a weight or bias of the layers, by its name; None: each has it whole."""
    layer, _, kind = name.rpartition(".")
    split = layer.rpartition(".")[2]
    if split in _COLUMNS:
        return 0
    return 1 if split in _INPUTS and kind == "weight" else None


def shard_for(config: PretrainedConfig, exchange: Exchange) -> Shard:
    """Return this rank's shard of a model with a whole configuration."""
    return Shard(parts_of(config.num_attention_heads, config.num_key_value_heads), exchange)


def shard_config(config: PretrainedConfig, ranks: int) -> PretrainedConfig:
    """Return the configuration of a shard: as many layers, and a share of the heads and inner columns."""
    own = deepcopy(config)
    own.head_dim = _head_dim(config)
    for name in _SIZES:
        setattr(own, name, getattr(config, name) // ranks)
    return own


def read_shard(files: Sequence[Path], shard: Shard, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read this rank's share of weight files, by name, in `dtype`; no weight is read whole that is split."""
    return {name: tensor.to(dtype) for name, tensor in _shares(files, shard)}


def as_shard(model: PreTrainedModel, shard: Shard) -> None:
    """Mark a loaded model as a shard: the sums of its own forward are those of all ranks."""
    setattr(model, SHARD, shard)
    layers: Any = decoder_layers(model)
    for layer in layers:
        layer.self_attn.o_proj = _SummedLinear(layer.self_attn.o_proj, shard)
        layer.mlp.down_proj = _SummedLinear(layer.mlp.down_proj, shard)


class _SummedLinear(nn.Linear):
    """A linear layer whose inputs the ranks share, for transformers' own forward; fused layers take its weight.

    It is summed in the parts of the shard, so that a split model has the bits of the whole here, too.
    """

    def __init__(self, linear: nn.Linear, shard: Shard) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._exchange, self._edges = shard.exchange, list(pairwise(shard.bounds(self.in_features).tolist()))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` of the whole layer, from this rank's share of `x`."""
        total = added(self._all_parts(torch.stack(self._parts(x))))
        return (total if self.bias is None else total + self.bias).to(x.dtype)

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Return the products of this rank's parts in float32. Their shapes don't depend on the number of ranks."""
        weight = self.weight.detach().as_subclass(Tensor)
        parts = [(x[..., start:end], weight[:, start:end]) for start, end in self._edges]
        return [functional.linear(*(side.float().contiguous() for side in part)) for part in parts]

    def _all_parts(self, own: Tensor) -> list[Tensor]:
        """Return the parts of all ranks, from this rank's `own` [parts, …]."""
        exchange = self._exchange
        if exchange is None:
            return list(own)
        every = own.new_empty(exchange.ranks * len(own), *own.shape[1:])
        exchange.all_gather(every.view(-1), own.view(-1))
        return list(every)


def _shares(files: Sequence[Path], shard: Shard) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                axis = shared_axis(name)
                if axis is not None:
                    part = opened.get_slice(name)
                    own = shard.share(part.get_shape()[axis])
                    yield name, part[own] if axis == 0 else part[:, own]
                else:
                    yield name, opened.get_tensor(name)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
