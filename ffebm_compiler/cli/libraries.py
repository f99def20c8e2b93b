"""Build models of timm, torchvision and transformers by name, with random weights, and inputs that fit them."""

from __future__ import annotations

import ast
import importlib
from inspect import signature
from typing import Any

import torch
from torch import nn

from ffebm_compiler.cli.named_model import NamedModel, built, first_line
from ffebm_compiler.errors import InputError

__all__ = ["timm_model", "torchvision_model", "transformers_model"]


def timm_model(call: str) -> NamedModel:
    """The model of timm with this name, for images of the size in its own configuration."""
    timm = _library("timm")
    name, settings = _call_of(call)
    model = built(f"timm:{call}", lambda: timm.create_model(name, pretrained=False, **settings))
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = list(config.get("input_size") or (3, 224, 224))
    size[0] = settings.get("in_chans", size[0])
    if "img_size" in settings:
        sides = settings["img_size"]
        size[1:] = sides if isinstance(sides, tuple | list) else (sides, sides)
    return NamedModel(model, ("x".join(map(str, (1, *size))),))


def torchvision_model(call: str) -> NamedModel:
    """The model of torchvision with this name, for inputs of the size that its published weights are evaluated at."""
    models = _library("torchvision").models
    name, settings = _call_of(call)
    if name in ("googlenet", "inception_v3"):  # these warn if it is not given, and initialising them takes long
        settings = {"init_weights": False, **settings}
    model = built(f"torchvision:{call}", lambda: models.get_model(name, weights=None, **settings))
    return NamedModel(model, _torchvision_inputs(models, name))


def _torchvision_inputs(models: Any, name: str) -> tuple[str, ...]:
    try:
        weights = models.get_model_weights(name).DEFAULT
        preparation = weights.transforms()
    except (AttributeError, ValueError):  # there are none
        return ("1x3x224x224",)
    sizes = list(getattr(preparation, "crop_size", None) or getattr(preparation, "resize_size", None) or [])
    if not sizes:
        least = weights.meta.get("min_size", (224, 224))
        sizes = [max(224, side) for side in least] if type(preparation).__name__ != "OpticalFlow" else list(least)
    image = "x".join(map(str, sizes if len(sizes) == 2 else sizes * 2))
    if type(preparation).__name__ == "OpticalFlow":  # from one image to another
        return (f"1x3x{image}", f"1x3x{image}")
    if type(preparation).__name__ == "VideoClassification":
        return (f"1x3x{max(16, weights.meta.get('min_temporal_size', 16))}x{image}",)
    return (f"1x3x{image}",)


def transformers_model(call: str) -> NamedModel:
    """A model type (`bert`), a model's class (`BertModel`) or a configuration (`BertConfig`) of transformers.

    Arguments are those of the configuration: `GPT2Config(n_layer=2)`.
    """
    transformers = _library("transformers")
    name, settings = _call_of(call)

    def build() -> Any:
        known = getattr(transformers, name, None)
        if isinstance(known, type) and issubclass(known, nn.Module):
            return known(known.config_class(**settings))  # type: ignore[attr-defined]
        if isinstance(known, type) and issubclass(known, transformers.PretrainedConfig):
            return transformers.AutoModel.from_config(known(**settings))
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **settings))

    model = built(f"transformers:{call}", build)
    return NamedModel(model, _transformers_inputs(model))


def _transformers_inputs(model: Any) -> tuple[str, ...]:
    """Default inputs of a transformers model: pixels, sound or tokens, and tokens for a decoder."""
    config = model.config
    taken = signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in taken and "pixel_values" in taken and hasattr(config, "vision_config"):  # text and images
        return ("input_ids=1x16:int64", f"pixel_values={_image(config.vision_config)}")
    if main == "pixel_values":
        inputs = [_image(getattr(config, "vision_config", config))]
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 512)
        inputs = [f"1x{getattr(config, 'num_mel_bins', 80)}x{frames}"]
    elif main == "input_values":
        inputs = ["1x16000"]
    else:
        inputs = ["1x16:int64"]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        inputs.append("decoder_input_ids=1x16:int64")
    return tuple(inputs)


def _image(config: Any) -> str:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    sides = tuple(size) if isinstance(size, tuple | list) and len(size) == 2 else (size, size)
    known = sides if all(isinstance(side, int) for side in sides) else (224, 224)
    return f"1x{channels if isinstance(channels, int) else 3}x{known[0]}x{known[1]}"


def _call_of(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of `name` or `name(key=value, ...)`, with values that are written out.

    Raises:
        InputError: the text has another form.
    """
    if "(" not in text:
        return text, {}
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(settings) < len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"the model is {text!r}; expected a name, or a name with arguments that are written out, such as "
            "GPT2Config(n_layer=2, n_embd=64)"
        ) from error
    return call.func.id, settings


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision raises RuntimeError if it was built for another torch
        raise InputError(
            f"{name} cannot be imported ({first_line(error)}): pip install {name}, in a build that fits torch "
            f"{torch.__version__}"
        ) from error
