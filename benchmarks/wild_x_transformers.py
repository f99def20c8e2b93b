"""Sixty option sets of x-transformers at their smallest, for `wild.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo_models import Case

_DEFAULT: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False}
_HEADS4 = {"heads": 4}

# Option sets of the layers of a decoder over 12 tokens.
_LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"attn_dropout": 0.1, "ff_dropout": 0.1, "attn_sublayer_dropout": 0.1},
    "layer_dropout": {"layer_dropout": 0.3},
    "rmsnorm": {"use_rmsnorm": True},
    "simple_rmsnorm": {"use_simple_rmsnorm": True},
    "scalenorm": {"use_scalenorm": True},
    "dynamic_tanh": {"use_dynamic_tanh": True},
    "derf": {"use_derf": True},
    "post_norm": {"pre_norm": False},
    "pre_and_post_norm": {"pre_and_post_norm": True},
    "sandwich_norm": {"sandwich_norm": True},
    "glu": {"ff_glu": True},
    "swiglu": {"ff_glu": True, "ff_swish": True},
    "relu_squared": {"ff_relu_squared": True},
    "ff_post_act_ln": {"ff_post_act_ln": True},
    "ff_no_bias": {"ff_no_bias": True},
    "ff_glu_mult_bias": {"ff_glu": True, "ff_glu_mult_bias": True},
    "ff_solu": {"ff_solu": True},
    "ff_softclamp": {"ff_softclamp_value": 5.0},
    "alibi": {"alibi_pos_bias": True},
    "rel_pos_bias": {"rel_pos_bias": True},
    "dynamic_pos_bias": {"dynamic_pos_bias": True},
    "rotary": {"rotary_pos_emb": True},
    "rotary_xpos": {"rotary_pos_emb": True, "rotary_xpos": True},
    "polar": {"polar_pos_emb": True},
    "data_dependent_alibi": {"attn_data_dependent_alibi": True},
    "cope": {"attn_use_cope": True},
    "head_scale": {"attn_head_scale": True},
    "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "sparse_topk": {"attn_sparse_topk": 3},
    "sparse_topk_straight_through": {"attn_sparse_topk": 3, "attn_sparse_topk_straight_through": True},
    "hard_attention": {"attn_hard": True},
    "memory_kv": {"attn_num_mem_kv": 3},
    "attn_on_attn": {"attn_on_attn": True},
    "gate_values": {"attn_gate_values": True},
    "swiglu_values": {"attn_gate_values": True, "attn_swiglu_values": True},
    "gate_value_heads": {"attn_gate_value_heads": True},
    "qk_norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk_rmsnorm": {"attn_qk_rmsnorm": True},
    "value_rmsnorm": {"attn_value_rmsnorm": True},
    "l2_distance": {"attn_l2_distance": True},
    "sigmoid_attention": {"attn_sigmoid": True},
    "gumbel_softmax": {"attn_gumbel_softmax": True},
    "selective": {"attn_selective": True},
    "cog_signed": {"attn_cog_signed": True},
    "one_kv_head": {"attn_one_kv_head": True},
    "grouped_queries": {"attn_kv_heads": 2, **_HEADS4},
    "zero_kv": {"attn_add_zero_kv": True},
    "learned_sink": {"attn_head_learned_sink": True},
    "softclamp_logits": {"attn_softclamp_logits": True},
    "laser": {"attn_laser": True},
    "latent_kv": {
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": 8,
        "attn_use_latent_q": True,
        "attn_dim_latent_q": 8,
    },
    "max_attend_past": {"attn_max_attend_past": 4},
    "inverted_attention": {"attn_inverted_attention": True},
    "flash": {"attn_flash": True},
    "residual_attn": {"residual_attn": True},
    "macaron": {"macaron": True},
    "gate_residual": {"gate_residual": True},
    "orthog_residual": {"orthog_residual": True},
    "scale_residual": {"scale_residual": True},
    "shift_tokens": {"shift_tokens": 1},
    "layerscale": {"use_layerscale": True},
    "unet_skips": {"unet_skips": True},
    "integrate_layers": {"integrate_layers": True},
    "hyper_connections": {"num_residual_streams": 2},
    "reinject_input": {"reinject_input": True},
    "value_residual": {"add_value_residual": True},
    "weight_tied": {"weight_tie_layers": True},
    "sandwich": {"sandwich_coef": 1},
    "par_ratio": {"par_ratio": 2, "depth": 4},
    "softclamp_output": {"softclamp_output": True},
}

# Option sets of the wrapper around the plain layers.
_WRAPPERS: dict[str, dict[str, Any]] = {
    "memory_tokens": {"num_memory_tokens": 2},
    "tied_embedding": {"tie_embedding": True},
    "emb_frac_gradient": {"emb_frac_gradient": 0.5},
    "post_emb_norm": {"post_emb_norm": True, "emb_dropout": 0.1},
    "scaled_sinusoidal": {"scaled_sinu_pos_emb": True},
    "l2norm_embed": {"l2norm_embed": True},
    "factored_embedding": {"emb_dim": 8},
    "mixture_of_softmax": {"mixture_of_softmax": True, "mixture_of_softmax_k": 2},
    "cls_token": {"use_cls_token": True},
    "attn_pool": {"attn_pool": True},
    "output_heads": {"num_output_heads": 2},
}


def _decoder(layers: dict[str, Any], wrapper: dict[str, Any]) -> Callable[[], Case]:
    def build() -> Case:
        from x_transformers import Decoder, TransformerWrapper

        settings = {"num_tokens": 31, "max_seq_len": 16} | wrapper
        net = TransformerWrapper(attn_layers=Decoder(**(_DEFAULT | layers)), **settings)
        return net, (torch.randint(0, 31, (2, 12)),), {}

    return build


def _masked_encoder() -> Case:
    from x_transformers import Encoder, TransformerWrapper

    net = TransformerWrapper(num_tokens=31, max_seq_len=16, attn_layers=Encoder(**_DEFAULT))
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    return net, (torch.randint(0, 31, (2, 12)),), {"mask": mask}


def _picture() -> Case:
    from x_transformers import Encoder, ViTransformerWrapper

    net = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=Encoder(**_DEFAULT))
    return net, (torch.randn(2, 3, 32, 32),), {}


def _continuous() -> Case:
    from x_transformers import ContinuousTransformerWrapper, Decoder

    net = ContinuousTransformerWrapper(dim_in=6, dim_out=5, max_seq_len=16, attn_layers=Decoder(**_DEFAULT))
    return net, (torch.randn(2, 12, 6),), {}


def _translation() -> Case:
    """Encoder and decoder; the output is the loss."""
    from x_transformers import XTransformer

    sides = {
        f"{side}_{key}": value
        for side in ("enc", "dec")
        for key, value in {"num_tokens": 31, "depth": 1, "heads": 2, "max_seq_len": 16}.items()
    }
    return XTransformer(dim=16, **sides), (torch.randint(1, 31, (2, 8)), torch.randint(1, 31, (2, 9))), {}


def _language_model() -> Case:
    """A decoder in the wrapper that shifts its tokens; the output is the loss."""
    from x_transformers import AutoregressiveWrapper

    net, (tokens,), _ = _decoder({}, {})()
    return AutoregressiveWrapper(net), (tokens,), {}


X_TRANSFORMERS: dict[str, Callable[[], Case]] = {
    **{name: _decoder(options, {}) for name, options in _LAYERS.items()},
    **{name: _decoder({}, options) for name, options in _WRAPPERS.items()},
    "masked_encoder": _masked_encoder,
    "picture": _picture,
    "continuous": _continuous,
    "translation": _translation,
    "language_model": _language_model,
}
