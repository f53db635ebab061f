# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
SAIL-VL multimodal model (arXiv 2507.01643, 2509.14033): vision encoder (vision tower), connector and language model.

    vision:     tiles -> vision encoder -> patch tokens
    connector:  patch tokens -> pixel shuffle (f x f) -> LayerNorm, Linear, GELU, Linear -> visual tokens
    language:   input_ids -> embeddings, with visual tokens at the <IMG_CONTEXT> positions -> language model -> logits

Works with any vision encoder of AutoModel and any AutoModelForCausalLM. Parameter names are those of the released
SAIL-VL checkpoints: vision_model, mlp1, language_model.

Shapes: B prompts, S tokens of a prompt, n tiles of all prompts, h and w the height and width of a tile in pixels, N
visual tokens of a tile, D width of the vision encoder, f pixel shuffle factor, E width of the language model.
"""

import copy
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
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import is_flash_attn_2_available, logging

from .chat_sailvl import SAILVLChat
from .configuration_sailvl import SAILVLConfig
from .modeling_sailvit import SAILViTModel, pixel_shuffle


logger = logging.get_logger(__name__)

# Names of the key-value cache argument; "cache" since transformers 5.24.
CACHE_NAMES = ("cache", "past_key_values")
_GENERATION_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next((name for name in CACHE_NAMES if name in _GENERATION_ARGUMENTS), CACHE_NAMES[-1])


# Modules that a quantization leaves as they are, unless its settings list modules themselves.
UNQUANTIZED = ("vision_model", "mlp1", "language_model.lm_head")
# Names of that list in the settings of bitsandbytes, and of torchao and others.
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def with_unquantized_modules(quantization: Any) -> Any:
    """
    Return a copy of a `quantization_config`, object or dict, that quantizes the language model only.

    A list of modules in the settings, even an empty one, is kept as it is.
    """
    if isinstance(quantization, Mapping):
        quantization = AutoQuantizationConfig.from_dict(dict(quantization))
    quantization = copy.deepcopy(quantization)
    for name in _SKIP_LISTS:
        if getattr(quantization, name, ()) is None:
            setattr(quantization, name, list(UNQUANTIZED))
    return quantization


def with_cache_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Rename the key-value cache in `arguments` to its name in the installed transformers.

    Raises:
        ValueError: A cache is given under both names.
    """
    given = [name for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two names of one argument: pass one of them")
    renamed = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return renamed | ({CACHE: arguments[given[0]]} if given else {})


class SAILVLForConditionalGeneration(SAILVLChat, PreTrainedModel, GenerationMixin):
    """
    Vision encoder, connector and language model, with `generate` of transformers and `chat` of the releases.

    Attributes:
        always_run_vision: Run vision encoder and connector in a forward pass without images, too, on one tile of zeros
            whose output is multiplied by 0. It adds no token and changes neither logits nor loss; gradients of vision
            encoder and connector are then 0 instead of missing. Switched on by trainers, since data-parallel ranks must
            run the same modules in every step.
    """

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
    always_run_vision = False

    def __init__(self, config: SAILVLConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        is_sailvit = vision.model_type == SAILViTModel.config_class.model_type
        self.vision_model = SAILViTModel._from_config(vision) if is_sailvit else AutoModel.from_config(vision)
        if config.select_layer != -1:  # some vision encoders of transformers 4.57 do not accept it as an argument
            self.vision_model.config.output_hidden_states = True
        shuffled_size = config.pixel_shuffle_factor**2 * vision.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled_size),
            nn.Linear(shuffled_size, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.language_model = AutoModelForCausalLM.from_config(text)
        if isinstance(
            self.language_model._tied_weights_keys, list
        ):  # transformers < 5 reads only the top-level model's
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
        As in transformers, plus the arguments that evaluation harnesses and the InternVL model cards pass.

        Args:
            quantization_config: Quantizes the language model without its LM head, unless it lists the modules to skip
                itself (`llm_int8_skip_modules`, `modules_to_not_convert`).
            load_in_8bit, load_in_4bit: Quantize with bitsandbytes; transformers >= 5 removed these arguments.
            use_flash_attn: Use FlashAttention 2 if it is installed, as in the InternVL model cards.

        Raises:
            ValueError: A shard is missing or corrupt, the checkpoint is not a SAIL-VL, bitsandbytes cannot compute its
                widths, or the quantization is given twice.
        """
        if load_in_8bit or load_in_4bit:
            if kwargs.get("quantization_config") is not None:
                raise ValueError(
                    "expected load_in_8bit or load_in_4bit, or a quantization_config, got both: leave one of them out"
                )
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_unquantized_modules(kwargs["quantization_config"])
        if use_flash_attn and is_flash_attn_2_available():
            kwargs.setdefault("attn_implementation", "flash_attention_2")
        elif use_flash_attn:
            logger.warning_once("use_flash_attn=True, but flash-attn is not installed: using the default attention")
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except FileNotFoundError as error:
            raise ValueError(f"{error}: the checkpoint is incomplete; download this file") from error
        except SafetensorError as error:
            name = args[0] if args else cls.__name__
            raise ValueError(
                f"{name}: a weight file is truncated or corrupt ({error}): find it with `sailvit inspect` and "
                "re-download it"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model, "is_loaded_in_4bit", False):
            _check_4_bit_widths(model)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers.

        Raises:
            ValueError: bitsandbytes has rounded the scales of its 4-bit weights for a kernel, and would save those.
        """
        for name, module in self.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: expected 4-bit weights as they were loaded, got what bitsandbytes rounded and packed as "
                    "the model ran on this CPU: load the model again, and save it before it runs"
                )
        return super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the connector; vision encoder and language model initialize themselves."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def img_context_token_id(self) -> int | None:
        """`config.image_token_id`, under its name in the releases."""
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
        """The model without the LM head, for trainers that compute the loss themselves."""
        return SAILVLModel(self)

    @property
    def model(self) -> "SAILVLModel":
        """`base_model`, under its name in the multimodal models of transformers 4."""
        return self.base_model

    @property
    def num_image_token(self) -> int:
        """Visual tokens per tile, under its name in InternVL."""
        return self.config.image_seq_length

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`get_image_features`, under its name in InternVL."""
        return self.get_image_features(pixel_values)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        return_dict: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> torch.Tensor | BaseModelOutputWithPooling:
        """
        Return the visual tokens of tiles: the outputs of vision encoder and connector.

        The vision encoder processes `config.vision_batch_size` tiles at a time. During training it processes all tiles
        at once: their activations are kept anyway, and all ranks must call it equally often.

        Args:
            pixel_values: (n, channels, h, w), any float dtype.
            return_dict: Return an object instead of the tensor, like the models of transformers.
            output_hidden_states, output_attentions: Also return those of the vision encoder, in that object.

        Returns:
            (n, N, E); or an object with pooler_output (n, N, E), and last_hidden_state, hidden_states and attentions of
            the vision encoder.

        Raises:
            ValueError: The tiles do not have the shape and size that the vision encoder expects.
        """
        self._check_pixel_values(pixel_values)
        batch_size = len(pixel_values) if self.training else self.config.vision_batch_size
        batches = pixel_values.split(batch_size)
        if return_dict or output_hidden_states or output_attentions:
            options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            return _concatenate_outputs([self._run_vision_and_connector(batch, **options) for batch in batches])
        if len(batches) == 1:
            return self._encode_tiles(pixel_values)
        return self._encode_in_batches(batches)

    def _check_pixel_values(self, pixel_values: Any) -> None:
        expected = (self.config.vision_config.num_channels, *self._tile_size())
        if not (
            isinstance(pixel_values, torch.Tensor)
            and tuple(pixel_values.shape[1:]) == expected
            and len(pixel_values)
            and pixel_values.is_floating_point()
        ):
            dtype, shape = (getattr(pixel_values, key, "unknown") for key in ("dtype", "shape"))
            raise ValueError(
                f"pixel_values must be a tensor of floats of shape (tiles, {', '.join(map(str, expected))}), as "
                f"returned by the processor; got a {type(pixel_values).__name__}, dtype {dtype}, shape {shape}"
            )

    def _encode_in_batches(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Encode micro-batches into one preallocated tensor: torch.cat would need its memory twice."""
        first = self._encode_tiles(batches[0])
        features, end = first.new_empty(sum(map(len, batches)), *first.shape[1:]), len(first)
        features[:end] = first
        del first
        for batch in batches[1:]:
            features[end : end + len(batch)] = self._encode_tiles(batch)
            end += len(batch)
        return features

    def _encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return self._run_vision_and_connector(tiles).pooler_output

    def _run_vision_and_connector(self, tiles: torch.Tensor, **options: bool) -> BaseModelOutputWithPooling:
        """Run vision encoder and connector on (n, channels, h, w); pooler_output is the output of the connector."""
        layer, (rows, columns) = self.config.select_layer, self.config.grid_size
        tiles = tiles.to(self.vision_model.dtype)
        if self.vision_model.device.type != "meta":  # an offloaded vision encoder moves its input itself
            tiles = tiles.to(self.vision_model.device)
        output = self.vision_model(pixel_values=tiles, **{name: True for name, is_set in options.items() if is_set})
        tokens = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        tokens = tokens[:, tokens.shape[1] - rows * columns :]  # drop class token and registers, which come first
        shuffled = pixel_shuffle(tokens, (rows, columns), self.config.pixel_shuffle_factor)
        features = self.mlp1(shuffled.to(next(self.mlp1.parameters()).dtype))
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
        tile_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids: (B, S), with `config.image_token_id` at the position of every visual token, tile after tile.
            pixel_values: (n, channels, h, w), the tiles of all prompts, in order.
            attention_mask, position_ids: Passed to the language model.
            past_key_values, cache: The key-value cache, under either of its names in transformers.
            inputs_embeds: (B, S, E) instead of `input_ids`, with the embedding of `config.image_token_id` at the
                position of every visual token.
            labels: (B, S) token ids; positions of visual tokens are ignored, like -100.
            image_features: (n, N, E) instead of `pixel_values`: the output of `get_image_features`.
            logits_to_keep: Number of last positions, or the positions, to compute logits for; 0 for all.
            mm_token_type_ids: (B, S) from the processor; unused, accepted so that its whole output can be passed.
            tile_indices: (m,) integers: for every tile that the prompts show, in their order, its index among the n
                tiles. A tile that is shown several times is encoded once. Default: each is shown once, in order.
            kwargs: Passed to the language model: use_cache, num_items_in_batch, ...

        Returns:
            The output of the language model: loss, logits (B, S, vocabulary), the cache, ...

        Raises:
            ValueError: The numbers of placeholders and visual tokens differ; both or neither of `input_ids` and
                `inputs_embeds` are given; the tiles have a wrong shape; `tile_indices` are not indices of tiles; visual
                tokens and input embeddings have different widths.
        """
        kwargs |= with_cache_name({"cache": cache, "past_key_values": past_key_values})
        if labels is not None and (placeholders := self._placeholders(input_ids, inputs_embeds)) is not None:
            labels = labels.masked_fill(placeholders.to(labels.device), -100)
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:  # some language models lack this argument
            kwargs["logits_to_keep"] = logits_to_keep
        vision = (pixel_values, image_features, tile_indices)
        return self.language_model(
            inputs_embeds=self._embed(input_ids, inputs_embeds, *vision, kwargs.get(CACHE)),
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
        tile_indices: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """Return the input embeddings (B, S, E), with visual tokens at the positions of the placeholders."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if pixel_values is not None and image_features is not None:
            raise ValueError("pass either pixel_values or image_features")
        placeholders = self._placeholders(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        if tile_indices is not None:
            image_features = _select_tiles(image_features, tile_indices)
        is_first = _is_first_step(cache, inputs_embeds.shape[1])
        if image_features is None and is_first and self.always_run_vision:
            inputs_embeds = inputs_embeds + self._zero_of_vision(inputs_embeds)
        if image_features is not None or is_first:
            return self._with_visual_tokens(inputs_embeds, placeholders, image_features)
        return inputs_embeds

    def _zero_of_vision(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Return 0, computed from the visual tokens of a tile of zeros."""
        tile = inputs_embeds.new_zeros(1, self.config.vision_config.num_channels, *self._tile_size())
        features = self.get_image_features(tile)
        return (0.0 * features).sum().to(inputs_embeds.device, inputs_embeds.dtype)  # a sum in fp16 may overflow

    def _supports_logits_to_keep(self) -> bool:
        return self.language_model._supports_logits_to_keep()

    def _placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
        """Return the mask (B, S) of placeholder positions; None if `config.image_token_id` is not set."""
        image_token_id = self.config.image_token_id
        if image_token_id is None or (input_ids is None and inputs_embeds is None):
            return None
        if input_ids is not None and (inputs_embeds is None or input_ids.shape[1]):  # `generate` may pass empty ones
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
                "config.image_token_id is None: set it to tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
            )
        self._check_count(placeholders.sum(), 0 if features is None else features.shape[:2].numel())
        if features is None:
            return inputs_embeds
        if features.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"visual tokens of width {features.shape[-1]}, input embeddings of width {inputs_embeds.shape[-1]}: "
                "expected the same (hidden_size of the language model)"
            )
        visual = features.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders.to(inputs_embeds.device)[..., None], visual)

    def _check_count(self, num_placeholders: torch.Tensor, num_visual_tokens: int) -> None:
        if torch.compiler.is_compiling():  # the value of a tensor is unknown here; inductor on CPU aborts the process
            message = (
                f"{num_visual_tokens} visual tokens, but another number of placeholders ({self.config.image_token})"
            )
            torch._assert_async(num_placeholders == num_visual_tokens, message)
        elif num_placeholders != num_visual_tokens:
            raise ValueError(
                f"{num_placeholders} placeholders ({self.config.image_token}, id {self.config.image_token_id}) in the "
                f"input, {num_visual_tokens} visual tokens: expected {self.config.image_seq_length} per tile"
            )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if "tokenizer" in kwargs:  # of stop strings; the server of transformers gives the processor
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        return super().generate(*args, **with_cache_name(kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = None,
        tile_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; images are passed in the first step only."""
        if is_first_iteration is not None:  # transformers >= 5
            kwargs["is_first_iteration"] = is_first_iteration
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        step = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        # in assisted generation is_first_iteration is False even for the first step
        is_first = is_first_iteration or _is_first_step(kwargs.get(CACHE), step.shape[1])
        if is_first or (is_first_iteration is None and self._continues_with_images(inputs.get("input_ids"))):
            inputs |= {"pixel_values": pixel_values, "image_features": image_features, "tile_indices": tile_indices}
        return inputs

    def _continues_with_images(self, input_ids: torch.Tensor | None) -> bool:
        """Return whether a turn with images follows a given cache; transformers >= 5 passes is_first_iteration."""
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
        """
        As in transformers, for beam search and several answers per prompt.

        Images are encoded once; their visual tokens are repeated prompt by prompt, which keeps the tiles of a prompt
        together.
        """
        names = ("pixel_values", "image_features", "tile_indices")
        pixel_values, features, tile_indices = (model_kwargs.pop(name, None) for name in names)
        if expand_size > 1 and (pixel_values is not None or features is not None):
            features = self.get_image_features(pixel_values) if features is None else features
            features = features if tile_indices is None else _select_tiles(features, tile_indices)
            placeholders = self._placeholders(input_ids, model_kwargs.get("inputs_embeds"))
            self._check_count(placeholders.sum(), features.shape[:2].numel())
            features = _repeat_by_prompt(features, placeholders, expand_size)
            pixel_values = tile_indices = None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | dict(zip(names, (pixel_values, features, tile_indices), strict=True))


class SAILVLModel(nn.Module):
    """
    SAILVLForConditionalGeneration without the LM head, as returned by `model.base_model`.

    It shares the weights of the full model and takes the same arguments, except `labels` and `logits_to_keep`.
    """

    _tp_plan = _pp_plan = None  # read by transformers >= 5

    def __init__(self, full_model: SAILVLForConditionalGeneration):
        super().__init__()
        self.training, self.config = full_model.training, full_model.config
        object.__setattr__(self, "full_model", full_model)  # not as a submodule
        self.vision_model, self.mlp1 = full_model.vision_model, full_model.mlp1
        self.language_model = full_model.language_model.base_model

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
        tile_indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[torch.Tensor, ...]:
        """
        Return the output of the language model without its LM head: last_hidden_state (B, S, E), the cache, ...

        Raises:
            ValueError: As in SAILVLForConditionalGeneration.forward.
        """
        kwargs |= with_cache_name({"cache": cache, "past_key_values": past_key_values})
        vision = (pixel_values, image_features, tile_indices)
        embeds = self.full_model._embed(input_ids, inputs_embeds, *vision, kwargs.get(CACHE))
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


def _check_4_bit_widths(model: nn.Module) -> None:
    """Raise ValueError for 4-bit weights that the CPU kernels of bitsandbytes (0.50) dequantize wrongly."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ != "Params4bit" or weight.device.type != "cpu":
            continue
        if module.in_features % weight.blocksize:
            raise ValueError(
                f"{name}: expected an input width that is a multiple of {weight.blocksize}, got {module.in_features}: "
                "bitsandbytes computes others wrongly in 4 bit on a CPU; load the model in 8 bit, or on a GPU"
            )


def _is_empty(cache: Any) -> bool:
    return cache is None or cache.get_seq_length() == 0


def _is_first_step(cache: Any, length: int) -> bool:
    """
    Return whether a forward of `length` tokens is the first of a prompt.

    A static cache holds its length in a tensor; it is not read where that would synchronize every step or break a
    compiled graph.
    """
    return cache is None or (length > 1 and not torch.compiler.is_compiling() and _is_empty(cache))


def _concatenate_outputs(outputs: Sequence[BaseModelOutputWithPooling]) -> BaseModelOutputWithPooling:
    """Concatenate the outputs of micro-batches of tiles."""
    concatenated = {}
    for name in outputs[0]:
        values = [output[name] for output in outputs]
        is_tensor = isinstance(values[0], torch.Tensor)
        concatenated[name] = torch.cat(values) if is_tensor else tuple(map(torch.cat, zip(*values, strict=True)))
    return BaseModelOutputWithPooling(**concatenated)


def _select_tiles(features: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor:
    """Return the visual tokens (m, N, E) of the tiles with the `indices` (m,)."""
    if features is None:
        raise ValueError("tile_indices needs the tiles: pass pixel_values or image_features, too")
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        shape = tuple(indices.shape)
        raise ValueError(f"tile_indices: expected integers of shape (tiles shown,), got {indices.dtype}, shape {shape}")
    if len(indices) and not torch.compiler.is_compiling():
        least, most = indices.aminmax()
        if least < 0 or most >= len(features):
            raise ValueError(f"tile_indices: expected 0 to {len(features) - 1}, got {least} to {most}")
    return features[indices.to(features.device)]


def _repeat_by_prompt(features: torch.Tensor, placeholders: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat the visual tokens (n, N, E) of each prompt (B, S) `times` times, in order: (times * n, N, E)."""
    num_tiles = (placeholders.sum(1) // features.shape[1]).tolist()
    return torch.cat([repeat for prompt in features.split(num_tiles) for repeat in [prompt] * times])


SAILVLForConditionalGeneration.register_for_auto_class("AutoModel")
SAILVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
SAILVLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["SAILVLForConditionalGeneration"]
