"""Toy SAIL-VL releases, and a reference model with the same weights built from transformers components."""

import json
from pathlib import Path

import torch
from conftest import TINY_SHAPE, published_config, randomize
from einops import rearrange
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CONFIG_MAPPING, Aimv2VisionConfig, Aimv2VisionModel, AutoModelForCausalLM, AutoTokenizer

from sailvit import SAILViTConfig, SAILViTModel
from sailvit.convert.export.runtimes import transformers_config
from sailvit.convert.models.aimv2_state_dict import convert_tensors


IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
# The system turn of the releases, and the placeholders of one tile of the toy model.
SYSTEM = (
    "<|im_start|>system\n"
    "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。<|im_end|>"
)
TILE = "<IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT>"
CORPUS = [
    "What is the total?",
    "Describe the image. Answer with one word.",
    "The total is 42.",
    "Image-1: Frame-1:",
] * 8
LANGUAGE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
# As small as it can be, for checkpoints that are stored in tests/data.
SMALLEST = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    "llm_config": {"hidden_size": 16, "intermediate_size": 24},
}
LANGUAGES = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
}


def write_tokenizer(folder: Path, image_tokens: bool = True) -> Path:
    """Write a byte-level BPE tokenizer of a few hundred tokens, in the file layout of Qwen2 and the releases."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.model.save(str(folder))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(IMAGE_TOKENS if image_tokens else [])]
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            str(first + index): {"content": token, **flags} for index, token in enumerate(special)
        },
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 8192,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({token: first + i for i, token in enumerate(special)}))
    return folder


def load_tokenizer(folder: Path):
    """
    Return the toy tokenizer with a decoder that joins the vocabulary entries.

    A random model generates bytes that are not valid UTF-8; the normal decoder would turn all of them into "\ufffd".
    """
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder))
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


class RecordingTokenizer:
    """A tokenizer that records the prompts it is called with."""

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def __call__(self, prompts, **options):
        self.prompts += prompts
        return self.tokenizer(prompts, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def released_config(language: str = "qwen2", tied: bool = False) -> dict:
    """Return the config.json of a release, with all its fields, old keys included."""
    old = {"_name_or_path": "/mnt/somebody/ckpt", "torch_dtype": "bfloat16", "transformers_version": "4.37.2"}
    generation = {"max_length": 20, "do_sample": False, "temperature": 1.0, "top_k": 50, "num_beams": 1}
    text = {**LANGUAGES[language], **LANGUAGE, **old, **generation, "tie_word_embeddings": tied, "use_cache": True}
    vision = {
        **published_config("sailvit"),
        **old,
        **generation,
        "auto_map": {"AutoModel": "modeling_aimv2.AIMv2Model"},
    }
    return {
        "architectures": ["SailVLModel"],
        "auto_map": {"AutoConfig": "configuration_sailvl.SailVLConfig", "AutoModel": "modeling_sailvl.SailVLModel"},
        "model_type": "internvl_chat",
        "vision_config": {**vision, "attn_implementation": "flash_attention_2", "use_flash_attn": True},
        "llm_config": {**text, "attn_implementation": "flash_attention_2"},
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "ps_version": "v2",
        "template": "sailvl-chat",
        "force_image_size": TINY_SHAPE.grid_size * TINY_SHAPE.patch_size,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": None,
    }


def released_tensors(config: dict, seed: int = 0, attentive: bool = False) -> dict[str, torch.Tensor]:
    """
    Return random weights under the released names, without a tied head.

    A random language model depends mostly on its last token. With `attentive` its answer depends on the image, and it
    generates only tokens of the tokenizer.
    """
    tower = randomize(SAILViTModel(SAILViTConfig(**_fields(config["vision_config"]))), seed)
    language = randomize(_language_model(config["llm_config"]), seed + 1)
    width, factor = config["llm_config"]["hidden_size"], round(1 / config["downsample_ratio"])
    shuffled = factor**2 * config["vision_config"]["hidden_size"]
    connector = randomize(_connector(shuffled, width), seed + 2)
    tensors = {}
    for prefix, part in (("vision_model", tower), ("mlp1", connector), ("language_model", language)):
        tensors |= {f"{prefix}.{name}": tensor.contiguous() for name, tensor in part.state_dict().items()}
    if config["llm_config"]["tie_word_embeddings"]:
        del tensors["language_model.lm_head.weight"]
    if attentive:
        for name, tensor in tensors.items():
            if name.startswith("language_model.") and ".self_attn." in name:
                tensor.mul_(0 if name.endswith("bias") else 2)
        tensors["language_model.lm_head.weight"][316:] = 0
    return tensors


def write_release(
    folder: Path,
    language: str = "qwen2",
    tied: bool = False,
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
    attentive: bool = False,
    smallest: bool = False,
    factor: int = 2,
) -> Path:
    """Write a SAIL-VL release of toy size: sharded weights, config.json, tokenizer; no processor, no code."""
    config = released_config(language, tied) | {"downsample_ratio": 1 / factor}
    if smallest:
        for part, sizes in SMALLEST.items():
            config[part] |= sizes
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in released_tensors(config, attentive=attentive).items()}
    names = sorted(tensors)  # language_model, mlp1, vision_model
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        own = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _fields(config: dict) -> dict:
    old = ("model_type", "architectures", "_name_or_path", "torch_dtype", "transformers_version", "auto_map")
    return {key: value for key, value in config.items() if key in SAILViTConfig().to_dict() and key not in old}


def _language_model(config: dict) -> nn.Module:
    kept = {**{key: config[key] for key in LANGUAGE}, "tie_word_embeddings": config["tie_word_embeddings"]}
    if "head_dim" in config:
        kept["head_dim"] = config["head_dim"]
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**kept))


def _connector(shuffled: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(shuffled), nn.Linear(shuffled, width), nn.GELU(), nn.Linear(width, width))


class ReferenceModel:
    """Reference SAIL-VL: transformers' Aimv2VisionModel, an nn.Sequential and a causal language model."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor], image_token_id: int):
        fields = {**_fields(config["vision_config"]), "pos_embed_type": "absolute"}
        self.tower = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(fields))).eval()
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
        self.tower.load_state_dict(convert_tensors(own, "transformers"), strict=True)
        width, shuffled = config["llm_config"]["hidden_size"], 4 * config["vision_config"]["hidden_size"]
        self.connector = _connector(shuffled, width)
        self.connector.load_state_dict(_strip_prefix(tensors, "mlp1."), strict=True)
        self.language = _language_model(config["llm_config"]).eval()
        weights = _strip_prefix(tensors, "language_model.")
        if config["llm_config"]["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.language.load_state_dict(weights, strict=True)
        self.image_token_id = image_token_id

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        embeds = self.language.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        tokens = self.tower(pixel_values).last_hidden_state
        side = round(tokens.shape[1] ** 0.5)
        tokens = rearrange(tokens, "b (h p w q) c -> b (h w) (p q c)", h=side // 2, w=side // 2, p=2, q=2)
        embeds = embeds.clone()
        embeds[input_ids == self.image_token_id] = self.connector(tokens).flatten(0, 1)
        return embeds

    @torch.no_grad()
    def logits(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.language(inputs_embeds=self.embed(input_ids, pixel_values), attention_mask=mask).logits

    def greedy(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, tokens: int) -> list[int]:
        """Decode one prompt greedily, without cache and without `generate`."""
        for _ in range(tokens):
            next_token = self.logits(input_ids, pixel_values)[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, next_token], 1)
        return input_ids[0, -tokens:].tolist()

    def answer(self, tokenizer, prompt: str, pixel_values: torch.Tensor | None = None, tokens: int = 6) -> str:
        """Return the greedy answer to a prompt as text, up to the end of the turn."""
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = self.greedy(ids, pixel_values, tokens)
        if (end := tokenizer.convert_tokens_to_ids("<|im_end|>")) in written:
            written = written[: written.index(end)]
        return tokenizer.decode(written, skip_special_tokens=True).strip()


def _strip_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
