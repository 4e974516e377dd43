"""A sentence encoder (BERT's architecture) in plain torch, with the tensor names of its files."""

import json
import pathlib

import torch
from torch import nn
from torch.nn import functional


class Encoder(nn.Module):
    """Token ids of shape [batch, length] to embeddings of shape [batch, hidden]."""

    def __init__(self, config, device="cpu"):
        super().__init__()
        hidden = config["hidden_size"]
        place = {"device": device}

        def table(rows):
            return nn.Embedding(config[rows], hidden, **place)

        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": table("vocab_size"),
                "position_embeddings": table("max_position_embeddings"),
                "token_type_embeddings": table("type_vocab_size"),
                "LayerNorm": nn.LayerNorm(hidden, config["layer_norm_eps"], **place),
            }
        )
        layers = [Layer(config, place) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, ids):
        table = self.embeddings
        positions = torch.arange(ids.shape[1])
        x = table["word_embeddings"](ids) + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x + table["position_embeddings"](positions))
        for layer in self.encoder["layer"]:
            x = layer(x)
        return functional.normalize(x.mean(dim=1), dim=-1)


class Layer(nn.Module):
    def __init__(self, config, place):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        epsilon = config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        names = ("query", "key", "value")

        def maps(wide):
            return nn.Linear(hidden, wide, **place)

        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: maps(hidden) for name in names}),
                "output": dense_and_norm(hidden, hidden, epsilon, place),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": maps(inner)})
        self.output = dense_and_norm(inner, hidden, epsilon, place)

    def forward(self, x):
        batch, length, hidden = x.shape
        attention = self.attention["self"]

        def heads(name):
            return attention[name](x).view(batch, length, self.heads, -1).transpose(1, 2)

        scores = heads("query") @ heads("key").transpose(-1, -2)
        scores = scores / (hidden // self.heads) ** 0.5
        mixed = scores.softmax(-1) @ heads("value")
        mixed = mixed.transpose(1, 2).reshape(batch, length, hidden)
        x = close(self.attention["output"], mixed, x)
        return close(self.output, functional.gelu(self.intermediate["dense"](x)), x)


def dense_and_norm(wide, hidden, epsilon, place):
    dense = nn.Linear(wide, hidden, **place)
    return nn.ModuleDict({"dense": dense, "LayerNorm": nn.LayerNorm(hidden, epsilon, **place)})


def close(block, inner, residual):
    return block["LayerNorm"](block["dense"](inner) + residual)


def read_config(folder):
    return json.loads((pathlib.Path(folder) / "config.json").read_text())


def with_weights(config, weights):
    """An encoder whose parameters are the given tensors themselves, not copies of them."""
    model = Encoder(config, device="meta")
    for name, module in model.named_modules():
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                tensor = weights[f"{name}.{key}"]
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    return model.eval()


def sentence(seed, vocabulary):
    """Token ids of one sentence of 16 tokens."""
    return torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(seed))
