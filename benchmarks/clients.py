"""Loads four kinds of cut models by one client, and compares what it computes with what prunenet
computes: one JSON line a model.

    python benchmarks/clients.py models DENSE --out FOLDER
    python benchmarks/clients.py CLIENT FOLDER --out lines.jsonl
    python benchmarks/clients.py speed FOLDER --out lines.jsonl
    python benchmarks/clients.py table --out lines.jsonl

`models` cuts DENSE, a Llama, four ways, and keeps the logits of fixed tokens beside them. Each
client reads them in an environment that may lack prunenet, and may hold other versions; llama.cpp
(`llama_cpp_f32`, `llama_cpp_q8_0`) is compared by `prunenet export --gguf` itself. What a client
refuses is kept with its message. `speed` measures tokens per second of llama.cpp, all files in
turn, five times.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FORMS = ("uniform", "per-layer", "heads", "layers")
RATIO = 0.3
REFERENCE = "reference.safetensors"
IDS = [[(n * 7919 + 11) % 49152 for n in range(48)]]
_CODE = {"trust_remote_code": True}
_QUESTIONS = [
    {"question": "Water freezes to", "choices": ["ice", "fire"], "answer": 0},
    {"question": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1},
]


def make_models(dense: Path, out: Path) -> None:
    """Cuts FFN channels alike and per layer, then some heads too, and drops every eighth layer."""
    from prunenet import load_model, prune
    from prunenet.checkpoints.provenance import Provenance
    from prunenet.checkpoints.save import save_pruned
    from prunenet.models.heads import group_counts
    from prunenet.models.surgery import narrowed
    from prunenet.policies.artifact import policy_for

    model = load_model(dense, dtype="float32")
    policy, name = policy_for("llama", model.config.model_type)
    made = [
        prune(model, policy, ratio=RATIO, widths=widths, policy_name=name)
        for widths in ("uniform", "per-layer")
    ]
    for name, cut in zip(FORMS, made, strict=False):
        cut.save_pretrained(out / name)
    counts = group_counts(model)
    groups = [torch.arange(n) < (n - 1 if i % 3 == 1 else n) for i, n in enumerate(counts)]
    fewer = narrowed(model, made[1].keep, groups)
    how: dict[str, Any] = {"policy": "the last group of every third layer", "policy_sha256": None}
    how |= {"base_model": dense.name, "revision": made[1].provenance.revision, "seed": None}
    story = Provenance.of(model, fewer, regime="weights", ratio=RATIO, **how)
    save_pruned(fewer, out / "heads", made[1].keep, story, groups=groups)
    _drop_layers(dense, out / "layers")
    logits = {name: _logits(load_model(out / name)) for name in FORMS}
    save_file(logits, out / REFERENCE, {"model": dense.name})


def _drop_layers(dense: Path, out: Path) -> None:
    """By transformers alone: the result is a stock model with fewer layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="float32")
    kept = [i for i in range(len(model.model.layers)) if i % 8 != 7]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)
    # transformers 5 writes rotary embeddings in words that version 4 does not know; prunenet adds
    # those
    stated = json.loads((out.parent / FORMS[0] / "config.json").read_text())
    stated |= {"num_hidden_layers": len(kept), "intermediate_size": model.config.intermediate_size}
    (out / "config.json").write_text(json.dumps(stated, indent=2) + "\n")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Of the fixed tokens in float32, (tokens, vocabulary)."""
    return model(torch.tensor(IDS)).logits[0].contiguous()


def _loaded(folder: Path) -> Any:
    """As a user of transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **_CODE).float().eval()


class _Logits(torch.nn.Module):
    """Token ids in, logits out, without a cache: what is exported."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def by_transformers(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    return _compared(_logits(_loaded(folder)), expected)


def by_peft(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    """One step of LoRA on every linear; then merged, and compared with the unmerged model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(_loaded(folder), LoraConfig(r=2, target_modules="all-linear"))
    fresh = _compared(_logits(tuned), expected)
    ids = torch.tensor(IDS)
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained), "LoRA weights without a gradient"
    torch.optim.SGD(trained, lr=0.1).step()
    stepped = _logits(tuned)
    moved = float((stepped - expected).abs().max())
    merged = _compared(_logits(tuned.merge_and_unload()), stepped)
    return fresh | {"step_moves_logits_by": moved, "merged": merged}


def by_lm_eval(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    """A task of two questions, from a local file; and the log-likelihood of the fixed tokens."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", **_CODE)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "questions.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in _QUESTIONS))
        task = {
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": scratch},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
        }
        scores = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]["local"]
    ((found, _),) = model._loglikelihood_tokens([(("", ""), IDS[0][:1], IDS[0][1:])])
    known = expected.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[0][1:])[:, None]).sum()
    return {"log_likelihood_differs_by": abs(found - float(known)), "accuracy": scores["acc,none"]}


def by_onnxruntime(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        length = torch.export.Dim("length", min=2, max=2048)
        torch.onnx.export(
            _Logits(_loaded(folder)),
            (torch.tensor(IDS)[:, :32],),
            path,
            input_names=["ids"],
            dynamic_shapes={"ids": {1: length}},
            external_data=True,
            optimize=False,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"ids": torch.tensor(IDS).numpy()})
    return _compared(torch.from_numpy(found[0]), expected)


def by_openvino(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    """Converted from PyTorch, compiled for the CPU in float32."""
    import openvino

    ids = torch.tensor(IDS)
    with torch.no_grad():
        exported = torch.export.export(_Logits(_loaded(folder)), (ids,))
    model = openvino.Core().compile_model(
        openvino.convert_model(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return _compared(torch.from_numpy(model([ids.numpy()])[0][0]), expected)


def by_ctranslate2(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    import ctranslate2
    import numpy
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as scratch:
        place = str(Path(scratch) / "model")
        TransformersConverter(str(folder), **_CODE).convert(place)
        generator = ctranslate2.Generator(place, compute_type="float32")
        found = torch.from_numpy(numpy.array(generator.forward_batch(IDS)))
    return _compared(found[0], expected)


def _by_llama_cpp(kind: str) -> Callable[[Path, torch.Tensor], dict[str, Any]]:
    def measured(folder: Path, expected: torch.Tensor) -> dict[str, Any]:
        from prunenet.checkpoints.exports.gguf import export_gguf

        with tempfile.TemporaryDirectory() as scratch:
            made = export_gguf(folder, Path(scratch) / "file", kind)
        assert made.proof is not None, "llama.cpp is not installed: pip install 'prunenet[gguf]'"
        return {
            "architecture": made.architecture,
            "bytes": made.bytes,
            "log_probabilities_differ_by": made.proof.difference,
            "divergence_in_nats": made.proof.divergence,
            "same_greedy_text": made.proof.same_text,
        }

    return measured


CLIENTS: dict[str, tuple[str, Callable[[Path, torch.Tensor], dict[str, Any]]]] = {
    "transformers": ("transformers", by_transformers),
    "peft": ("peft", by_peft),
    "lm_eval": ("lm-eval", by_lm_eval),
    "llama_cpp_f32": ("xllamacpp", _by_llama_cpp("f32")),
    "llama_cpp_q8_0": ("xllamacpp", _by_llama_cpp("q8_0")),
    "onnxruntime": ("onnxruntime", by_onnxruntime),
    "openvino": ("openvino", by_openvino),
    "ctranslate2": ("ctranslate2", by_ctranslate2),
}
"""Client -> (its package, what loads one model and compares it)."""


def _compared(found: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    return {
        "logits_differ_by": float((found - expected).abs().max()),
        "same_likeliest": bool((found.argmax(-1) == expected.argmax(-1)).all()),
    }


def measured(client: str, folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    """One line: what a client did with one model, or how it refused."""
    package, load = CLIENTS[client]
    line = {"client": client, "version": version(package), "form": folder.name}
    line["transformers"] = version("transformers")
    start = time.perf_counter()
    try:
        line |= load(folder, expected)
    except Exception as error:  # every way in which a client refuses is a result
        said = " ".join(str(error).split())
        line["refused"] = f"{type(error).__name__}: {said[:300]}"
    return line | {"seconds": round(time.perf_counter() - start, 1)}


def speeds(folder: Path, repeats: int = 5) -> list[dict[str, Any]]:
    """Tokens per second that llama.cpp itself reports, one thread: 256 read, 64 written."""
    from prunenet.checkpoints.exports.llama_cpp import serving

    torch.set_num_threads(1)
    paths = sorted(folder.rglob("*.gguf"))
    found: dict[Path, list[tuple[float, float]]] = {path: [] for path in paths}
    with ExitStack() as stack:
        servers = {p: stack.enter_context(serving(p, context=512)) for p in paths}
        for repeat in range(repeats + 1):
            for path, server in servers.items():
                read, written = server.seconds(256, 64)
                pair = (256 / read, 64 / written)
                found[path] += [pair] if repeat else []  # the first is a warm-up
    lines = []
    for path, pairs in found.items():
        line: dict[str, Any] = {"client": "llama_cpp", "file": path.name}
        line["bytes"] = path.stat().st_size
        for name, values in zip(("prefill", "decode"), zip(*pairs, strict=True), strict=True):
            line |= {f"{name}_tokens_per_second": median(values), f"{name}_range": sorted(values)}
        lines.append(line | {"load": os.getloadavg()[0]})
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row a client, version and model, one column a form; the latest line counts."""
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        if "form" in line:
            row = f"`{line['client']}` {line['version']}, {line['model']}"
            cells.setdefault(row, {})[line["form"]] = _cell(line)
    rows = ["| client, model | " + " | ".join(FORMS) + " |", "|---" * (len(FORMS) + 1) + "|"]
    for row, found in cells.items():
        rows.append(f"| {row} | {' | '.join(found.get(form, 'not run') for form in FORMS)} |")
    return "\n".join(rows)


def _cell(line: dict[str, Any]) -> str:
    if "refused" in line:
        return "refused"
    if "divergence_in_nats" in line:
        greedy = "same" if line["same_greedy_text"] else "another"
        shown = f"{line['log_probabilities_differ_by']:.1e}"
        if line["client"].endswith("q8_0"):
            shown = f"{line['divergence_in_nats']:.4f} nats"
        return f"{shown}, {greedy} text ({line['architecture']})"
    if "log_likelihood_differs_by" in line:
        far = line["log_likelihood_differs_by"]
    else:
        far = line["logits_differ_by"]
    return "equal" if far == 0 else f"{far:.1e}"


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("what", choices=["models", *CLIENTS, "speed", "table"])
    parser.add_argument("folder", nargs="?", type=Path, help="dense model, or what models made")
    parser.add_argument("--form", choices=FORMS, help="one kind alone; default: all four")
    parser.add_argument("--out", type=Path, required=True, help="folder, or JSON lines")
    asked = parser.parse_args()
    if asked.what == "table":
        print(table([json.loads(line) for line in asked.out.read_text().splitlines()]))
        return
    if asked.folder is None:
        parser.error(f"{asked.what} reads a folder: give it")
    if asked.what == "models":
        make_models(asked.folder, asked.out)
        return
    if asked.what == "speed":
        lines = iter(speeds(asked.folder))
    else:
        known = load_file(asked.folder / REFERENCE)
        with safe_open(asked.folder / REFERENCE, "pt") as file:
            model = {"model": (file.metadata() or {}).get("model", "")}
        forms = [asked.form] if asked.form else FORMS
        lines = (measured(asked.what, asked.folder / form, known[form]) | model for form in forms)
    for line in map(json.dumps, lines):
        print(line, flush=True)
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
