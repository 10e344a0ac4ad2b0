"""Dimensions of a decoder, read from its configuration, and the exact number of its parameters, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from burnish.config.validation import did_you_mean
from burnish.errors import ModelError, show

__all__ = ["Linear", "ModelShape", "shape_from_config"]


class Linear(NamedTuple):
    """Equal linear layers of a decoder.

    Attributes:
        path: name within a decoder layer, such as `self_attn.q_proj`.
        inputs: input features.
        outputs: output features.
        number: how many the model has.
        bias: whether each has a bias.
        experts: experts whose weights one tensor holds; 1 for an ordinary layer.
    """

    path: str
    inputs: int
    outputs: int
    number: int
    bias: bool = False
    experts: int = 1

    @property
    def weights(self) -> int:
        """Weights of all of them, without biases."""
        return self.inputs * self.outputs * self.number * self.experts


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder.

    Attributes:
        model_type: name of the architecture in transformers.
        layers: number of decoder layers, L.
        hidden: width of the residual stream, H.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: features per head.
        width: width of a dense MLP, M.
        vocabulary: rows of the embedding, V.
        tied: whether embedding and head are one weight.
        gated: whether an MLP multiplies two projections.
        qkv_bias, output_bias, mlp_bias, norm_bias: whether those layers have biases.
        qk_norm: whether queries and keys are normalised per head.
        norms: norms over the residual stream in a layer.
        fused: whether projections of one input are one layer, as in phi3.
        positions: learned positions; 0 for rotary ones.
        max_positions: longest sequence of the pre-training, or 0 where the configuration does not say.
        experts: experts of a mixture layer; 0 for none.
        experts_per_token: experts that a token visits.
        expert_width: width of an expert.
        shared_width: width of the expert that all tokens visit; 0 for none.
        dense_layers: layers of a mixture model with a dense MLP.
        softcap: whether attention scores are capped, which fused kernels do not compute.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocabulary: int
    tied: bool = False
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    fused: bool = False
    positions: int = 0
    max_positions: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    dense_layers: int = 0
    softcap: bool = False

    @property
    def queries(self) -> int:
        """Features of all query heads, Q."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Features of all key heads, K."""
        return self.kv_heads * self.head_dim

    @property
    def mixture_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @cached_property
    def linears(self) -> list[Linear]:
        """Linear layers of the decoder, which adapters and quantisation apply to; experts are fused tensors."""
        is_gpt2 = self.model_type == "gpt2"
        attention, mlp = "attn" if is_gpt2 else "self_attn", "mlp"
        if is_gpt2 or self.fused:
            projections = {"c_attn" if is_gpt2 else "qkv_proj": self.queries + 2 * self.keys}
        else:
            projections = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        found = [
            Linear(f"{attention}.{name}", self.hidden, outputs, self.layers, self.qkv_bias)
            for name, outputs in projections.items()
        ]
        out = f"{attention}.{'c_proj' if is_gpt2 else 'o_proj'}"
        found.append(Linear(out, self.queries, self.hidden, self.layers, self.output_bias))
        found += self._mlp_linears(mlp, self.width, self.layers - self.mixture_layers)
        if self.mixture_layers and self.shared_width:
            found += self._mlp_linears(f"{mlp}.shared_expert", self.shared_width, self.mixture_layers)
            found.append(Linear(f"{mlp}.shared_expert_gate", self.hidden, 1, self.mixture_layers))
        return [linear for linear in found if linear.number]

    def _mlp_linears(self, path: str, width: int, count: int) -> list[Linear]:
        if self.model_type == "gpt2":
            names = {"c_fc": (self.hidden, width), "c_proj": (width, self.hidden)}
        elif self.fused:
            names = {"gate_up_proj": (self.hidden, 2 * width), "down_proj": (width, self.hidden)}
        else:
            up = (self.hidden, width)
            names = {"gate_proj": up, "up_proj": up, "down_proj": (width, self.hidden)}
        return [Linear(f"{path}.{name}", *sizes, count, self.mlp_bias) for name, sizes in names.items()]

    @cached_property
    def expert_tensors(self) -> list[Linear]:
        """Fused weights of all experts, which are parameters and not linear layers."""
        if not self.mixture_layers:
            return []
        count, experts = self.mixture_layers, self.experts
        return [
            Linear("mlp.experts.gate_up_proj", self.hidden, 2 * self.expert_width, count, experts=experts),
            Linear("mlp.experts.down_proj", self.expert_width, self.hidden, count, experts=experts),
        ]

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by component; a tied head counts with the embedding."""

        def of(linears: Iterator[Linear]) -> int:
            return sum(one.weights + one.bias * one.outputs * one.number for one in linears)

        norm = self.hidden * (1 + self.norm_bias)
        router = self.hidden * self.experts * self.mixture_layers
        return {
            "embedding": (self.vocabulary + self.positions) * self.hidden,
            "attention": of(one for one in self.linears if "attn" in one.path),
            "mlp": of(one for one in self.linears if "attn" not in one.path),
            "experts": of(iter(self.expert_tensors)) + router,
            "norms": (self.layers * self.norms + 1) * norm + self.layers * 2 * self.head_dim * self.qk_norm,
            "head": 0 if self.tied else self.vocabulary * self.hidden,
        }

    @cached_property
    def num_parameters(self) -> int:
        """Number of all parameters."""
        return sum(self.parameters.values())

    @cached_property
    def linear_weights(self) -> int:
        """Weights of the linear layers of the decoder."""
        return sum(one.weights for one in self.linears)

    @cached_property
    def decoder_weights(self) -> int:
        """Weights that one token is multiplied with in the decoder, without embedding and head."""
        visited = sum(one.weights // one.experts * self.experts_per_token for one in self.expert_tensors)
        return self.linear_weights + visited + self.hidden * self.experts * self.mixture_layers

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer, which sharded training gathers at a time."""
        parts = self.parameters
        decoder = parts["attention"] + parts["mlp"] + parts["experts"] + parts["norms"]
        return -(-decoder // self.layers)


@dataclass(frozen=True, slots=True)
class _Family:
    """How an architecture differs from Llama.

    Attributes:
        fixed: fields of `ModelShape` that its configuration does not set.
        defaults: values of fields that a configuration may leave out.
        names: names of transformers -> its own.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    names: Mapping[str, str] = field(default_factory=dict[str, str])


_BIASES = ("qkv_bias", "output_bias", "mlp_bias", "norm_bias")
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
_FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(defaults={"num_key_value_heads": 8}),
    "smollm3": _Family(defaults={"tie_word_embeddings": True}),
    "qwen2": _Family({"qkv_bias": True, "output_bias": False}),
    "qwen3": _Family({"qk_norm": True}, {"head_dim": 128}),
    "gemma": _Family(defaults=_GEMMA),
    "gemma2": _Family({"norms": 4, "softcap": True}, {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "gemma3_text": _Family(
        {"norms": 4, "qk_norm": True},
        {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
    ),
    "phi3": _Family({"fused": True, "qkv_bias": False, "output_bias": False}),
    "gpt2": _Family(
        {"gated": False, **dict.fromkeys(_BIASES, True)},
        {"tie_word_embeddings": True},
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
        },
    ),
    "mixtral": _Family(defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": _Family({"qkv_bias": True, "output_bias": False}),
    "qwen3_moe": _Family({"qk_norm": True}),
}
"""Architectures by `model_type`."""

_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def shape_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Read the dimensions of a decoder from a configuration of transformers.

    Args:
        config: contents of config.json; of a multimodal model, the language model within it.
        where: name of the file in messages.

    Raises:
        ModelError: an unknown architecture, or a missing or bad dimension.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        outer = str(config.get("model_type", ""))
        config = {"model_type": f"{outer}_text" if outer == "gemma3" else outer, **inner}
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        known = did_you_mean(str(kind), _FAMILIES)
        raise ModelError(f"{where}: model_type = {show(kind)}: {known}, or plan with a known model of the same size.")
    family = _FAMILIES[kind]
    values = {**family.defaults, **{name: value for name, value in config.items() if value is not None}}

    def get(name: str, default: int | None = None) -> int:
        value = values.get(family.names.get(name, name), values.get(name, default))
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{where}: {family.names.get(name, name)} = {show(value)}: use the number of the model.")
        return value

    layers, hidden, heads, vocabulary = map(get, _REQUIRED)
    if 0 in (layers, hidden, heads, vocabulary):
        raise ModelError(f"{where}: one of {', '.join(_REQUIRED)} is 0; use the numbers of the model.")
    has_bias = bool(values.get("attention_bias", False))
    longest = get("max_position_embeddings", 0)
    mixture: dict[str, Any] = {}
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        # transformers 5 writes the second name for all of them.
        experts = get("num_local_experts" if "num_local_experts" in values else "num_experts")
        step, dense = max(get("decoder_sparse_step", 1), 1), values.get("mlp_only_layers") or []
        mixture = {
            "experts": experts,
            "experts_per_token": get("num_experts_per_tok"),
            "expert_width": get("intermediate_size" if kind == "mixtral" else "moe_intermediate_size"),
            "shared_width": get("shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
            "dense_layers": sum(i in dense or not experts or (i + 1) % step > 0 for i in range(layers)),
        }
    rest: dict[str, Any] = {"qkv_bias": has_bias, "output_bias": has_bias, "mlp_bias": bool(values.get("mlp_bias"))}
    return ModelShape(
        kind,
        layers,
        hidden,
        heads,
        kv_heads=get("num_key_value_heads", heads),
        head_dim=get("head_dim", hidden // heads),
        width=get("intermediate_size", 4 * hidden if kind == "gpt2" else None),
        vocabulary=vocabulary,
        tied=bool(values.get("tie_word_embeddings", False)),
        positions=longest if kind == "gpt2" else 0,
        max_positions=longest,
        **{**rest, **mixture, **family.fixed},
    )
