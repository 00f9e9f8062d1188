"""Laws of the verb: the output is whole, in order, the same after a kill, and refused input leaves nothing."""

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.generate import GenerateConfig, SampleConfig, sample_texts
from pretrain.main import main as train
from pretrain.model.transformer import ModelConfig, init_params
from pretrain.pretrained import Checkpoint
from pretrain.sample import SampleJob, main, sample
from pretrain.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Untrained:
    """A model from nowhere: sampling asks for nothing more than this."""

    seed: int = 0

    def model_config(self):
        return ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=16)

    def vocab_size(self):
        return ByteTokenizer().vocab_size

    def tokenizer(self):
        return ByteTokenizer()

    def params(self, model, mesh=None):
        return init_params(model, self.vocab_size(), self.seed, mesh)


def job(path, **changes):
    """Three prompts, three samples each, on all eight devices."""
    values = {
        "model": Untrained(),
        "output": str(path),
        "prompts": ("one", "", "three"),
        "samples_per_prompt": 3,
        "max_new_tokens": 12,
        "bos": True,
        "end_at_eos": False,
        "dtype": "float32",
        "generate": GenerateConfig(max_length=32, slots=8, chunk_tokens=16),
    }
    return SampleJob(**{**values, **changes})


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "samples.jsonl"
    sample(job(path))
    return path


def test_the_output_has_a_line_for_each_sample_in_order(whole):
    lines = lines_of(whole)
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (prompt, j) for prompt in ("one", "", "three") for j in range(3)
    ]
    assert {line["new_tokens"] for line in lines} == {12}
    assert {line["prompt_tokens"] for line in lines} == {4, 1, 6}
    assert len({line["text"] for line in lines}) == 9
    assert all(line["logprob"] < 0 for line in lines)
    assert list(whole.parent.iterdir()) == [whole]


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    """Killed after some samples, with a last line that was cut."""
    path = tmp_path / "samples.jsonl"

    def kill(progress):
        if progress.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(job(path), report=kill)
    assert not path.exists()
    part = Path(f"{path}.part")
    kept = part.read_bytes()
    assert kept.count(b"\n") >= 3
    part.write_bytes(kept + b'{"key": [2, ')
    served = []
    sample(job(path), report=lambda progress: served.append(progress.total))
    assert served[-1] == 9 - (kept.count(b"\n") - 1)
    assert path.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_a_part_of_another_job_is_refused(tmp_path):
    path = tmp_path / "samples.jsonl"

    def kill(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(job(path), report=kill)
    for change in ({"temperature": 0.5}, {"prompts": ("one",)}, {"model": Untrained(seed=1)}):
        with pytest.raises(ConfigError, match="other settings, prompts or parameters"):
            sample(job(path, **change))


def test_prompts_of_a_file_keep_their_fields(whole, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n\n" for i, p in enumerate(("one", "", "three")))
    )
    out = tmp_path / "out.jsonl"
    sample(job(out, prompts=(), prompts_file=str(prompts)))
    lines = lines_of(out)
    assert [line.pop("id") for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert lines == lines_of(whole)


def test_a_line_separator_inside_a_prompt_ends_no_line(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["a\u2028b", "c\u2029\x85d"]
    prompts.write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\r\n" for t in texts))
    sample(job(out, prompts=(), prompts_file=str(prompts), samples_per_prompt=1))
    lines = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert [line["prompt"] for line in lines] == texts


def test_no_field_of_a_prompt_is_lost_to_one_of_the_output(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a", "text": "precious", "logprob": 1, "id": 7}\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError) as error:
        sample(job(out, prompts=(), prompts_file=str(prompts)))
    (fault,) = error.value.faults
    assert "prompts.jsonl:1" in fault
    assert "fields text, logprob of its own; rename them" in fault
    assert list(tmp_path.iterdir()) == [prompts]


CONFIG = """
import dataclasses, importlib.util, sys
spec = importlib.util.spec_from_file_location("sample_laws", {here!r})
laws = sys.modules["sample_laws"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)
def get_config():
    return laws.job({output!r})
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature=-1", "temperature must be at least 0"),
        ("top_p=2", "top_p must lie in"),
        ("prompts_file=x.jsonl", "exactly one of prompts and prompts_file"),
        (
            "max_new_tokens=31",
            "prompt 0 must fit generate.max_length=32 with its max_new_tokens=31, got 4 tokens",
        ),
        ("model=nowhere", "nowhere"),
        ("bos=false", "prompt 1 must hold at least one token"),
        ("samples_per_promt=1", "did you mean samples_per_prompt"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(override, message, tmp_path, capsys):
    config = tmp_path / "job.py"
    config.write_text(CONFIG.format(here=__file__, output=str(tmp_path / "out.jsonl")))
    assert main(["--config", str(config), override]) in (2, 3)
    errors = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert len(errors) >= 1
    assert errors[0].startswith("error: ")
    assert {p.name for p in tmp_path.iterdir()} <= {"job.py", "__pycache__"}


def test_an_output_that_exists_and_bad_prompts_are_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"promt": "b"}\nnot json\n')
    with pytest.raises(ConfigError) as error:
        sample(job(out, prompts=(), prompts_file=str(prompts)))
    assert [
        f"prompts.jsonl:{n} must be a JSON object with a prompt" in f
        for n, f in zip((2, 3), error.value.faults, strict=True)
    ] == [True] * 2
    out.write_text("precious")
    with pytest.raises(ConfigError, match="must not exist yet"):
        sample(job(out))
    assert out.read_text() == "precious"


@pytest.mark.slow
def test_a_run_is_sampled_from_its_folder_as_it_was_in_training(tmp_path):
    smoke = str(ROOT / "configs/pretrain/smoke.py")
    assert train(["--config", smoke, "run.writers=()", "run.num_steps=6", f"run.workdir={tmp_path}"]) == 0
    (folder,) = (tmp_path / "smoke").iterdir()
    out, prompts = tmp_path / "samples.jsonl", ("0 ants ", "3 ")
    sample(
        job(out, model=str(folder), prompts=prompts, bos=None, end_at_eos=True, temperature=0.0, samples_per_prompt=1)
    )  # fmt: skip
    source = Checkpoint(path=str(folder))
    model, tokenizer = source.model_config(), source.tokenizer()
    wanted = sample_texts(
        source.params(model),
        model,
        tokenizer,
        SampleConfig(prompts=prompts, max_new_tokens=12, temperature=0.0),
    )
    assert [line["prompt"] + line["text"] for line in lines_of(out)] == wanted
