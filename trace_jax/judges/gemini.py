"""Gemini as a reader, through google-genai's asynchronous client.

The policy comes first, as the system instruction, the same bytes for equal clauses, so that the
service finds it in its prefix cache. Replies are structured and checked; whatever is wrong with one
is asked again, and in the end an error, never a guess. Keys come from the environment alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

from trace_jax import records
from trace_jax.errors import InputError
from trace_jax.judges import gemini_out, gemini_reply, gemini_service, reading, template
from trace_jax.judges import store as stores
from trace_jax.judges.gemini_job import Asking, Job, Settings

_KEYS = "judge.gemini.max_output_tokens", "judge.gemini.thinking_tokens"


def identity(settings: Settings) -> stores.Reader:
    """Under what its answers are stored: everything that can change them."""
    parameters = dataclasses.asdict(settings)
    del parameters["model"], parameters["clauses_per_call"]
    digest = hashlib.sha256(f"{template.HASH}{gemini_reply.HASH}".encode()).hexdigest()[:16]
    return stores.Reader("gemini", settings.model, json.dumps(parameters, sort_keys=True), digest)


class GeminiReader(gemini_service.Service):
    """Answers questions by calls to the Gemini API, the Developer API's or Vertex AI's.

    Raises:
      InputError: no key, or the settings ask for the impossible.
    """

    collective = False

    def __init__(self, settings: Settings, asking: Asking, kept: stores.Store):
        if asking.batch and asking.vertex_project:
            raise InputError(
                "asking.batch needs the Developer API, and asking.vertex_project asks Vertex AI, "
                "whose batches go through buckets; unset one of the two"
            )
        super().__init__(settings, asking, kept, identity(settings), _KEYS)
        self.clauses_per_call = settings.clauses_per_call
        self._last_call = 0  # in the store when it was last asked

    def ask(
        self,
        questions: Sequence[reading.Question],
        answered: Callable[[reading.Question, stores.Call, reading.Verdicts], None],
    ) -> None:
        """Answers all questions; see `reading.Reader`."""
        self._last_call = self.store.last_call()
        if self.asking.batch:
            from trace_jax.judges import gemini_batch

            gemini_service.run_to_end(gemini_batch.ask(self, questions, answered))
        else:
            self.run([self.job(q, answered) for q in questions])

    def compare(
        self,
        questions: Sequence[reading.Comparison],
        answered: Callable[[reading.Comparison, stores.Call, str | None], None],
    ) -> None:
        """The same for comparisons; never as a batch."""
        jobs = [
            Job(
                template.comparison_instruction(q.clauses),
                template.comparison_material(q.prompt, q.a, q.b),
                gemini_reply.comparison_schema(),
                gemini_reply.better,
                lambda call, answer, q=q: answered(q, call, answer),
                None,
                self.settings.reply_tokens(1),
            )
            for q in questions
        ]
        self.run(jobs)

    def job(
        self,
        question: reading.Question,
        answered: Callable[[reading.Question, stores.Call, reading.Verdicts], None],
    ) -> Job:
        """The question, ready to be sent."""
        clauses = question.clauses

        def kept() -> bool:
            if found := self.kept(question):
                answered(question, stores.KEPT, found)
            return bool(found)

        return Job(
            template.instruction(clauses),
            template.material(question.prompt, question.response),
            gemini_reply.verdict_schema(clauses),
            lambda response: gemini_reply.verdicts(response, clauses),
            lambda call, verdicts: answered(question, call, verdicts or {}),
            dict.fromkeys(clauses, records.ClauseVerdict("error", None)),
            self.settings.reply_tokens(len(clauses)),
            kept,
            hashlib.sha256(f"{self.identity} {gemini_out.key(question)}".encode()).hexdigest(),
        )

    def kept(self, question: reading.Question) -> reading.Verdicts:
        """What another process has answered since this was asked; nothing where a clause is open.

        Abstentions of before are no answer: it may have been asked because of them.
        """
        if not self.store.others_wrote():
            return {}
        item = stores.item_hash(question.prompt, question.response)
        answers = self.store.find(self.identity, question.clauses, [item]).get(item, {})
        found = {
            clause: answers[clause.id].verdict
            for clause in question.clauses
            if clause.id in answers and self._is_answer(answers[clause.id])
        }
        return found if len(found) == len(question.clauses) else {}

    def _is_answer(self, answer: stores.Answer) -> bool:
        status = answer.verdict.status
        return status != "error" and (status != "abstain" or answer.call > self._last_call)
