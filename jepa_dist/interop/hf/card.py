"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping

from jepa_dist.interop.safetensors_io import Description

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```"""


def model_card(description: Description, facts_of_run: Mapping[str, str]) -> str:
    """Return the text of README.md: how to use the model, what it is and how it was trained.

    Args:
        description: The weights and the configuration of the run.
        facts_of_run: Its data and its validation; may be empty.
    """
    config, model = description.config, description.config.model
    steps = "unknown" if description.step is None else f"{description.step:,}"
    objective = f"{config.jepa.lambda_:g}" if config.jepa.lambda_ else "0 (off)"
    facts = {
        "weights": "moving average" if description.weights == "ema" else "as trained",
        "optimizer steps": steps,
        "sequences per step": f"{config.batch.sequences} of {model.seq_len} tokens",
        "seed": str(config.seed),
        "weight of the JEPA objective": objective,
        "blocks, width, heads": f"{model.num_layers}, {model.model_dim}, {model.num_heads}",
        "recurrence phase": str(description.phase),
        **facts_of_run,
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    table = "\n".join(["| | |", "|---|---|", *rows])
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    note = (
        f"Rows have at most {model.seq_len} positions, as in training; beyond that the context of "
        "`generate` is a window of the last ones. The first token of a text is the one that begins "
        "documents."
    )
    return f"{head}\n# A GPT trained with jepa_dist\n\n{_USE}\n\n{note}\n\n{table}\n"
