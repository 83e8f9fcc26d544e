"""Shapes of published models: what their makers' config.json says that decides sizes, where it is not a default.

Models are never downloaded for these: a shape with another's tokenizer is all that `plan` reads. Values are those of
the config.json of the model's repository on the Hugging Face hub, read in stored copies of it or of its derivatives; a
test compares the number of parameters with the published one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> Any:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }


@dataclass(frozen=True)
class Published:
    """A published model.

    Args:
        model_type: Its architecture in transformers.
        billions: Billions of parameters, as published.
        settings: Values of its config.json that differ from the defaults of transformers and decide sizes.
        context: Number of positions; it takes no memory, so that it need not be the published one.
        elsewhere: Billions of its parameters that transformers does not load, such as a layer for more tokens.
    """

    model_type: str
    billions: float
    settings: dict[str, Any] = field(default_factory=dict)
    context: int = 131_072
    elsewhere: float = 0.0

    def config(self) -> Any:
        """The configuration of transformers."""
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.model_type, **{"dtype": "bfloat16"} | self.settings)
        config.get_text_config().max_position_embeddings = self.context
        return config

    def write(self, folder: Path, tokenizer: Path) -> Path:
        """Write the configuration and another model's tokenizer to a folder, unless they are there.

        Args:
            folder: Folder to write.
            tokenizer: Folder of the tokenizer.
        """
        from transformers import AutoTokenizer

        if not (folder / "config.json").is_file():
            self.config().save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return folder


_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_NEMOTRON = {"M": "mamba", "E": "moe", "*": "attention"}

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Published(
        "llama", 0.135, _sizes(576, 1536, 30, 9, 3, 49_152) | {"tie_word_embeddings": True}
    ),
    "HuggingFaceTB/SmolLM2-360M": Published(
        "llama", 0.362, _sizes(960, 2560, 32, 15, 5, 49_152) | {"tie_word_embeddings": True}
    ),
    "HuggingFaceTB/SmolLM3-3B": Published("smollm3", 3.08),
    "LiquidAI/LFM2-1.2B": Published(
        "lfm2",
        1.17,
        _sizes(2048, 12_288, 16, 32, 8, 65_536)
        | {"layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]},
    ),
    "Qwen/Qwen2.5-7B-Instruct": Published("qwen2", 7.62, _sizes(3584, 18_944, 28, 28, 4, 152_064)),
    "Qwen/Qwen3-8B": Published("qwen3", 8.19, _sizes(4096, 12_288, 36, 32, 8, 151_936)),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Published(
        "qwen3_moe", 30.5, {"num_hidden_layers": 48, "num_experts": 128, "head_dim": 128}
    ),
    "Qwen/Qwen3.5-9B": Published("qwen3_5", 9.65, {"vision_config": {"out_hidden_size": 4096}}, elsewhere=0.24),
    "allenai/Olmo-3-7B-Instruct": Published("olmo3", 7.30, {"vocab_size": 100_278}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Published("qwen2", 7.62, _sizes(3584, 18_944, 28, 28, 4, 152_064)),
    "google/gemma-3-4b-it": Published(
        "gemma3",
        4.30,
        {
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "num_hidden_layers": 34,
                "sliding_window": 1024,
            },
            "vision_config": _SIGLIP | {"image_size": 896, "patch_size": 14, "vision_use_head": False},
        },
    ),
    "google/gemma-4-E4B-it": Published(
        "gemma4",
        8.0,
        {
            "text_config": _sizes(2560, 10_240, 42, 8, 2, 262_144)
            | {"num_kv_shared_layers": 18, "final_logit_softcapping": 30.0},
            "vision_config": {},
            "audio_config": {},
        },
        elsewhere=0.055,  # keys and values of layers that share those of another
    ),
    "ibm-granite/granite-4.0-h-tiny": Published(
        "granitemoehybrid",
        6.94,
        _sizes(1536, 512, 40, 12, 4, 100_352)
        | {"layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)], "tie_word_embeddings": True}
        | {"num_local_experts": 64, "num_experts_per_tok": 6, "shared_intermediate_size": 1024}
        | {"mamba_n_heads": 48, "mamba_d_state": 128},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Published("llama", 8.03, _sizes(4096, 14_336, 32, 32, 8, 128_256)),
    "meta-llama/Llama-3.2-1B": Published(
        "llama",
        1.24,
        _sizes(2048, 8192, 16, 32, 8, 128_256) | {"head_dim": 64, "tie_word_embeddings": True},
        context=2**20,
    ),
    "meta-llama/Llama-3.3-70B-Instruct": Published("llama", 70.6, _sizes(8192, 28_672, 80, 64, 8, 128_256)),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": Published(
        "llama4",
        109.0,
        {"vision_config": {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096}},
    ),
    "microsoft/phi-4": Published("phi3", 14.7, _sizes(5120, 17_920, 40, 40, 10, 100_352) | {"pad_token_id": None}),
    "mistralai/Mistral-Small-24B-Instruct-2501": Published(
        "mistral",
        23.6,
        _sizes(5120, 32_768, 40, 32, 8, 131_072) | {"head_dim": 128, "sliding_window": None},
    ),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": Published("mistral3", 24.0, {"tie_word_embeddings": False}),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Published(
        "nemotron_h",
        31.6,
        {
            "hidden_size": 2688,
            "layers_block_type": [_NEMOTRON[kind] for kind in "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"],
            "num_key_value_heads": 2,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
        },
    ),
    "openai/gpt-oss-20b": Published("gpt_oss", 20.9, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "tiiuae/Falcon-H1-1.5B-Instruct": Published(
        "falcon_h1",
        1.55,
        _sizes(2048, 4608, 24, 8, 2, 65_537)
        | {"head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_chunk_size": 128},
    ),
    "zai-org/GLM-4.5-Air": Published("glm4_moe", 110.5, {"attention_bias": True, "head_dim": 128}, elsewhere=3.6),
}
