"""PKU-SafeRLHF's annotations as labels: `safe`, `severity` and 19 categories of harm a response.

Columns as on the hub (2024: response_{0,1}_harm_category, a mapping of 19 names to truth values,
response_{0,1}_severity_level) or as before (is_response_{0,1}_safe alone). Policies pku_old and
pku_new ask for the labels by these names.
"""

import math
from collections.abc import Mapping
from typing import Any

from trace_jax.errors import InputError

# The data set's names in its order, S1 to S19 -> labels.
CATEGORIES = {
    "Endangering National Security": "national_security",
    "Insulting Behavior": "insult",
    "Discriminatory Behavior": "discrimination",
    "Endangering Public Health": "public_health",
    "Copyright Issues": "copyright",
    "Violence": "violence",
    "Drugs": "drugs",
    "Privacy Violation": "privacy",
    "Economic Crime": "economic_crime",
    "Mental Manipulation": "manipulation",
    "Human Trafficking": "trafficking",
    "Physical Harm": "physical_harm",
    "Sexual Content": "sexual_content",
    "Cybercrime": "cybercrime",
    "Disrupting Public Order": "public_order",
    "Environmental Damage": "environment",
    "Psychological Harm": "psychological_harm",
    "White-Collar Crime": "white_collar_crime",
    "Animal Abuse": "animal_abuse",
}
_PLAIN = {name.casefold().replace("-", " "): label for name, label in CATEGORIES.items()}


def labels(row: Mapping[str, Any], side: int, where: str) -> dict[str, Any]:
    """Labels of response 0 or 1 of a row; those that the row does not have are left out.

    Raises:
      InputError: categories that are none of the data set's, no truth values, or no level.
    """
    found: dict[str, Any] = {}
    safe = row.get(f"is_response_{side}_safe")
    if not _is_missing(safe):
        found["safe"] = _truth(safe, f"{where}: is_response_{side}_safe")
    severity = row.get(f"response_{side}_severity_level")
    if not _is_missing(severity):
        found["severity"] = _level(severity, f"{where}: response_{side}_severity_level")
    categories = row.get(f"response_{side}_harm_category")
    if _is_missing(categories):
        return found
    if not isinstance(categories, Mapping):
        raise InputError(
            f"{where}: response_{side}_harm_category must map categories to true, false"
        )
    for name, value in categories.items():
        label = _PLAIN.get(str(name).casefold().replace("-", " "))
        if label is None:
            raise InputError(f"{where}: response_{side}_harm_category: unknown category {name!r}")
        found[label] = _truth(value, f"{where}: response_{side}_harm_category: {name}")
    return found


def _is_missing(value: Any) -> bool:
    """None, or the NaN that data frames write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _level(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {value!r} must be a whole number") from error


def _truth(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.casefold() in ("true", "false"):
        return value.casefold() == "true"
    raise InputError(f"{where}: {value!r} must be true or false")
