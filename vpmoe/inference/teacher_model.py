"""GPT-OSS in vLLM as a model that returns log-probabilities of its input instead of sampling from it.

vLLM's own way, `prompt_logprobs`, holds the logits of a forward's tokens: on the CPU of all at once, on GPUs
of 1,024 at a time in the model's dtype, which it then reads three times, one of them for ranks that are not
used. So this is a pooling model: vLLM runs the layers and gives the hidden states of a step to `pooler`. On a
GPU `target_logp` computes the output layer without storing logits; on the CPU vLLM's own product does, for
CPU_ROWS tokens at a time. Nothing is sampled. The model is otherwise vLLM's, and so is its loading.
"""

from collections.abc import Set

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from vpmoe.model.head import target_chunks, target_logp, unscored_logp
from vpmoe.model.spans import NO_TARGET
from vpmoe.teacher.weights import ARCHITECTURE

TASK: PoolingTask = "token_classify"
"""vLLM's name of what a teacher's model does: a result for each token of the input. "token_embed" is another,
for which vLLM wants a tokenizer."""
CPU_ROWS = 128
"""Tokens whose logits the CPU holds at a time: 103 MB in float32."""


class TokenLogp(Pooler):  # type: ignore[misc]
    """For each finished sequence of T ids, [T] float32: the log-probability of the id after each; NaN for the
    last. None for a sequence of which tokens are still to come."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        super().__init__()
        self._model = [model]  # in a list, as it is no part of the pooler

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """`hidden_states` [N, H]: of the step's tokens, sequence after sequence."""
        cursor = pooling_metadata.get_pooling_cursor()
        sizes, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        targets_N = torch.full((len(hidden_states),), NO_TARGET)
        first = 0
        for ids_T, size, end in zip(pooling_metadata.get_prompt_token_ids_cpu(), sizes, ends, strict=True):
            next_ids = ids_T[end - size + 1 : end + 1]
            targets_N[first : first + len(next_ids)] = next_ids
            first += size
        found: list[Tensor | None] = []
        for logp_t, size, end, state, finished in zip(
            torch.split(self._logp(hidden_states, targets_N), sizes),
            sizes,
            ends,
            pooling_metadata.pooling_states,
            cursor.get_finished_mask(),
            strict=True,
        ):
            earlier = state.hidden_states_cache  # vLLM keeps it until the sequence is finished
            if size == end:
                earlier.clear()  # a sequence that vLLM preempted begins again
            earlier.append(logp_t)
            found.append(torch.cat(earlier) if finished else None)
            if finished:
                state.clean()
        return found

    def _logp(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        """[N] float32: the log-probability of each target; NaN without one."""
        (model,) = self._model
        if hidden_NH.is_cuda:
            weight_VH = model.lm_head.weight[: model.config.vocab_size]  # vLLM pads the vocabulary
            return target_logp(hidden_NH, weight_VH, targets_N.to(hidden_NH.device))
        logp_N = unscored_logp(hidden_NH)
        for rows_t in target_chunks(targets_N, CPU_ROWS):
            # vLLM's product with its repacked weight takes a quarter of torch's time
            logits_tV = model.compute_logits(hidden_NH[rows_t]).float()
            logp_N[rows_t] = -cross_entropy(logits_tV, targets_N[rows_t], reduction="none")
        return logp_N


class ScoringGptOss(GptOssForCausalLM):  # type: ignore[misc]
    """vLLM's GPT-OSS, implementing VllmModelForPooling. It runs on one device: the pooler needs the whole
    output matrix."""

    is_pooling_model = True

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = TokenLogp(self)


def register() -> None:
    """Make vLLM load GPT-OSS as ScoringGptOss in this process."""
    ModelRegistry.register_model(ARCHITECTURE, ScoringGptOss)
