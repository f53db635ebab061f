# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the SAIL-VL multimodal model: vision, connector, language (arXiv 2507.01643, 2509.14033)."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from .configuration_sailvit import SAILViTConfig


# The class that each Auto class of transformers loads from a model folder.
AUTO_MAP = {
    "AutoConfig": "configuration_sailvl.SAILVLConfig",
    "AutoModel": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoProcessor": "processing_sailvl.SAILVLProcessor",
    "AutoImageProcessor": "image_processing_sailvit.SAILViTImageProcessor",
}
# The id of <IMG_CONTEXT> in the SAIL-VL releases with Qwen2.5, which extend its tokenizer.
RELEASED_IMAGE_TOKEN_ID = 151667
# Keys of a nested config that record its origin and how it was run; only the top-level config holds them.
NON_MODEL_KEYS = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attn_implementation",
    "auto_map", "dtype", "torch_dtype", "transformers_version", "use_flash_attn",
}  # fmt: skip
# Older configs also contain generation defaults, which are dropped; the ids of special tokens are kept.
GENERATION_FIELDS = {key for key in GenerationConfig().to_dict() if not key.endswith("_token_id")} - {"use_cache"}
TEXT_HINTS = {"internlm2": "convert it to Llama's names with `sailvit convert SRC OUT --part language`"}
VISION_HINTS = {
    "intern_vit_6b": "convert it to transformers' internvl_vision with `sailvit convert SRC OUT --part vision`"
}


class SAILVLConfig(PretrainedConfig):
    r"""
    Configuration of a vision encoder, a connector and a language model. Also reads the config.json of a SAIL-VL release
    (`llm_config`, `downsample_ratio`, a nested "aimv2", ...) unchanged.

    Args:
        vision_config: Config of the vision encoder, or its fields with a `model_type`: "sailvit" ("aimv2" in releases)
            or any vision encoder of transformers. Default: SAILViT-Large.
        text_config: Config of the language model, or its fields with a `model_type`: any causal language model of
            transformers. Default: Qwen2Config().
        pixel_shuffle_factor: Side of the square of tokens that is merged into one token.
        select_layer: Input of the connector: -1 for `last_hidden_state` of the vision encoder, any other value is an
            index into its `hidden_states`, where 0 is the embeddings.
        image_token: Placeholder of one visual token in a prompt.
        image_start_token, image_end_token: Tokens before and after the visual tokens of an image.
        image_token_id: The id of `image_token` in the tokenizer. Default: the id in the Qwen2.5 releases if the
            language model is a Qwen2 with a large enough vocabulary, else None; then set it before passing images.
        vision_batch_size: Tiles per forward pass of the vision encoder, outside training.
        initializer_range: Standard deviation of a newly initialised connector.
        kwargs: Fields of any PretrainedConfig. `tie_word_embeddings` is taken from `text_config`.

    Raises:
        ValueError: A field is out of range, contradicts another, or is unknown; the message names it and the fix.
    """

    model_type = "sailvl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        pixel_shuffle_factor: int = 2,
        select_layer: int = -1,
        image_token: str = "<IMG_CONTEXT>",
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
        image_token_id: int | None = None,
        vision_batch_size: int = 8,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        if kwargs.keys() & {"llm_config", "downsample_ratio", "ps_version"}:
            text_config, pixel_shuffle_factor = _read_release(kwargs, text_config, pixel_shuffle_factor)
        self.vision_config = _vision_config(vision_config)
        self.text_config = _text_config(text_config)
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.select_layer = select_layer
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        self.image_token_id = image_token_id
        self.vision_batch_size = vision_batch_size
        self.initializer_range = initializer_range
        if image_token_id is None and self.text_config.model_type == "qwen2":
            in_vocabulary = self.text_config.vocab_size > RELEASED_IMAGE_TOKEN_ID
            self.image_token_id = RELEASED_IMAGE_TOKEN_ID if in_vocabulary else None
        self._check_fields(kwargs.get("force_image_size"))
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def llm_config(self) -> PretrainedConfig:
        """`text_config`, under its name in the releases."""
        return self.text_config

    @property
    def downsample_ratio(self) -> float:
        """1 / `pixel_shuffle_factor`, under its name in the releases."""
        return 1 / self.pixel_shuffle_factor

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch of the vision encoder, in pixels."""
        return _pair(self.vision_config.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid of one tile."""
        (height, width), (patch_height, patch_width) = _pair(self.vision_config.image_size), self.patch_size
        return height // patch_height, width // patch_width

    @property
    def image_seq_length(self) -> int:
        """Number of visual tokens per tile."""
        rows, columns = self.grid_size
        return (rows // self.pixel_shuffle_factor) * (columns // self.pixel_shuffle_factor)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        As in transformers; also accepts the model_type "internvl_chat" of the releases.

        Raises:
            ValueError: The config.json has another model_type.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, "internvl_chat"):
            raise ValueError(
                f"{pretrained_model_name_or_path}: expected a SAIL-VL config.json, got model_type {model_type!r}: "
                "load it with an Auto class, or build a SAIL-VL from a vision encoder and a language model with "
                "`sailvit compose`"
            )
        return {**config, "model_type": cls.model_type}, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, except that field overrides are validated together with the other fields."""
        fields = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"} | {"downsample_ratio"}
        overrides = {key: kwargs.pop(key) for key in [*kwargs] if key in fields}
        for name in overrides.keys() & cls.sub_configs.keys():
            if isinstance(overrides[name], Mapping) and isinstance(config_dict.get(name), Mapping):
                overrides[name] = {**config_dict[name], **overrides[name]}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the `auto_map` of the vision config: the top-level one covers it."""
        output = super().to_dict()
        output["vision_config"].pop("auto_map", None)
        return output

    def _check_fields(self, force_image_size: int | None) -> None:
        for field in ("pixel_shuffle_factor", "vision_batch_size"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        blocks = self.vision_config.num_hidden_layers
        if type(self.select_layer) is not int or not -(blocks + 1) <= self.select_layer <= blocks:
            raise ValueError(
                f"select_layer {self.select_layer!r} is out of range: expected {-(blocks + 1)} to {blocks} for a "
                f"vision encoder of {blocks} blocks, -1 for its last_hidden_state"
            )
        rows, columns = self.grid_size
        if rows % self.pixel_shuffle_factor or columns % self.pixel_shuffle_factor:
            raise ValueError(
                f"pixel_shuffle_factor {self.pixel_shuffle_factor} does not divide the {rows} x {columns} patches of a "
                "tile"
            )
        if force_image_size not in (None, *_pair(self.vision_config.image_size)):
            raise ValueError(
                f"force_image_size {force_image_size!r} contradicts vision_config.image_size "
                f"{self.vision_config.image_size!r}: correct one of them"
            )
        if not all(isinstance(token, str) and token for token in self.special_tokens):
            raise ValueError(
                "image_token, image_start_token and image_end_token must be non-empty strings, got "
                f"{self.special_tokens}"
            )

    @property
    def special_tokens(self) -> tuple[str, str, str]:
        """`image_start_token`, `image_token` and `image_end_token`."""
        return self.image_start_token, self.image_token, self.image_end_token


def _read_release(kwargs: dict[str, Any], text_config: Any, factor: int) -> tuple[Any, int]:
    """Pop the fields of a release from `kwargs`; return the text config and the pixel shuffle factor they define."""
    if kwargs.get("ps_version", "v2") != "v2":
        raise ValueError(
            f"ps_version {kwargs['ps_version']!r} is not supported: it transposes rows and columns after the pixel "
            'shuffle, as in InternVL 1; expected "v2", the order of SAIL-VL'
        )
    ratio = kwargs.get("downsample_ratio", 1 / factor)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1 or round(1 / ratio) != 1 / ratio:
        raise ValueError(f"downsample_ratio must be 1 / integer, such as 0.5, got {ratio!r}")
    if kwargs.get("llm_config") is not None and text_config is not None:
        raise ValueError("llm_config and text_config are two names of one field: pass one of them")
    text_config = kwargs.get("llm_config") or text_config
    for key in ("llm_config", "downsample_ratio", "ps_version"):
        kwargs.pop(key, None)
    for key in ("auto_map", "architectures"):  # of the code in the release
        kwargs.pop(key, None)
    return text_config, round(1 / ratio)


def _vision_config(config: PretrainedConfig | Mapping[str, Any] | None) -> PretrainedConfig:
    if config is None:
        return SAILViTConfig()
    if isinstance(config, PretrainedConfig):
        return config
    fields = _model_fields(config)
    model_type = fields.pop("model_type", "sailvit")
    if model_type in ("sailvit", "aimv2"):
        return SAILViTConfig(**fields)
    built = _build_config("vision_config", model_type, fields, VISION_HINTS)
    required = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")
    missing = [key for key in required if not hasattr(built, key)]
    if missing:
        raise ValueError(f"vision_config.model_type {model_type!r} is no vision encoder: missing {', '.join(missing)}")
    return built


def _text_config(config: PretrainedConfig | Mapping[str, Any] | None) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = _model_fields(config or {"model_type": "qwen2"})
    return _build_config("text_config", fields.pop("model_type", None), fields, TEXT_HINTS)


def _model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a nested config that describe the model."""
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a config or a dict of its fields, got {config!r}")
    return {key: value for key, value in config.items() if key not in NON_MODEL_KEYS | GENERATION_FIELDS}


def _build_config(name: str, model_type: Any, fields: dict[str, Any], hints: Mapping[str, str]) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        hint = hints.get(model_type, "use a supported one, or install a newer transformers")
        raise ValueError(f"{name}.model_type {model_type!r} is not known to the installed transformers: {hint}")
    return CONFIG_MAPPING[model_type](**fields)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or as a pair."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


SAILVLConfig.register_for_auto_class()

__all__ = ["SAILVLConfig"]
