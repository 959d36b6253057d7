"""Reads a GGUF file by llama.cpp, and compares what it computes with transformers.

llama.cpp comes as the package `xllamacpp`, which holds its server. The server listens on a port of
this machine alone, and ends with the block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunenet.runtime.files import CheckpointError

CLOSE, NEAR = 1e-3, 0.1
"""Accepted difference: of log-probabilities in float32, and in mean nats for other types."""
ROUGH = 1e-2
"""Accepted of log-probabilities in float32 where llama.cpp looks GELU up in a table of float16."""
_NEGLIGIBLE = -30.0
"""Log-probabilities below are not compared: llama.cpp computes probabilities in float32."""
_TEXTS = (
    "The capital of France is",
    "In 1969, three   people said:\n\n\t\"We're 100% sure; it's 12345.\"\n",
    "def f(x):\n    return x**2  # naïve 你好 🙂",
)
_ODD = (
    "",
    "\n\n\n",
    "a  b   c    d",
    "\t\tif x:\r\n\t\t\treturn",
    "trailing blanks   ",
    " a blank in front",
    "ÀÉÎõü straße Łódź İstanbul",
    "Привет, мир! Ελληνικά שלום مرحبا",
    "日本語のテキスト 한국어 ไทย हिन्दी",
    "🙂👍🏽 \U0001f469\u200d\U0001f467 \U0001d4b3",
    "1234567890 3.14159 1,000,000 0x1F",
    "!!!???...--- «quotes» “curly”",
    "camelCaseWord snake_case_word SHOUTING",
    "http://example.com/a?b=c&d=%20#e",
    "<html><b>bold</b></html> &amp;",
    "\u00a0no-break\u2003em\u200bzero",
    "a" * 60,
)
_READ = 100
"""Texts whose tokens are compared, at least."""
_STEPS = 32


@dataclass(frozen=True, slots=True)
class Proof:
    """How far llama.cpp is from transformers in float32.

    Attributes:
        difference: largest, of log-probabilities above -30.
        divergence: KL of llama.cpp's next-token distribution from the reference, mean in nats.
        positions: at which the two distributions were compared.
        texts: whose tokens were compared, all of them the same.
        same_text: whether the greedy continuations are the same tokens.
        steps: tokens of the greedy continuation.
    """

    difference: float
    divergence: float
    positions: int
    texts: int
    same_text: bool
    steps: int


def sentence(proof: Proof | None) -> str:
    """Says what was compared."""
    if proof is None:
        return "Nobody has compared this file with the model: llama.cpp was not installed."
    same = "is the same" if proof.same_text else "is another"
    return (
        f"Compared with transformers in float32 when it was written, at {proof.positions}"
        f" positions: log-probabilities differ by up to {proof.difference:.2g}, the divergence is"
        f" {proof.divergence:.2g} nats, and greedy text of {proof.steps} tokens {same}. Its"
        f" tokens of {proof.texts} texts are the same."
    )


def prove(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    close: float | None,
    context: int,
    plain_start: bool = False,
) -> Proof | None:
    """Compares a GGUF file, read by llama.cpp, with the model that it was written from.

    Args:
        path: of the file.
        model: in float32.
        tokenizer: the model's.
        close: accepted difference of log-probabilities; None where the file is rounded.
        context: tokens for which llama.cpp computes attention as the model does.
        plain_start: compares texts without the blanks that they begin with.

    Returns:
        None where llama.cpp is not installed.

    Raises:
        CheckpointError: llama.cpp refuses the file, or what it computes differs.
    """
    if find_spec("xllamacpp") is None:
        return None
    prompts = [tokenizer(text)["input_ids"] for text in _TEXTS]
    size = cast(Any, model.config).vocab_size
    fixed = [(n * 7919 + 11) % size for n in range(min(24, context))]
    texts = [text.lstrip(" ") if plain_start else text for text in _texts()]
    with serving(path, context=128) as server:
        for text in texts:
            ids, theirs = tokenizer(text)["input_ids"], server.tokenize(text)
            if theirs != ids:
                raise CheckpointError(
                    f"{path.name} was not written: llama.cpp reads {text!r} as tokens {theirs},"
                    f" the model's tokenizer as {ids}"
                )
        mine = [_log_probabilities(model, ids) for ids in (*prompts, fixed)]
        theirs_of = [server.log_probabilities(ids, len(mine[0])) for ids in (*prompts, fixed)]
        pairs = list(zip(mine, theirs_of, strict=True))
        differences = [float((a - b)[a > _NEGLIGIBLE].abs().max()) for a, b in pairs]
        divergences = [float((a.exp() * (a - b.clamp_min(-80))).sum()) for a, b in pairs]
        greedy = server.continuation(prompts[0], _STEPS)
    proof = Proof(
        difference=max(differences),
        divergence=max(0.0, sum(divergences) / len(pairs)),
        positions=len(pairs),
        texts=len(texts),
        same_text=_is_greedy(model, prompts[0], greedy),
        steps=len(greedy),
    )
    if close is not None and not (proof.difference <= close and proof.same_text):
        raise CheckpointError(
            f"{path.name} was not written: log-probabilities of llama.cpp differ by up to"
            f" {proof.difference:.2g}, and {close} is allowed; its greedy text is"
            f" {'the same' if proof.same_text else 'another'}"
        )
    if not proof.divergence <= NEAR:
        raise CheckpointError(
            f"{path.name} was not written: llama.cpp is {proof.divergence:.2g} nats from the model,"
            f" and {NEAR} are allowed: say --type f32, or --type bf16"
        )
    return proof


def _texts() -> list[str]:
    """English and code of the standard library, other scripts, and blanks in all places."""
    whole = "\n".join(text for _, text in sorted(topics.items()))
    wanted = _READ - len(_ODD) - len(_TEXTS)
    step = len(whole) // wanted
    return [*_TEXTS, *_ODD, *(whole[i * step : i * step + 150] for i in range(wanted))]


@dataclass(frozen=True)
class Served:
    """A model that llama.cpp holds; `server` is xllamacpp's."""

    server: Any

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special ones in front included."""
        return list(self._asked("tokenize", content=text, add_special=True)["tokens"])

    def log_probabilities(self, ids: Sequence[int], size: int) -> Tensor:
        """(size,), of the token that follows."""
        found = self._completed(ids, 1, n_probs=size)["completion_probabilities"]
        values = torch.full((size,), -torch.inf)
        for entry in found[0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values.log_softmax(-1)

    def continuation(self, ids: Sequence[int], steps: int) -> list[int]:
        """Up to `steps` tokens that follow, each the likeliest."""
        return list(self._completed(ids, steps, return_tokens=True)["tokens"])

    def seconds(self, prompt: int, new_tokens: int) -> tuple[float, float]:
        """Seconds that reading a prompt took, and writing behind it, as llama.cpp counts them."""
        said = self._completed([5] * prompt, new_tokens, ignore_eos=True)["timings"]
        return prompt / said["prompt_per_second"], new_tokens / said["predicted_per_second"]

    def _completed(self, ids: Sequence[int], steps: int, **more: Any) -> Any:
        exact = {"temperature": 0, "cache_prompt": False}
        return self._asked("completion", prompt=list(ids), n_predict=steps, **exact, **more)

    def _asked(self, what: str, **question: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        body = json.dumps(question).encode()
        request = Request(f"{self.server.listening_address}/{what}", body, headers)
        try:
            with urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise CheckpointError(f"llama.cpp does not answer: {said}") from error


@contextmanager
def serving(path: Path, context: int) -> Iterator[Served]:
    """Yields the model of a GGUF file, held by llama.cpp in this process; float32 cache.

    Args:
        path: of the file.
        context: tokens at most.

    Raises:
        CheckpointError: llama.cpp refuses the file.
    """
    import xllamacpp  # type: ignore[import-not-found, import-untyped, unused-ignore]

    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = context, 1, 0
    asked.warmup = asked.fit_params = False
    asked.verbosity = -1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(asked)
    except Exception as error:  # of C++
        raise CheckpointError(f"llama.cpp refuses {path.name}: {error}") from error
    try:
        yield Served(server)
    finally:
        del server


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([list(ids)])).logits
    return logits[0, -1].float().log_softmax(-1)


@torch.no_grad()
def _is_greedy(model: PreTrainedModel, ids: Sequence[int], text: Sequence[int]) -> bool:
    """Whether each token of a continuation is the likeliest after those before it, or as likely."""
    logits: Tensor = model(torch.tensor([[*ids, *text[:-1]]])).logits[0, len(ids) - 1 :]
    chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    return bool((logits.max(-1).values - chosen <= CLOSE).all())
