"""Loads pruned checkpoints by one client, and compares what it computes with the dense-to-cut
reference that prunenet itself computes: one JSON line a folder.

    python benchmarks/clients.py reference FOLDER... --out reference.safetensors
    python benchmarks/clients.py transformers FOLDER... --out reference.safetensors
    python benchmarks/clients.py peft FOLDER... --out reference.safetensors
    python benchmarks/clients.py llama_cpp FILE.gguf... --out speeds.jsonl

`reference` needs prunenet. `transformers` and `peft` need the client alone, so that they run in an
environment of another version. `llama_cpp` measures speed, all files in turn, five times; that its
numbers are right is compared by `prunenet export --gguf` itself.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

IDS = [[(n * 7919 + 11) % 49152 for n in range(48)]]


def reference(folder: str) -> torch.Tensor:
    """Logits of 48 fixed tokens in float32, (48, vocabulary)."""
    from prunenet.checkpoints.load import load_model

    return load_model(folder, dtype="float32")(torch.tensor(IDS)).logits[0]


def by_transformers(folder: str) -> torch.Tensor:
    """As a user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    return (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        .float()(torch.tensor(IDS))
        .logits[0]
    )


def by_peft(folder: str) -> torch.Tensor:
    """Fresh LoRA on every linear, one backward pass, merged; the updates are still zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float()
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.tensor(IDS)
    with torch.enable_grad():
        tuned(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad is not None for name, p in tuned.named_parameters() if "lora_" in name]
    assert all(grads), f"{grads.count(False)} of {len(grads)} LoRA weights have no gradient"
    return tuned.merge_and_unload()(ids).logits[0]


def llama_cpp_speeds(paths: list[str], repeats: int = 5) -> list[dict[str, object]]:
    """Tokens per second that llama.cpp itself reports, one thread: 256 read, 64 written."""
    from prunenet.checkpoints.exports.llama_cpp import serving

    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {path: [] for path in paths}
    with ExitStack() as stack:
        servers = {p: stack.enter_context(serving(Path(p), context=512)) for p in paths}
        for repeat in range(repeats + 1):
            for path, server in servers.items():
                timings = server._completed([5] * 256, 64, ignore_eos=True)["timings"]
                pair = (timings["prompt_per_second"], timings["predicted_per_second"])
                found[path] += [pair] if repeat else []  # the first is a warm-up
    lines = []
    for path, pairs in found.items():
        line: dict[str, object] = {"file": Path(path).name, "bytes": Path(path).stat().st_size}
        for name, values in zip(("prefill", "decode"), zip(*pairs, strict=True), strict=True):
            line |= {f"{name}_tokens_per_second": median(values), f"{name}_range": sorted(values)}
        lines.append(line | {"load": os.getloadavg()[0]})
    return lines


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("client", choices=["reference", "transformers", "peft", "llama_cpp"])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    if asked.client == "reference":
        save_file({Path(f).name: reference(f).contiguous() for f in asked.folders}, asked.out)
        return
    if asked.client == "llama_cpp":
        lines = llama_cpp_speeds(asked.folders)
        Path(asked.out).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    import transformers

    known = load_file(asked.out)
    for folder in asked.folders:
        line = {"client": asked.client, "folder": Path(folder).name}
        line["transformers"] = transformers.__version__
        try:
            found = (by_peft if asked.client == "peft" else by_transformers)(folder)
            expected = known[Path(folder).name]
            line["largest_difference"] = float((found - expected).abs().max())
            line["same_likeliest"] = bool((found.argmax(-1) == expected.argmax(-1)).all())
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        print(json.dumps(line))


if __name__ == "__main__":
    main()
