"""A nested dict of arrays to a safetensors file and back: numbers only, no format that can carry code."""

import json

import numpy as np


def save(path, params):
    """Write float32 arrays; a nested name is joined by dots."""
    arrays, header, offset = _flatten(params, ""), {}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [offset, offset + 4 * array.size],
        }
        offset += 4 * array.size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, "<f4").tobytes())


def load(path):
    """Read them back."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    params = {}
    for name, entry in header.items():
        *folders, leaf = name.split(".")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.frombuffer(data[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
    return params


def _flatten(value, prefix):
    if not isinstance(value, dict):
        return {prefix[:-1]: np.asarray(value, np.float32)}
    return {
        name: array
        for key in sorted(value)
        for name, array in _flatten(value[key], f"{prefix}{key}.").items()
    }
