"""Writes the model card, README.md, from a checkpoint's provenance.

Its metadata are those of the hub: base model and relation, licence and languages of the base
model's own card, and results as `model-index`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from prunenet.checkpoints.provenance import UNRECORDED, Provenance, RecoveryStep
from prunenet.checkpoints.regimes import REGIMES

CARD = "README.md"
_LARGEST = 1_000_000
"""Bytes of a source's card that are read at most."""
_INHERITED = ("license", "license_name", "license_link", "language")
_SAID = (
    *("updates", "steps", "batch", "micro_batch", "learning_rate", "gentle_below", "warmup"),
    *("schedule", "hidden", "average", "seed", "dtype"),
)
"""Settings of a training that its command always says: defaults may change."""
_AMOUNTS = (("blocks", "sequences", "count"), ("tokens", "window"))
"""Blocks of a text, and tokens of each, by what the sources of texts call them."""
_USUAL = {"self": 40960, "data": 8192}
"""Tokens of the text that a cut is measured on where nobody says how many."""
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def card_of(
    made: Provenance,
    text: str | None = None,
    *,
    code: bool = False,
    loading: str = "",
    inherited: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns the model card of a pruned checkpoint.

    Args:
        made: its provenance.
        text: Markdown put after the summary, such as a table of results.
        code: whether the model needs code beside it.
        loading: how it is loaded, put above the example.
        inherited: of the base model's card, see `inherited_fields`.
        results: rows of `prunenet eval` of this model.
    """
    addition = "" if text is None else f"\n{text.strip()}\n"
    if results:
        addition += f"\n{_results_table(results)}"
    steps = [
        f"{name} {made.how.get(name)}"
        for name in ("widths", "channels", "refit")
        if name in made.how
    ]
    how = f"\nHow: {', '.join(steps)}; policy: `{made.policy}`.\n" if steps else ""
    share = 1 - made.parameters_after / made.parameters_before
    name = (
        f"{Path(made.base_model).name}, pruned by PruneNet to {made.parameters_after:,} parameters"
    )
    if made.how.get("widths") == "ordered":
        name = f"{Path(made.base_model).name}, its channels sorted by PruneNet"
    return f"""{_heading(name, made, inherited or {}, results)}
{_summary(made)}
{how}{_command(made)}
| | before | after |
|---|---|---|
| parameters | {made.parameters_before:,} | {made.parameters_after:,} ({-share:.1%}) |
| without embeddings | {made.non_embedding_before:,} | {made.non_embedding_after:,} |

{_counts(made)}
{_recovery(made.recovered)}{addition}
{_example(code, loading)}
{_limits(made)}
`prunenet.json` says how this checkpoint was made; `prunenet_masks.safetensors`, where it is there,
holds the channels kept, by their number in the base model.
"""


def bare_card(name: str, parameters: int, width: int, loading: str) -> str:
    """Returns the model card of a padded checkpoint that has no provenance.

    Args:
        name: of the model.
        parameters: in all.
        width: of every FFN.
        loading: how it is loaded.
    """
    return f"""{_heading(f"{name}, a pruned model of {parameters:,} parameters")}
Every layer is filled with zeros to {width} channels. Another tool saved the pruned model, so
nothing says here how it was made.

{_example(False, loading)}"""


def gguf_card(
    file: str, checked: str, made: Provenance | None, inherited: Mapping[str, Any]
) -> str:
    """Returns the model card of a GGUF file.

    Args:
        file: its name.
        checked: how it was compared with the model, in a sentence.
        made: provenance of the checkpoint that it was written from; None where it has none.
        inherited: as for `card_of`.
    """
    fields = dict(inherited)
    if made is not None and _HUB_ID.fullmatch(made.base_model):
        fields |= {"base_model": made.base_model, "base_model_relation": "quantized"}
    data = ModelCardData(
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["prunenet", "pruned", "gguf"],
        **fields,
    )
    return f"""---
{data.to_yaml()}
---
# {file.removesuffix(".gguf")}

{"" if made is None else _summary(made)}

{checked}

```console
llama-cli -m {file}
```

```python
import xllamacpp

asked = xllamacpp.CommonParams()
asked.model.path = "{file}"
server = xllamacpp.Server(asked)
print(server.handle_chat_completions({{"messages": [{{"role": "user", "content": "Hello"}}]}}))
```
"""


def inherited_fields(folder: Path | None) -> dict[str, Any]:
    """Returns licence and languages, as the card of a base model states them; none where it does
    not, or is damaged.

    Args:
        folder: of the base model, where it is known.
    """
    path = None if folder is None else folder / CARD
    if path is None or not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    with suppress(Exception):  # of YAML, and of the hub's checks: this is another's file
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        found = {name: getattr(data, name, None) for name in _INHERITED}
        return {name: value for name, value in found.items() if _is_words(value)}
    return {}


def _is_words(value: object) -> bool:
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and 0 < len(word) < 200 for word in words)


def _heading(
    name: str,
    made: Provenance | None = None,
    inherited: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Metadata and title."""
    fields: dict[str, Any] = dict(inherited or {})
    if made is not None and _HUB_ID.fullmatch(made.base_model):
        fields |= {"base_model": made.base_model, "base_model_relation": "finetune"}
    found = [result for row in results for result in _eval_results(row)]
    if found:
        fields |= {"eval_results": found, "model_name": name.replace(",", "")}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["prunenet", "pruned"],
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---\n# {name}\n"


def _eval_results(row: Mapping[str, Any]) -> list[EvalResult]:
    """What the hub shows of a row of `prunenet eval`."""
    if row.get("perplexity") is None:
        return []
    asked = {name: row[name] for name in ("window", "stride", "tokens", "bos") if name in row}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(row["text"]),
            dataset_name=str(row["text"]),
            metric_type="perplexity",
            metric_value=float(row["perplexity"]),
            metric_args=asked,
        )
    ]


def _results_table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join(
        f"| {_cell(row['text'])} | {row['perplexity']:,.2f} | {row.get('tokens', 0):,} |"
        f" {row.get('window', '')} |\n"
        for row in results
        if row.get("perplexity") is not None
    )
    return f"| text | perplexity | tokens | window |\n|---|---|---|---|\n{lines}"


def _cell(text: Any) -> str:
    """A text in one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _command(made: Provenance) -> str:
    """The command that makes this checkpoint from its base model, where the record says enough."""
    how = made.how
    if made.policy == UNRECORDED or not how.keys() & {"channels", "tried"} or made.residual_widths:
        return ""
    amount = "--params" if how.get("of_all") else "--ratio"
    # the damping was chosen before the widths were
    auto = how["widths"] == "per-layer" and "text" in how and how.get("predicted_gain") is not None
    base, widths = shlex.quote(made.base_model), "auto" if auto else how["widths"]
    said = f"prunenet prune {base} {amount} {made.ratio:.10g} --widths {widths}"
    if how["widths"] == "ordered":
        said = f"prunenet order {base}"
    elif (text := how.get("text")) is None:
        said += " --moments none"
    else:
        if "structures" in how:
            said += f" --structures {how['structures']} --budget {how['budget']}"
        elif made.groups is not None and how["widths"] == "refined":
            said += " --structures channels,heads"
        if "experts_by" in how:
            said += f" --experts-by {how['experts_by']}"
        if "tried" not in how and (experts := how.get("experts")):
            said += f" --experts {len(next(iter(experts.values())))}"
        if "channels" in how:
            said += f" --channels {how['channels']} --refit {how['refit']}"
        # a training behind the cut may have read more than the cut
        own = made.regime == "self" or text.get("text") == "self-generated"
        if own:
            said += " --moments self"
        elif text.get("text") is not None:
            said += f" --moments data --text {_text_name(text)}"
        else:
            return ""
        said += _text_flags(text, _USUAL["self" if own else "data"])
    said += f" --round {how['round_to']}" if "round_to" in how else ""
    said += f" --dtype {how['dtype']}" if "dtype" in how else ""
    policy = "none" if made.policy in ("elimination", how.get("experts_by")) else made.policy
    lines = [f"{said} --policy {shlex.quote(policy)} --out smaller", *_trainings(made)]
    return "\n```console\n" + "\n".join(lines) + "\n```\n"


def _trainings(made: Provenance) -> list[str]:
    """The command of each training behind the cut; none where a record says too little."""
    lines, given = [], "smaller"
    for number, step in enumerate(made.recovered, 1):
        text: Any = step["text"]
        if not {"betas", "learned", "window"} <= step.keys():
            return []
        out = "recovered" if number == 1 else f"recovered-{number}"
        said = f"prunenet recover {given} --out {out}"
        if step["loss"] != "next token":
            said += f" --teacher {shlex.quote(made.base_model)}"
        if step["regime"] == "data":
            said += f" --moments data --text {_text_name(text)}"
        said += f" --tokens {step['learned']} --window {step['window']}{_reading_flags(text)}"
        flags = {name: step[name] for name in _SAID if name in step}  # type: ignore[literal-required]
        flags |= {"rank": step["rank"]} if step.get("updates") == "lora" else {}
        flags |= {"loss": "top256"} if "top 256" in step["loss"] else {}
        for name, value in flags.items():
            said += f" --{name.replace('_', '-')} {value}"
        said += " --betas {:g} {:g}".format(*step["betas"])
        lines.append(said + (" --embeddings" if step.get("embeddings") else ""))
        given = out
    return lines


def _amounts(text: Mapping[str, Any]) -> list[Any]:
    """Blocks and tokens of each; None where the source does not say."""
    return [next((text[name] for name in names if name in text), None) for names in _AMOUNTS]


def _text_flags(text: Mapping[str, Any], usual: int) -> str:
    """What was asked of the text beside what is usual."""
    blocks, tokens = _amounts(text)
    said = ""
    if blocks is not None and tokens is not None and blocks * tokens != usual:
        said += f" --tokens {blocks * tokens}"
    return said + (f" --seed {text['seed']}" if text.get("seed") else "") + _reading_flags(text)


def _reading_flags(text: Mapping[str, Any]) -> str:
    """How the text was asked to be read, where it was."""
    asked = {"bos": "bos_asked", "text-column": "column"}
    return "".join(
        f" --{flag} {shlex.quote(str(text[name]))}" for flag, name in asked.items() if name in text
    )


def _text_name(text: Mapping[str, Any]) -> str:
    """As `--text` takes it."""
    name = str(text["text"])
    return "builtin" if name.startswith("builtin ") else repr(name)


def _limits(made: Provenance) -> str:
    trained = " It was not trained after the cut."
    if made.how.get("blocks"):
        trained = " Each FFN was trained by itself after the cut, and the model as a whole was not."
    if made.recovered:
        trained = ""
    return (
        "## Limits\n\n"
        f"Pruning loses knowledge first and fluency later.{trained} What the base model must"
        " not be used for,\nthis model must not either. Measure it on your own task before you rely"
        " on it.\n"
    )


def _example(code: bool, loading: str) -> str:
    trust = ", trust_remote_code=True" if code else ""
    return f"""{loading}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
```
"""


def _summary(made: Provenance) -> str:
    """What was cut, and by what."""
    chosen = "elimination" if made.how.get("channels") == "elimination" else made.policy
    removed = f"without {made.ratio:.1%} of its FFN channels, chosen by"
    if made.residual_widths:
        removed = f"with its residual stream sliced to {min(made.residual_widths)} directions by"
    elif made.groups is not None or made.layers is not None or "budget" in made.how:
        removed = f"without {_amount(made)} chosen by"
    if made.policy == UNRECORDED:
        return (
            f"`{made.base_model}` ({made.revision}) without {made.ratio:.1%} of its FFN channels."
            " Another tool saved the pruned model before this one, so nothing says how they were\n"
            "chosen. The licence and the limits of the base model apply."
        )
    return (
        f"`{made.base_model}` ({made.revision}) {removed} `{chosen}` in the\n{made.regime} regime"
        f" ({REGIMES[made.regime]}). The licence and the limits of the base model apply."
    )


def _amount(made: Provenance) -> str:
    """How much was cut of several structures at once, or by another budget."""
    gone = True if made.groups is not None and 0 in made.groups else None
    cut = {"heads": made.groups, "attention": gone, "layers": made.layers}
    names = ["channels", *(name for name, left in cut.items() if left is not None)]
    if "tried" in made.how:
        names = made.how["structures"].split(",")
    of = f"from {', '.join(names[:-1])} and {names[-1]}" if names[1:] else f"from {names[0]}"
    if made.how.get("budget", "params") == "params":
        return f"as many parameters as {made.ratio:.1%} of its FFN channels have, {of}"
    budget, reached = made.how["budget"], made.how["reached"]
    return f"as much of the budget {budget!r} as {reached:.1%} of what it counts, {of}"


def _counts(made: Provenance) -> str:
    """What each layer has left."""
    said = f"FFN channels left: {_numbers(made.widths)}"
    if made.residual_widths:
        said += "; shortcuts and an LM head of its own count as parameters"
    said += "."
    if made.padded_to is not None:
        said += f"\nEvery layer is filled with zeros to {made.padded_to} channels."
    if made.groups is not None:
        said += (
            f"\n\nGroups of attention heads left, with {made.group_heads} query heads each:"
            f" {_numbers(made.groups)}."
        )
        places = made.layers or range(len(made.groups))
        without = [str(n) for n, left in zip(places, made.groups, strict=True) if not left]
        said += f" No attention in layers {', '.join(without)}." if without else ""
    if made.layers is not None:
        gone = [n for n in range(made.dense_layers or 0) if n not in made.layers]
        said += (
            f"\n\nDecoder layers left: {len(made.layers)} of {made.dense_layers}; gone:"
            f" {', '.join(map(str, gone))}."
        )
    if experts := made.how.get("experts"):
        said += (
            f"\n\nExperts left in each layer: {len(next(iter(experts.values())))}, chosen by"
            f" `{made.how['experts_by']}`."
        )
    if made.padded_groups is not None:
        said += f"\nEvery layer is filled with zeros to {made.padded_groups} groups."
    return said


_TRAININGS = {
    "lora": "low-rank training of its linears",
    "full": "training of all weights of its layers",
}


def _recovery(recovered: Sequence[RecoveryStep]) -> str:
    """What the card says of it, one line for each training."""
    lines = ""
    for step in recovered:
        how = (
            f"{_TRAININGS[step.get('updates', 'lora')]}, {step['steps']} steps of {step['batch']}"
            f" blocks,"
            f" text: {step['text']['text']}"
        )
        change = (
            f"{step['loss']} {step['loss_before']:.4f} before and {step['loss_after']:.4f} after,"
            " nats per token"
        )
        kept = (
            ""
            if step["best_step"]
            else "; nothing was better, so the weights are those from before"
        )
        lines += f"\nRecovered by {how}. On text held back: {change}{kept}.\n"
    return lines


def _numbers(counts: Sequence[int]) -> str:
    fewest, most = min(counts), max(counts)
    return (
        f"{most} in every layer"
        if fewest == most
        else f"{fewest} to {most} in a layer, {sum(counts)} in all"
    )
