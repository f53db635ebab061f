"""
SAILViT vision encoder (arXiv 2507.01643) and SAIL-VL multimodal model for transformers.

`import sailvit` registers the classes with transformers' Auto classes, so models load without `trust_remote_code`.
This file is not part of a model folder on the Hub; it does nothing unless imported as the package `sailvit`.
"""

if __package__ == "sailvit":
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from .configuration_sailvit import SAILViTConfig
    from .configuration_sailvl import SAILVLConfig
    from .image_processing_sailvit import SAILViTImageProcessor, choose_tile_grid
    from .modeling_sailvit import SAILViTBackbone, SAILViTForImageClassification, SAILViTModel, pixel_shuffle
    from .modeling_sailvl import SAILVLForConditionalGeneration
    from .processing_sailvl import SAILVLProcessor

    AutoConfig.register("sailvit", SAILViTConfig)
    AutoModel.register(SAILViTConfig, SAILViTModel)
    AutoModelForImageClassification.register(SAILViTConfig, SAILViTForImageClassification)
    AutoBackbone.register(SAILViTConfig, SAILViTBackbone)
    AutoConfig.register("sailvl", SAILVLConfig)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto_class.register(SAILVLConfig, SAILVLForConditionalGeneration)
    AutoProcessor.register(SAILVLConfig, SAILVLProcessor)
    try:
        from transformers import AutoModelForMultimodalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    except ImportError:  # transformers < 5.0
        pass
    else:
        AutoModelForMultimodalLM.register(SAILVLConfig, SAILVLForConditionalGeneration)
        # The server and the pipelines of transformers look for names here, where `register` writes none.
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["sailvl"] = SAILVLForConditionalGeneration.__name__
    for config_class in (SAILViTConfig, SAILVLConfig):
        try:
            AutoImageProcessor.register(config_class, image_processor_classes={"torchvision": SAILViTImageProcessor})
        except TypeError:  # transformers < 5.4 would warn about slow and fast processors at every load
            from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

            IMAGE_PROCESSOR_MAPPING.register(config_class, (SAILViTImageProcessor, None))

    __version__ = "0.1.0"
    __all__ = [
        "SAILVLConfig",
        "SAILVLForConditionalGeneration",
        "SAILVLProcessor",
        "SAILViTBackbone",
        "SAILViTConfig",
        "SAILViTForImageClassification",
        "SAILViTImageProcessor",
        "SAILViTModel",
        "choose_tile_grid",
        "pixel_shuffle",
    ]
