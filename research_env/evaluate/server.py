"""The candidate's side of the logits contract: load its model, answer frames. Mounted into a jail of its own.

It runs among candidate code, so nothing here is trusted; the judge checks every byte. The candidate's module has
`load(folder) -> function`, and the function takes int32 [B, T] and returns logits [B, T, V].
"""

import importlib
import os
import struct
import sys

import numpy as np


def main() -> None:
    """Serve until the judge closes the pipe."""
    module_name, artifact = sys.argv[1], sys.argv[2]
    read = os.fdopen(os.dup(0), "rb")
    write = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the model prints must not get among the frames
    sys.path.insert(0, os.getcwd())
    logits_of = importlib.import_module(module_name).load(artifact)
    while True:
        header = read.read(12)
        if len(header) < 12:
            return
        _, num_rows, num_tokens = struct.unpack("<4sII", header)
        tokens_BT = np.frombuffer(read.read(num_rows * num_tokens * 4), "<i4").reshape(num_rows, num_tokens)
        data = np.ascontiguousarray(logits_of(tokens_BT), dtype="<f4").tobytes()
        write.write(struct.pack("<Q", len(data)) + data)
        write.flush()


if __name__ == "__main__":
    main()
