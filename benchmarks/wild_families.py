"""The smallest models of timm's families, torchvision's models and small ones of transformers, for `wild.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo_models import SMALL, Case
from zoo_models import TORCHVISION as SIZES
from zoo_models import TRANSFORMERS as ZOO

_TIMM = """
    test_byobnet test_convnext test_convnext2 test_convnext3 test_efficientnet test_mambaout test_nfnet test_resnet
    test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos test_efficientnet_gn test_efficientnet_ln
    test_efficientnet_evos

    resnet10t seresnet18 ecaresnet26t resnet18d resnetblur18 resnetrs50 resnet50_gn legacy_seresnet18 resnest14d
    skresnet18 res2net50_14w_8s res2next50 resnetv2_18 resnetv2_50d_frn resnetv2_50x1_bit regnetx_002 regnety_002
    regnetz_005 gernet_s mobileone_s0 repvgg_a0 gcresnext26ts bat_resnext26ts lambda_resnet26t botnet26t_256 halonet26t
    eca_halonext26ts densenet121 densenetblur121d dla46_c dpn48b vgg11 vgg11_bn hrnet_w18_small selecsls42 tresnet_m
    vovnet39a ese_vovnet19b_slim_dw xception41 legacy_xception inception_v3 inception_v4 inception_resnet_v2
    cs3darknet_focus_s cspresnet50 darknet17 cspnext_tiny rexnet_100 hgnetv2_b0 nf_regnet_b0 nf_resnet26 nfnet_l0

    efficientnet_b0 efficientnetv2_rw_t efficientnet_cc_b0_4e mobilenetv2_035 mnasnet_small spnasnet_100 fbnetc_100
    mixnet_s tinynet_e semnasnet_075 tf_efficientnet_lite0 mobilenetv3_small_050 mobilenetv4_conv_small_035
    mobilenetv4_hybrid_medium lcnet_035 fbnetv3_b hardcorenas_a lcnetv2_small ghostnet_050 ghostnetv2_100 ghostnetv3_050
    repghostnet_050 fasternet_t0 starnet_s050 shvit_s1 repvit_m0_9 efficientvit_b0 efficientvit_m0 efficientvim_m1
    cpubone_nano lowformer_b0 iformer_t csatv2 mobilenetv5_base

    convnext_zepto_rms convnextv2_atto convmixer_768_32 inception_next_atto focalnet_tiny_srf poolformer_s12
    poolformerv2_s12 caformer_s18 convformer_s18 rdnet_tiny edgenext_xx_small fastvit_t8 mobilevit_xxs mobilevitv2_050
    swiftformer_xs efficientformer_l1 efficientformerv2_s0 nextvit_small davit_tiny gcvit_xxtiny pvt_v2_b0
    coatnet_nano_rw_224 maxvit_pico_rw_256 vitamin_small_224 visformer_tiny tiny_vit_5m_224

    vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 vit_base_patch14_dinov2
    flexivit_small vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224 samvit_base_patch16_224
    naflexvit_base_patch16_gap beit_base_patch16_224 eva02_tiny_patch14_224 vit_base_patch16_rope_224 cait_xxs24_224
    coat_tiny coat_lite_tiny convit_tiny crossvit_tiny_240 hiera_tiny_224 hieradet_small levit_128s
    levit_conv_128s mvitv2_tiny nest_tiny pit_ti_224 sequencer2d_s swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224
    tnt_s_legacy_patch16_224 tnt_s_patch16_224 twins_pcpvt_small twins_svt_small volo_d1_224 xcit_nano_12_p16_224
    mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224
"""
_LARGE = {"inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96, "legacy_xception": 96, "tresnet_m": 64}
_ONE_SIZE = ("bat_resnext26ts", "halonet26t", "eca_halonext26ts", "efficientformer_l1", "crossvit_tiny_240")
"""Those that other sizes do not fit, whatever their configuration says."""
_WINDOW = {
    "swin_tiny_patch4_window7_224": {"window_size": 4},
    "swinv2_tiny_window8_256": {"window_size": 4},
    "swinv2_cr_tiny_224": {"window_size": 2},
}


def _timm(name: str) -> Callable[[], Case]:
    def build() -> Case:
        import timm

        size, config = _LARGE.get(name, 64), timm.get_pretrained_cfg(name)
        assert config is not None
        settings = {"pretrained": False, **_WINDOW.get(name, {})}
        if name in _ONE_SIZE:
            size = config.input_size[-1]
            net = timm.create_model(name, **settings)
        elif config.fixed_input_size:
            try:
                net = timm.create_model(name, img_size=size, **settings)
            except (AssertionError, TypeError, ValueError, RuntimeError):  # of one size only
                size = config.input_size[-1]
                net = timm.create_model(name, **settings)
        else:
            net = timm.create_model(name, **settings)
        return net, (torch.randn(2, 3, size, size),), {}

    return build


_VISION: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    # name: (module below torchvision.models, settings, shape of a sample)
    **{
        name: (
            "",
            {"image_size": size} if name == "vit_b_16" else {"init_weights": True} if "ception" in name else {},
            (3, size, size),
        )
        for name, size in SIZES.items()
    },
    "googlenet": ("", {"init_weights": True}, (3, 64, 64)),
    "inception_v3": ("", {"init_weights": True}, (3, 299, 299)),
    "efficientnet_v2_s": ("", {}, (3, 64, 64)),
    "maxvit_t": ("", {"input_size": (224, 224)}, (3, 224, 224)),
    "mnasnet1_3": ("", {}, (3, 64, 64)),
    "mobilenet_v3_large": ("", {}, (3, 64, 64)),
    "regnet_x_400mf": ("", {}, (3, 64, 64)),
    "squeezenet1_1": ("", {}, (3, 64, 64)),
    "swin_v2_t": ("", {}, (3, 64, 64)),
    "lraspp_mobilenet_v3_large": ("segmentation", {"weights_backbone": None}, (3, 64, 64)),
    "deeplabv3_mobilenet_v3_large": ("segmentation", {"weights_backbone": None, "aux_loss": True}, (3, 64, 64)),
    "fcn_resnet50": ("segmentation", {"weights_backbone": None}, (3, 64, 64)),
    "r3d_18": ("video", {}, (3, 4, 32, 32)),
    "mc3_18": ("video", {}, (3, 4, 32, 32)),
    "r2plus1d_18": ("video", {}, (3, 4, 32, 32)),
    "s3d": ("video", {}, (3, 16, 224, 224)),
    "swin3d_t": ("video", {}, (3, 4, 32, 32)),
}


def _torchvision(name: str, module: str, settings: dict[str, Any], shape: tuple[int, ...]) -> Callable[[], Case]:
    def build() -> Case:
        import torchvision

        place = getattr(torchvision.models, module) if module else torchvision.models
        return getattr(place, name)(weights=None, **settings), (torch.randn(2, *shape),), {}

    return build


def _transformers(model: str, config: str, settings: dict[str, Any], **inputs: Any) -> Callable[[], Case]:
    def build() -> Case:
        import transformers

        net = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return net, (), {name: value() for name, value in inputs.items()}

    return build


def _tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 8))


def _mask() -> torch.Tensor:
    return (torch.arange(8)[None] < torch.tensor([[8], [5]])).long()


_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}

TRANSFORMERS: dict[str, Callable[[], Case]] = {
    **ZOO,
    "gpt2 cache": _transformers("GPT2LMHeadModel", "GPT2Config", _GPT2, input_ids=_tokens),
    "bert mask": _transformers("BertModel", "BertConfig", SMALL, input_ids=_tokens, attention_mask=_mask),
    "bert labels": _transformers("BertForMaskedLM", "BertConfig", SMALL, input_ids=_tokens, labels=_tokens),
    "llama cache": _transformers("LlamaForCausalLM", "LlamaConfig", SMALL, input_ids=_tokens, attention_mask=_mask),
    "t5": _transformers("T5ForConditionalGeneration", "T5Config", _T5, input_ids=_tokens, decoder_input_ids=_tokens),
}
TIMM: dict[str, Callable[[], Case]] = {name: _timm(name) for name in _TIMM.split()}
TORCHVISION: dict[str, Callable[[], Case]] = {name: _torchvision(name, *case) for name, case in _VISION.items()}
