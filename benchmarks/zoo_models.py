"""The zoo: real architectures with random weights at small sizes.

`MODELS` maps a name to a function that returns (model, args, kwargs). Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

TIMM = {
    # name: (image size, settings of create_model)
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "resnet26d": (64, {}),
    "resnext50_32x4d": (64, {}),
    "seresnet50": (64, {}),
    "resnetv2_50": (64, {}),
    "resnetv2_50x1_bit": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "vgg11": (64, {}),
    "vgg11_bn": (64, {}),
    "densenet121": (64, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnetv2_rw_t": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
    "ghostnet_050": (64, {}),
    "mnasnet_small": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "inception_v3": (96, {}),
    "xception41": (96, {}),
    "dla34": (64, {}),
    "hrnet_w18_small": (64, {}),
    "cspresnet50": (64, {}),
    "darknet53": (64, {}),
    "repvgg_a0": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42": (64, {}),
    "skresnet18": (64, {}),
    "dpn48b": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "deit_tiny_patch16_224": (64, {"img_size": 64}),
    "deit3_small_patch16_224": (64, {"img_size": 64}),
    "beit_base_patch16_224": (64, {"img_size": 64}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "cait_xxs24_224": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4}),
    "swinv2_cr_tiny_224": (64, {"img_size": 64, "window_size": 2}),
    "mixer_s16_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmlp_s16_224": (64, {"img_size": 64}),
    "poolformer_s12": (64, {}),
    "pvt_v2_b0": (64, {}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "levit_128s": (224, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "efficientformer_l1": (224, {}),
    "edgenext_xx_small": (64, {}),
    "fastvit_t8": (64, {}),
    "nfnet_l0": (64, {}),
    "tnt_s_legacy_patch16_224": (224, {}),
    "twins_svt_small": (64, {"img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64}),
}

TORCHVISION = {
    "alexnet": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "squeezenet1_0": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "vit_b_16": 64,
    "swin_t": 64,
}


def _timm(name: str) -> Case:
    import timm

    size, settings = TIMM[name]
    return timm.create_model(name, pretrained=False, **settings), (torch.randn(2, 3, size, size),), {}


def _torchvision(name: str) -> Case:
    load_torchvision()
    import torchvision

    size = TORCHVISION[name]
    settings: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        settings |= {"init_weights": True, "aux_logits": False}
    if name == "vit_b_16":
        settings["image_size"] = size
    return getattr(torchvision.models, name)(**settings), (torch.randn(2, 3, size, size),), {}


def load_torchvision() -> None:
    """Let torchvision's wheel import beside a torch of another build: define the operators that it then lacks."""
    if not hasattr(load_torchvision, "library"):
        library = None if _loads() else torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            if library is not None and not hasattr(torch.ops.torchvision, schema.split("(")[0]):
                library.define(schema)
        load_torchvision.library = library  # type: ignore[attr-defined]


def _loads() -> bool:
    """Whether torchvision's compiled operators load beside this torch, which defines them."""
    spec = importlib.util.find_spec("torchvision")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for path in (path for folder in folders for path in sorted(Path(folder).glob("_C*"))):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def _tokens(**more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 97, (2, 8), generator=generator), **more}


def _text(model: str, config: str, settings: dict[str, Any], **inputs: Any) -> Callable[[], Case]:
    def build() -> Case:
        import transformers

        net = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return net, (), _tokens(**inputs)

    return build


def _image(model: str, config: str, settings: dict[str, Any], size: int = 32) -> Callable[[], Case]:
    def build() -> Case:
        import transformers

        net = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return net, (), {"pixel_values": torch.randn(2, 3, size, size)}

    return build


_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_DECODER = SMALL | {"use_cache": False}

TRANSFORMERS: dict[str, Callable[[], Case]] = {
    "bert": _text("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta": _text("RobertaModel", "RobertaConfig", SMALL | {"max_position_embeddings": 40}),
    "distilbert": _text(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32},
    ),
    "albert": _text("AlbertModel", "AlbertConfig", SMALL | {"embedding_size": 16}),
    "electra": _text("ElectraModel", "ElectraConfig", SMALL | {"embedding_size": 16}),
    "gpt2": _text(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
    ),
    "gpt_neox": _text("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER),
    "opt": _text(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
    ),
    "llama": _text("LlamaForCausalLM", "LlamaConfig", _DECODER | {"num_key_value_heads": 2}),
    "mistral": _text("MistralForCausalLM", "MistralConfig", _DECODER | {"num_key_value_heads": 2}),
    "qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", _DECODER | {"num_key_value_heads": 2}),
    "gemma": _text("GemmaForCausalLM", "GemmaConfig", _DECODER | {"num_key_value_heads": 2, "head_dim": 8}),
    "phi": _text("PhiForCausalLM", "PhiConfig", _DECODER),
    "t5_encoder": _text(
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "vit": _image("ViTForImageClassification", "ViTConfig", _VISION),
    "deit": _image("DeiTModel", "DeiTConfig", _VISION),
    "dinov2": _image("Dinov2Model", "Dinov2Config", _VISION),
    "convnext": _image("ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}),
    "resnet": _image(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    ),
}


def _case(library: str, name: str) -> Callable[[], Case]:
    return lambda: {"timm": _timm, "torchvision": _torchvision}[library](name)


MODELS: dict[str, Callable[[], Case]] = {
    **{f"timm:{name}": _case("timm", name) for name in TIMM},
    **{f"torchvision:{name}": _case("torchvision", name) for name in TORCHVISION},
    **{f"transformers:{name}": build for name, build in TRANSFORMERS.items()},
}
