"""Twenty networks each of segmentation-models-pytorch and monai at their smallest, for `wild.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo_models import Case

_SEGMENTATION: dict[str, tuple[Any, ...]] = {
    # name: (class, settings[, size])
    "unet": ("Unet", {}),
    "unet mobilenet": ("Unet", {"encoder_name": "mobilenet_v2"}),
    "unet scse": ("Unet", {"decoder_attention_type": "scse"}),
    "unet aux": ("Unet", {"aux_params": {"classes": 4, "dropout": 0.2}}),
    "unet efficientnet": ("Unet", {"encoder_name": "efficientnet-b0"}),
    "unet mobileone": ("Unet", {"encoder_name": "mobileone_s0"}),
    "unet mit": ("Unet", {"encoder_name": "mit_b0"}),
    "unet vgg": ("Unet", {"encoder_name": "vgg11_bn", "encoder_depth": 3, "decoder_channels": (16, 8, 4)}),
    "unet densenet": ("Unet", {"encoder_name": "densenet121"}),
    "unet timm": ("Unet", {"encoder_name": "tu-mobilenetv3_small_050"}),
    "unetplusplus": ("UnetPlusPlus", {}),
    "manet": ("MAnet", {}),
    "linknet": ("Linknet", {}),
    "fpn": ("FPN", {}),
    "pspnet": ("PSPNet", {}),
    "deeplabv3": ("DeepLabV3", {"encoder_name": "mobilenet_v2"}),
    "deeplabv3plus": ("DeepLabV3Plus", {}),
    "pan": ("PAN", {}, 128),
    "upernet": ("UPerNet", {}),
    "segformer": ("Segformer", {"encoder_name": "mit_b0"}),
    "dpt": ("DPT", {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}),
}


def _segmentation(name: str, settings: dict[str, Any], size: int = 64) -> Callable[[], Case]:
    def build() -> Case:
        import segmentation_models_pytorch as smp

        options = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3} | settings
        return getattr(smp, name)(**options).eval(), (torch.randn(2, 3, size, size),), {}

    return build


_UNET: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "channels": (4, 8, 16),
    "strides": (2, 2),
}
_FEATURES: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": (8, 8, 8, 8, 16, 8)}
_VIT: dict[str, Any] = {
    "in_channels": 1,
    "img_size": 16,
    "hidden_size": 16,
    "mlp_dim": 32,
    "num_heads": 2,
    "spatial_dims": 2,
}
_KL: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": 1,
    "channels": (8, 8),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
}
_RESNET: dict[str, Any] = {
    "block": "basic",
    "layers": (1, 1, 1, 1),
    "block_inplanes": (4, 8, 8, 16),
    "spatial_dims": 2,
    "n_input_channels": 1,
    "num_classes": 3,
}
_MONAI: dict[str, tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    # name: (class, settings, shapes of the inputs without the batch)
    "unet": ("UNet", _UNET | {"num_res_units": 2, "dropout": 0.1}, ((1, 16, 16),)),
    "unet 3d": ("UNet", _UNET | {"spatial_dims": 3}, ((1, 8, 8, 8),)),
    "attention_unet": ("AttentionUnet", _UNET | {"dropout": 0.1}, ((1, 16, 16),)),
    "autoencoder": ("AutoEncoder", _UNET | {"strides": (2, 2, 1)}, ((1, 16, 16),)),
    "varautoencoder": (
        "VarAutoEncoder",
        {
            "spatial_dims": 2,
            "in_shape": (1, 16, 16),
            "out_channels": 1,
            "latent_size": 3,
            "channels": (4, 8),
            "strides": (2, 2),
        },
        ((1, 16, 16),),
    ),
    "autoencoder_kl": ("AutoencoderKL", _KL, ((1, 16, 16),)),
    "basic_unet": ("BasicUNet", _FEATURES | {"dropout": 0.1}, ((1, 32, 32),)),
    "basic_unetplusplus": ("BasicUNetPlusPlus", _FEATURES, ((1, 32, 32),)),
    "classifier": (
        "Classifier",
        {"in_shape": (1, 16, 16), "classes": 3, "channels": (4, 8), "strides": (2, 2)},
        ((1, 16, 16),),
    ),
    "critic": ("Critic", {"in_shape": (1, 16, 16), "channels": (4, 8), "strides": (2, 2)}, ((1, 16, 16),)),
    "regressor": (
        "Regressor",
        {"in_shape": (1, 16, 16), "out_shape": (2,), "channels": (4, 8), "strides": (2, 2)},
        ((1, 16, 16),),
    ),
    "densenet": (
        "DenseNet",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 3,
            "init_features": 8,
            "growth_rate": 4,
            "block_config": (2, 2),
            "dropout_prob": 0.1,
        },
        ((1, 32, 32),),
    ),
    "dynunet": (
        "DynUNet",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 2,
            "kernel_size": (3, 3, 3),
            "strides": (1, 2, 2),
            "upsample_kernel_size": (2, 2),
            "filters": (4, 8, 8),
            "deep_supervision": True,
            "deep_supr_num": 1,
        },
        ((1, 16, 16),),
    ),
    "highresnet": ("HighResNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, ((1, 16, 16),)),
    "mednext": (
        "MedNeXt",
        {
            "spatial_dims": 2,
            "init_filters": 4,
            "in_channels": 1,
            "out_channels": 2,
            "blocks_down": (1, 1),
            "blocks_bottleneck": 1,
            "blocks_up": (1, 1),
        },
        ((1, 16, 16),),
    ),
    "resnet": ("ResNet", _RESNET, ((1, 32, 32),)),
    "segresnet": (
        "SegResNet",
        {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "dropout_prob": 0.1},
        ((1, 16, 16),),
    ),
    "segresnet_ds": (
        "SegResNetDS",
        {"spatial_dims": 2, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "dsdepth": 2},
        ((1, 16, 16),),
    ),
    "swin_unetr": (
        "SwinUNETR",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 2,
            "feature_size": 12,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 1, 2, 2),
            "window_size": 2,
            "dropout_path_rate": 0.2,
        },
        ((1, 64, 64),),
    ),
    "unetr": ("UNETR", _VIT | {"out_channels": 2, "feature_size": 4}, ((1, 16, 16),)),
    "vit": (
        "ViT",
        _VIT | {"patch_size": 8, "num_layers": 2, "classification": True, "dropout_rate": 0.1},
        ((1, 16, 16),),
    ),
    "vit_autoenc": ("ViTAutoEnc", _VIT | {"patch_size": 4, "num_layers": 2}, ((1, 16, 16),)),
    "vnet": ("VNet", {"spatial_dims": 2, "dropout_dim": 2}, ((1, 32, 32),)),
    "vqvae": (
        "VQVAE",
        {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "channels": (8, 8),
            "num_res_layers": 1,
            "num_res_channels": (8, 8),
            "downsample_parameters": ((2, 4, 1, 1), (2, 4, 1, 1)),
            "upsample_parameters": ((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            "num_embeddings": 8,
            "embedding_dim": 4,
        },
        ((1, 16, 16),),
    ),
    "patch_discriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 4, "in_channels": 1, "num_layers_d": 2},
        ((1, 16, 16),),
    ),
}


def _monai(name: str, settings: dict[str, Any], shapes: tuple[tuple[int, ...], ...]) -> Callable[[], Case]:
    def build() -> Case:
        import monai.networks.nets

        net = getattr(monai.networks.nets, name)(**settings)
        return net, tuple(torch.randn(2, *shape) for shape in shapes), {}

    return build


SEGMENTATION: dict[str, Callable[[], Case]] = {name: _segmentation(*case) for name, case in _SEGMENTATION.items()}
MONAI: dict[str, Callable[[], Case]] = {name: _monai(*case) for name, case in _MONAI.items()}
