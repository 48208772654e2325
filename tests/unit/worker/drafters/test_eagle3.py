"""Laws of published EAGLE-3 heads: each format drafts what its formulas say, fits its target or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softmax

from tests.models import VOCAB, packed, tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, sequences
from worker.drafters.eagle3_file import TargetShape, read_eagle3
from worker.drafters.head import HeadDrafter, PackedHead
from worker.drafters.mixed import MixedDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.errors import ModelRefused
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.loading import embeddings, output_weights
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.segments import chain
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Forest

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, EPS, THETA, LAYERS = 48, 64, 6, 2, 8, 1e-5, 10_000.0, 6
IDS = [5, 9, 2, 7, 7, 30, 41, 8, 12, 3]
PROPOSED = torch.arange(1, VOCAB, 2)  # target ids of the draft ids
TAPS = (1, 2, 2)  # outputs of these layers, by default: the inputs of layer 2, of the middle one, of the last but two

Weights = dict[str, Tensor]
Config = dict[str, Any]


def target_shape(layers: int = LAYERS) -> TargetShape:
    return TargetShape("tiny", layers, WIDTH, VOCAB)


def target_model(layers: int = 8) -> Any:
    return tiny("llama", hidden_size=WIDTH, num_hidden_layers=layers)


def weights_of(layer: str, **more: Tensor) -> Weights:
    """Return random weights under published names; `layer` is the prefix of the decoder layer."""
    torch.manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape) * 0.3

    attention = {
        "self_attn.q_proj.weight": some(HEADS * HEAD_DIM, 2 * WIDTH),
        "self_attn.k_proj.weight": some(KV_HEADS * HEAD_DIM, 2 * WIDTH),
        "self_attn.v_proj.weight": some(KV_HEADS * HEAD_DIM, 2 * WIDTH),
        "self_attn.o_proj.weight": some(WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": some(INNER, WIDTH),
        "mlp.up_proj.weight": some(INNER, WIDTH),
        "mlp.down_proj.weight": some(WIDTH, INNER),
        "input_layernorm.weight": 1 + some(WIDTH),
        "hidden_norm.weight": 1 + some(WIDTH),
        "post_attention_layernorm.weight": 1 + some(WIDTH),
    }
    return {
        **{layer + name: weight for name, weight in attention.items()},
        "fc.weight": some(WIDTH, 3 * WIDTH),
        "norm.weight": 1 + some(WIDTH),
        "lm_head.weight": some(len(PROPOSED), WIDTH),
        "d2t": PROPOSED - torch.arange(len(PROPOSED)),
        "t2d": torch.isin(torch.arange(VOCAB), PROPOSED),
        **more,
    }


def layer_config(**more: Any) -> Config:
    return {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        **more,
    }


def flat(**more: Any) -> Config:
    return layer_config(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=len(PROPOSED), **more)


def speculators(**more: Any) -> Config:
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x"}},
        "draft_vocab_size": len(PROPOSED),
        "transformer_layer_config": layer_config(),
        **more,
    }


def norms() -> Weights:
    torch.manual_seed(2)
    return {f"fc_norm.{i}.weight": 1 + 0.3 * torch.randn(WIDTH) for i in range(3)}


def own_embeddings() -> Weights:
    torch.manual_seed(3)
    return {"embed_tokens.weight": torch.randn(VOCAB, WIDTH)}


FORMATS: dict[str, Callable[[], tuple[Config, Weights]]] = {
    "SafeAILab": lambda: (flat(), weights_of("midlayer.")),
    "SpecForge": lambda: (
        flat(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 3, 5], "use_aux_hidden_state": True}),
        weights_of("midlayer."),
    ),
    "AngelSlim": lambda: (flat(), weights_of("midlayer.", **own_embeddings())),
    "speculators": lambda: (
        speculators(norm_before_residual=True, eagle_aux_hidden_state_layer_ids=[1, 4, 6]),
        weights_of("layers.0.", **own_embeddings()),
    ),
    "speculators, input norm": lambda: (
        speculators(norm_before_residual=False, norm_before_fc=True),
        weights_of("layers.0.", **{"input_norm.weight": 0.5 + torch.rand(3 * WIDTH)}),
    ),
    "EAGLE-3.1": lambda: (
        speculators(norm_before_residual=True, fc_norm=True, norm_output=True),
        weights_of("layers.0.", **norms()),
    ),
}
PICKLED = "SafeAILab"  # publishes pytorch_model.bin


def write(folder: Path, name: str, config: Config, weights: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name == PICKLED:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(params=FORMATS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Config, Weights]:
    config, weights = FORMATS[request.param]()
    return write(tmp_path / "head", request.param, config, weights), config, weights


def reference_chain(config: Config, weights: Weights, embedding: Tensor, hidden: list[Tensor], steps: int) -> list[int]:
    """Return the target ids that a head drafts greedily below IDS, by the published formulas, row by row.

    `hidden` are the outputs [tokens, width] of the target's layers that are tapped.
    """
    layer = next(key.removesuffix("hidden_norm.weight") for key in weights if key.endswith("hidden_norm.weight"))

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], weights[name], EPS)

    parts = [norm(h, f"fc_norm.{i}.weight") if "fc_norm.0.weight" in weights else h for i, h in enumerate(hidden)]
    fused = torch.cat(parts, -1)
    if "input_norm.weight" in weights:
        fused = norm(fused, "input_norm.weight")
    states = list(fused @ weights["fc.weight"].T)
    tokens, keys, values, drafted = IDS[1:], [], [], []
    for row in range(len(IDS) - 1 + steps - 1):
        state = states[row]
        normed = norm(state, layer + "hidden_norm.weight")
        joined = torch.cat([norm(embedding[tokens[row]], layer + "input_layernorm.weight"), normed])
        queries, key, value = (joined @ weights[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv")
        keys.append(rotated(key.view(KV_HEADS, HEAD_DIM), row))
        values.append(value.view(KV_HEADS, HEAD_DIM))
        attended = attention(rotated(queries.view(HEADS, HEAD_DIM), row), torch.stack(keys), torch.stack(values))
        x = normed if config.get("norm_before_residual") else state
        x = x + attended @ weights[layer + "self_attn.o_proj.weight"].T
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (silu(gate) * up) @ weights[layer + "mlp.down_proj.weight"].T
        out = norm(x, "norm.weight")
        if row >= len(IDS) - 2:
            draft_id = int((weights["lm_head.weight"] @ out).argmax())
            drafted.append(draft_id + int(weights["d2t"][draft_id]))
            tokens = [*tokens, drafted[-1]]
            states.append(out if config.get("norm_output") else x)
    return drafted


def rotated(x: Tensor, position: int) -> Tensor:
    angles = position * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    group = HEADS // KV_HEADS
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    weights = softmax(torch.einsum("hd,nhd->hn", queries, keys) / HEAD_DIM**0.5, -1)
    return torch.einsum("hn,nhd->hd", weights, values).flatten()


def with_published(folder: Path, layers: int) -> tuple[PackedModel, HeadDrafter, tuple[int, ...], Tensor]:
    """Return a target, a drafter with the head in `folder`, its taps and its embeddings."""
    model = target_model(layers)
    head = read_eagle3(folder, target_shape(layers))
    embedding = embeddings(model) if head.embedding is None else head.embedding
    output = output_weights(model)[head.tokens].clone() if head.output is None else head.output
    net = PackedHead(head.network, embedding, output, head.tokens, slots=4, capacity=512)
    model.set_attn_implementation(ATTENTION_NAME)
    taps = head.network.shape.taps
    target = PackedModel(model, slots=4, capacity=512, tapped=taps)
    assert target.hidden is not None
    return target, HeadDrafter(net, target.hidden, "head"), taps, embedding


def test_each_format_drafts_what_its_formulas_say(published: tuple[Path, Config, Weights]) -> None:
    folder, config, weights = published
    target, drafter, taps, embedding = with_published(folder, layers=8)
    target.forward([chain(0, 0, IDS, keep_last=True)])
    assert target.hidden is not None
    hidden = list(target.hidden.read(0, 0, len(IDS) - 1).view(len(IDS) - 1, len(taps), WIDTH).unbind(1))
    with torch.no_grad():
        wanted = reference_chain(config, weights, embedding.detach(), hidden, steps=4)
    sequence = Sequence(
        key=0, ids=list(IDS), num_prompt=len(IDS), max_tokens=20, sampling=sequences()[0].sampling, slot=0
    )
    forest, drafted = Forest([sequence]), []
    frontier = forest.roots
    for _ in range(4):
        offered = drafter.expand(forest, frontier)
        best = int(offered.probabilities[0].argmax())
        drafted.append(int(offered.tokens[0, best]))
        only = np.zeros_like(offered.probabilities)
        only[0, best] = 0.9
        frontier = forest.add_layer(frontier, type(offered)(offered.tokens, only))
    assert drafted == wanted


@pytest.mark.parametrize(
    ("name", "taps"), [("SafeAILab", (1, 3, 4)), ("SpecForge", (0, 3, 5)), ("speculators", (0, 3, 5))]
)
def test_each_format_names_the_layers_of_the_target_in_its_own_way(
    tmp_path: Path, name: str, taps: tuple[int, ...]
) -> None:
    folder = write(tmp_path, name, *FORMATS[name]())
    assert read_eagle3(folder, target_shape(8)).network.shape.taps == taps


def test_text_with_a_published_head_is_the_text_without(tmp_path: Path) -> None:
    folder = write(tmp_path, "AngelSlim", *FORMATS["AngelSlim"]())
    prompts = [[2, 3, 4, 5, 6], [7], [9, 10, 11, 12, 13, 14, 15, 16, 17] * 3, [9, 10, 11, 12, 13, 14, 15, 16, 17] * 3]
    plain, drafted = sequences(prompts), sequences(prompts)
    decode(engine(packed(target_model()), None, options(Mode.PLAIN)), plain)
    target, drafter, *_ = with_published(folder, layers=8)
    results = decode(engine(target, MixedDrafter(drafter, SuffixDrafter()), options(Mode.PAPER)), drafted)
    assert outputs(drafted) == outputs(plain)
    assert any(result.stats.tree_nodes for result in results)


def refusal(folder: Path, target: TargetShape) -> str:
    with pytest.raises(ModelRefused) as refused:
        read_eagle3(folder, target)
    return str(refused.value)


def test_a_head_that_does_not_fit_is_refused_with_the_two_numbers(tmp_path: Path) -> None:
    folder = write(tmp_path, "SpecForge", *FORMATS["SpecForge"]())
    assert "hidden size is 96: it was trained for 48" in refusal(folder, TargetShape("other", 8, 96, VOCAB))
    assert f"vocabulary is 1000: it was trained for {VOCAB}" in refusal(folder, TargetShape("other", 8, WIDTH, 1000))
    assert "layers 0, 3, 5, and the target has the layers 0 to 3" in refusal(
        folder, TargetShape("other", 4, WIDTH, VOCAB)
    )


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"hidden_size": None}, {}, "lacks hidden_size"),
        ({"eagle_config": ["x"]}, {}, "config.json does not describe an EAGLE-3 head"),
        ({"num_attention_heads": 0, "head_dim": None}, {}, "config.json does not describe an EAGLE-3 head"),
        ({"model_type": "qwen3"}, {}, "a layer of qwen3"),
        ({"draft_vocab_size": 7}, {}, f"maps {len(PROPOSED)} tokens, and its draft_vocab_size is 7"),
        ({"rope_scaling": {"rope_type": "longrope"}}, {}, "rotary embeddings of type longrope"),
        ({}, {"fc.weight": torch.zeros(WIDTH, 7)}, "no fc.weight for 3 layers"),
        ({}, {"norm.weight": torch.zeros(WIDTH + 1)}, "norm.weight"),
        ({}, {"surplus.weight": torch.zeros(1)}, "surplus.weight"),
        ({}, {"d2t": torch.full((len(PROPOSED),), VOCAB)}, f"outside of tiny's {VOCAB} ids"),
        ({}, {"d2t": -torch.arange(len(PROPOSED))}, "maps two tokens to one id"),
        ({}, {"lm_head.weight": torch.zeros(3, WIDTH)}, "has 3 output rows"),
        ({}, {"embed_tokens.weight": torch.zeros(3, WIDTH)}, "has 3 embeddings"),
    ],
)
def test_a_damaged_head_is_refused_by_what_is_wrong(
    tmp_path: Path, config: Config, weights: Weights, words: str
) -> None:
    folder = write(tmp_path, "flat", {**flat(), **config}, {**weights_of("midlayer."), **weights})
    assert words in refusal(folder, target_shape(8))


def test_a_truncated_file_and_a_pickle_of_code_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "flat", flat(), weights_of("midlayer."))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert "is damaged" in refusal(folder, target_shape(8))
    file.unlink()
    torch.save({"fc.weight": print}, folder / "pytorch_model.bin")
    assert "holds more than weights" in refusal(folder, target_shape(8))
