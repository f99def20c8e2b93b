"""Sixty architectures of vit-pytorch at their smallest, for `wild.py`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from zoo_models import Case

_BASE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 32,
    "dim_head": 8,
}
_DROPPED = _BASE | {"dropout": 0.1, "emb_dropout": 0.1}
_VIDEO = _BASE | {"image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
_SERIES = _BASE | {"seq_len": 16, "patch_size": 4}
_VIVIT = _VIDEO | {"spatial_depth": 1, "temporal_depth": 1}


def _without(settings: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names} | more


_VIDEO = _without(_VIDEO, "patch_size")
_VIVIT = _without(_VIVIT, "patch_size", "depth")
_SERIES = _without(_SERIES, "image_size")
_STAGES = {"num_classes": 5, "dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)}

# name: (module, class, settings, shape of the input without the batch)
_IMAGE, _CLIP, _SIGNAL = (3, 32, 32), (3, 4, 32, 32), (3, 16)
_NETS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "vit": ("vit", "ViT", _DROPPED, _IMAGE),
    "vit mean": ("vit", "ViT", _BASE | {"pool": "mean"}, _IMAGE),
    "simple_vit": ("simple_vit", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_1d": ("simple_vit_1d", "SimpleViT", _SERIES, _SIGNAL),
    "simple_vit_3d": ("simple_vit_3d", "SimpleViT", _VIDEO, _CLIP),
    "simple_flash_attn_vit": ("simple_flash_attn_vit", "SimpleViT", _BASE, _IMAGE),
    "simple_flash_attn_vit_3d": ("simple_flash_attn_vit_3d", "SimpleViT", _VIDEO, _CLIP),
    "simple_uvit": ("simple_uvit", "SimpleUViT", _BASE, _IMAGE),
    "simple_vit_attn_residual": ("simple_vit_attn_residual", "SimpleViTAttnResidual", _BASE, _IMAGE),
    "simple_vit_orthog": ("simple_vit_orthog_residual_update", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_fft": ("simple_vit_with_fft", "SimpleViT", _BASE | {"freq_patch_size": 8}, _IMAGE),
    "simple_vit_patch_dropout": ("simple_vit_with_patch_dropout", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_qk_norm": ("simple_vit_with_qk_norm", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_registers": ("simple_vit_with_register_tokens", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_relative": ("simple_vit_with_relative_proj_pos_bias", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_sparse": ("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating", _BASE, _IMAGE),
    "simple_vit_specialized": ("simple_vit_with_specialized_cls", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_value_residual": ("simple_vit_with_value_residual", "SimpleViT", _BASE, _IMAGE),
    "simple_vit_hyper": (
        "simple_vit_with_hyper_connections",
        "SimpleViT",
        _BASE | {"num_residual_streams": 2},
        _IMAGE,
    ),
    "attn_residual_dca": ("attn_residual_with_dca_simple_vit", "SimpleViT", _BASE, _IMAGE),
    "ats_vit": ("ats_vit", "ViT", _DROPPED | {"max_tokens_per_depth": (8, 4)}, _IMAGE),
    "cait": ("cait", "CaiT", _DROPPED | {"cls_depth": 1, "layer_dropout": 0.3}, _IMAGE),
    "cct": (
        "cct",
        "CCT",
        {"img_size": 32, "embedding_dim": 16, "n_conv_layers": 1, "num_layers": 2, "num_heads": 2, "num_classes": 5},
        _IMAGE,
    ),
    "cct_3d": (
        "cct_3d",
        "CCT",
        {
            "img_size": 32,
            "num_frames": 4,
            "embedding_dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_classes": 5,
        },
        _CLIP,
    ),
    "cross_vit": (
        "cross_vit",
        "CrossViT",
        {
            "image_size": 32,
            "num_classes": 5,
            "depth": 1,
            "sm_dim": 16,
            "lg_dim": 24,
            "sm_patch_size": 8,
            "lg_patch_size": 16,
            "sm_enc_heads": 2,
            "lg_enc_heads": 2,
            "sm_enc_mlp_dim": 32,
            "lg_enc_mlp_dim": 32,
            "lg_enc_depth": 1,
            "sm_enc_dim_head": 8,
            "lg_enc_dim_head": 8,
            "cross_attn_depth": 1,
            "cross_attn_heads": 2,
            "cross_attn_dim_head": 8,
        },
        _IMAGE,
    ),
    "crossformer": (
        "crossformer",
        "CrossFormer",
        _STAGES | {"dim": (32, 32, 32, 32), "global_window_size": (4, 2, 1, 1), "local_window_size": 1},
        _IMAGE,
    ),
    "cvt": (
        "cvt",
        "CvT",
        {
            "num_classes": 5,
            "s1_emb_dim": 8,
            "s2_emb_dim": 16,
            "s3_emb_dim": 24,
            "s2_heads": 1,
            "s2_depth": 1,
            "s3_heads": 2,
            "s3_depth": 1,
        },
        _IMAGE,
    ),
    "deepvit": ("deepvit", "DeepViT", _DROPPED, _IMAGE),
    "jet_vit": ("jet_vit", "JetViT", _BASE | {"window_size": 2}, _IMAGE),
    "jumbo_vit": ("jumbo_vit", "JumboViT", _BASE | {"jumbo_cls_k": 2}, _IMAGE),
    "learnable_memory_vit": ("learnable_memory_vit", "ViT", _DROPPED, _IMAGE),
    "levit": (
        "levit",
        "LeViT",
        {
            "image_size": 64,
            "num_classes": 5,
            "stages": 2,
            "dim": (8, 16),
            "depth": 1,
            "heads": (1, 2),
            "mlp_mult": 2,
            "dim_key": 4,
            "dim_value": 8,
        },
        (3, 64, 64),
    ),
    "look_vit": (
        "look_vit",
        "LookViT",
        {
            "image_size": 48,
            "num_classes": 5,
            "dim": 16,
            "depth": 1,
            "patch_size": 16,
            "highres_patch_size": 8,
            "heads": 2,
            "dim_head": 8,
            "cross_attn_heads": 2,
            "cross_attn_dim_head": 8,
        },
        (3, 48, 48),
    ),
    "looped_vit": (
        "looped_vit",
        "LoopedViT",
        _without(_BASE, "depth", "dim_head")
        | {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": 2},
        _IMAGE,
    ),
    "max_vit": ("max_vit", "MaxViT", _STAGES | {"dim": 8, "depth": (1, 1), "dim_head": 4, "window_size": 2}, _IMAGE),
    "max_vit_registers": (
        "max_vit_with_registers",
        "MaxViT",
        _STAGES | {"dim": 8, "depth": (1, 1), "dim_head": 4, "window_size": 2},
        _IMAGE,
    ),
    "mobile_vit": (
        "mobile_vit",
        "MobileViT",
        {
            "image_size": (64, 64),
            "dims": [16, 16, 16],
            "channels": [4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 16],
            "num_classes": 5,
            "depths": (1, 1, 1),
        },
        (3, 64, 64),
    ),
    "mp3": ("mp3", "ViT", _BASE, _IMAGE),
    "nest": (
        "nest",
        "NesT",
        _without(_BASE, "depth", "mlp_dim") | {"num_hierarchies": 2, "block_repeats": (1, 1)},
        _IMAGE,
    ),
    "normalized_vit": ("normalized_vit", "nViT", _BASE, _IMAGE),
    "parallel_vit": ("parallel_vit", "ViT", _DROPPED, _IMAGE),
    "pit": ("pit", "PiT", _DROPPED | {"depth": (1, 1)}, _IMAGE),
    "regionvit": ("regionvit", "RegionViT", _STAGES | {"window_size": 2, "dim": (16, 16, 32, 32)}, (3, 64, 64)),
    "rvt": ("rvt", "RvT", _DROPPED, _IMAGE),
    "scalable_vit": (
        "scalable_vit",
        "ScalableViT",
        {
            "num_classes": 5,
            "dim": 8,
            "heads": (1, 1),
            "depth": (1, 1),
            "reduction_factor": (2, 1),
            "window_size": (4, None),
            "ssa_dim_key": 8,
            "iwsa_dim_key": 8,
        },
        _IMAGE,
    ),
    "sep_vit": (
        "sep_vit",
        "SepViT",
        {"num_classes": 5, "dim": 8, "depth": (1, 1), "heads": (1, 2)},
        (3, 56, 56),
    ),
    "t2t": ("t2t", "T2TViT", _without(_BASE, "patch_size") | {"t2t_layers": ((7, 4), (3, 2))}, _IMAGE),
    "twins_svt": (
        "twins_svt",
        "TwinsSVT",
        {
            "num_classes": 5,
            **{f"s{stage}_emb_dim": 8 * stage for stage in range(1, 5)},
            **{f"s{stage}_depth": 1 for stage in range(1, 5)},
            **{f"s{stage}_local_patch_size": 1 for stage in range(1, 5)},
            **{f"s{stage}_global_k": 1 for stage in range(1, 5)},
        },
        _IMAGE,
    ),
    "vit_1d": ("vit_1d", "ViT", _SERIES | {"dropout": 0.1}, _SIGNAL),
    "vit_3d": ("vit_3d", "ViT", _VIDEO | {"dropout": 0.1}, _CLIP),
    "vit_5": ("vit_5", "ViT", _DROPPED, _IMAGE),
    "vit_detpool": ("vit_detpool", "ViTDetPool", _DROPPED, _IMAGE),
    "vit_for_small_dataset": ("vit_for_small_dataset", "ViT", _DROPPED, _IMAGE),
    "vit_decorr": ("vit_with_decorr", "ViT", _BASE, _IMAGE),
    "vit_keel_post_ln": ("vit_with_keel_post_ln", "ViT", _DROPPED, _IMAGE),
    "vit_patch_dropout": ("vit_with_patch_dropout", "ViT", _DROPPED, _IMAGE),
    "vit_patch_merger": ("vit_with_patch_merger", "ViT", _DROPPED | {"patch_merge_num_tokens": 4}, _IMAGE),
    "vivit": ("vivit", "ViViT", _VIVIT | {"use_flash_attn": False}, _CLIP),
    "vivit_attention": ("vivit", "ViViT", _VIVIT | {"variant": "factorized_self_attention"}, _CLIP),
    "vivit_moss": ("vivit_with_moss", "ViViT", _VIVIT | {"use_flash_attn": False}, _CLIP),
    "xcit": ("xcit", "XCiT", _DROPPED | {"cls_depth": 1, "layer_dropout": 0.3}, _IMAGE),
}


def _net(module: str, name: str, settings: dict[str, Any], shape: tuple[int, ...]) -> Callable[[], Case]:
    def build() -> Case:
        net = getattr(import_module(f"vit_pytorch.{module}"), name)(**settings)
        return net, (torch.randn(2, *shape),), {}

    return build


def _ragged(module: str) -> Callable[[], Case]:
    def build() -> Case:
        net = import_module(f"vit_pytorch.{module}").NaViT(**_BASE)
        return net, ([[torch.randn(3, 16, 32)], [torch.randn(3, 32, 24)]],), {}

    return build


def _masked() -> Case:
    """Self-supervised training around an encoder; the output is the loss."""
    from vit_pytorch.mp3 import MP3, ViT

    return MP3(vit=ViT(**_BASE), masking_ratio=0.75), (torch.randn(2, 3, 32, 32),), {}


VIT: dict[str, Callable[[], Case]] = {
    **{name: _net(*settings) for name, settings in _NETS.items()},
    "na_vit": _ragged("na_vit"),
    "mp3 loss": _masked,
}
