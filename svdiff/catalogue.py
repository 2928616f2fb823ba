"""What params.yaml names: concepts, pairs of them, and edits of single pictures. A name belongs to one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from svdiff.errors import SvdiffError
from svdiff.words import fill, word_pattern

if TYPE_CHECKING:
    from svdiff.sections import ConceptConfig

Kind = Literal["concept", "pair", "edit"]
SECTIONS: dict[Kind, str] = {"concept": "concepts", "pair": "pairs", "edit": "edits"}


@dataclass(frozen=True)
class Entry:
    """What is trained, sampled and scored under one name.

    `concepts` are those whose subjects it learns: one for a concept, two or three for a pair, none for an edit.
    """

    name: str
    kind: Kind
    concepts: dict[str, ConceptConfig] = field(default_factory=dict)

    @property
    def tokens(self) -> list[str]:
        """The special tokens."""
        return [concept.token for concept in self.concepts.values()]

    @property
    def token(self) -> str:
        """The special tokens in one line: 'sks', or 'sks, zwx'."""
        return ", ".join(self.tokens)

    @property
    def class_word(self) -> str:
        """The class words in one line: 'dog', or 'dog, cat'."""
        return ", ".join(concept.class_word for concept in self.concepts.values())

    @property
    def subjects(self) -> list[str]:
        """The subjects in words: ['sks dog', 'zwx cat']."""
        return [concept.subject for concept in self.concepts.values()]

    @property
    def subject(self) -> str:
        """All subjects in words, to stand after an article: 'sks dog and a zwx cat'."""
        return " and a ".join(self.subjects)

    def prompts(self, templates: Iterable[str]) -> list[str]:
        """Templates in the words of this entry, in order, each prompt once.

        `{subject}` makes a prompt of each subject, `{first}` with `{second}` one of every two; a template with neither
        stays as it is. Raises SvdiffError for a template that needs more subjects than there are, or has other braces.
        """
        prompts: list[str] = []
        for template in templates:
            if "{first}" in template or "{second}" in template:
                fill(template, first="", second="")
                made = [fill(template, first=a, second=b) for a, b in combinations(self.subjects, 2)]
            elif "{subject}" in template:
                fill(template, subject="")
                made = [fill(template, subject=subject) for subject in self.subjects]
            else:
                made = [fill(template)]
            if not made:
                raise SvdiffError(
                    f"prompt '{template}' needs {'two subjects' if '{first}' in template else 'a subject'}; "
                    f"the {self.kind} '{self.name}' has {len(self.concepts)}"
                )
            prompts += made
        return list(dict.fromkeys(prompts))

    def class_prompts(self, template: str) -> list[str]:
        """A template's `{subject}` as each bare class word, which training should leave alone; each prompt once."""
        return list(dict.fromkeys(template.format(subject=c.class_word) for c in self.concepts.values()))

    def shown(self, prompt: str) -> list[str]:
        """Names of the concepts whose token is in `prompt`, in the order of the entry."""
        return [name for name, concept in self.concepts.items() if word_pattern(concept.token).search(prompt)]
