from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from bench.quantise import quantise
from patcher.errors import ForgetSetError, ModelError, UsageError
from patcher.kernels import LowRank
from patcher.patch import module_base
from patcher.unlearn.facts import Fact
from patcher.unlearn.forward import answered, continuations, folded, hidden, inputs_of, logits
from patcher.unlearn.models import ARCHITECTURES, Model, load, title
from patcher.unlearn.prompts import encode, encode_fact, encode_facts

from . import tiny


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family(tmp_path: Path, family: str) -> None:
    model = load(tiny.save(tmp_path, family))
    ids = torch.tensor([model.tokenizer("The tower stands in the city of").input_ids])
    with torch.no_grad():
        wanted = model.network(ids).logits[0]
        torch.testing.assert_close(logits(model, hidden(model, ids)[0]), wanted)
    name = model.module_name(1)
    W = model.weight(name)
    d_out, d_in = W.shape
    assert (d_out, d_in) == (32, 128 if family == "falcon" else 64)
    assert module_base(model.served(name)).dtype == "bfloat16"
    # The edit reaches the model through the weight that the table names.
    delta = LowRank("multiplicative", torch.ones(d_out, 1), torch.ones(1, d_out))
    k = inputs_of(model, ids.tolist(), [1])[1][0]
    out: list[torch.Tensor] = []
    hook = model.module(1).register_forward_hook(lambda m, a, o: out.append(o.reshape(-1, d_out)))
    with torch.no_grad():
        hidden(model, ids)
        with folded(model, {name: delta}):
            hidden(model, ids)
    hook.remove()
    change = (k @ W.T) @ torch.ones(d_out, d_out)
    torch.testing.assert_close(out[1] - out[0], change, rtol=0.05, atol=0.05 * change.std().item())
    torch.testing.assert_close(model.weight(name), W, rtol=0, atol=0)


def test_the_table_names_only_families_that_transformers_has() -> None:
    from transformers import AutoConfig

    for family in ARCHITECTURES:
        assert AutoConfig.for_model(family).model_type == family


def test_weights_come_back_bit_for_bit_whatever_happens(tiny_model: Model) -> None:
    name = tiny_model.module_name(0)
    before = tiny_model.weight(name).clone()
    delta = LowRank("multiplicative", torch.ones(32, 1), torch.ones(1, 32))

    def trouble() -> None:
        with folded(tiny_model, {name: delta}):
            assert not torch.equal(tiny_model.weight(name), before)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        trouble()
    assert torch.equal(tiny_model.weight(name), before)


def test_padding_and_batches_change_no_answer(tiny_model: Model) -> None:
    prompts = ["One", "A much longer prompt than the other one", "Two words"]
    coded = [tiny_model.tokenizer(prompt).input_ids for prompt in prompts]
    together = continuations(tiny_model, coded, 4)
    assert together == [continuations(tiny_model, [ids], 4)[0] for ids in coded]
    assert answered(tiny_model, list(zip(coded, together, strict=True))) == [True] * 3
    wrong = [[*line[:-1], line[-1] ^ 1] for line in together]
    assert answered(tiny_model, list(zip(coded, wrong, strict=True))) == [False] * 3


def test_a_float32_checkpoint_is_served_in_bfloat16(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, dtype=torch.float32)
    model = load(folder)
    assert model.dtype_name == "bfloat16"
    weight = model.weight(model.module_name(0))
    assert torch.equal(weight, weight.bfloat16().float())
    assert load(folder, dtype="float32").dtype_name == "float32"
    assert load(tiny.save(tmp_path / "half", dtype=torch.float16)).dtype_name == "float16"


@pytest.mark.parametrize("name", ["", "no/such/place/here", "/no/such/place", "../nowhere", "a b"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(ModelError):
        load(name)


def test_what_is_no_usable_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)

    def changed(name: str, **fields: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    with pytest.raises(ModelError, match="not supported"):
        load(changed("other", model_type="mamba"))
    with pytest.raises(ModelError, match="quantised"):
        load(changed("quantised", quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ModelError, match="lacks"):
        load(changed("deeper", num_hidden_layers=5))
    cut = changed("cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(cut)
    pickled = changed("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can't be loaded"):
        load(pickled)


def test_unknown_device_and_dtype(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="device"):
        load(tiny_folder, device="abacus")
    with pytest.raises(UsageError, match="dtype"):
        load(tiny_folder, dtype="int8")


def test_a_manifest_never_learns_where_the_model_lies(tiny_model: Model, tiny_folder: Path) -> None:
    assert tiny_model.name == tiny_folder.name


def test_a_folders_name_that_does_not_print_is_made_to(tmp_path: Path) -> None:
    folder = tmp_path / "mo\x1b[31mdel\u202e"
    folder.mkdir()
    assert title(str(folder)) == "mo?[31mdel?"
    assert title("somebody/model") == "somebody/model"


def test_an_answer_continues_its_prompt(tiny_model: Model) -> None:
    read = tiny_model.tokenizer
    for prompt in ("The capital is", "The capital is ", "The capital is\n"):
        head, tail = encode(read, prompt, "Paris")
        assert read.decode(head) == prompt
        assert read.decode(tail).strip() == "Paris"
        assert read.decode(tail).startswith(" ") == (not prompt[-1].isspace())


def test_the_position_is_the_subjects_last_token(tiny_model: Model) -> None:
    read = tiny_model.tokenizer
    fact = Fact("Paris", prompt="The capital of France is", subject="France")
    coded = encode_fact(read, fact)
    assert read.decode(coded.prompt[: coded.subject + 1]) == "The capital of France"
    # The very first token is a rest for attention: the next one is taken.
    assert encode_fact(read, Fact("b", prompt="A is", subject="A")).subject == 1


def test_messages_go_through_the_template(tiny_model: Model) -> None:
    ask = ({"role": "user", "content": "Where is Paris?"},)
    coded = encode_fact(tiny_model.tokenizer, Fact("In France", messages=ask, subject="Paris"))
    text = tiny_model.tokenizer.decode(coded.prompt)
    assert text == "<user> Where is Paris?\n<assistant> "
    upto = tiny_model.tokenizer.decode(coded.prompt[: coded.subject + 1])
    assert upto == "<user> Where is Paris"


def test_facts_that_can_not_be_encoded_are_named_by_line(tiny_model: Model) -> None:
    long = Fact("x", prompt="word " * 300, subject="word", line=7)
    silent = copy.copy(tiny_model.tokenizer)
    silent.chat_template = None
    chat = Fact("x", messages=({"role": "user", "content": "Hi"},), line=9)
    with pytest.raises(ForgetSetError, match=r"line 7: .* takes 256; line 9: .*no chat template"):
        encode_facts(silent, [long, chat], 256)


# torch's own, when compressed-tensors is imported
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_checkpoint_whose_weights_alone_are_quantised_is_what_they_stand_for(
    tiny_folder: Path, tmp_path: Path
) -> None:
    quantise(tiny_folder, tmp_path / "quantised", tmp_path / "plain")
    quantised, plain = load(tmp_path / "quantised"), load(tmp_path / "plain")
    for layer in range(plain.layers):
        name = plain.module_name(layer)
        assert torch.equal(quantised.weight(name), plain.weight(name))
    assert quantised.dtype == plain.dtype


def test_a_checkpoint_that_rounds_activations_too_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rounding"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    group = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
    told = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    with pytest.raises(ModelError, match="can't be told"):
        load(folder)
