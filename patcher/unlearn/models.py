"""Causal language models: which ones, where their MLP's down projection is, loading.

Local files or what ``from_pretrained`` finds for a hub id; safetensors only, so
nothing is unpickled, and code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, UsageError
from ..kernels import LowRank

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its layers and, in each, the MLP's down projection.

    ``transposed``: the weight is stored ``[d_in, d_out]`` (GPT-2's ``Conv1D``).
    """

    layers: str
    down: str
    transposed: bool = False


_LLAMA = Architecture("model.layers", "mlp.down_proj")

#: ``model_type`` of a configuration -> where to look (transformers 5.19).
ARCHITECTURES: dict[str, Architecture] = {
    "exaone4": _LLAMA,
    "falcon": Architecture("transformer.h", "mlp.dense_4h_to_h"),
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "gpt2": Architecture("transformer.h", "mlp.c_proj", transposed=True),
    "gpt_bigcode": Architecture("transformer.h", "mlp.c_proj"),
    "gpt_neox": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "gptj": Architecture("transformer.h", "mlp.fc_out"),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "opt": Architecture("model.decoder.layers", "fc2"),
    "phi": Architecture("model.layers", "mlp.fc2"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": Architecture("model.layers", "mlp.c_proj"),
}


@dataclass
class Model:
    """A loaded model: weights rounded to the served dtype, held and run in float32.

    Nothing here changes the weights but :func:`patcher.unlearn.forward.folded` and
    ``beneath``, which put them back.
    """

    name: str
    network: Any  # transformers' PreTrainedModel
    tokenizer: Any  # transformers' PreTrainedTokenizerBase
    architecture: Architecture
    dtype: torch.dtype
    under: tuple[Mapping[str, LowRank], ...] = ()  # the stack in force, its bottom first
    pristine: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # of its modules
    _digest: str = field(default="", repr=False)

    @property
    def class_name(self) -> str:
        """The class that vLLM knows the model by, such as ``LlamaForCausalLM``."""
        return type(self.network).__name__

    @property
    def computed_on(self) -> list[Any]:
        """The kind of device and, on a CPU, the threads: sums have other last bits on another."""
        kind = self.device.type
        return [kind, torch.get_num_threads() if kind == "cpu" else None]

    @property
    def dtype_name(self) -> str:
        """The served dtype as manifests and the command line write it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.device
        return device

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.network.get_submodule(self.architecture.layers))

    @property
    def max_tokens(self) -> int | None:
        """The most positions that the model can take; None where it doesn't say."""
        value = getattr(self.network.config, "max_position_embeddings", None)
        return int(value) if value else None

    def module_name(self, layer: int) -> str:
        """The dotted name of that layer's down projection."""
        return f"{self.architecture.layers}.{layer}.{self.architecture.down}"

    def module(self, layer: int) -> torch.nn.Module:
        """That layer's down projection."""
        found: torch.nn.Module = self.network.get_submodule(self.module_name(layer))
        return found

    def parameter(self, name: str) -> torch.nn.Parameter:
        """The weight of the module of that name, as the module stores it."""
        weight: torch.nn.Parameter = self.network.get_submodule(name).weight
        return weight

    def weight(self, name: str) -> torch.Tensor:
        """The weight of the module of that name as ``[d_out, d_in]`` float32, a view."""
        weight = self.parameter(name).detach()
        return weight.T if self.architecture.transposed else weight

    def served(self, name: str) -> torch.Tensor:
        """The base's, in the served dtype: what is digested and folded; exact, a copy."""
        kept = self.pristine.get(name)
        weight = self.weight(name) if kept is None else kept.clone()
        return weight.to(self.dtype).contiguous()

    def put_under(
        self, under: tuple[Mapping[str, LowRank], ...], pristine: dict[str, torch.Tensor]
    ) -> None:
        """Say what the weights have folded in (:func:`patcher.unlearn.forward.beneath`)."""
        self.under, self.pristine, self._digest = under, pristine, ""

    def digest(self) -> str:
        """SHA-256 over every parameter's name, dtype, shape and values as they are now, kept."""
        if not self._digest:
            total = hashlib.sha256()
            for name, tensor in sorted(self.network.state_dict().items()):
                total.update(f"{name} {tuple(tensor.shape)} {self.dtype_name}\n".encode())
                part = tensor.detach().to(self.dtype).contiguous().cpu()
                total.update(part.view(torch.uint8).reshape(-1).numpy().data)
            self._digest = total.hexdigest()
        return self._digest


def load(model: str | Path, dtype: str = "auto", device: str = "auto") -> Model:
    """Load a causal language model and its tokenizer.

    Args:
        model: a directory, or a hub id (looked up as ``from_pretrained`` does, so
            ``HF_HUB_OFFLINE=1`` keeps it offline).
        dtype: what the weights are served in; ``auto``: the checkpoint's, where
            float32 counts as bfloat16, as in vLLM.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1`` …

    Raises:
        ModelError: no such model, not in :data:`ARCHITECTURES`, quantised,
            incomplete or unreadable.
        UsageError: an unknown dtype or device.
    """
    where = place(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", f"Choose auto or {', '.join(DTYPES)}.")
    name = resolve(model)
    with quiet():
        config = configuration(name)
        architecture = _architecture(config)
        served = DTYPES[dtype] if dtype != "auto" else served_dtype(config)
        network = _network(name, config, served)
        tokenizer = _tokenizer(name)
    network = network.float().to(where).eval().requires_grad_(False)
    loaded = Model(title(name), network, tokenizer, architecture, served)
    _check(loaded)
    return loaded


def outline(model: str | Path) -> Model:
    """The model's shapes, on the device ``meta``: nothing of its weights or tokenizer.

    Raises:
        ModelError: as :func:`load`, as far as a configuration tells.
    """
    from transformers import AutoModelForCausalLM

    name = resolve(model)
    with quiet(), torch.device("meta"):
        config = configuration(name)
        architecture = _architecture(config)
        maker: Any = AutoModelForCausalLM
        try:
            network = maker.from_config(config)
        except Exception as error:
            raise _unreadable(name, error) from None
    found = Model(title(name), network, None, architecture, served_dtype(config))
    _check(found)
    return found


def place(device: str) -> torch.device:
    """Where to compute: the device of that name; ``auto``: CUDA where there is one.

    Raises:
        UsageError: there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError):
        raise UsageError(
            f"There is no device {device!r} here.", "Choose auto, cpu or cuda."
        ) from None
    return where


def resolve(model: str | Path) -> str:
    """The directory as it was given, or a hub id.

    Raises:
        ModelError: neither.
    """
    path = Path(model)
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelError(
                    f"{path} holds no config.json.", "Give a directory in transformers' layout."
                )
            return str(path)
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    hub = isinstance(model, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)
    if is_file or not hub:
        raise ModelError(
            f"There is no model directory {str(model)!r}.",
            "Give a directory with config.json and safetensors, or a hub id.",
        )
    return str(model)


def title(name: str) -> str:
    """What a manifest says: a hub id as it is, of a path the last part only, fit to be printed."""
    found = Path(name).resolve().name if Path(name).is_dir() else name
    return "".join(one if one.isprintable() else "?" for one in found)


def configuration(name: str) -> Any:
    """transformers' configuration of a directory or hub id.

    Raises:
        ModelError: there is none that can be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever the library raises, the cause is the model given
        raise _unreadable(name, error) from None


def _architecture(config: Any) -> Architecture:
    _dequantise(config)
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"Models of type {config.model_type!r} are not supported.",
            f"Supported are {', '.join(sorted(ARCHITECTURES))}.",
        )
    return found


def _dequantise(config: Any) -> None:
    """Have a checkpoint whose weights alone are quantised loaded as what they stand for.

    Engines that serve such weights take a patch of those on the modules' outputs.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return
    rounds = [group.get("input_activations") for group in given.get("config_groups", {}).values()]
    if given.get("quant_method") != "compressed-tensors" or any(rounds):
        raise ModelError(
            "The checkpoint is quantised in a way that its weights can't be told from.",
            "Give the checkpoint that it was quantised from, or one in compressed-tensors' format"
            " whose weights alone are quantised.",
        )
    given["dequantize"] = True


def served_dtype(config: Any) -> torch.dtype:
    """What vLLM serves such a checkpoint in where nobody says: float32 counts as bfloat16."""
    stored = getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = DTYPES.get(stored)
    return torch.float16 if stored == torch.float16 else torch.bfloat16


def _network(name: str, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # its types don't tell that it can return a pair
    try:
        network, info = loader.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreadable(name, error) from None
    missing = sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise ModelError(
            f"The checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}.",
            "Give a complete checkpoint in safetensors.",
        )
    return network


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(name, error, "tokenizer") from None


def _unreadable(name: str, error: Exception, what: str = "model") -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"The {what} {name} can't be loaded: {reason[:300]}",
        "Give a complete local directory (config.json, safetensors, tokenizer) or a hub id.",
    )


def _check(model: Model) -> None:
    try:
        shapes = {tuple(model.weight(model.module_name(i)).shape) for i in range(model.layers)}
    except AttributeError:
        raise ModelError(
            f"{model.class_name} has no {model.module_name(0)}.",
            "A mixture of experts or a variant of its family is not supported.",
        ) from None
    if not shapes:
        raise ModelError("The model has no layers.", "Give another.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars and advice on standard error."""
    from transformers.utils import logging

    chatter: Any = logging  # untyped

    bars, level = chatter.is_progress_bar_enabled(), chatter.get_verbosity()
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
