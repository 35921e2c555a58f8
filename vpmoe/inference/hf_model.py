"""Loads the student into transformers: the reference implementation that vLLM's is compared with."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from vpmoe.model import hf_export
from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.modeling_vpmoe import VpmoeForCausalLM
from vpmoe.model.shapes import Shape


def register() -> None:
    """Register the student with AutoConfig and AutoModelForCausalLM. Idempotent."""
    AutoConfig.register(VpmoeConfig.model_type, VpmoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(VpmoeConfig, VpmoeForCausalLM, exist_ok=True)


def load_student(folder: Path, shape: Shape) -> VpmoeForCausalLM:
    """The student in `folder`, in its stored dtype and in evaluation mode.

    Raises Permanent as hf_export.check_export does.
    """
    hf_export.check_export(folder, shape)
    register()
    model: VpmoeForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model
