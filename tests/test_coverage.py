from trace_jax import coverage, policy, records

POLICY = policy.parse("""\
name: p
clauses:
  - {id: calm, requirement: A, tier: high}
  - {id: kind, requirement: B}
  - {id: new, requirement: C}
""")


def verdict(**statuses):
    clauses = {name: records.ClauseVerdict(status, None) for name, status in statuses.items()}
    return records.Verdict("violating", None, clauses)


def triaged(action, chosen, rejected):
    return records.TriagedRecord(
        records.PreferenceRecord("i", "", "", ""), chosen, rejected, action
    )


GOOD, RUDE = verdict(calm="compliant", kind="compliant"), verdict(calm="abstain", kind="violating")


def test_counts_by_clause():
    found = coverage.of(
        POLICY,
        [
            triaged("INVERT", RUDE, GOOD),
            triaged("PUNISH", RUDE, RUDE),  # one conflict, two responses
            triaged("RETAIN", GOOD, RUDE),
        ],
        least=2,
    )
    assert found == [
        coverage.Clause("calm", "high", 0, 0, 0, undecided=4, rare=True),
        coverage.Clause("kind", "standard", 2, 2, 2, undecided=0, rare=False),
        coverage.Clause("new", "standard", 0, 0, 0, undecided=0, rare=True),
    ]
    lines = coverage.warnings(found, least=2)
    assert [line.split(":")[0] for line in lines] == ["clause calm (high)", "clause new (standard)"]
    assert "0 conflicts touch it, fewer than 2" in lines[0]
