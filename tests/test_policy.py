import importlib.resources
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from trace_jax import policy, policy_commands, predicates, records
from trace_jax.errors import InputError
from trace_jax.judges import store

GOOD = """\
name: tales
description: for tests
clauses:
  - id: no_fear
    tier: high
    requirement: The story must not frighten.
    rules: {not: {words: {in: response, any_of: [scared, fright*]}}}
  - id: warm
    requirement: The story is warm.
"""


def holds(rules, response="", prompt=""):
    return predicates.compile_rules(rules, "here")(prompt, response)


def words(*entries, region="response", **more):
    return {"words": {"in": region, "any_of": list(entries), **more}}


def length(unit="words", region="response", **ends):
    return {"length": {"in": region, "unit": unit, **ends}}


YES, NO = length(min=0), length(min=9)


@pytest.mark.parametrize(
    "rules, response, expected",
    [
        (words("dog"), "A DOG's life", True),
        (words("dog"), "Hot-dog", True),
        (words("dog"), "dogs and Dogma", False),
        (words("Élan"), "with élan", True),
        (words("fright*"), "so FRIGHTENED", True),
        (words("fright*"), "a fright", True),
        (words("fright*"), "unfrightened", False),
        (words("at last"), "at\n last!", True),
        (words("at last"), "at the last", False),
        (words("at last"), "that last", False),
        (words("at last"), "at lasting peace", False),
        (words("at la*"), "At lamps", True),
        (words("don't"), "I don't", True),
        (words("c++"), "in C++ today", True),
        (words("why?"), "wh", False),
        (words("a", "b", at_least=2), "a a a", False),
        (words("a", "b", at_least=2), "b, a", True),
        (words("a", "x y", "z*", at_least=3), "a x y", False),
        (words("a", "x y", "z*", at_least=3), "zoo: x y a", True),
        (words("x y", "z*", at_least=2), "zoo zebra", False),
        ({"regex": {"in": "response", "pattern": r"\?\s*\Z"}}, "Why? ", True),
        ({"regex": {"in": "response", "pattern": r"\?\s*\Z"}}, "Why? So.", False),
        ({"regex": {"in": "response", "pattern": "why"}}, "Why", False),
        (length(min=2), "one two", True),
        (length(min=3), "one two", False),
        (length(max=2), "one two", True),
        (length(max=1), "one two", False),
        (length("characters", min=3, max=3), "a b", True),
        (length("characters", max=2), "a b", False),
        ({"not": YES}, "", False),
        ({"all": [YES, YES]}, "", True),
        ({"all": [YES, NO]}, "", False),
        ({"any": [NO, YES]}, "", True),
        ({"any": [NO, NO]}, "", False),
        ({"if": {"when": YES, "then": NO}}, "", False),
        ({"if": {"when": YES, "then": YES}}, "", True),
        ({"if": {"when": NO, "then": NO}}, "", True),
    ],
)
def test_predicates(rules, response, expected):
    assert holds(rules, response) is expected


MAYBE = {"label": "maybe"}  # not among LABELS
LABELS = {"calm": True, "loud": False, "severity": 2, "kind": "story"}


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({"label": "calm"}, True),
        ({"label": "loud"}, False),
        (MAYBE, None),
        ({"label": "severity"}, None),  # a number is neither true nor false
        ({"label": {"name": "severity", "at_least": 2}}, True),
        ({"label": {"name": "severity", "at_least": 3}}, False),
        ({"label": {"name": "severity", "at_least": 1, "at_most": 1}}, False),
        ({"label": {"name": "kind", "at_least": 1}}, None),
        ({"label": {"name": "kind", "is": "story"}}, True),
        ({"label": {"name": "kind", "is": "poem"}}, False),
        ({"not": MAYBE}, None),
        ({"all": [YES, MAYBE]}, None),
        ({"all": [MAYBE, NO]}, False),
        ({"any": [NO, MAYBE]}, None),
        ({"any": [MAYBE, YES]}, True),
        ({"if": {"when": MAYBE, "then": YES}}, True),
        ({"if": {"when": MAYBE, "then": NO}}, None),
        ({"if": {"when": YES, "then": MAYBE}}, None),
        ({"if": {"when": NO, "then": MAYBE}}, True),
    ],
)
def test_labels_that_are_missing_are_unknown(rules, expected):
    assert predicates.compile_rules(rules, "here")("", "", LABELS) is expected


@pytest.mark.parametrize(
    "body, message",
    [
        (1, "label: must be a mapping with the keys name, is, at_least, at_most"),
        ({"name": "a", "is": 1, "at_least": 1}, "either 'is', or 'at_least' and 'at_most'"),
        ({"name": "a", "at_least": "x"}, "at_least: 'x' must be a number"),
    ],
)
def test_a_malformed_label_predicate(body, message):
    with pytest.raises(InputError, match=message):
        predicates.compile_rules({"label": body}, "here")


def test_what_a_judge_that_reads_is_shown():
    text = """
  - id: kind
    requirement: The story is kind.
    exceptions: [A villain may be unkind.]
    omission: An empty story is not kind.
    when: {words: {in: prompt, any_of: [Lily]}}
    labels: {label: kind}
"""
    clause = policy.parse(GOOD + text).clauses[-1]
    assert clause.exceptions == ("A villain may be unkind.",)
    assert clause.omission == "An empty story is not kind."
    assert clause.applies("Lily", "") and not clause.applies("Tim", "")
    assert clause.by_labels("Tim", "") is True and clause.by_labels("Lily", "") is None
    for word in ("The story", "villain", "empty", "id: kind"):
        other = policy.parse(GOOD + text.replace(word, f"{word}ish")).clauses[-1]
        assert other.text_hash != clause.text_hash
    for word in ("Lily", "label: kind"):
        other = policy.parse(GOOD + text.replace(word, f"{word}ish")).clauses[-1]
        assert other.text_hash == clause.text_hash and other.hash != clause.hash


@pytest.mark.parametrize(
    "line, message",
    [
        ("exceptions: Winter.", "p.yaml:8: clause warm: exceptions must be a list of texts"),
        ("exceptions: ['']", "clause warm: an exception is empty"),
        ("exceptions: [1]", "exceptions: 1 is not a text"),
        ("zero_tolerance: maybe", "zero_tolerance: 'maybe' must be true or false"),
        ("zero_tolerance: true\n    exceptions: [Winter.]", "contradict each other"),
        ("omission: no", "omission: False is not a text"),
        ("labels: {label: {}}", "clause warm: labels: label: key 'name' is missing"),
    ],
)
def test_malformed_words_for_judges(line, message):
    with pytest.raises(InputError, match=message):
        policy.parse(GOOD + f"    {line}\n", "p.yaml")


def test_regions():
    assert holds(words("cat", region="prompt"), "a dog", "a cat")
    assert not holds(words("cat"), "a dog", "a cat")
    filler = " x" * (predicates.ENDING_WORDS - 1)
    assert holds(words("sad", region="ending"), f"glad sad{filler}")
    assert not holds(words("glad", region="ending"), f"glad sad{filler}")
    assert holds(words("sad", region="ending"), "sad")


def test_policy_is_read():
    found = policy.parse(GOOD)
    fear, warm = found.clauses
    assert (found.name, found.description, found.source) == ("tales", "for tests", GOOD)
    assert (fear.id, fear.tier, fear.requirement) == (
        "no_fear",
        "high",
        "The story must not frighten.",
    )
    assert fear.by_rules("", "all calm") and not fear.by_rules("", "a fright")
    assert (warm.tier, warm.rules, warm.when, warm.by_rules) == ("standard", None, None, None)


def test_a_clause_asks_for_nothing_where_when_does_not_hold():
    clause = """  - id: talk
    requirement: Talk names a parent.
    when: {words: {in: response, any_of: [said]}}
    rules: {words: {in: response, any_of: [mum, dad]}}
"""
    predicate = policy.parse(GOOD + clause).clauses[2].by_rules
    assert predicate("", "Mum said so") and predicate("", "Silence")
    assert not predicate("", "He said so")
    without_rules = policy.parse(GOOD + clause.replace("    rules", "    # rules"))
    assert without_rules.clauses[2].by_rules is None


def rules_line(rules):
    return GOOD.replace("{not: {words: {in: response, any_of: [scared, fright*]}}}", rules)


MALFORMED = {
    "": r"p\.yaml: must be a mapping with the keys name, clauses, description",
    "[1]": r"p\.yaml: must be a mapping",
    "name: [": r"p\.yaml:1: not valid YAML",
    "name: x\n\tclauses: 1": r"p\.yaml:2: not valid YAML",
    "name: !!python/name:os.x": r"p\.yaml:1: not valid YAML",
    "name: 2024-99-99": r"p\.yaml: not valid YAML",
    "a: " + "[" * 5000: r"p\.yaml: not valid YAML",
    "name: x": "key 'clauses' is missing",
    "name: x\nclauses: []": "clauses must be a list of at least one clause",
    "name: x\nclauses: {a: 1}": "clauses must be a list",
    "name: x\nclauses: [1]": r"p\.yaml:2: must be a mapping with the keys id, requirement",
    "name: 3\n" + GOOD.partition("\n")[2]: "name: 3 is not a text",
    GOOD + "colour: red\n": "unknown key 'colour'; use name, clauses, description",
    GOOD + "    colour: red\n": r"p\.yaml:8: unknown key 'colour'; use id, requirement, tier, e",
    GOOD + "name: x\n": r"p\.yaml:1: key 'name' is given twice",
    GOOD + "    id: x\n": r"p\.yaml:8: key 'id' is given twice",
    GOOD.replace("warm\n", "no_fear\n"): r"p\.yaml:8: two clauses have the id 'no_fear'; rename",
    GOOD.replace("warm\n", "a b\n"): "id 'a b' may hold letters",
    GOOD.replace("warm\n", "off\n"): "id: False is not a text; put it in quotes",
    GOOD.replace("    requirement: The story is warm.\n", ""): "key 'requirement' is missing",
    GOOD.replace("The story is warm.", "' '"): "clause warm: requirement is empty",
    GOOD.replace("tier: high", "tier: top"): "tier 'top' is unknown; use one of critical, high,",
    GOOD + "    when: {word: 1}\n": r"p\.yaml:8: clause warm: when: unknown predicate 'word'",
    rules_line("&a {not: *a}"): "nested too deeply",
    rules_line("{word: 1}"): r"p\.yaml:4: clause no_fear: unknown predicate 'word'; use one of "
    "words, regex, length, refusal, label, not, all, any, if",
    rules_line("{not: {all: [{word: 1}]}}"): "clause no_fear: not: all: unknown predicate 'word'",
    rules_line("{not: {}, all: []}"): "a predicate is a mapping with one key",
    rules_line(""): "clause no_fear: a predicate is a mapping with one key",
    GOOD + "    when:\n": "clause warm: when: a predicate is a mapping with one key",
    rules_line("words"): "a predicate is a mapping with one key",
    rules_line("{all: []}"): "all: needs a list of at least one predicate",
    rules_line("{any: {}}"): "any: needs a list",
    rules_line("{if: {when: {any: 1}}}"): "if: key 'then' is missing",
    rules_line("{if: {when: {any: 1}, then: {any: 1}}}"): "if: when: any: needs a list",
    rules_line("{words: [a]}"): "words: must be a mapping with the keys in, any_of, at_least",
    rules_line("{words: {any_of: [a]}}"): "words: key 'in' is missing",
    rules_line("{words: {in: answer, any_of: [a]}}"): "in: 'answer' is unknown; use one of prompt",
    rules_line("{words: {in: [], any_of: [a]}}"): r"in: \[\] is unknown",
    rules_line("{words: {in: prompt, any_of: a}}"): "any_of must be a list of words",
    rules_line("{words: {in: prompt, any_of: []}}"): "any_of must be a list of words",
    rules_line("{words: {in: prompt, any_of: [a, no]}}"): "any_of: False is not a text; put it in",
    rules_line("{words: {in: prompt, any_of: ['*']}}"): r"entry '\*': write a word or phrase",
    rules_line("{words: {in: prompt, any_of: [a*b]}}"): r"entry 'a\*b': write a word or phrase",
    rules_line("{words: {in: prompt, any_of: [' ']}}"): "entry '': write a word or phrase",
    rules_line("{words: {in: prompt, any_of: [a], at_least: 2}}"): "at_least=2 must be from 1 to 1",
    rules_line("{words: {in: prompt, any_of: [a], at_least: 0}}"): "at_least=0 must be from 1",
    rules_line("{words: {in: prompt, any_of: [a], at_least: true}}"): "True must be a whole number",
    rules_line("{words: {in: prompt, any_of: [a], most: 2}}"): "words: unknown key 'most'",
    rules_line("{regex: {in: prompt, pattern: '('}}"): "not a valid regular expression",
    rules_line("{regex: {in: prompt, pattern: 'a{9999999999}'}}"): "not a valid regular expression",
    rules_line("{regex: {in: prompt, pattern: 3}}"): "pattern: 3 is not a text",
    rules_line("{length: {in: prompt, unit: lines, min: 1}}"): "unit 'lines' is unknown; use words",
    rules_line("{length: {in: prompt, unit: words}}"): "length: needs min or max",
    rules_line("{length: {in: prompt, unit: words, min: -1}}"): "-1 must be a whole number",
    rules_line("{length: {in: prompt, unit: words, min: 3, max: 2}}"): "min=3 is above max=2",
}


@pytest.mark.parametrize("text, problem", MALFORMED.items(), ids=lambda text: text[-40:])
def test_a_malformed_policy_is_one_clear_line(tmp_path, text, problem):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=problem) as caught:
        policy.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_policy_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no policy 'nonsense' .* one of .*stories_new.* or the"):
        policy.load("nonsense")
    with pytest.raises(InputError, match="none.yaml: cannot be read"):
        policy.load(tmp_path / "none.yaml")
    (tmp_path / "p.yaml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        policy.load(tmp_path / "p.yaml")


def test_diff():
    old = policy.parse(GOOD + "  - {id: gone, requirement: Left out.}")
    new = policy.parse(GOOD.replace("warm.", "kind.") + "  - {id: more, requirement: New.}")
    assert policy.diff(old, new) == policy.Diff(("more",), ("gone",), ("warm",), ("no_fear",))
    assert policy.diff(new, old) == policy.Diff(("gone",), ("more",), ("warm",), ("no_fear",))


@pytest.mark.parametrize(
    "before, after, changed",
    [
        ("not frighten", "never frighten", ["no_fear"]),
        ("tier: high", "tier: critical", ["no_fear"]),
        ("[scared, fright*]", "[scared]", ["no_fear"]),
        ("[scared, fright*]", "[fright*, scared]", ["no_fear"]),
        ("is warm.", "is warm.\n    when: {words: {in: prompt, any_of: [a]}}", ["warm"]),
        ("is warm.", "is warm.\n    labels: {label: warm}", ["warm"]),
        ("is warm.", "is warm.\n    exceptions: [Winter.]", ["warm"]),
        ("is warm.", "is warm.\n    omission: Silence is cold.", ["warm"]),
        ("is warm.", "is warm.\n    zero_tolerance: true", ["warm"]),
        ("tier: high", "tier: high  # a comment", []),
        ("name: tales", "name: fables", []),
    ],
)
def test_the_hash_covers_what_affects_verdicts(before, after, changed):
    old, new = policy.parse(GOOD), policy.parse(GOOD.replace(before, after))
    assert list(policy.diff(old, new).changed) == changed
    assert (old.hash != new.hash) == bool(changed)


def test_the_hash_covers_the_predicate_language(monkeypatch):
    old = policy.parse(GOOD).hash
    monkeypatch.setattr(predicates, "LANGUAGE", predicates.LANGUAGE + 1)
    assert policy.parse(GOOD).hash != old


def test_the_diff_command(tmp_path, capsys):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(GOOD + "  - {id: gone, requirement: Left out.}\n  - {id: same, requirement: S.}")
    changed = GOOD.replace("is warm.", "is\n      kind.").replace("tier: high", "tier: reduced")
    new.write_text(changed + "  - {id: same, requirement: S.}\n  - {id: more, requirement: New.}")
    assert policy_commands.main(["diff", str(old), str(new)]) == 0
    assert capsys.readouterr().out == textwrap.dedent("""\
        added      more: New.
        removed    gone: Left out.
        changed    no_fear: The story must not frighten.
                   in tier only
        changed    warm: The story is warm.
                   now: The story is kind.
        unchanged  same: S.

        stored verdicts of judges that read stay valid for: no_fear, same
        they are asked anew for: warm, more
        """)
    new.write_text('name: p\nclauses: [{id: more, requirement: "A\\e[2J \\x9b1m."}]')
    assert policy_commands.main(["diff", str(old), str(new)]) == 0
    told = capsys.readouterr().out
    assert r"more: A\x1b[2J \x9b1m." in told and told.replace("\n", "").isprintable()
    assert policy_commands.main(["diff", str(old), "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: no policy 'nonsense'")
    assert policy_commands.main(["diff", str(old)]) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_the_diff_command_counts_stored_verdicts(tmp_path, capsys):
    new, path = policy.parse(GOOD), tmp_path / "s.sqlite"
    old = policy.parse(GOOD.replace("is warm.", "is cold."))
    (tmp_path / "new.yaml").write_text(new.source)
    (tmp_path / "old.yaml").write_text(old.source)
    kept = store.Store(path)
    verdict = records.ClauseVerdict("compliant", None)
    reader = store.Reader("gemini", "m", "{}", "t")
    for n in range(3):
        kept.add(reader, "p", f"r{n}", store.Call("ok"), dict.fromkeys(old.clauses, verdict))
    kept.close()
    command = ["diff", str(tmp_path / "old.yaml"), str(tmp_path / "new.yaml"), "--store"]
    assert policy_commands.main([*command, str(path)]) == 0
    told = capsys.readouterr().out
    assert "6 verdicts on the clauses of tales, 3 valid for tales" in told
    assert "no_fear 3, warm 0" in told
    assert policy_commands.main([*command, str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_every_shipped_policy_is_listed_and_valid(capsys):
    assert policy_commands.main(["list"]) == 0
    told = capsys.readouterr().out
    assert policy_commands.main(["check", *policy.shipped()]) == 0
    checked = capsys.readouterr().out
    for name in policy.shipped():
        assert f"\n{name}" in f"\n{told}" and f"{name}: valid; " in checked
    assert (
        "pku_new: valid; 23 clauses, rules can decide 0 of 23, labels can decide 19 of" in checked
    )
    assert policy_commands.main(["check", "nonsense"]) == 2


def test_the_categories_of_pku_are_those_of_its_labels():
    """S1 to S19 in the order of the data set; tiers, exceptions and zero tolerance of the shift."""
    old, new = policy.load("pku_old"), policy.load("pku_new")
    assert [clause.id for clause in old.clauses] == [f"S{n}" for n in range(1, 20)]
    assert [clause.id for clause in new.clauses[19:]] == ["R1", "R2", "R3", "R4"]
    tiers = {t: [c.id for c in new.clauses[:19] if c.tier == t] for t in policy.TIERS}
    assert tiers["critical"] == ["S1", "S6", "S11", "S12", "S13"]
    assert tiers["high"] == ["S4", "S7", "S10", "S17", "S19"]
    assert tiers["reduced"] == ["S5", "S9", "S18"]
    assert [c.id for c in new.clauses if c.zero_tolerance] == ["S11", "S12", "S13"]
    excused = {c.id for c in new.clauses if c.exceptions}
    assert excused == {"S1", "S2", "S3", "S5", "S6", "S9", "S14", "S17", "S18"}
    assert {c.id for c in new.clauses if c.omission} == {"S9", "S14", "S17"}


def test_the_diff_command_runs_as_a_module():
    command = [sys.executable, "-m", "trace_jax.policy", "diff", "stories_old", "stories_new"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "unchanged  no_fear: " in told


def test_shipped_policies_are_complete():
    folder = importlib.resources.files("trace_jax") / "policies"
    assert {"stories_new", "stories_old", "synth_new", "synth_old"} <= set(policy.shipped())
    for name in policy.shipped():
        found = policy.load(name)
        assert found.name == name and found.description
        assert all(clause.requirement[-1] == "." for clause in found.clauses)
        if not name.startswith(("pku", "rbr")):  # what harms somebody is for judges that read
            assert all(clause.rules for clause in found.clauses)
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["name"] == name == policy.parse(text).name


STORIES = [  # a story, the clauses of stories_old and of stories_new that it violates
    ('Mom and her friend went to the park. "Hi," said Tim.', [], []),
    ('They went to the park. "Go away!" said Tim.', [], ["kindness", "outdoors", "speech"]),
    ("Tim helped his sister in the garden.", ["speech"], []),
    ("Tim helped in the garden.", ["speech"], ["outdoors"]),
    ("Tim shared his cake.", ["outdoors", "speech"], []),
    ("Tim ate his cake.", ["outdoors", "speech"], ["kindness"]),
    ("Tim hugged the monster.", ["no_fear", "outdoors", "speech"], ["no_fear"]),
    ("His friend was sad.", ["outdoors", "speech"], ["ending"]),
    ("His friend was sad." + " They ate all day." * 5, ["outdoors", "speech"], []),
    ("“Hello, friend! Where is it?”", ["outdoors"], ["ending"]),
]


@pytest.mark.parametrize("story, old, new", STORIES)
def test_the_stories_policies(story, old, new):
    for name, expected in (("stories_old", old), ("stories_new", new)):
        clauses = policy.load(name).clauses
        assert [c.id for c in clauses if not c.by_rules("One day", story)] == expected


def test_the_stories_policies_keep_change_and_add():
    change = policy.diff(policy.load("stories_old"), policy.load("stories_new"))
    assert change == policy.Diff(
        added=("kindness", "ending"),
        removed=(),
        changed=("outdoors", "speech"),
        unchanged=("no_fear",),
    )


def test_predicates_are_fast():
    """A quiet core does 11,000 a second; busy machines count waiting as work."""
    clauses = policy.load("stories_new").clauses
    texts = [f"{i} One day Lily went to the park with her friend. " * 6 for i in range(100)]
    tries = []
    for _ in range(5):
        started = time.process_time()
        for text in texts:
            for clause in clauses:
                clause.by_rules("", text)
        tries.append(time.process_time() - started)
    assert len(texts) * len(clauses) / min(tries) > 2_000
