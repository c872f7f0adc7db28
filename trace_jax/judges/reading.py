"""Judges that read: what a reader (a service, a local model) says of clauses, kept in the store.

Only what the store does not know is asked, each question once; answers are kept as they come.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from trace_jax import judges, processes, records
from trace_jax import policy as policies
from trace_jax.judges import store as stores
from trace_jax.judges import template

Verdicts = Mapping[policies.Clause, records.ClauseVerdict]


class Question(NamedTuple):
    """Does this response to this prompt meet each of these clauses?"""

    prompt: records.Text
    response: records.Text
    clauses: tuple[policies.Clause, ...]


class Comparison(NamedTuple):
    """Which of two responses complies better with these clauses?"""

    prompt: records.Text
    a: records.Text
    b: records.Text
    clauses: tuple[policies.Clause, ...]


class _Case(NamedTuple):
    """The hash of a prompt with its response, and the ids of the clauses that apply to it.

    Equal texts are several cases where their annotations make different clauses apply.
    """

    key: bytes
    ids: tuple[str, ...]


class Reader(Protocol):
    """Who answers questions.

    Attributes:
      identity: answers of readers with the same identity are interchangeable.
      clauses_per_call: how many clauses a question may have; 0: any number.
      collective: it computes on the devices of all processes, so all of them ask it together.
    """

    identity: stores.Reader
    clauses_per_call: int
    collective: bool

    def ask(
        self,
        questions: Sequence[Question],
        answered: Callable[[Question, stores.Call, Verdicts], None],
    ) -> None:
        """Answers all questions, in any order.

        answered: called after every attempt: with no verdicts while the question will be tried
        again; at last with one for each clause, status "error" where no attempt gave a good one.

        Raises:
          InputError: nothing can be asked (no key, no budget); what was answered stays answered.
        """
        ...

    def compare(
        self,
        questions: Sequence[Comparison],
        answered: Callable[[Comparison, stores.Call, str | None], None],
    ) -> None:
        """The same for comparisons; the answer is one of judges.CHOICES, None after a failure."""
        ...


@dataclasses.dataclass
class ReadingJudge:
    """Judges every clause that applies by asking a reader what the store does not know."""

    policy: policies.Policy
    reader: Reader
    store: stores.Store
    reask_abstentions: bool = False

    keeps_answers = True

    @property
    def id(self) -> str:
        return f"{self.reader.identity.judge}:{self.reader.identity.model}/{self.policy.name}"

    def judge(
        self, items: Sequence[judges.Item], *, progress: Callable[[int], None] | None = None
    ) -> list[records.Verdict]:
        """Gives one verdict per item, in order.

        Raises:
          InputError: nothing can be asked any more; answers so far are in the store.
        """
        items = [judges.Item(*item) for item in items]
        cases = [self._case(item) for item in items]
        questions = self._questions(cases, items)
        if questions:
            self._ask(questions, [key for key, _ in cases], progress)
        elif progress is not None:
            progress(len(items))
        unique = list(dict.fromkeys(cases))
        rows = processes.from_first(lambda: self._verdicts(unique))
        verdicts = dict(zip(unique, map(_from_row, rows), strict=True))
        return [verdicts[case] for case in cases]

    def questions(self, items: Iterable[judges.Item]) -> list[Question]:
        """What `judge` would ask of these items: each once, without what the store knows."""
        items = list(items)
        return self._questions([self._case(item) for item in items], items)

    def _questions(self, cases: Sequence[_Case], items: Sequence[judges.Item]) -> list[Question]:
        texts = {key: item[:2] for (key, _), item in zip(cases, items, strict=True)}
        open_ = processes.from_first(lambda: self._open(cases))
        return [Question(*texts[bytes.fromhex(key)], self._of_ids(ids)) for key, ids in open_]

    def compare(
        self, pairs: Sequence[tuple[records.Text, records.Text, records.Text]]
    ) -> list[str]:
        """One of judges.CHOICES per (prompt, a, b), in order."""
        questions = [Comparison(*pair, self.policy.clauses) for pair in pairs]
        keys = [_comparison_hash(question) for question in questions]
        unique = dict(zip(keys, questions, strict=True))

        def found() -> dict[str, str]:
            known = self.store.find_comparisons(self.reader.identity, unique)
            return {key.hex(): answer for key, answer in known.items()}

        known = processes.from_first(found)
        missing = [q for key, q in unique.items() if key.hex() not in known]
        if missing and self.reader.collective:
            self.reader.compare(missing, self._keep_comparison)
        elif missing:
            processes.from_first(lambda: self.reader.compare(missing, self._keep_comparison))
        known = processes.from_first(found)
        return [known.get(key.hex(), "undecided") for key in keys]

    def _case(self, item: judges.Item) -> _Case:
        """The clauses ask for something here; where it is not known whether they do, they do."""
        texts = judges.prompt_text(item.prompt), judges.response_text(item.response)
        ids = tuple(
            clause.id
            for clause in self.policy.clauses
            if clause.applies is None or clause.applies(*texts, item.labels) is not False
        )
        return _Case(stores.item_hash(item.prompt, item.response), ids)

    def _open(self, cases: Iterable[_Case]) -> list:
        """[item hash as hex, clause ids] of every question to ask, like clauses together.

        Of equal texts with other annotations all is asked that is wanted of any.
        """
        wanted: dict[bytes, set[str]] = {}
        for key, ids in cases:
            wanted.setdefault(key, set()).update(ids)
        known = self.store.find(self.reader.identity, self.policy.clauses, wanted)
        again = {"error", "abstain"} if self.reask_abstentions else {"error"}
        found = []
        for key, of_key in wanted.items():
            answers = known.get(key, {})
            ids = [
                clause.id
                for clause in self.policy.clauses
                if clause.id in of_key
                and (clause.id not in answers or answers[clause.id].verdict.status in again)
            ]
            found += [[key.hex(), part] for part in self._calls(ids)]
        return sorted(found, key=lambda question: question[1])

    def _calls(self, ids: Sequence[str]) -> list[list[str]]:
        """Clause ids by call; the same clauses always share one, so that instructions repeat."""
        size = self.reader.clauses_per_call or len(self.policy.clauses)
        order = {clause.id: i // size for i, clause in enumerate(self.policy.clauses)}
        return [list(group) for _, group in itertools.groupby(ids, key=order.__getitem__)]

    def _of_ids(self, ids: Iterable[str]) -> tuple[policies.Clause, ...]:
        by_id = {clause.id: clause for clause in self.policy.clauses}
        return tuple(by_id[i] for i in ids)

    def _ask(self, questions: list[Question], hashes: list[bytes], progress) -> None:
        left: dict[bytes, int] = {}  # questions still open per item
        copies: dict[bytes, int] = {}
        for key in hashes:
            copies[key] = copies.get(key, 0) + 1
        for question in questions:
            key = stores.item_hash(question.prompt, question.response)
            left[key] = left.get(key, 0) + 1
        if progress is not None:
            progress(sum(n for key, n in copies.items() if key not in left))

        def answered(question: Question, call: stores.Call, verdicts: Verdicts) -> None:
            if processes.is_first():
                identity, (prompt, response, _) = self.reader.identity, question
                self.store.add(identity, prompt, response, call, verdicts)
            if verdicts and progress is not None:
                key = stores.item_hash(question.prompt, question.response)
                left[key] -= 1
                if not left[key]:
                    progress(copies[key])

        if self.reader.collective:
            self.reader.ask(questions, answered)
        else:
            processes.from_first(lambda: self.reader.ask(questions, answered))

    def _keep_comparison(self, question: Comparison, call: stores.Call, answer: str | None) -> None:
        if processes.is_first():
            key = _comparison_hash(question)
            self.store.add_comparison(self.reader.identity, key, call, answer)

    def _verdicts(self, cases: Sequence[_Case]) -> list[dict]:
        """Fields of the Verdict on each, ready for JSON."""
        keys = [key for key, _ in cases]
        known = self.store.find(self.reader.identity, self.policy.clauses, keys)
        return [self._verdict(set(ids), known.get(key, {})) for key, ids in cases]

    def _verdict(self, asked: set[str], answers: Mapping[str, stores.Answer]) -> dict:
        clauses = {
            clause.id: _of_clause(answers.get(clause.id), clause.id in asked)
            for clause in self.policy.clauses
        }
        given = [answers[i] for i in asked & answers.keys()]
        rationales = dict.fromkeys(answer.rationale for answer in given if answer.rationale)
        verdict = judges.aggregate(
            clauses,
            rationale="\n".join(sorted(rationales)),
            judge=self.id,
            policy_hash=self.policy.hash,
            template_hash=template.HASH,
            date=max((answer.date for answer in given), default=""),
            tokens=sum({answer.call: answer.tokens for answer in given}.values()),
        )
        return dataclasses.asdict(verdict)


def _of_clause(answer: stores.Answer | None, asked: bool) -> records.ClauseVerdict:
    if not asked:
        return records.ClauseVerdict("compliant", 1.0)
    return records.ClauseVerdict("error", None) if answer is None else answer.verdict


def _from_row(row: Mapping) -> records.Verdict:
    clauses = {name: records.ClauseVerdict(**clause) for name, clause in row["clauses"].items()}
    return records.Verdict(**{**row, "clauses": clauses})


def _comparison_hash(question: Comparison) -> bytes:
    hashes = [[clause.tier, clause.text_hash] for clause in question.clauses]
    canonical = json.dumps([hashes, *question[:3]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).digest()[:16]
