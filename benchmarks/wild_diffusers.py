"""Twenty networks of diffusers at their smallest, for `wild.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from zoo_models import Case

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
_LATENT = (2, 4, 8, 8)


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _whole(*values: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor(values)


_TIME = _whole(7, 340)
_TEXT = _normal(2, 6, 16)
_IDS = {"img_ids": lambda: torch.rand(16, 3).mul(4).floor(), "txt_ids": lambda: torch.zeros(6, 3)}
_DOWN_UP: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_AUTO: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_PICTURE = {"sample": _normal(2, 3, 16, 16)}
_JOINT: dict[str, Any] = {"joint_attention_dim": 16, "pos_embed_max_size": 16, "sample_size": 8}

# name: (class, settings, inputs by name)
_NETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "unet_2d": (
        "UNet2DModel",
        _DOWN_UP
        | {
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
            "dropout": 0.1,
        },
        {"sample": _normal(2, 3, 16, 16), "timestep": _TIME},
    ),
    "unet_2d scale_shift": (
        "UNet2DModel",
        _DOWN_UP
        | {
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 4,
            "num_class_embeds": 3,
        },
        {"sample": _normal(2, 3, 16, 16), "timestep": _TIME, "class_labels": _whole(0, 2)},
    ),
    "unet_1d": (
        "UNet1DModel",
        {
            "sample_size": 32,
            "block_out_channels": (32, 32, 64),
            "extra_in_channels": 64,
        },
        {"sample": _normal(2, 2, 32), "timestep": _TIME},
    ),
    "unet_2d_condition": (
        "UNet2DConditionModel",
        _DOWN_UP
        | {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        {"sample": _normal(*_LATENT), "timestep": _TIME, "encoder_hidden_states": _TEXT},
    ),
    "unet_3d_condition": (
        "UNet3DConditionModel",
        _DOWN_UP
        | {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        {"sample": _normal(2, 4, 2, 8, 8), "timestep": _TIME, "encoder_hidden_states": _TEXT},
    ),
    "dit": (
        "DiTTransformer2DModel",
        _HEADS | {"sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        {"hidden_states": _normal(*_LATENT), "timestep": _TIME, "class_labels": _whole(1, 2)},
    ),
    "transformer_2d": (
        "Transformer2DModel",
        _HEADS | {"in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 16, "dropout": 0.1},
        {"hidden_states": _normal(2, 8, 4, 4), "encoder_hidden_states": _TEXT},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        _HEADS
        | {"sample_size": 8, "cross_attention_dim": 16, "caption_channels": 16, "use_additional_conditions": False},
        {
            "hidden_states": _normal(*_LATENT),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "prior": (
        "PriorTransformer",
        _HEADS | {"embedding_dim": 16, "num_embeddings": 6, "additional_embeddings": 4},
        {
            "hidden_states": _normal(2, 16),
            "timestep": _TIME,
            "proj_embedding": _normal(2, 16),
            "encoder_hidden_states": _TEXT,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        _HEADS
        | _JOINT
        | {"in_channels": 4, "out_channels": 4, "caption_projection_dim": 16, "pooled_projection_dim": 16},
        {
            "hidden_states": _normal(*_LATENT),
            "encoder_hidden_states": _TEXT,
            "pooled_projections": _normal(2, 16),
            "timestep": _TIME,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        },
        {
            "hidden_states": _normal(2, 16, 4),
            "encoder_hidden_states": _TEXT,
            "pooled_projections": _normal(2, 16),
            "timestep": lambda: torch.rand(2),
            **_IDS,
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        {
            "hidden_states": _normal(2, 16, 4),
            "encoder_hidden_states": _TEXT,
            "timestep": lambda: torch.rand(2),
            **_IDS,
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            **_JOINT,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 16,
        },
        {"hidden_states": _normal(*_LATENT), "encoder_hidden_states": _TEXT, "timestep": lambda: torch.rand(2)},
    ),
    "sana": (
        "SanaTransformer2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        {"hidden_states": _normal(*_LATENT), "encoder_hidden_states": _TEXT, "timestep": _TIME},
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "rope_max_seq_len": 16,
        },
        {"hidden_states": _normal(2, 4, 2, 8, 8), "timestep": _TIME, "encoder_hidden_states": _TEXT},
    ),
    "temporal": (
        "TransformerTemporalModel",
        _HEADS | {"in_channels": 8, "norm_num_groups": 4},
        {"hidden_states": _normal(4, 8, 4, 4), "num_frames": 2},
    ),
    "cogview3plus": (
        "CogView3PlusTransformer2DModel",
        _HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        {
            "hidden_states": _normal(*_LATENT),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME,
            **{name: _normal(2, 2) for name in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "autoencoder_kl": ("AutoencoderKL", _AUTO, _PICTURE),
    "autoencoder_asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_out_channels": (8, 8),
            "up_block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
        },
        _PICTURE,
    ),
    "vq_model": ("VQModel", _AUTO | {"num_vq_embeddings": 8}, _PICTURE),
    "autoencoder_tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        _PICTURE,
    ),
    "autoencoder_oobleck": (
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "channel_multiples": [1, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
        },
        {"sample": _normal(2, 2, 32)},
    ),
}


def _net(name: str, settings: dict[str, Any], inputs: dict[str, Any]) -> Callable[[], Case]:
    def build() -> Case:
        import diffusers

        net = getattr(diffusers, name)(**settings)
        return net, (), {key: value() if callable(value) else value for key, value in inputs.items()}

    return build


DIFFUSERS: dict[str, Callable[[], Case]] = {name: _net(*case) for name, case in _NETS.items()}
