"""Makes a family of models: a base, and fine-tunes of its upper layers.

    family.py BASE OUT COUNT

BASE is a folder with model.safetensors and config.json of a BERT-like sentence encoder. Embeddings
and layers 0 to 3 are frozen; the others are trained for a few steps, on sentences of random tokens
that have random embeddings to reach: enough for every weight to be another one. Each model is
written twice, as runtimes would get it: OUT/safetensors/NAME/model.safetensors, and
OUT/onnx/NAME.onnx with its weights inside. `warm-up` is a tiny model of the same kind.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file

from encoder import Encoder, read_config, sentence

FROZEN = ("embeddings.", *(f"encoder.layer.{layer}." for layer in range(4)))
STEPS = 3


def main(base, out, count):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base, out = pathlib.Path(base), pathlib.Path(out)
    config = read_config(base)
    weights = load_file(base / "model.safetensors")
    tiny = {**config, "hidden_size": 24, "intermediate_size": 48, "vocab_size": 2048}
    write(Encoder(tiny).eval(), tiny, out, "warm-up")
    for number in range(count + 1):
        model = Encoder(config)
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        if number:
            tune(model, config, seed=number)
        name = f"tune-{number}" if number else "base"
        write(model.eval(), config, out, name)


def tune(model, config, seed):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(FROZEN)
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in free]
    optimizer = torch.optim.AdamW(free, lr=1e-4)
    goals = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        embedding = model(sentence(100 * seed + step, config["vocab_size"]))
        goal = torch.randn(embedding.shape, generator=goals)
        loss = -(embedding * goal).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all((old != new).any() for old, new in zip(before, free))


def write(model, config, out, name):
    folder = out / "safetensors" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    graph = out / "onnx" / f"{name}.onnx"
    graph.parent.mkdir(exist_ok=True)
    example = sentence(0, config["vocab_size"])
    names = {"input_names": ["ids"], "output_names": ["embedding"]}
    torch.onnx.export(model, example, graph, opset_version=17, **names)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
