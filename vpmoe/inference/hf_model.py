"""The student in transformers: the reference implementation that vLLM's is compared with.

It is Qwen3's model (grouped-query attention with norms on queries and keys, RMSNorm, half-rotated RoPE, no
biases, untied embeddings) with other feed-forward layers.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

from vpmoe.inference import hf_config
from vpmoe.inference.hf_config import StudentConfig
from vpmoe.inference.layers import feed_forward
from vpmoe.model import hf_export
from vpmoe.model.shapes import Shape


class VpmoeForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    config_class = StudentConfig
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mlp = feed_forward(config, number)
        self.post_init()


def register() -> None:
    """Register the student with AutoModelForCausalLM. Idempotent."""
    hf_config.register()
    AutoModelForCausalLM.register(StudentConfig, VpmoeForCausalLM, exist_ok=True)


def load_student(folder: Path, shape: Shape) -> VpmoeForCausalLM:
    """The student in `folder`, in its stored dtype and in evaluation mode.

    Raises Permanent as hf_export.check_export does.
    """
    hf_export.check_export(folder, shape)
    register()
    model: VpmoeForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model
