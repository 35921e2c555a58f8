"""The student in transformers: the reference that vLLM is measured by, and the model of evaluations.

Qwen3's model is the student but for its feed-forward parts: grouped-query attention with norms on queries and keys, RMSNorm, RoPE in
halves, no biases, embeddings apart from the output. Those parts are replaced by ours.
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
    """Let AutoModelForCausalLM know the student. Idempotent."""
    hf_config.register()
    AutoModelForCausalLM.register(StudentConfig, VpmoeForCausalLM, exist_ok=True)


def load(folder: Path, shape: Shape) -> VpmoeForCausalLM:
    """The student in `folder`, in the type that it was exported in, ready to be asked. Raises Permanent as weights.check does."""
    hf_export.check_export(folder, shape)
    register()
    model: VpmoeForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model
