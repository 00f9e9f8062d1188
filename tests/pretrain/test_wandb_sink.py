"""The W&B writer against the real package, offline."""

import pytest

wandb = pytest.importorskip("wandb", reason="needs the [wandb] extra")
pytestmark = pytest.mark.slow


def framed(data):
    """The records of a LevelDB log of one block: after a file header of 7 bytes, (crc, length, kind, bytes)."""
    assert len(data) < 32768
    data = data[7:]
    while data:
        length = int.from_bytes(data[4:6], "little")
        yield data[7 : 7 + length]
        data = data[7 + length :]


def test_an_offline_run_holds_config_and_points(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    from pretrain.wandb_sink import WandbConfig

    folder = tmp_path / "smoke" / "1a2b3c4d"
    folder.mkdir(parents=True)
    writer = WandbConfig(project="autodidact", mode="offline").build(
        folder, config_json={"run": {"seed": 7}}, resume_step=None
    )
    writer.write(0, "eval", {"bits_per_byte": 8.0})
    writer.write(3, "train", {"loss": 2.5, "loss_by_source": {"a": 1.5}, "note": "text"})
    writer.flush()
    writer.close()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    points, config = [], {}
    for data in framed(file.read_bytes()):
        record = Record.FromString(data)
        config |= {item.key: item.value_json for item in record.run.config.update}
        if record.HasField("history"):
            named = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            points.append({key: value for key, value in named.items() if not key.startswith("_")})
    assert config["run"] == '{"seed":7}'
    assert points == [
        {"train_step": "0", "eval/bits_per_byte": "8"},
        {"train_step": "3", "train/loss": "2.5", "train/loss_by_source/a": "1.5"},
    ]
