"""QuALITY questions: the published htmlstripped files, and the derived set of stories with two and four options.

One loader for each; both give `Question`s. Published QuALITY has 265 documents and 4,609 questions in train and
dev; the authors of EntiGraph hold out the first fifth of the documents, sorted by title, for choices.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.config import ConfigError, local
from pretrain.data.source import BadRecord, FileSource, SourceConfig, TextDocument, TextSource
from synth.question import Question


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, record) of a JSON-lines file, gzipped if its name says so."""
    if not path.is_file():
        raise ConfigError(f"{path} must be a file of JSON lines, it is not there; check root and path")
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else open(path, encoding="utf-8") as file
    ):
        for number, line in enumerate(file, start=1):
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}:{number} must be JSON, it is not ({error})") from error


@dataclass(frozen=True, kw_only=True)
class NicheQuestions:
    """The derived set (`passage_id, question, options, answer`): chance differs, so two and four options are tags."""

    path: str = "niche/mcq.jsonl.gz"
    root: str = local("data")
    documents: tuple[str, ...] = ()
    form: str = "{question}"  # how a question is put to a model that continues text

    def load(self) -> list[Question]:
        """The questions, those of `documents` alone if any are named."""
        questions = []
        for where, record in _records(Path(self.root) / self.path):
            if self.documents and record["passage_id"] not in self.documents:
                continue
            options = tuple(record["options"])
            questions.append(
                Question(
                    id=f"{record['passage_id']}:{where.rpartition(':')[2]}",
                    document=record["passage_id"],
                    text=self.form.format(question=record["question"].strip()),
                    options=options,
                    gold=record["answer"],
                    tags=(f"options{len(options)}",),
                )
            )
        return questions


@dataclass(frozen=True, kw_only=True)
class QualityQuestions:
    """The published files, one line per (article, writer): lines of one article are merged by "title by author"."""

    paths: tuple[str, ...] = (
        "QuALITY.v1.0.1.htmlstripped.train",
        "QuALITY.v1.0.1.htmlstripped.dev",
    )
    root: str = local("data")
    part: Literal["all", "validation", "test"] = "all"
    form: str = "{question}"  # how a question is put to a model that continues text; {document} is its title and author

    def load(self) -> list[Question]:
        """Questions by title of the document, then in the order of the files; HARD ones have the tag "hard"."""
        titles: dict[str, list[Question]] = {}
        for path in self.paths:
            for _, record in _records(Path(self.root) / path):
                document = f"{record['title']} by {record['author']}"
                for asked in record["questions"]:
                    titles.setdefault(document, []).append(
                        Question(
                            id=asked["question_unique_id"],
                            document=document,
                            text=self.form.format(question=asked["question"].strip(), document=document),
                            options=tuple(asked["options"]),
                            gold=asked["gold_label"] - 1,
                            tags=("hard" if asked["difficult"] else "other",),
                        )
                    )
        ordered = sorted(titles)
        validation = len(ordered) // 5
        chosen = {"all": ordered, "validation": ordered[:validation], "test": ordered[validation:]}[self.part]
        return [question for title in chosen for question in titles[title]]


@dataclass(frozen=True, kw_only=True)
class QualityArticles(SourceConfig):
    """The articles of the published files, each once: quoted title, author, year, then the text, as the authors do."""

    paths: tuple[str, ...] = (
        "QuALITY.v1.0.1.htmlstripped.train",
        "QuALITY.v1.0.1.htmlstripped.dev",
    )

    def build(self, root: str) -> TextSource:
        """Open the files.

        Raises:
          ConfigError: one of them is not there.
        """
        files = [(path, Path(root) / path) for path in self.paths]
        missing = [str(path) for _, path in files if not path.is_file()]
        if missing:
            raise ConfigError(
                f"the files of QuALITY must be there, got none at {', '.join(missing)}; set root"
            )
        return FileSource(self, files, _read_articles)


def _read_articles(name: str, path: Path, config: QualityArticles) -> Iterator[TextDocument | BadRecord]:
    """Articles in the order of the file; a later line of the same article (another writer) is left out."""
    seen: set[str] = set()
    for _, record in _records(path):
        identity = f"{record['title']} by {record['author']}"
        if identity in seen:
            continue
        seen.add(identity)
        author = " ".join(part.strip() for part in reversed(record["author"].split(",", 1)))
        year = f", {record['year']}" if record.get("year") else ""
        head = f'"{record["title"]}" by {author}{year}'
        yield TextDocument(identity, f"{head}\n{record['article']}", config.name)
