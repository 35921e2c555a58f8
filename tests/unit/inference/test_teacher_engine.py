"""The teacher's log-probabilities by vLLM equal those of its checkpoint in transformers, token by token."""

import json
import pwd
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from openai_harmony import (
    Conversation,
    HarmonyEncodingName,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    load_harmony_encoding,
)

from tests.fakes import tiny_teacher
from tests.fakes.reference_scores import TOLERANCE, expected
from tests.fakes.students import new_seed
from tests.fakes.tiny_teacher import Remote
from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import Renderer, SystemMessage
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.data.tokenizer import Tokenizer
from vpmoe.data.vocabulary import END_OF_DOCUMENT, VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.inference.teacher_engine import TeacherEngine, check_config
from vpmoe.inference.vllm_options import check_device, token_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LENGTHS = (2, 3, 17, 40, 300, 640, 600)
"""Shorter and longer than the sliding window of 16, up to the teacher's maximum. Together they exceed one
forward pass, so some are computed in chunks."""


@pytest.fixture(scope="module")
def reference(teacher: Path) -> "PreTrainedModel":
    """The checkpoint in transformers, eager and in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_every_position_agrees_with_transformers(scorer: Remote, reference: "PreTrainedModel") -> None:
    random = np.random.default_rng(new_seed())
    sequences = [random.integers(0, VOCABULARY_SIZE, length, np.int32) for length in LENGTHS]
    for ids_T, logp_T in zip(sequences, scorer.score(sequences), strict=True):
        assert logp_T.dtype == np.float32 and np.isnan(logp_T[0])
        wanted_T = expected(reference, ids_T)
        assert np.abs(logp_T - wanted_T)[1:].max() <= TOLERANCE
        assert len(ids_T) < 40 or wanted_T[1:].std() > 0.5, (
            "log-probabilities differ between tokens: else agreement would show nothing"
        )


def test_the_same_sequences_in_the_same_order_have_the_same_bits(scorer: Remote) -> None:
    random = np.random.default_rng(new_seed())
    sequences = [random.integers(0, VOCABULARY_SIZE, random.integers(1, 200), np.int32) for _ in range(12)]
    first, second = list(scorer.score(sequences)), list(scorer.score(sequences))
    assert [logp_T.tobytes() for logp_T in first] == [logp_T.tobytes() for logp_T in second]


def test_a_sequence_without_a_second_token_has_no_score(scorer: Remote) -> None:
    empty, one, two = scorer.score([np.array(ids, np.int32) for ids in ([], [5], [5, 6])])
    assert len(empty) == 0
    assert np.isnan(one).tolist() == [True] and np.isnan(two).tolist() == [True, False]


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1] * 641, "641 ids, and the teacher was loaded for 640"),
        ([5, 201_088], "ids from 5 to 201088"),
        ([-1, 5], "ids from -1 to 5"),
    ],
    ids=["long", "beyond", "negative"],
)
def test_invalid_sequences_are_rejected(scorer: Remote, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(scorer.score([np.array(ids, np.int32)]))


def conversation(effort: str) -> dict[str, str | None]:
    """A dataset's settings.conversation."""
    return {
        "identity": "You are vpMoE, a large language model.",
        "knowledgeCutoff": "2024-06",
        "date": "2026-01-01",
        "effort": effort,
    }


REASONING = "The pond is ≈ 40 m wide. ⟨H≈0.4⟩ ☑"
ANSWER = "About forty metres, <|end|> included."


def render_with_openai_harmony(effort: ReasoningEffort) -> list[int]:
    """The document of the next tests, rendered by openai-harmony."""
    vocabulary_file.install()
    system = (
        SystemContent.new()
        .with_model_identity("You are vpMoE, a large language model.")
        .with_reasoning_effort(effort)
    )
    messages = [
        Message.from_role_and_content(
            Role.SYSTEM, system.with_knowledge_cutoff("2024-06").with_conversation_start_date("2026-01-01")
        ),
        Message.from_role_and_content(Role.USER, "How wide is the pond?"),
        Message.from_role_and_content(Role.ASSISTANT, REASONING).with_channel("analysis"),
        Message.from_role_and_content(Role.ASSISTANT, ANSWER).with_channel("final"),
    ]
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    config = RenderConversationConfig(auto_drop_analysis=False)
    ids: list[int] = encoding.render_conversation_for_training(Conversation.from_messages(messages), config)
    return ids


@pytest.mark.parametrize(
    "mix, own", [("high", "high"), ("low=0.5,high=0.5", "low"), ("low=0.2,medium=0.7,high=0.1", "medium")]
)
@pytest.mark.parametrize("teacher_effort", list(ReasoningEffort), ids=lambda effort: effort.name.lower())
def test_with_another_effort_the_document_is_scored_as_rendered_with_that_effort(
    scorer: Remote, reference: "PreTrainedModel", teacher_effort: ReasoningEffort, mix: str, own: str
) -> None:
    settings = conversation(mix)
    system_message = SystemMessage(
        str(settings["identity"]), str(settings["knowledgeCutoff"]), settings["date"], own
    )
    document = Renderer(Tokenizer(), system_message).render("How wide is the pond?", None, REASONING, ANSWER)
    effort = EffortSubstitution(settings, teacher_effort.name.lower())
    sent_S = effort.to_teacher(document.ids)
    rendered = render_with_openai_harmony(teacher_effort)
    assert sent_S.tolist() == rendered and len(sent_S) == len(document.ids) + effort.extra_tokens
    logp_T = effort.from_teacher(document.ids, next(scorer.score([sent_S])))
    assert len(logp_T) == len(document.ids) and np.isnan(logp_T[-1])
    supervised = document.reasoning + document.final
    wanted_S = expected(reference, np.array(rendered, np.int32))
    assert np.abs(logp_T[document.prompt : -1] - wanted_S[-supervised:]).max() <= TOLERANCE


def test_a_document_of_another_conversation_is_rejected() -> None:
    effort = EffortSubstitution(conversation("high"), "low")
    sent = effort.to_teacher(
        np.append(
            EffortSubstitution(conversation("low"), "high").to_teacher(
                np.append(render_with_openai_harmony(ReasoningEffort.LOW), END_OF_DOCUMENT)
            ),
            END_OF_DOCUMENT,
        )
    )
    assert sent.tolist() == render_with_openai_harmony(ReasoningEffort.LOW), "the substitution is reversible"
    for ids in (
        [*render_with_openai_harmony(ReasoningEffort.MEDIUM), END_OF_DOCUMENT],
        render_with_openai_harmony(ReasoningEffort.HIGH),
        [END_OF_DOCUMENT],
    ):
        with pytest.raises(Permanent, match=r"its dataset.s settings.conversation\.|has no end-of-document"):
            effort.to_teacher(np.array(ids, np.int32))


def test_batches_are_consecutive_and_bounded() -> None:
    random = np.random.default_rng(new_seed())
    sequences = [np.zeros(length, np.int32) for length in random.integers(1, 120, 50)]
    batches = list(token_batches(sequences, 100))
    assert [id(ids_T) for batch in batches for ids_T in batch] == [id(ids_T) for ids_T in sequences]
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 100 for batch in batches)
    assert all(sum(map(len, batch)) + len(after[0]) > 100 for batch, after in pairwise(batches)), (
        "no batch has room for the next sequence"
    )


def test_a_stop_is_checked_before_every_batch(scorer: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fakes.tiny_teacher.BATCH_TOKENS", 10)
    checks = 0

    def stop_at_the_third_check() -> None:
        nonlocal checks
        checks += 1
        if checks == 3:
            raise InterruptedError

    scores = []
    with pytest.raises(InterruptedError):
        for logp_T in scorer.score([np.arange(8, dtype=np.int32)] * 5, stop_at_the_third_check):
            scores.append(logp_T)
    assert len(scores) == 2


def test_a_missing_gpu_is_an_error_and_the_cpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        Permanent, match=r"no CUDA device for the teacher\. .* CUDA_VISIBLE_DEVICES to the empty string"
    ):
        check_device("the teacher", "spec.teacher.gpus")


def test_a_python_without_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the extra `train`, or the trainer image, is not enough for a TeacherForced stage."""
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(
        Permanent, match=r"^the teacher needs vLLM, which is not installed .* inference image"
    ):
        check_device("the teacher", "spec.teacher.gpus")


def test_a_context_that_is_too_short_is_rejected_before_loading(teacher: Path) -> None:
    with pytest.raises(
        Permanent, match="max_position_embeddings is 4096, and the longest document is 4097 tokens"
    ):
        TeacherEngine(teacher, 4097)


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"sliding_window": "x"}, "sliding_window", id="window"),
        pytest.param({"rms_norm_eps": "a"}, "rms_norm_eps", id="epsilon"),
        pytest.param({"layer_types": ["a", "b"]}, "layer_types", id="layer-types"),
        pytest.param({"swiglu_limit": "q"}, "swiglu_limit", id="limit"),
        pytest.param({"initializer_range": None}, "initializer_range", id="range"),
    ],
)
def test_a_config_that_transformers_cannot_read_is_rejected(
    teacher: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = json.loads((teacher / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Permanent, match=rf"^teacher.model: .*config.json: (.|\n)*{message}"):
        check_config(tmp_path)


def test_an_output_matrix_that_is_tied_is_rejected(tmp_path: Path) -> None:
    """vLLM's GPT-OSS has an output matrix of its own, and would leave it as zeros."""
    tiny_teacher.write(tmp_path, tie_word_embeddings=True)
    with pytest.raises(Permanent, match=r"^teacher.model: lm_head.weight is missing, and vLLM does not tie"):
        TeacherEngine(tmp_path, 100)


def test_a_user_without_name_and_home_can_score(scorer: Remote, teacher_address: str) -> None:
    """As in a pod. The shared teacher process runs as such a user, who may write only below TMPDIR."""
    user = Path(teacher_address).stat().st_uid
    with pytest.raises(KeyError):
        pwd.getpwuid(user)
    assert user != 0 and len(list(scorer.score([np.array([1, 2], np.int32)]))) == 1
