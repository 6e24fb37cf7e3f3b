"""Small Keras models for the port, and their files in ``keras/``, which lie there for machines without Keras.

The files were made by ``KERAS_BACKEND=torch python tests/cases/keras_models.py`` with Keras 3.15.1.
"""

import os
from pathlib import Path

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "torch")
FILES = Path(__file__).parent / "keras_files"  # not "keras": tests/cases is on the import path
SOURCES, TARGETS, UNITS = 7, 9, 6  # tokens of the vocabularies, hidden size
STEPS = (5, 4)  # of source and target


def one_hot(keras, activation="softmax"):
    """The encoder-decoder of Keras' own example lstm_seq2seq: one-hot characters, no mask."""
    layers = keras.layers
    source, target = layers.Input((None, SOURCES)), layers.Input((None, TARGETS))
    _, h, c = layers.LSTM(UNITS, return_state=True)(source)
    output, _, _ = layers.LSTM(UNITS, return_sequences=True, return_state=True)(target, initial_state=[h, c])
    return keras.Model([source, target], layers.Dense(TARGETS, activation=activation)(output))


def embedded(keras):
    """Embeddings of different sizes, masked padding, two layers, dropout."""
    layers = keras.layers
    source, target = layers.Input((None,)), layers.Input((None,))
    x = layers.Dropout(0.2)(layers.Embedding(SOURCES, 3, mask_zero=True)(source))
    x, h0, c0 = layers.LSTM(UNITS, return_sequences=True, return_state=True)(x)
    _, h1, c1 = layers.LSTM(UNITS, return_state=True)(x)
    y = layers.Embedding(TARGETS, 5, mask_zero=True)(target)
    y, _, _ = layers.LSTM(UNITS, return_sequences=True, return_state=True)(y, initial_state=[h0, c0])
    y, _, _ = layers.LSTM(UNITS, return_sequences=True, return_state=True)(y, initial_state=[h1, c1])
    return keras.Model([source, target], layers.Dense(TARGETS)(y))


def both_directions(keras):
    """A Bidirectional encoder, its states concatenated for a decoder of twice the size."""
    layers = keras.layers
    source, target = layers.Input((None,)), layers.Input((None,))
    x = layers.Embedding(SOURCES, 3)(source)
    _, fh, fc, bh, bc = layers.Bidirectional(layers.LSTM(UNITS, return_state=True))(x)
    states = [layers.Concatenate()([fh, bh]), layers.Concatenate()([fc, bc])]
    y = layers.Embedding(TARGETS, 5)(target)
    y, _, _ = layers.LSTM(2 * UNITS, return_sequences=True, return_state=True)(y, initial_state=states)
    return keras.Model([source, target], layers.TimeDistributed(layers.Dense(TARGETS, use_bias=False))(y))


MODELS = {"one_hot": one_hot, "embedded": embedded, "both_directions": both_directions}


def with_weights(model, seed=0):
    """The model with random weights, biases included, that make large gates."""
    generator = np.random.default_rng(seed)
    model.set_weights([generator.normal(0, 0.7, w.shape).astype("float32") for w in model.get_weights()])
    return model


def batch(seed=0):
    """Ids of 3 sources and targets; sources 1 and 2 end with padding, id 0."""
    generator = np.random.default_rng(seed)
    source = generator.integers(1, SOURCES, (3, STEPS[0]))
    source[1, 3:] = source[2, 1:] = 0
    return source, generator.integers(1, TARGETS, (3, STEPS[1]))


def outputs(model, name):
    """Results of the model for :func:`batch`, (3, T, TARGETS)."""
    source, target = batch()
    if name.startswith("one_hot"):
        source, target = np.eye(SOURCES)[source], np.eye(TARGETS)[target]
    return np.asarray(model.predict_on_batch([source, target]))


if __name__ == "__main__":
    import keras

    for name, build in MODELS.items():
        model = with_weights(build(keras))
        model.save(FILES / f"{name}.keras")
        if name == "embedded":
            model.save(FILES / f"{name}.h5")
        np.save(FILES / f"{name}.npy", outputs(model, name))
