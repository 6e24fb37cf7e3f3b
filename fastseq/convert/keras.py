"""Keras: the classic encoder-decoder of two LSTMs, in `.keras` and `.h5` files of Keras 3 and `.h5` of Keras 2.

Reads the files with h5py, without Keras or TensorFlow. The encoder is one or several LSTMs or Bidirectional LSTMs over
one-hot vectors or an Embedding. Each LSTM of the decoder starts from the final h and c of the encoder's LSTM of the
same layer, and a Dense layer reads the last one.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
from torch import Tensor

from fastseq.convert.parts import Affine, Layer, Parts, Weights, attention_score
from fastseq.convert.port import Given, Port
from fastseq.convert.tables import TABLES
from fastseq.convert.vocabulary import Vocabulary, read_tokens
from fastseq.errors import UserError
from fastseq.training.tokenizer import RESERVED

MAX_CONFIG = 16 << 20
PASSED = ("Dropout", "SpatialDropout1D", "GaussianNoise", "ActivityRegularization")  # identities at inference
EXPECTED = {  # of an LSTM; another value computes something else
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "use_bias": True,
    "go_backwards": False,
}


class Node(NamedTuple):
    """A layer of the model, with the outputs of other layers that it reads."""

    name: str
    kind: str
    config: dict[str, Any]
    inputs: list[tuple[str, int]]  # (layer, index of its output), data first, then initial states


def read(path: Path, given: Given) -> Port:
    """The port of a Keras model; raises UserError naming a layer or an option that fastseq lacks."""
    config, tensors = _read_zip(path) if zipfile.is_zipfile(path) else _read_h5(path)
    model = Model(config, tensors)
    parts = model.parts()
    if given.source is None or given.target is None:
        _refuse("the file holds no vocabulary; give the tokens by id: --source-vocab and --target-vocab")
    source = _vocabulary(given, given.source, needed=())
    if model.masked_id_0 and source.pad != source.tokens[0]:
        _refuse(f"the embedding of the sources masks id 0; name that token with --pad {source.tokens[0]!r}")
    target = _vocabulary(given, given.target, needed=("bos", "eos"))
    if given.padding is not None and model.masked:
        _refuse("the encoder masks the padding of the sources, so --pad-to has no effect; leave it out")
    if given.padding is None and not model.masked:
        parts.notes.append(
            "the encoder has no mask and reads the padding after a source; if it was trained so, give --pad-to"
        )
    return Port(parts, source, target, given.tokenizer or "char", given.padding)


def _vocabulary(given: Given, path: Path, needed: tuple[str, ...]) -> Vocabulary:
    """The vocabulary of one side. Reserved are the tokens named, or <pad>, <bos>, <eos>, <unk> where they exist."""
    tokens = read_tokens(path)
    names = {}
    for role, usual in zip(("pad", "bos", "eos", "unk"), RESERVED, strict=True):
        name = given.reserved.get(role, usual)
        names[role] = name if name in tokens else None
        if role in needed and names[role] is None:
            _refuse(f"{path} has no token {name!r}; name the one that serves as {role} with --{role}")
    return Vocabulary(tokens, **names)


class Model:
    """The graph of layers, read from the output back to both inputs."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, list[Tensor]]) -> None:
        if config.get("class_name") not in ("Functional", "Model"):
            _refuse(f"the model is {config.get('class_name')!r}, expected a functional keras.Model of two inputs")
        self.nodes = {node.name: node for node in map(_node, config["config"]["layers"])}
        outputs = config["config"]["output_layers"]
        outputs = [outputs] if isinstance(outputs[0], str) else outputs
        if len(outputs) != 1:
            _refuse(f"the model has {len(outputs)} outputs, expected one: the probabilities of the next token")
        self.output = outputs[0][0]
        self.tensors = tensors
        self.used: set[str] = set()
        self.masked = self.masked_id_0 = False
        self.dropout = 0.0
        self.notes: list[str] = []

    def parts(self) -> Parts:
        """Read everything; a layer that is reached by no path is named."""
        dense = self._visit(self.output)
        output = self._dense(dense)
        chain = self._chain(dense)
        decoder, target = chain[:-1][::-1], chain[-1]
        encoder, source = self._encoder([self._origin(node) for node in decoder])
        source_matrix, self.masked = self._embedding(source, self._layers(encoder[0])[0].weight_ih.size(1))
        self.masked_id_0 = self.masked and source.kind == "Embedding"
        target_matrix, _ = self._embedding(target, self._layers(decoder[0])[0].weight_ih.size(1))
        rest = [n.name for n in self.nodes.values() if n.name not in self.used and n.kind not in ("NotEqual", "Any")]
        if rest:
            _refuse(f"the layers {', '.join(rest)} lie outside the encoder-decoder, so fastseq has no place for them")
        return Parts(
            source_matrix,
            target_matrix,
            [self._layers(node) for node in encoder],
            [self._layers(node)[0] for node in decoder],
            output,
            attention=attention_score("keras", "no attention layer"),
            options={"dropout": self.dropout, "bridge": "concat"},
            closed=False,
            notes=self.notes,
        )

    def _visit(self, name: str) -> Node:
        if name not in self.nodes:
            _refuse(f"the model names a layer {name!r} that it does not have")
        self.used.add(name)
        return self.nodes[name]

    def _follow(self, node: Node) -> Node:
        """The layer whose output ``node`` reads, past layers that do nothing at inference."""
        if not node.inputs:
            _refuse(f"{node.name} ({node.kind}) reads no layer")
        before = self._visit(node.inputs[0][0])
        while before.kind in PASSED:
            self.dropout = max(self.dropout, float(before.config.get("rate", 0.0)))
            before = self._visit(before.inputs[0][0])
        return before

    def _chain(self, node: Node) -> list[Node]:
        """The recurrent layers below ``node``, top first, and then the Embedding or the input."""
        chain = []
        node = self._follow(node)
        while node.kind in ("LSTM", "Bidirectional"):
            self._check(node)
            chain.append(node)
            node = self._follow(node)
        if node.kind not in ("Embedding", "InputLayer", "Masking") or not chain:
            _refuse(
                f"{node.name} is a {node.kind}; expected LSTMs over an Embedding or one-hot vectors. "
                "Attention layers, convolutions and GRUs of Keras have no equal in fastseq"
            )
        return [*chain, node]

    def _check(self, node: Node) -> None:
        for config in _lstm_configs(node):
            for option, expected in EXPECTED.items():
                if option == "go_backwards" and node.kind == "Bidirectional":
                    continue
                if config.get(option, expected) != expected:
                    _refuse(f"{node.name} has {option}={config[option]!r}; fastseq has {option}={expected!r} alone")
            self.dropout = max(self.dropout, float(config.get("dropout", 0.0)))
            if config.get("recurrent_dropout"):
                self.notes.append(
                    f"{node.name} was trained with recurrent_dropout={config['recurrent_dropout']}, which fastseq lacks"
                )
        if node.kind == "Bidirectional" and node.config.get("merge_mode", "concat") != "concat":
            _refuse(f"{node.name} has merge_mode={node.config['merge_mode']!r}; fastseq concatenates the directions")

    def _origin(self, node: Node) -> str:
        """The encoder's layer whose final h and c, of both directions if it has two, start ``node``."""
        if node.kind != "LSTM" or len(node.inputs) != 3:
            _refuse(
                f"{node.name} ({node.kind}, {len(node.inputs) - 1} initial states) must be an LSTM of the decoder that "
                "starts from h and c of the encoder"
            )
        given = [self._visit(name) for name, _ in node.inputs[1:]]
        joined = [state for layer in given if layer.kind == "Concatenate" for state in layer.inputs]
        states, expected, kind = (
            (joined, [1, 3, 2, 4], "Bidirectional") if joined else (node.inputs[1:], [1, 2], "LSTM")
        )
        origin = self._visit(states[0][0])
        if origin.kind != kind or states != [(origin.name, index) for index in expected]:
            _refuse(
                f"{node.name} starts from {', '.join(layer.name for layer in given)}; expected h and c of one LSTM, or "
                "of one Bidirectional the Concatenate of forward and backward h, and the Concatenate of both c"
            )
        return origin.name

    def _encoder(self, names: list[str]) -> tuple[list[Node], Node]:
        """The recurrent layers of the encoder, lowest first, and the layer below them."""
        top = self._visit(names[-1])
        if top.kind not in ("LSTM", "Bidirectional"):
            _refuse(f"the decoder starts from {top.name}, a {top.kind}; expected an LSTM or a Bidirectional LSTM")
        self._check(top)
        chain = [top]
        below = self._follow(top)
        while below.kind in ("LSTM", "Bidirectional"):
            self._check(below)
            chain.append(below)
            below = self._follow(below)
        chain.reverse()
        if [node.name for node in chain] != names:
            _refuse(
                f"the decoder's layers start from {', '.join(names)}, and the encoder's layers are "
                f"{', '.join(node.name for node in chain)}; fastseq hands each layer's state to the same layer"
            )
        return chain, below

    def _layers(self, node: Node) -> list[Layer]:
        """The directions of a recurrent layer."""
        configs, tensors = _lstm_configs(node), self._tensors(node.name, 3 * len(_lstm_configs(node)))
        layers = []
        for config, names in zip(configs, range(0, len(tensors), 3), strict=True):
            units = config["units"]
            named = dict(
                zip(("LSTM: kernel", "LSTM: recurrent_kernel", "LSTM: bias"), tensors[names : names + 3], strict=True)
            )
            weights = Weights(f"keras, {node.name}", named, TABLES["keras"])
            kernel = weights.take("decoder.lstm.weight_ih_l{k}", None, 4 * units)
            recurrent = weights.take("decoder.lstm.weight_hh_l{k}", units, 4 * units)
            layers.append(Layer(kernel.t(), recurrent.t(), weights.take("decoder.lstm.bias_ih_l{k}", 4 * units), None))
        return layers

    def _embedding(self, node: Node, size: int) -> tuple[Tensor, bool]:
        """(V, E) and True if the padding is masked; an identity for one-hot vectors."""
        if node.kind == "Embedding":
            self._visit_inputs(node)
            named = {"Embedding: embeddings": self._tensors(node.name, 1)[0]}
            weights = Weights(f"keras, {node.name}", named, TABLES["keras"])
            return weights.take("encoder.embedding.weight", node.config["input_dim"], size), node.config["mask_zero"]
        if node.kind == "Masking":
            self._visit_inputs(node)
            if node.config["mask_value"] != 0:
                _refuse(f"{node.name} has mask_value={node.config['mask_value']}; one-hot padding is 0")
        return torch.eye(size), node.kind == "Masking"

    def _visit_inputs(self, node: Node) -> None:
        for name, _ in node.inputs:
            if self._visit(name).kind != "InputLayer":
                _refuse(f"{node.name} reads {name}, a {self.nodes[name].kind}; expected an input of the model")

    def _dense(self, node: Node) -> Affine:
        config = node.config["layer"]["config"] if node.kind == "TimeDistributed" else node.config
        kind = node.config["layer"]["class_name"] if node.kind == "TimeDistributed" else node.kind
        if kind != "Dense":
            _refuse(f"the output layer {node.name} is a {kind}; expected Dense, with softmax or linear activation")
        if config["activation"] not in ("softmax", "linear"):
            _refuse(f"{node.name} has activation={config['activation']!r}; expected 'softmax' or 'linear'")
        tensors = self._tensors(node.name, 1 + config["use_bias"])
        weights = Weights(
            "keras", dict(zip(("Dense: kernel", "Dense: bias")[: len(tensors)], tensors, strict=True)), TABLES["keras"]
        )
        kernel = weights.take("decoder.output.weight", None, config["units"])
        return Affine(kernel.t(), weights.take("decoder.output.bias", config["units"]) if config["use_bias"] else None)

    def _tensors(self, name: str, count: int) -> list[Tensor]:
        tensors = self.tensors.get(name, [])
        if len(tensors) != count:
            _refuse(f"{name} has {len(tensors)} weights in the file, expected {count}")
        return tensors


def _node(stored: dict[str, Any]) -> Node:
    nodes = stored["inbound_nodes"]
    if len(nodes) > 1:
        _refuse(f"{stored['name']} is called {len(nodes)} times; a layer shared by two places has no equal in fastseq")
    return Node(stored["name"], stored["class_name"], stored["config"], _inputs(nodes[0]) if nodes else [])


def _inputs(call: Any) -> list[tuple[str, int]]:
    """The outputs that a call reads, in order: Keras 3 ``{"args", "kwargs"}``, Keras 2 ``[layer, node, index, {}]``."""
    if isinstance(call, dict):
        if call.get("class_name") == "__keras_tensor__":
            name, _, index = call["config"]["keras_history"]
            return [(name, index)]
        if "args" in call:
            return _inputs(call["args"]) + _inputs(call["kwargs"].get("initial_state", []))
        return _inputs(call.get("initial_state", []))
    if isinstance(call, list):
        if len(call) >= 3 and isinstance(call[0], str) and isinstance(call[2], int):
            return [(call[0], call[2])] + [found for rest in call[3:] for found in _inputs(rest)]
        return [found for part in call for found in _inputs(part)]
    return []


def _lstm_configs(node: Node) -> list[dict[str, Any]]:
    """The options of each direction."""
    if node.kind == "LSTM":
        return [node.config]
    inner = node.config["layer"]
    if inner["class_name"] != "LSTM":
        _refuse(f"{node.name} is bidirectional over {inner['class_name']}; fastseq has LSTMs alone")
    return [inner["config"], node.config.get("backward_layer", inner)["config"]]


def _read_zip(path: Path) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Configuration and the weights of each layer of a `.keras` file."""
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        for name in ("config.json", "model.weights.h5"):
            if name not in sizes:
                _refuse(f"{path} has no {name}; save the model with model.save('model.keras')")
        if sizes["config.json"] > MAX_CONFIG or sizes["model.weights.h5"] > path.stat().st_size:
            _refuse(f"{path} is compressed or has a configuration of {sizes['config.json']:,} bytes")
        config = _json(archive.read("config.json"))
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            return config, _by_group(file, config, sizes["model.weights.h5"])


def _by_group(file: h5py.File, config: dict[str, Any], limit: int) -> dict[str, list[Tensor]]:
    """The weights under ``layers/GROUP/.../vars/0, 1, ...``. A group counts the layers of a class: lstm, lstm_1, ..."""
    counted: dict[str, int] = {}
    found = {}
    for layer in config["config"]["layers"]:
        base = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", layer["class_name"]).lower()
        group = f"layers/{base}_{counted[base]}" if counted.get(base) else f"layers/{base}"
        if group not in file:
            continue  # an operation of the graph, such as not_equal
        counted[base] = counted.get(base, 0) + 1
        name = layer["config"]["name"]
        stored_name = _text(file[group].get("vars", file).attrs.get("name", name))
        if stored_name != name:
            _refuse(f"{group} holds the weights of {stored_name!r}, expected {name!r}; save the model again with Keras")
        tensors: list[Tensor] = []
        for inner in ("vars", "cell/vars", "layer/vars", "forward_layer/cell/vars", "backward_layer/cell/vars"):
            stored = file.get(f"{group}/{inner}", {})
            tensors += [_tensor(stored[str(i)], limit) for i in range(len(stored))]
        found[name] = tensors
    return found


def _read_h5(path: Path) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Configuration and the weights of each layer of an `.h5` file of a whole model."""
    if not h5py.is_hdf5(path):
        _refuse(f"{path} is neither a .keras nor an .h5 file")
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            _refuse(f"{path} holds weights without the model; save it with model.save, not save_weights")
        groups = file["model_weights"]
        tensors = {
            name: [_tensor(group[_text(weight)], path.stat().st_size) for weight in group.attrs["weight_names"]]
            for name, group in groups.items()
        }
        return _json(file.attrs["model_config"]), tensors


def _tensor(stored: h5py.Dataset, limit: int) -> Tensor:
    if stored.nbytes > limit:
        _refuse(f"{stored.name} claims {stored.nbytes:,} bytes, more than its file has")
    return torch.from_numpy(stored[()])


def _json(text: Any) -> dict[str, Any]:
    try:
        stored = json.loads(text)
        stored["config"]["layers"], stored["config"]["output_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"keras: the file's configuration is no functional model ({error!r})") from error
    return stored


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _refuse(sentence: str) -> None:
    raise UserError(f"keras: {sentence}")
