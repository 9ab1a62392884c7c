"""The format of spinfold's Transformers plugin: all that a run can be, in a folder that `from_pretrained` reads.

    config.json         the model's, with quantization_config: recipe, wires, checksum (`quantizer.SpinfoldConfig`)
    *.safetensors       weights as packed integers and scales (`packed`), maps on wires (`wires`), the rest as it is
    README.md           the model card: how to load it, recipe, figures, proofs
    generation_config.json, tokenizer files

    import spinfold
    model = AutoModelForCausalLM.from_pretrained(folder)

Shapes: O out features, I in features.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from spinfold.checkpoint import load_clips
from spinfold.errors import reading
from spinfold.evaluation import Proof
from spinfold.export.contents import Contents
from spinfold.export.packed import packed_tensors
from spinfold.export.quantizer import SpinfoldConfig, digest
from spinfold.export.shards import save_shards
from spinfold.export.wires import describe_wires
from spinfold.files import write_json
from spinfold.folding import place_online
from spinfold.report.tables import comparison_table, human_bytes
from spinfold.runtime import quantize_wires

__all__ = ["write"]

_SHARD_BYTES = 4_000_000_000

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [spinfold, quantized]
---

# {name}, {bits}{grid}

{size} of weights, made by spinfold {version} with the method `{method}`.

```python
import spinfold
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Weights stay packed in memory, and so does the KV cache if the recipe quantizes it.

## Figures

On {text}, computed before the export:

{figures}
## Proofs

{proofs}

`proof.json`, if it is there, compares this folder with the run in memory.

## Recipe

```yaml
{recipe}```
"""


def write(
    contents: Contents, folder: Path, *, dtype: torch.dtype = torch.float32, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write a run into an existing folder, in shards of at most `shard_bytes` (or one tensor).

    All that is not quantized is rounded to `dtype`; in float32 the folder computes what the run does.
    """
    wires, maps = _wires(contents)
    digests: dict[str, str] = {}

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in itertools.chain(_tensors(contents, dtype), maps.items()):
            digests[name] = digest(tensor)
            yield name, tensor

    save_shards(folder, noted(), shard_bytes)
    quantization = SpinfoldConfig(contents.recipe.model_dump(mode="json"), wires)
    config = contents.model_config() | {"dtype": str(dtype).removeprefix("torch.")}
    quantization.checksum = quantization.checksum_over(digests, config)
    GenerationConfig.from_model_config(contents.config).save_pretrained(folder)
    for file in contents.tokenizer_files:
        shutil.copyfile(file, folder / file.name)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with reading(contents.path / "run.json"):
        (folder / "README.md").write_text(_card(contents, num_bytes), "utf-8")
    write_json(folder / "config.json", config | {"quantization_config": quantization.to_dict()})


def _tensors(contents: Contents, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the model as the plugin builds it, parameter by parameter."""
    shapes = {name: tensor.shape for name, tensor in contents.network.model.state_dict().items()}
    for name, weight in contents.modules():
        parameter = name if name in shapes else f"{name}.weight"
        if isinstance(weight, Tensor):
            yield parameter, weight.view(shapes[parameter]).to(dtype)
            continue
        for key, value in packed_tensors(weight, shapes[parameter]).items():
            yield f"{parameter}.{key}", value
    for name, tensor in contents.others():
        yield name, tensor.to(dtype)


def _wires(contents: Contents) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands on the wires of the run's network, without its weights."""
    network = contents.network.copy()
    network.embedding.weight = nn.Parameter(torch.empty(0))  # ops go where the embedding is, and need their values
    place_online(network, contents.maps)
    quantize_wires(network, contents.recipe, clips=load_clips(contents.path))
    return describe_wires(network.model)


def _card(contents: Contents, num_bytes: int) -> str:
    """The model card."""
    data, recipe = contents.data, contents.recipe
    proofs = [Proof(x["statement"], x["measured"], x["tolerance"], x["detail"]) for x in data["proofs"]]
    return _CARD.format(
        name=data["model"]["name"],
        bits=recipe.bits,
        grid="" if recipe.format == "int" else f" {recipe.format.upper()}",
        method=recipe.method,
        size=human_bytes(num_bytes),
        version=data["spinfold"],
        text=data["text"]["evaluation"],
        figures=comparison_table(data["metrics"]["rows"]),
        proofs="\n".join(f"- {proof}" for proof in proofs),
        recipe=recipe.to_yaml(),
    )
