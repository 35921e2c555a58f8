"""Answers one question with an exported student and transformers, on a GPU or a CPU, and takes reasoning and
final answer apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpmoe.api.effort import Effort
from vpmoe.checkpoint.safetensors_header import InvalidCheckpoint, read_folder, read_json_object
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.failure import Permanent
from vpmoe.model.hf_export import MODEL_TYPE
from vpmoe.rollout.prompts import completion_messages

REMEDY = (
    "Export one: vpmoe export s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8 --to DIR. "
    "`kubectl get distillrun NAME --output=jsonpath='{.status.provenance.folder}'` prints the address."
)


@dataclass(frozen=True)
class Answer:
    """A completion as text.

    reasoning, final: without headers and special tokens; empty if there is none. ended: whether the student
    ended it, and not the limit.
    """

    reasoning: str
    final: str
    ended: bool
    tokens: int


class ChatModel:
    """An exported student, loaded from its folder with its own code."""

    def __init__(self, folder: Path) -> None:
        """Raises Permanent if `folder` is no model of ours, or a part of it is missing."""
        check_model_folder(folder)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        try:
            # Without trust_remote_code it asks on standard input, because config.json names code.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        except (OSError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise Permanent(f"{folder} cannot be loaded: {first}. {REMEDY}") from error
        self._model = model.to(self._device).eval()

    def answer(self, question: str, effort: Effort, max_tokens: int) -> Answer:
        """The student's most likely answer, of at most `max_tokens` tokens."""
        prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            reasoning_effort=effort,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            output = self._model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
        ids_C = output[0, prompt["input_ids"].shape[1] :].cpu().numpy().astype(np.int32)
        return self._parse(ids_C)

    def _parse(self, ids_C: Ids) -> Answer:
        texts: dict[bool, list[str]] = {True: [], False: []}
        for message in completion_messages(ids_C):
            # What is no message is shown as it is: its special tokens say what is wrong.
            whole = message.content < len(ids_C)
            ids = ids_C[message.content + 1 : message.end] if whole else ids_C[message.start :]
            text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=whole)
            texts[message.channel == "final"].append(text.strip())
        reasoning, final = ("\n\n".join(texts[is_final]) for is_final in (False, True))
        return Answer(reasoning, final, bool(len(ids_C)) and int(ids_C[-1]) in STOP_IDS, len(ids_C))


def check_model_folder(folder: Path) -> None:
    """Raise Permanent, with the remedy, unless `folder` is an exported student with all of its weights."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise Permanent(f"{folder} {what}, so it is no model. {REMEDY}")
    try:
        found = read_json_object(folder / "config.json").get("model_type")
        if found != MODEL_TYPE:
            raise Permanent(f"{folder}/config.json: model_type is {found}, not {MODEL_TYPE}. {REMEDY}")
        read_folder(folder)
    except InvalidCheckpoint as error:
        raise Permanent(f"{folder} is no complete model: {error} {REMEDY}") from error
