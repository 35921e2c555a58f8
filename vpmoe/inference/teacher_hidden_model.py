"""GPT-OSS in vLLM without its output matrix: final hidden states stay on the device, each where its request
says.

vLLM's own token-wise pooling widens hidden states to fp32 and copies every document to the host, which at
60,000 tokens a second of 2,880 numbers takes a quarter of the time that the forward takes.

Imports vLLM, so call prepare_environment first.
"""

from collections.abc import Set

from torch import Tensor
from vllm import ModelRegistry, PoolingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from vpmoe.inference.teacher_model import TASK
from vpmoe.teacher.weights import ARCHITECTURE

START = "start"
"""Key of PoolingParams.extra_kwargs: the row of the answer at which the document begins."""


def request(start: int) -> PoolingParams:
    """The parameters of a document whose hidden states go to the rows from `start` on."""
    return PoolingParams(task=TASK, extra_kwargs={START: start})


class HiddenStatePooler(Pooler):  # type: ignore[misc]
    """Copies hidden states into `answer_TG` and gives vLLM an empty tensor for each finished document."""

    answer_TG: Tensor | None = None
    """Where they go. None while vLLM measures its memory, with requests of its own."""

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """`hidden_states` [tokens, G]: of the requests of this step one after another, of each its next
        chunk."""
        cursor = pooling_metadata.get_pooling_cursor()
        lengths, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        if self.answer_TG is not None:
            at = 0
            for length, end, params in zip(lengths, ends, pooling_metadata.pooling_params, strict=True):
                first = params.extra_kwargs[START] + end - length
                self.answer_TG[first : first + length] = hidden_states[at : at + length]
                at += length
        done = hidden_states.new_empty(0)
        return [done if finished else None for finished in cursor.get_finished_mask()]


class GptOssHiddenStates(as_embedding_model(GptOssForCausalLM)):  # type: ignore[misc]  # a class made at run time
    """GPT-OSS whose answer is its final hidden states, after the last norm."""

    def _init_pooler(self, vllm_config: VllmConfig, prefix: str = "") -> Pooler:
        return HiddenStatePooler()


def register() -> None:
    """Make vLLM load GPT-OSS as this class, in this process.

    It keeps GPT-OSS' own name, by which vLLM knows how its MXFP4 is stored.
    """
    ModelRegistry.register_model(ARCHITECTURE, GptOssHiddenStates)
