"""Batches of questions: the real client against a server on loopback, several policies and runs."""

import asyncio
import concurrent.futures
import json
import time

import gemini_client
import pytest

from trace_jax import policy
from trace_jax.errors import InputError
from trace_jax.judges import gemini_batch, gemini_out, gemini_reply, reading, store

EDITED = policy.parse("""\
name: tales
clauses:
  - {id: calm, requirement: The story is calm.}
  - id: kind
    requirement: The story is kind to all.
    exceptions: [A villain.]
    omission: Nothing is said.
    zero_tolerance: false
""")
OTHER = policy.parse("name: other\nclauses: [{id: brief, requirement: The story is brief.}]")


@pytest.fixture(scope="module")
def address():
    with gemini_client.running() as found:
        yield found


@pytest.fixture
def server(address, monkeypatch):
    """The server's address, and the environment to reach it."""
    gemini_client.get(address, "/set", {"batch": 0.0, "blind": 0.0, "tokens": 20, "thoughts": 0})
    gemini_client.get(address, "/set", {"lose": 0})
    gemini_client.reach(address, monkeypatch)
    return address


def judge(kept, rules=gemini_client.POLICY, **more):
    options = {"batch": True, "batch_wait_minutes": 0.1, "tries": 1} | more
    return gemini_client.judge(kept, rules, **options)


def items(name, n=5):
    return [("Tell", f"calm kind brief {name}{i}") for i in range(n)]


def leave(server, kept, rules, found, *, seconds=0.0):
    """A batch is submitted, and left to end after so long."""
    gemini_client.get(server, "/set", {"batch": seconds + 0.2})
    with pytest.raises(InputError, match="at work at the service"):
        judge(kept, rules, batch_wait_minutes=0.0).judge(found)
    gemini_client.get(server, "/set", {"batch": 0.0})
    time.sleep(0.3)


def asked(server, found):
    counts = gemini_client.get(server)["asked"]
    return [counts.get(response, 0) for _, response in found]


def statuses(verdicts):
    return [verdict.status for verdict in verdicts]


@pytest.mark.parametrize("rules", [OTHER, EDITED], ids=["policy", "clause"])
def test_a_batch_is_kept_for_its_policy_by_whoever_looks_first(server, tmp_path, rules):
    found = items(rules.name)
    leave(server, tmp_path / "s", rules, found)
    new = judge(tmp_path / "s")
    assert statuses(new.judge([("Tell", f"calm kind first {rules.name}")])) == ["compliant"]
    assert new.store.spent().calls == 6 and new.store.batches() == {}
    later = judge(tmp_path / "s", rules)
    assert statuses(later.judge(found)) == ["compliant"] * 5
    assert asked(server, found) == [1] * 5 and later.store.spent().calls == 6


def test_nobody_waits_for_the_batch_of_another(server, tmp_path):
    leave(server, tmp_path / "s", OTHER, items("w"), seconds=600)
    new = judge(tmp_path / "s", batch_wait_minutes=0.05)
    assert statuses(new.judge(items("v"))) == ["compliant"] * 5
    assert len(new.store.batches()) == 1


def as_before(kept):
    """Batches as a version wrote them that kept keys alone."""
    kept = store.Store(kept)
    for name, text in kept.batches().items():
        row = json.dumps(gemini_out.keys(text)), name
        kept._db.execute("UPDATE batches SET questions = ? WHERE name = ?", row)
    kept._db.execute("DELETE FROM items")
    kept.close()


def test_a_batch_of_an_older_version_is_picked_up(server, tmp_path):
    leave(server, tmp_path / "s", OTHER, items("o"))
    as_before(tmp_path / "s")
    assert statuses(judge(tmp_path / "s", OTHER).judge(items("o"))) == ["compliant"] * 5
    assert asked(server, items("o")) == [1] * 5


def test_replies_to_unknown_questions_are_counted_all_the_same(server, tmp_path):
    leave(server, tmp_path / "s", OTHER, items("u"))
    as_before(tmp_path / "s")
    new = judge(tmp_path / "s")
    new.judge([("Tell", "calm kind after u")])
    spent = new.store.spent()
    assert spent.calls == 6 and spent.output_tokens == 6 * 20


def test_a_batch_is_taken_in_whole_or_not_at_all(server, tmp_path):
    leave(server, tmp_path / "s", OTHER, items("half"))
    left = judge(tmp_path / "s", OTHER)
    done = []

    def interrupted(n):
        done.append(n)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        left.judge(items("half"), progress=interrupted)
    assert left.store.spent().calls == 0 and len(left.store.batches()) == 1
    assert statuses(judge(tmp_path / "s", OTHER).judge(items("half"))) == ["compliant"] * 5
    assert left.store.spent().calls == 5 and asked(server, items("half")) == [1] * 5


def test_of_two_runs_that_look_at_once_one_takes_a_batch_in(server, tmp_path, monkeypatch):
    leave(server, tmp_path / "s", OTHER, items("two"))
    faster = [judge(tmp_path / "s", OTHER)]
    look = gemini_batch._Batches._look

    async def overtaken(self, name):
        found = await look(self, name)
        if faster:
            faster.pop().judge(items("two"))
        return found

    monkeypatch.setattr(gemini_batch._Batches, "_look", overtaken)
    slower = judge(tmp_path / "s", OTHER)
    assert statuses(slower.judge(items("two"))) == ["compliant"] * 5
    assert slower.store.spent().calls == 5 and asked(server, items("two")) == [1] * 5


def test_looks_that_fail_are_repeated(server, tmp_path):
    leave(server, tmp_path / "s", OTHER, items("blind"))
    gemini_client.get(server, "/set", {"blind": 3.0})
    found = judge(tmp_path / "s", OTHER, batch_wait_minutes=0.0).judge(items("blind"))
    assert statuses(found) == ["compliant"] * 5


@pytest.mark.fault
def test_a_service_that_goes_away_ends_with_a_line_and_keeps_the_batches(tmp_path, monkeypatch):
    with gemini_client.running() as address:
        gemini_client.reach(address, monkeypatch)
        leave(address, tmp_path / "s", OTHER, items("gone"))
        gemini_client.get(address, "/set", {"blind": 1e6})
        left = judge(tmp_path / "s", OTHER, outage_seconds=0.3)
        with pytest.raises(InputError, match="HTTP 503, .*; 1 batch.* are kept, run the same"):
            left.judge(items("gone"))
    with pytest.raises(InputError, match="could not be asked for batches for .* ConnectError"):
        left.judge(items("gone"))
    assert len(left.store.batches()) == 1
    with pytest.raises(InputError, match="did not answer when it was given a batch"):
        judge(tmp_path / "new", OTHER).judge(items("gone"))


def _killed(before, *, sent):
    """`_create` of a process that dies once the service has the batch, or just before."""

    async def create(*given):
        if sent:
            await before(*given)
        raise KeyboardInterrupt

    return create


@pytest.mark.fault
@pytest.mark.parametrize("how", ["killed", "not sent", "connection lost"])
def test_a_batch_whose_name_was_lost_is_asked_once(server, tmp_path, monkeypatch, how):
    found = items(how.replace(" ", ""))
    with monkeypatch.context() as patch:
        if how == "connection lost":
            gemini_client.get(server, "/set", {"lose": 1})
            ends = pytest.raises(InputError, match="did not answer when it was given a batch")
        else:
            create = _killed(gemini_batch._Batches._create, sent=how == "killed")
            patch.setattr(gemini_batch._Batches, "_create", create)
            ends = pytest.raises(KeyboardInterrupt)
        with ends:
            judge(tmp_path / "s").judge(found)
    assert asked(server, found) == [how != "not sent"] * 5
    for n in range(3):  # newer ones, on more than a page
        judge(tmp_path / "other").judge(items(f"{how[0]}newer{n}", 1))
    gemini_client.get(server, "/set", {"blind": 2.0})
    again = judge(tmp_path / "s", batch_wait_minutes=0.1 * (how == "not sent"))
    assert statuses(again.judge(found)) == ["compliant"] * 5
    assert asked(server, found) == [1] * 5
    assert again.store.spent().calls == 5 and again.store.batches() == {}


@pytest.mark.fault
def test_another_machine_finds_what_was_sent_to_the_service(server, tmp_path, monkeypatch):
    """What is asked is in the bucket before the service has it, the name at once."""
    there, create, kept = [], gemini_batch._Batches._create, judge(tmp_path / "s")

    async def created(*given):
        there.append("created")
        return await create(*given)

    monkeypatch.setattr(gemini_batch._Batches, "_create", created)
    monkeypatch.setattr(
        gemini_batch.bucket, "publish", lambda: there.append([*kept.store.batches()])
    )
    kept.judge(items("published"))
    (begun,), now, (named,) = there
    assert begun.startswith("trace_jax-") and now == "created" and named.startswith("batches/")


def test_a_batch_that_was_refused_is_not_looked_for(server, tmp_path):
    with pytest.raises(InputError, match="the service took no batch .HTTP 404"):
        judge(tmp_path / "s", gemini={"model": "gemini-no"}, price_input=1.0).judge(items("no"))
    assert store.Store(tmp_path / "s").batches() == {}


def test_vertex_ai_has_no_such_batches(server, tmp_path):
    with pytest.raises(InputError, match="unset one of the two"):
        judge(tmp_path / "s", vertex_project="p")


def test_a_batch_takes_no_more_calls_than_the_budget(server, tmp_path):
    with pytest.raises(InputError, match=r"batch of 20 .* \(0 calls .* asking.budget_calls=5"):
        judge(tmp_path / "s", budget_calls=5).judge(items("calls", 20))
    assert asked(server, items("calls", 20)) == [0] * 20
    assert statuses(judge(tmp_path / "s", budget_calls=20).judge(items("calls", 20)))


def test_a_batch_is_reckoned_with_its_thoughts(server, tmp_path):
    gemini_client.get(server, "/set", {"tokens": 100, "thoughts": 1024})
    thinks = {"gemini": {"thinking_tokens": 1024}}
    with pytest.raises(InputError, match="go beyond the budget"):
        judge(tmp_path / "s", budget_usd=0.02, **thinks).judge(items("thinks", 20))
    enough = judge(tmp_path / "s", budget_usd=0.04, **thinks)
    assert statuses(enough.judge(items("thinks", 20))) == ["compliant"] * 20
    assert 0.02 < enough.store.spent().price <= 0.04


def test_a_batch_of_replies_that_are_cut_off_is_told(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gemini_reply, "verdicts", cut_off)
    assert statuses(judge(tmp_path / "s").judge(items("cut", 3))) == ["error"] * 3
    assert "all were cut off; raise judge.gemini.max_output_tokens" in capsys.readouterr().err


def cut_off(*_):
    raise gemini_reply.Malformed("finished by MAX_TOKENS")


def test_of_those_that_submit_at_once_one_does_and_the_others_wait_for_it(
    server, tmp_path, monkeypatch
):
    """Each would submit all: none finds a batch that is out."""
    create = gemini_batch._Batches._create

    async def slowly(*given):
        await asyncio.sleep(0.5)
        return await create(*given)

    monkeypatch.setattr(gemini_batch._Batches, "_create", slowly)
    found = items("same", 10)
    judges = [judge(tmp_path / "s") for _ in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        verdicts = list(pool.map(lambda one: one.judge(found), judges))
    assert [statuses(v) for v in verdicts] == [["compliant"] * 10] * 3
    assert asked(server, found) == [1] * 10 and judges[0].store.spent().calls == 10


def test_what_is_out_counts_in_the_budget(server, tmp_path):
    leave(server, tmp_path / "s", OTHER, items("out", 20), seconds=600)
    alone = judge(tmp_path / "s", batch=False, budget_calls=23, concurrency=1)
    with pytest.raises(InputError, match=r"budget is spent \(23 calls"):
        alone.judge(items("alone"))
    assert sum(asked(server, items("alone"))) == 3
    price, calls = gemini_out.expected(alone.store)
    assert calls == 20 and price > 0
    spent = alone.store.spent().price
    with pytest.raises(InputError, match="go beyond the budget"):
        judge(tmp_path / "s", OTHER, budget_usd=spent + price).judge(items("more", 10))
    more = judge(tmp_path / "s", OTHER, budget_usd=spent + 2 * price).judge(items("more", 10))
    assert statuses(more) == ["compliant"] * 10


def test_questions_are_read_back_as_they_were():
    kept = store.Store(":memory:")
    chat = [{"role": "user", "content": "\ud800 So?"}]
    found = [
        reading.Question("Tell", "calm", EDITED.clauses),
        reading.Question(chat, "kind", EDITED.clauses[1:]),
        reading.Question("Nowhere", "kept", OTHER.clauses),
    ]
    text = gemini_out.written(found, 0.5)
    one = store.Reader("one", "m", "{}", "t")
    kept.add_batch(one, "batches/b", text, [q[:2] for q in found[:2]])
    assert gemini_out.keys(text) == [gemini_out.key(q) for q in found]
    *known, lost = gemini_out.questions(kept, text)
    assert [gemini_out.key(q) for q in known] == [gemini_out.key(q) for q in found[:2]]
    assert known[1].prompt == chat and lost is None
    assert gemini_out.expected(kept) == (0.5, 3)
