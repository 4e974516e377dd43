"""One process that runs one model in an unmodified runtime, so that its memory can be looked at.

    peer.py onnxruntime|torch WARM-UP MODEL

It runs WARM-UP, a tiny model of the same kind, so that the runtime's own code and heap are there
before anything is measured, and drops it; then it answers each line on standard input with a line of JSON:

    start   says the runtime's version, and loads nothing yet
    load    loads MODEL, embeds a few sentences, reads every page of the weights, and says the
            SHA-256 of the embeddings and how long the load took
    stop    ends
"""

import ctypes
import hashlib
import json
import pathlib
import signal
import sys
import time

import numpy

PAGE = 4096
# Whoever measures does not wait longer than this for a runtime that hangs.
SECONDS = 300


def sentences():
    """Four sentences of 16 tokens, with ids that every model here has."""
    return numpy.random.default_rng(0).integers(2048, size=(4, 1, 16), dtype=numpy.int64)


def touch_weights():
    """Reads a byte of every page that is mapped from a weights file.

    A lookup table is read where a sentence leads; over time, all of it is.
    """
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name.endswith((".safetensors", ".onnx")):
            begin, end = (int(address, 16) for address in span.split("-"))
            for address in range(begin, end, PAGE):
                ctypes.string_at(address, 1)


class OnnxRuntime:
    """MODEL is an .onnx file."""

    def __init__(self):
        import onnxruntime

        self.runtime = onnxruntime
        self.version = onnxruntime.__version__

    def load(self, path):
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # Packing copies the weights into a layout of the runtime's own, per process.
        options.add_session_config_entry("session.disable_prepacking", "1")
        self.model = self.runtime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def embed(self, ids):
        return self.model.run(None, {"ids": ids})[0]


class Torch:
    """MODEL is a folder with config.json and safetensors files."""

    def __init__(self):
        import safetensors
        import torch

        import encoder

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.torch, self.encoder = torch, encoder
        self.version = f"{torch.__version__}, safetensors {safetensors.__version__}"

    def load(self, path):
        from safetensors.torch import load_file

        index = path / "model.safetensors.index.json"
        shards = ["model.safetensors"]
        if index.exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        weights = {}
        for shard in shards:
            weights.update(load_file(path / shard))
        self.model = self.encoder.with_weights(self.encoder.read_config(path), weights)

    def embed(self, ids):
        return self.model(self.torch.from_numpy(ids)).numpy()


RUNTIMES = {"onnxruntime": OnnxRuntime, "torch": Torch}


def digest(runtime):
    hasher = hashlib.sha256()
    for ids in sentences():
        hasher.update(numpy.ascontiguousarray(runtime.embed(ids)).tobytes())
    return hasher.hexdigest()


def say(**what):
    print(json.dumps(what), flush=True)


def main(name, warm_up, model):
    signal.alarm(SECONDS)
    runtime = RUNTIMES[name]()
    runtime.load(pathlib.Path(warm_up))
    digest(runtime)
    touch_weights()
    runtime.model = None
    for line in sys.stdin:
        match line.strip():
            case "start":
                say(version=runtime.version)
            case "load":
                begin = time.perf_counter()
                runtime.load(pathlib.Path(model))
                elapsed = time.perf_counter() - begin
                sha256 = digest(runtime)
                touch_weights()
                say(load_ms=elapsed * 1e3, sha256=sha256)
            case "stop":
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
