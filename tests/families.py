"""Every family of causal models that transformers has, as a tiny random model, and what decoding it shows.

`python -m tests.families` writes docs/models.md; it takes two minutes of CPU time.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.cpu.fused_layers import are_known
from worker.engine.engine import Engine
from worker.engine.errors import ModelRefused
from worker.engine.model.backend import fuse_layers
from worker.engine.model.loading import load
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.segments import Segment, chain
from worker.engine.sequence import Sequence
from worker.engine.speculation.cost_model import CostModel

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
CPU = torch.device("cpu")

# Sizes by all the names that configurations have for them; a family gets those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"], 512),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["shared_intermediate_size", "moe_shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["num_experts_per_tok", "moe_k"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "topk_group", "first_k_dense_replace"], 1),
    **{"num_key_value_heads": 2, "n_group": 2, "sliding_window": 8, "dropout": 0.0},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"vocab_size": 258, "bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 0},
}
_BOTH = ["sliding_attention", "full_attention"]
_TEXT = {
    **{"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 8},
    **{"bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 0, "layer_types": _BOTH},
}
_VISION = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention: a key for each head
_DECODER = {"is_decoder": True}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 258, "num_kv_shared_layers": 2}
# What a family needs beside SIZES.
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], _LATENT),
    **dict.fromkeys(["glm_moe_dsa", "minicpm3", "youtu", "bailing_hybrid"], _LATENT),
    **dict.fromkeys(["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"], _DECODER),
    **dict.fromkeys(["ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer"], _DECODER),
    **dict.fromkeys(["xlm-roberta", "xlm-roberta-xl", "xmod"], _DECODER),
    **{kind: {"head_dim": 16} for kind in ("helium", "hunyuan_v1_dense", "ministral")},
    **{kind: {"head_dim": 32} for kind in ("llama", "mistral", "qwen3")},  # whole panels: their layers are fused
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    **{kind: {"rotary_dim": 8} for kind in ("codegen", "gptj")},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION},
    "gemma3n_text": {
        **_PER_LAYER,
        "num_hidden_layers": 4,
        "layer_types": _BOTH * 2,
        "head_dim": 16,
        "laurel_rank": 8,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **_PER_LAYER,
        "num_hidden_layers": 4,
        "layer_types": _BOTH * 2,
        "head_dim": 32,
        "global_head_dim": 64,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["full_attention"] * 2},  # as in the dense models; others have Mamba layers
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [2, 2], "num_shared_expert": [1, 1], "num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 96, "num_experts_per_tok": 1},
}
# Models of a family under the names that people know.
KNOWN = {
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2, -V2-Lite, Coder-V2",
    "deepseek_v3": "DeepSeek-V3, -R1, Kimi K2",
    "exaone4": "EXAONE 4.0",
    "falcon": "Falcon 7B, 40B",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n_text": "Gemma 3n",
    "gemma4_text": "Gemma 4",
    "glm": "GLM-4-9B",
    "glm4": "GLM-4-0414",
    "glm4_moe": "GLM-4.5, 4.6",
    "gpt_oss": "gpt-oss-20b, -120b, unpacked to bfloat16",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4.0 without Mamba layers",
    "llama": "Llama 2, 3, SmolLM2, Yi, TinyLlama, DeepSeek-R1-Distill-Llama",
    "llama4_text": "Llama 4 text",
    "minicpm3": "MiniCPM3",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "olmo2": "OLMo 2",
    "olmoe": "OLMoE",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, 3.5, 4",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, 2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Coder",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM 2",
    "starcoder2": "StarCoder2",
}
# Softcap; sinks, biased experts; latent attention and its router: what few families have and many people run.
POPULAR = ("gemma2", "gpt_oss", "deepseek_v3")
_MOST_NUMBERS = 3_000_000  # of a model: a family that has more despite SIZES consists of several models

PROMPTS = [[2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 2, 3, 4], [18] * 3, [2, 3, 4, 5, 6, 7, 2, 3, 4]]
TEXT = [int(i) for i in np.random.default_rng(0).integers(2, 250, 90)]
_OPTIONS = EngineOptions(max_sequences=4, max_context=120, prefill_rows=7, nodes=12, threshold=0.1, max_depth=5)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What a family showed."""

    exact: bool
    fused: bool = False
    reason: str = ""  # why it is refused, or what differs

    @property
    def cells(self) -> str:
        """The columns of the table: on a CPU, on a GPU, and why not."""
        if not self.exact:
            return f"refused | refused | {self.reason}"
        return "exact, fused | exact, fused | " if self.fused else "exact | bits may depend on the batch | "


def families() -> list[str]:
    """Return the families of which a tiny model can be made from a configuration alone."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _is_small(kind)]


def model_of(kind: str, **shape: Any) -> PreTrainedModel:
    """Return a random float32 model of a family, whose logits are far from flat."""
    torch.manual_seed(1)
    made: Any = AutoModelForCausalLM.from_config(_config(kind, shape), dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.16)
    made.train(False)
    assert isinstance(made, PreTrainedModel)
    return made


def verdict(kind: str, dtype: torch.dtype = torch.float32) -> Verdict:
    """Load a family's tiny model as a worker does and decode it; see `differences` for the laws."""
    own = model_of(kind)
    fused = hasattr(own, "model") and are_known(
        getattr(own.model, "layers", torch.nn.ModuleList([torch.nn.Identity()]))
    )
    with TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        try:
            model = load(folder, dtype=dtype, device=CPU)
            fuse_layers(model)
            packed = PackedModel(model, slots=len(PROMPTS), capacity=160)
        except ModelRefused as refused:
            return Verdict(False, fused, _short(str(refused), folder, type(own).__name__, kind))
    found = differences(own.to(dtype), packed)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    return Verdict(not found, fused, f"DIFFERS: {found}" if found else "")


def differences(own: Any, packed: PackedModel) -> str:
    """Return which laws a model breaks, "" if none.

    Greedy text equals transformers' `generate`; text with draft trees, in other batches, equals plain text; the logits
    of a row have the same bits alone, in a batch of other lengths and in a draft tree.
    """
    own.generation_config.eos_token_id = None
    plain, drafted = _texts(packed, None), _texts(packed, SuffixDrafter())
    laws = {
        "text of transformers": plain == [_generated(own, prompt, len(plain[0])) for prompt in PROMPTS],
        "text with trees": plain == drafted,
        "bits": _bits_hold(packed),
    }
    return ", ".join(name for name, holds in laws.items() if not holds)


def table(verdicts: Mapping[str, Verdict]) -> str:
    """Return docs/models.md."""
    exact = sum(v.exact for v in verdicts.values())
    rows = [
        f"| `{kind}` | {KNOWN.get(kind, '')} | {found.cells} |"
        for kind, found in sorted(verdicts.items(), key=lambda item: (not item[1].exact, item[0]))
    ]
    return "\n".join([_HEAD.format(exact=exact, count=len(verdicts)), *rows, ""])


_HEAD = """# Models

Written by `python -m tests.families`, which loads a tiny random model of each family of causal models in transformers
as a worker does, and decodes it. {exact} of {count} families are exact on a CPU. The others are refused at start, by
name and with the reason. None loads and differs.

- **exact**: greedy text equals that of transformers' `generate`; text with draft trees equals plain text; the logits of
  a row have the same bits alone, in a batch with others, in a draft tree and in any chunk of a prompt. The rows of an
  expert are multiplied in the compiled kernels, and a row's experts are summed in the order of its router. Softcap
  and sinks are parts of every attention path.
- **latent attention** (DeepSeek-V2 and V3, MiniCPM3, GLM-4.7-Flash, Youtu): the KV cache holds each token's latent and
  the rotated part of its key once, for all heads and for keys and values alike. A token of DeepSeek-V3 takes 69 KiB
  in bfloat16, where keys and values of all heads took 5.7 MiB; of DeepSeek-V2-Lite 30 and 324 KiB, of MiniCPM3-4B 35
  and 930. Queries are multiplied by the weights of their keys, and what they mix by those of their values, in prompts
  as in every step: so a row's bits are the same alone, in a batch, in a tree and in any chunk.
- **fused**: all layers run in one C call on a CPU, and in nine kernels a layer on a GPU. Other families run through
  transformers' layers, on a CPU with the compiled attention, products and activations. Without a C compiler, bits
  there may depend on the batch; the worker says so at start.
- **bits may depend on the batch**: on a GPU, the products of a family that is not fused run in libraries that choose an
  algorithm by the number of rows. The worker says so at start.

Weights are float32, bfloat16 or FP8, or int8 on a CPU ([quantised weights](quantization.md)). GGUF files are converted
to bfloat16; other quantised formats are refused by name ([operations](operations.md#which-models-load)). Texts end
where another text of the batch could change them: models with dynamic rotary embeddings at their original positions,
Llama 4 at the end of one chunk of attention. Longrope is chosen by text
([operations](operations.md#long-texts-with-longrope)).

| family | models | CPU | GPU | why not |
|---|---|---|---|---|"""


def _config(kind: str, shape: Mapping[str, Any]) -> Any:
    known: Any = CONFIG_MAPPING[kind]
    other_names = getattr(known, "attribute_map", None) or {}
    names = {field.name for field in dataclasses.fields(known)} | set(other_names)
    given = {other_names.get(name, name): size for name, size in SIZES.items() if name in names}
    return known(**{**given, **SHAPES.get(kind, {}), **shape})


def _is_small(kind: str) -> bool:
    """Return whether a family's tiny model can be made, and is tiny."""
    try:
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(_config(kind, {}))  # type: ignore[no-untyped-call]
    except Exception:  # what a configuration without further arguments is refused with differs from family to family
        return False
    numbers: int = sum(parameter.numel() for parameter in made.parameters())
    return numbers <= _MOST_NUMBERS


def _short(message: str, folder: str, name: str, kind: str) -> str:
    """Return why a family is refused, without names and numbers of this one model."""
    if "is not exact when it is packed" in message:
        return "packed rows have other logits"
    for known in (folder, name, kind):
        message = message.replace(known, "").strip()
    message = re.sub(r"^can't be packed: .*", "its forward takes no packed rows", message)
    message = re.split(r"; |, which packed| and not by|, and packed|; only", message)[0]
    return re.sub(r"^\w+(Attention)", "its attention", message).strip()


def _generated(own: Any, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = own.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


def _texts(packed: PackedModel, drafter: SuffixDrafter | None) -> list[list[int]]:
    mode = Mode.PLAIN if drafter is None else Mode.PAPER
    options = dataclasses.replace(_OPTIONS, mode=mode, max_sequences=len(PROMPTS) if drafter is None else 3)
    running = Engine(packed, drafter, options, CostModel({1: 10.0, 64: 11.0}))
    some = [
        Sequence(i, list(prompt), len(prompt), 14, Sampling(key=noise_key(7, i)), frozenset())
        for i, prompt in enumerate(PROMPTS)
    ]
    for sequence in some:
        running.add(sequence)
    while running.busy:
        running.step()
    packed.clear()
    return [sequence.output_ids for sequence in some]


def _bits_hold(packed: PackedModel, length: int = 33) -> bool:
    """Decode the path 0-1-3-4 of a tree token by token, then as part of the tree beside others; compare the bits."""
    packed.forward([chain(0, 0, TEXT[:length], keep_last=True)])
    packed.forward([chain(1, 0, TEXT[:7], keep_last=True), chain(2, 0, TEXT[3 : length + 3], keep_last=True)])
    packed.forward([chain(1, 7, TEXT[7:length], keep_last=True)])
    shown, path = _tree(1, length), [0, 1, 3, 4]
    alone = [
        packed.forward([chain(0, length + i, [int(shown.ids[node])], keep_last=True)])[0].clone()
        for i, node in enumerate(path)
    ]
    others = [chain(0, 0, TEXT[:20], keep_last=True), shown, chain(2, length, TEXT[:17], keep_last=True)]
    together = packed.forward(others)[1:-1]
    packed.clear()
    return all(torch.equal(together[node], row) for node, row in zip(path, alone, strict=True))


def _tree(slot: int, prefix: int) -> Segment:
    parents = [-1, 0, 0, 1, 3, 2]
    visible = np.eye(6, dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    positions = prefix + visible.sum(1) - 1
    return Segment(slot, prefix, prefix, np.array([7, 8, 9, 10, 11, 12]), positions, visible, np.arange(6))


def main() -> None:
    """Write docs/models.md."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    verdicts = {}
    for kind in sys.argv[1:] or families():
        verdicts[kind] = verdict(kind)
        print(kind, json.dumps(dataclasses.asdict(verdicts[kind])), file=sys.stderr, flush=True)
    if not sys.argv[1:]:
        TABLE.write_text(table(verdicts))


if __name__ == "__main__":
    main()
