# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of SAIL-VL, the multimodal language model around a vision tower (arXiv 2507.01643, 2509.14033)."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from .configuration_sailvit import SAILViTConfig


# What each Auto class of transformers loads from a folder that holds these files.
AUTO_MAP = {
    "AutoConfig": "configuration_sailvl.SAILVLConfig",
    "AutoModel": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_sailvl.SAILVLForConditionalGeneration",
    "AutoProcessor": "processing_sailvl.SAILVLProcessor",
    "AutoImageProcessor": "image_processing_sailvit.SAILViTImageProcessor",
}
# The id of <IMG_CONTEXT> in the releases with Qwen2.5, whose tokenizer they extend.
RELEASED_IMAGE_TOKEN_ID = 151667
# Of a nested configuration: where it came from and how it was run, which is for the whole model to say.
NOT_OF_A_PART = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attn_implementation",
    "auto_map", "dtype", "torch_dtype", "transformers_version", "use_flash_attn",
}  # fmt: skip
# Old configurations hold the defaults of generation too; the ids of special tokens are the model's.
GENERATION_FIELDS = {key for key in GenerationConfig().to_dict() if not key.endswith("_token_id")} - {"use_cache"}
TEXT_MENDS = {"internlm2": "convert it to Llama's names with `sailvit convert SRC OUT --part language`"}
VISION_MENDS = {
    "intern_vit_6b": "convert it to transformers' internvl_vision with `sailvit convert SRC OUT --part vision`"
}


class SAILVLConfig(PretrainedConfig):
    r"""
    A vision tower, the connector behind it, and a language model. The config.json of a SAIL-VL release (`llm_config`,
    `downsample_ratio`, a nested "aimv2", ...) is read as it is.

    Args:
        vision_config: The tower's configuration, or its fields with a `model_type`: "sailvit" (in releases "aimv2") or
            any vision tower of transformers; SAILViT-Large if not given.
        text_config: The language model's, likewise; any causal language model of transformers. Qwen2's defaults if not
            given.
        pixel_shuffle_factor: Side of the square of tokens that is folded into one.
        select_layer: What of the tower the connector is given: -1 is `last_hidden_state`; any other index is into its
            `hidden_states`, the embeddings being 0.
        image_token: The placeholder of one visual token in a prompt.
        image_start_token, image_end_token: What stands around the visual tokens of an image.
        image_token_id: The id of `image_token` in the tokenizer; that of the Qwen2.5 releases if not given and the
            language model is a Qwen2 of such a vocabulary, else None, and to be set before images are shown.
        vision_batch_size: Tiles that go through the tower at once, outside training.
        initializer_range: Standard deviation of a fresh connector's weights.
        kwargs: Fields of any configuration. Whether the embeddings are tied is the language model's to say.

    Raises:
        ValueError: A field is out of its range, contradicts another, or names what is not known; the message says what
            would do.
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
        """`text_config`, under the name of the releases."""
        return self.text_config

    @property
    def downsample_ratio(self) -> float:
        """Side of the grid of visual tokens as a fraction of the patches', under the name of the releases."""
        return 1 / self.pixel_shuffle_factor

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width in pixels of a patch of the tower."""
        return _pair(self.vision_config.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in one tile."""
        (height, width), (patch_height, patch_width) = _pair(self.vision_config.image_size), self.patch_size
        return height // patch_height, width // patch_width

    @property
    def image_seq_length(self) -> int:
        """Visual tokens of one tile."""
        rows, columns = self.grid_size
        return (rows // self.pixel_shuffle_factor) * (columns // self.pixel_shuffle_factor)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        As transformers' own; a release that calls itself "internvl_chat" is meant to be loaded here.

        Raises:
            ValueError: It is another model's.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        said = config.get("model_type", cls.model_type)
        if said not in (cls.model_type, "internvl_chat"):
            raise ValueError(
                f"{pretrained_model_name_or_path}: its config.json is of a {said!r}, not of a SAIL-VL: load it with an "
                "Auto class; `sailvit compose` makes a SAIL-VL of a tower and a language model"
            )
        return {**config, "model_type": cls.model_type}, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, but overrides of fields are checked with the others, not set one by one afterwards."""
        fields = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"} | {"downsample_ratio"}
        overrides = {key: kwargs.pop(key) for key in [*kwargs] if key in fields}
        for part in overrides.keys() & cls.sub_configs.keys():
            if isinstance(overrides[part], Mapping) and isinstance(config_dict.get(part), Mapping):
                overrides[part] = {**config_dict[part], **overrides[part]}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own; where the code of a part would be found is said once, for the whole."""
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
                f"select_layer {self.select_layer!r} is out of range: a tower of {blocks} blocks has "
                f"{-(blocks + 1)} to {blocks}, -1 for its last_hidden_state"
            )
        rows, columns = self.grid_size
        if rows % self.pixel_shuffle_factor or columns % self.pixel_shuffle_factor:
            raise ValueError(
                f"pixel_shuffle_factor {self.pixel_shuffle_factor} does not divide the {rows} x {columns} patches of a "
                "tile"
            )
        if force_image_size not in (None, *_pair(self.vision_config.image_size)):
            raise ValueError(
                f"force_image_size is {force_image_size!r}, but vision_config.image_size "
                f"{self.vision_config.image_size!r}: one of them is wrong"
            )
        if not all(isinstance(token, str) and token for token in self.special_tokens):
            raise ValueError(
                f"image_token, image_start_token and image_end_token must be texts, got {self.special_tokens}"
            )

    @property
    def special_tokens(self) -> tuple[str, str, str]:
        """Start, placeholder and end of an image."""
        return self.image_start_token, self.image_token, self.image_end_token


def _read_release(kwargs: dict[str, Any], text_config: Any, factor: int) -> tuple[Any, int]:
    """Takes the names of a release out of `kwargs`; what they mean wins over a default, and may not contradict."""
    if kwargs.get("ps_version", "v2") != "v2":
        raise ValueError(
            f"ps_version {kwargs['ps_version']!r} is not supported: it swaps rows and columns behind the pixel "
            'shuffle, as InternVL 1 alone was trained; "v2" is that of SAIL-VL'
        )
    ratio = kwargs.get("downsample_ratio", 1 / factor)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1 or round(1 / ratio) != 1 / ratio:
        raise ValueError(f"downsample_ratio must be 1 over a whole number, such as 0.5, got {ratio!r}")
    if kwargs.get("llm_config") is not None and text_config is not None:
        raise ValueError("llm_config and text_config are both given: they are two names of one thing")
    text_config = kwargs.get("llm_config") or text_config
    for key in ("llm_config", "downsample_ratio", "ps_version"):
        kwargs.pop(key, None)
    for key in ("auto_map", "architectures"):  # of the code that the release came with
        kwargs.pop(key, None)
    return text_config, round(1 / ratio)


def _vision_config(config: PretrainedConfig | Mapping[str, Any] | None) -> PretrainedConfig:
    if config is None:
        return SAILViTConfig()
    if isinstance(config, PretrainedConfig):
        return config
    fields = _fields_of_a_part(config)
    kind = fields.pop("model_type", "sailvit")
    built = (
        SAILViTConfig(**fields) if kind in ("sailvit", "aimv2") else _build("vision_config", kind, fields, VISION_MENDS)
    )
    missing = [
        key for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers") if not hasattr(built, key)
    ]
    if missing:
        raise ValueError(f"vision_config.model_type {kind!r} is no vision tower: it has no {', '.join(missing)}")
    return built


def _text_config(config: PretrainedConfig | Mapping[str, Any] | None) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = _fields_of_a_part(config or {"model_type": "qwen2"})
    return _build("text_config", fields.pop("model_type", None), fields, TEXT_MENDS)


def _fields_of_a_part(config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise ValueError(f"a configuration or its fields are wanted, got {config!r}")
    return {key: value for key, value in config.items() if key not in NOT_OF_A_PART | GENERATION_FIELDS}


def _build(part: str, kind: Any, fields: dict[str, Any], mends: Mapping[str, str]) -> PretrainedConfig:
    if kind not in CONFIG_MAPPING:
        mend = mends.get(kind, "name one that it knows, or install a newer transformers")
        raise ValueError(f"{part}.model_type {kind!r} is not known to the installed transformers: {mend}")
    return CONFIG_MAPPING[kind](**fields)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be one number for both."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


SAILVLConfig.register_for_auto_class()

__all__ = ["SAILVLConfig"]
