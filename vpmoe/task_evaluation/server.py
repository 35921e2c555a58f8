"""A model that vLLM serves: completions of prompts in token ids, by its OpenAI-compatible API.

Token ids in and out, because text would lose which tokens are Harmony's own. So student and teacher are asked
with the same ids, and their answers are read as rollouts are.
"""

import json
import logging
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.failure import Permanent, Retriable

log = logging.getLogger(__name__)

TIMEOUT = 3600.0
"""Seconds for an answer: a server with a long queue takes its time."""

WAITS = (1.0, 4.0, 16.0)
"""Seconds between the attempts at an answer, because one of thousands must not end an evaluation of hours."""


class Server:
    """A server with one model."""

    def __init__(self, url: str, option: str) -> None:
        """`url`: http://HOST:PORT, with or without /v1. `option`: that names it, for errors.

        Raises Retriable if nothing answers, Permanent if it is no server of vLLM.
        """
        self.url, self._option = url.rstrip("/").removesuffix("/v1"), option
        if not self.url.startswith(("http://", "https://")):
            raise Permanent(f"{option} {url} is no address. Write http://HOST:PORT of `vllm serve`.")
        try:
            served = self._ask("/v1/models")["data"][0]
            self.model, self.length = str(served["id"]), int(served["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Permanent(
                f"{option} {url} does not list a model as vLLM does ({type(error).__name__}: {error}). Serve "
                "it with `vllm serve`."
            ) from error

    def complete(self, prompt_P: Ids, max_tokens: int, temperature: float, seed: int) -> Ids:
        """The sampled tokens, with the stop token if one was sampled. They are at most `max_tokens`, and with
        the prompt at most `length`; none if the prompt has as many.

        Raises Retriable if the server does not answer, Permanent if it refuses.
        """
        room = min(max_tokens, self.length - len(prompt_P))
        if room < 1:
            return np.empty(0, np.int32)
        body = {
            "model": self.model,
            "prompt": prompt_P.tolist(),
            "max_tokens": room,
            "temperature": temperature,
            # Those of the model's generation_config.json would be used otherwise.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop_token_ids": STOP_IDS,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        choice = self._ask_again("/v1/completions", body)["choices"][0]
        if not isinstance(choice.get("token_ids"), list):
            raise Permanent(
                f"{self._option} {self.url} returns no token ids. Serve the model with vLLM 0.11 or newer."
            )
        return np.array(choice["token_ids"], np.int32)

    def _ask_again(self, path: str, body: dict[str, Any]) -> Any:
        for wait in WAITS:
            try:
                return self._ask(path, body)
            except Retriable as error:
                log.warning("Asking again in %g s: %s", wait, error)
                time.sleep(wait)
        return self._ask(path, body)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            found = f"{self._option} {self.url}{path} answered {error.code}: {said}"
            if error.code >= 500:
                raise Retriable(f"{found} Look at the server's log.") from error
            raise Permanent(f"{found} Serve a model of GPT-OSS' vocabulary with vLLM.") from error
        except (OSError, ValueError) as error:  # URLError and a broken connection; what is no JSON
            raise Retriable(
                f"{self._option} {self.url}{path}: {error}. Start `vllm serve`, and wait until it answers."
            ) from error
