# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
SAIL-VL (arXiv 2507.01643, 2509.14033): a vision tower (the vision encoder), a connector and a language model.

    tiles -> tower -> tokens of the patches -> pixel shuffle (f x f) -> LayerNorm, Linear, GELU, Linear -> visual tokens
    input_ids -> embeddings, the visual tokens in place of <IMG_CONTEXT> -> language model -> logits

Works with any vision encoder of AutoModel and any AutoModelForCausalLM. Parameter names are those of the released
SAIL-VL checkpoints: vision_model, mlp1, language_model.

Shapes: B prompts, S positions of a prompt, n tiles of all prompts together, h and w the pixels of a tile, N its visual
tokens, D the width of the tower, f the pixel shuffle factor, E the width of the language model.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging

from .chat_sailvl import SAILVLChat
from .configuration_sailvl import SAILVLConfig
from .modeling_sailvit import SAILViTModel, pixel_shuffle


logger = logging.get_logger(__name__)

# What the argument with the cache of keys and values is called; "cache" since transformers 5.24.
CACHE_NAMES = ("cache", "past_key_values")
_GENERATION_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next((name for name in CACHE_NAMES if name in _GENERATION_ARGUMENTS), CACHE_NAMES[-1])


def with_cache_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return `arguments` with the cache under the name that the installed transformers gives it.

    Raises:
        ValueError: A cache is given under both names.
    """
    given = [name for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two names of one argument: pass one of them")
    renamed = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return renamed | ({CACHE: arguments[given[0]]} if given else {})


class SAILVLForConditionalGeneration(SAILVLChat, PreTrainedModel, GenerationMixin):
    """Vision tower, connector and language model. `generate` is transformers' own, `chat` the API of the releases."""

    config_class = SAILVLConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # inherited from submodules
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: SAILVLConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        is_sailvit = vision.model_type == SAILViTModel.config_class.model_type
        self.vision_model = SAILViTModel._from_config(vision) if is_sailvit else AutoModel.from_config(vision)
        if config.select_layer != -1:  # not every tower of transformers 4.57 takes it in a call
            self.vision_model.config.output_hidden_states = True
        folded = config.pixel_shuffle_factor**2 * vision.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(folded),
            nn.Linear(folded, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.language_model = AutoModelForCausalLM.from_config(text)
        if isinstance(self.language_model._tied_weights_keys, list):  # transformers < 5, which asks the whole alone
            self._tied_weights_keys = [f"language_model.{name}" for name in self.language_model._tied_weights_keys]
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        *args: Any,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        use_flash_attn: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As transformers' own, plus the arguments that evaluation harnesses and InternVL's cards pass.

        Args:
            load_in_8bit, load_in_4bit: Quantize with bitsandbytes; transformers >= 5 has dropped these two.
            use_flash_attn: Use FlashAttention 2 where it is installed, as the cards of InternVL ask for it.

        Raises:
            ValueError: A shard is missing or broken, or it is no SAIL-VL.
        """
        if load_in_8bit or load_in_4bit:
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit)
        if use_flash_attn and is_flash_attn_2_available():
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        elif use_flash_attn:
            logger.warning_once("use_flash_attn=True, but flash-attn is not installed: using the default attention")
        try:
            return super().from_pretrained(*args, **kwargs)
        except FileNotFoundError as error:
            raise ValueError(f"{error}: the checkpoint is incomplete, download that file again") from error
        except SafetensorError as error:
            what = f"{args[0] if args else cls.__name__}: a file of weights is corrupt ({error})"
            raise ValueError(f"{what}: `sailvit inspect` names it; download it again") from error

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the connector; vision tower and language model initialize themselves."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def img_context_token_id(self) -> int | None:
        """`config.image_token_id`, under the name of the releases."""
        return self.config.image_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, value: int) -> None:
        self.config.image_token_id = value

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    @property
    def base_model(self) -> "SAILVLModel":
        """The model without its head: what trainers call that compute the loss themselves."""
        return SAILVLModel(self)

    @property
    def model(self) -> "SAILVLModel":
        """`base_model`, under the name that multimodal models of transformers 4 have."""
        return self.base_model

    @property
    def num_image_token(self) -> int:
        """Visual tokens of one tile, under InternVL's name."""
        return self.config.image_seq_length

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`get_image_features`, under InternVL's name."""
        return self.get_image_features(pixel_values)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        return_dict: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> torch.Tensor | BaseModelOutputWithPooling:
        """
        The visual tokens of tiles. Outside training the tower sees `config.vision_batch_size` tiles at a time; while
        training all at once, since its activations are kept anyway, and ranks must call it equally often.

        Args:
            pixel_values: (n, channels, h, w), floats of any type.
            return_dict: Return an object, as transformers' own models do, in place of the tensor.
            output_hidden_states, output_attentions: Return those of the tower too, in that object.

        Returns:
            (n, N, E); or pooler_output (n, N, E), and last_hidden_state, hidden_states and attentions of the tower.

        Raises:
            ValueError: The tiles are not of the shape and size that the tower was made for.
        """
        size = (self.config.vision_config.num_channels, *self._tile_size())
        if not (
            isinstance(pixel_values, torch.Tensor)
            and tuple(pixel_values.shape[1:]) == size
            and len(pixel_values)
            and pixel_values.is_floating_point()
        ):
            kind, shape = (getattr(pixel_values, key, "unknown") for key in ("dtype", "shape"))
            raise ValueError(
                f"pixel_values must be a tensor of floats of shape (tiles, {', '.join(map(str, size))}), as the "
                f"processor makes it; got a {type(pixel_values).__name__}, dtype {kind}, shape {shape}"
            )
        batch_size = len(pixel_values) if self.training else self.config.vision_batch_size
        batches = pixel_values.split(batch_size)
        if return_dict or output_hidden_states or output_attentions:
            options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            return _concatenate_outputs([self._tower_and_features(batch, **options) for batch in batches])
        if len(batches) == 1:
            return self._encode_tiles(pixel_values)
        return self._encode_in_batches(batches)

    def _encode_in_batches(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fill one output tensor: concatenating the micro-batches would take its memory twice."""
        first = self._encode_tiles(batches[0])
        features, end = first.new_empty(sum(map(len, batches)), *first.shape[1:]), len(first)
        features[:end] = first
        del first
        for batch in batches[1:]:
            features[end : end + len(batch)] = self._encode_tiles(batch)
            end += len(batch)
        return features

    def _encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return self._tower_and_features(tiles).pooler_output

    def _tower_and_features(self, tiles: torch.Tensor, **options: bool) -> BaseModelOutputWithPooling:
        """Run tower and connector on (n, channels, h, w); the features are the pooler_output."""
        layer, (rows, columns) = self.config.select_layer, self.config.grid_size
        tiles = tiles.to(self.vision_model.dtype)
        if self.vision_model.device.type != "meta":  # an offloaded tower takes its input along by itself
            tiles = tiles.to(self.vision_model.device)
        output = self.vision_model(pixel_values=tiles, **{name: True for name, wanted in options.items() if wanted})
        tokens = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        tokens = tokens[:, tokens.shape[1] - rows * columns :]  # without a class token and registers, which come first
        folded = pixel_shuffle(tokens, (rows, columns), self.config.pixel_shuffle_factor)
        features = self.mlp1(folded.to(next(self.mlp1.parameters()).dtype))
        states = (output.last_hidden_state, features, output.get("hidden_states"), output.get("attentions"))
        return BaseModelOutputWithPooling(*states)

    def _tile_size(self) -> tuple[int, int]:
        rows, columns = self.config.grid_size
        height, width = self.config.patch_size
        return rows * height, columns * width

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids: (B, S), with `config.image_token_id` in the place of every visual token, tile after tile.
            pixel_values: (n, channels, h, w), the tiles of all prompts, in order.
            attention_mask, position_ids: As the language model takes them.
            past_key_values, cache: Keys and values of earlier positions, by either of the names that transformers has
                for them.
            inputs_embeds: (B, S, E) instead of `input_ids`, with the embedding of `config.image_token_id` in the place
                of every visual token.
            labels: (B, S) token ids; those of visual tokens are ignored, as -100 is.
            image_features: (n, N, E) instead of `pixel_values`: what `get_image_features` has returned.
            logits_to_keep: Number of last positions, or the positions, whose logits are computed; 0 for all.
            mm_token_type_ids: (B, S) of the processor; not used, accepted so that its whole output can be passed.
            kwargs: Whatever the language model takes: use_cache, num_items_in_batch, ...

        Returns:
            What the language model returns: loss, logits (B, S, vocabulary), the cache, ...

        Raises:
            ValueError: Another number of placeholders than of visual tokens; both ids and embeddings, or neither; tiles
                of a wrong shape.
        """
        kwargs |= with_cache_name({"cache": cache, "past_key_values": past_key_values})
        if labels is not None and (placeholders := self._placeholders(input_ids, inputs_embeds)) is not None:
            labels = labels.masked_fill(placeholders.to(labels.device), -100)
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:  # some language models do not take it
            kwargs["logits_to_keep"] = logits_to_keep
        return self.language_model(
            inputs_embeds=self._embed(input_ids, inputs_embeds, pixel_values, image_features, kwargs.get(CACHE)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """What the language model reads, (B, S, E): the embeddings, visual tokens in the place of the placeholders."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if pixel_values is not None and image_features is not None:
            raise ValueError("pass either pixel_values or image_features")
        placeholders = self._placeholders(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        if image_features is not None or _is_first_step(cache, inputs_embeds.shape[1]):
            return self._with_visual_tokens(inputs_embeds, placeholders, image_features)
        return inputs_embeds

    def _supports_logits_to_keep(self) -> bool:
        return self.language_model._supports_logits_to_keep()

    def _placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
        """(B, S) booleans: where a visual token belongs; None if the id of the placeholder is not known."""
        image_token_id = self.config.image_token_id
        if image_token_id is None or (input_ids is None and inputs_embeds is None):
            return None
        if input_ids is not None and (inputs_embeds is None or input_ids.shape[1]):  # `generate` gives empty ones too
            return input_ids == image_token_id
        token = torch.tensor(image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _with_visual_tokens(
        self, inputs_embeds: torch.Tensor, placeholders: torch.Tensor | None, features: torch.Tensor | None
    ) -> torch.Tensor:
        if placeholders is None:
            if features is None:
                return inputs_embeds
            raise ValueError(
                "config.image_token_id is not known: set it to tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
            )
        self._check_count(placeholders.sum(), 0 if features is None else features.shape[:2].numel())
        if features is None:
            return inputs_embeds
        visual = features.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders.to(inputs_embeds.device)[..., None], visual)

    def _check_count(self, found: torch.Tensor, wanted: int) -> None:
        message = f"visual tokens, but another number of placeholders ({self.config.image_token})"
        if torch.compiler.is_compiling():  # a value cannot be read there; inductor on CPU aborts the process
            torch._assert_async(found == wanted, f"{wanted} {message}")
        elif found != wanted:
            raise ValueError(
                f"{found} placeholders ({self.config.image_token}, id {self.config.image_token_id}) in the input, "
                f"{wanted} visual tokens: expected {self.config.image_seq_length} placeholders for every tile"
            )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **with_cache_name(kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers' own; images are shown once, and kept out of the steps that follow."""
        if is_first_iteration is not None:  # transformers >= 5
            kwargs["is_first_iteration"] = is_first_iteration
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        read = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        is_first = is_first_iteration or _is_first_step(kwargs.get(CACHE), read.shape[1])  # an assistant is told False
        if is_first or (is_first_iteration is None and self._continues_with_images(inputs.get("input_ids"))):
            inputs |= {"pixel_values": pixel_values, "image_features": image_features}
        return inputs

    def _continues_with_images(self, input_ids: torch.Tensor | None) -> bool:
        """Whether a new turn with images follows a cache that was given; transformers >= 5 says so itself."""
        if input_ids is None or input_ids.shape[1] == 1:
            return False
        return bool((input_ids == self.config.image_token_id).any())

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As transformers' own, for beams and several answers; images are encoded once, and repeated prompt by prompt,
        since the tiles of a prompt must stay together."""
        pixel_values, features = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_features", None)
        if expand_size > 1 and (pixel_values is not None or features is not None):
            features = self.get_image_features(pixel_values) if features is None else features
            placeholders = self._placeholders(input_ids, model_kwargs.get("inputs_embeds"))
            self._check_count(placeholders.sum(), features.shape[:2].numel())
            features = _repeat_by_prompt(features, placeholders, expand_size)
            pixel_values = None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "pixel_values": pixel_values, "image_features": features}


class SAILVLModel(nn.Module):
    """
    A SAILVLForConditionalGeneration without the head of its language model: `model.base_model`. It has no weights of
    its own, and takes what the whole model takes, but for `labels` and `logits_to_keep`.
    """

    _tp_plan = _pp_plan = None  # read by transformers >= 5

    def __init__(self, whole: SAILVLForConditionalGeneration):
        super().__init__()
        self.training, self.config = whole.training, whole.config
        object.__setattr__(self, "whole", whole)  # not as a submodule
        self.vision_model, self.mlp1 = whole.vision_model, whole.mlp1
        self.language_model = whole.language_model.base_model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        cache: Any = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[torch.Tensor, ...]:
        """
        Return what the language model returns without its head: last_hidden_state (B, S, E), the cache, ...

        Raises:
            ValueError: As SAILVLForConditionalGeneration.forward does.
        """
        kwargs |= with_cache_name({"cache": cache, "past_key_values": past_key_values})
        embeds = self.whole._embed(input_ids, inputs_embeds, pixel_values, image_features, kwargs.get(CACHE))
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


def _is_empty(cache: Any) -> bool:
    return cache is None or cache.get_seq_length() == 0


def _is_first_step(cache: Any, length: int) -> bool:
    """Whether a forward of `length` positions begins a prompt. A static cache holds its length in a tensor, which is
    not read where that would synchronize every step or break a compiled graph."""
    return cache is None or (length > 1 and not torch.compiler.is_compiling() and _is_empty(cache))


def _concatenate_outputs(outputs: Sequence[BaseModelOutputWithPooling]) -> BaseModelOutputWithPooling:
    """Concatenate the outputs of micro-batches of tiles."""
    joined = {}
    for name in outputs[0]:
        parts = [output[name] for output in outputs]
        is_tensor = isinstance(parts[0], torch.Tensor)
        joined[name] = torch.cat(parts) if is_tensor else tuple(map(torch.cat, zip(*parts, strict=True)))
    return BaseModelOutputWithPooling(**joined)


def _repeat_by_prompt(features: torch.Tensor, placeholders: torch.Tensor, times: int) -> torch.Tensor:
    """(n, N, E), the tiles of prompts (B, S) -> (times * n, N, E): each prompt's tiles `times` times, in order."""
    tiles = (placeholders.sum(1) // features.shape[1]).tolist()
    return torch.cat([part for own in features.split(tiles) for part in [own] * times])


SAILVLForConditionalGeneration.register_for_auto_class("AutoModel")
SAILVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
SAILVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["SAILVLForConditionalGeneration"]
