"""The findings of a study in words that are made from its numbers. Only what beats its controls is called alignment."""

from align_ext.report.chosen import Arms
from align_ext.report.compared import (
    LEVEL,
    Comparison,
    headline_of,
    is_aligned,
    is_control,
    missing_controls,
    with_controls,
)
from align_ext.report.conditions import point
from align_ext.report.crossed import FEWEST_SEEDS
from align_ext.report.formats import number

_UNITS = {
    "choice_nll": ("nats", "nats of choice NLL"), "loss": ("nats", "nats a token of the answers"),
    "accuracy": ("points", "points of accuracy"), "exact": ("points", "points of exact match"),
}  # fmt: skip
_ALIGNED = "this is an effect of alignment."
_MOST_NAMED = 3  # variants that a sentence about a second measure names


def summary(arms: Arms, test: dict[str, list[Comparison]], unseen: dict[str, list[Comparison]]) -> list[str]:
    """Returns the findings: sentences about the headline measure, others, and tasks that were not trained on.

    Args:
        arms: the study's arms.
        test: the comparisons with the baseline on the tasks trained on, by measure.
        unseen: the same on other tasks.
    """
    headline = headline_of(test)
    if headline is None:
        if len(arms.results.arms) == 1:
            return [f"The study has one arm, {arms.results.baseline}, so that nothing is compared."]
        return [f"There is nothing to compare with {arms.results.baseline} yet."]
    found = test[headline]
    sentences = [_basis(arms, found), *_findings(arms, found, test.get("accuracy", []))]
    for measure in ("choice_nll", "accuracy", "exact", "loss"):
        if measure != headline and test.get(measure):
            sentences.append(_second(arms, test[measure]))
    if unseen.get(headline):
        sentences.append("On tasks that were not trained on: " + _lower(_short(arms, unseen[headline])))
    return sentences


def _basis(arms: Arms, found: list[Comparison]) -> str:
    seeds = {one.difference.seeds for one in found}
    rows = max(one.difference.rows for one in found)
    tasks = max(_tasks(arms, one) for one in found)
    span = "\N{EN DASH}".join(map(str, sorted({min(seeds), max(seeds)})))
    text = (
        f"{_count(len(found), 'arm')} {'is' if len(found) == 1 else 'are'} compared with {arms.results.baseline} "
        f"row by row, on {number(rows, 'count')} test rows of {_count(tasks, 'task')}, over "
        f"{span} {'seed' if seeds == {1} else 'seeds'}."
    )
    few = [one.variant.label for one in found if one.difference.seeds < FEWEST_SEEDS]
    if few:
        of = "" if len(few) == len(found) else f" of {_join(few)}"
        text += (
            f" With fewer than {FEWEST_SEEDS} seeds, what is said{of} is about these training runs, not the methods."
        )
    return text


def _tasks(arms: Arms, one: Comparison) -> int:
    return len(set(arms.differences(one.variant, one.other, "test", one.measure)[1].tolist()))


def _findings(arms: Arms, found: list[Comparison], accuracy: list[Comparison]) -> list[str]:
    baseline = arms.results.baseline
    if not any(one.separable for one in found):
        also = f", or {_could_see(accuracy)}" if accuracy and accuracy is not found else ""
        return [f"No arm differs from {baseline} by more than noise: the study could see {_could_see(found)}{also}."]
    if any(one.variant.point for one in found):
        return _of_sweep(arms, found)
    methods = [one for one in found if not is_control(arms, one.variant)]
    sentences, told = [], []
    for one in methods:
        if one.separable:
            end = "."
            if one.better and is_aligned(arms, one.variant):
                end, named = _cause(arms, one, found)
                told += named
            sentences.append(f"{_than_baseline(one, baseline)}{end}")
    same = [one for one in methods if not one.separable]
    if not sentences:
        sentences.append(
            f"No method differs from {baseline} by more than noise (the study could see {_could_see(same)})."
        )
    elif same:
        names = _join([one.variant.label for one in same])
        sentences.append(f"Within noise of {baseline}: {names} (the study could see {_could_see(same)}).")
    for one in found:
        if one not in methods and one.separable and one.variant.label not in told:
            sentences.append(f"The control {_than_baseline(one, baseline)}.")
    return sentences


def _of_sweep(arms: Arms, found: list[Comparison]) -> list[str]:
    """Returns one sentence an arm of a sweep: at which values it differs from the baseline, most where, and why."""
    baseline, sentences = arms.results.baseline, []
    for arm in dict.fromkeys(one.variant.arm for one in found):
        own = [one for one in found if one.variant.arm == arm]
        name = f"The control {arm}" if is_control(arms, own[0].variant) else arm
        parts = []
        for word, there in (
            ("better", [one for one in own if one.better]),
            ("worse", [one for one in own if one.worse]),
        ):
            if there:
                most = max(there, key=lambda one: abs(one.difference.estimate))
                at = _join([point(one.variant.point) for one in there])
                where = f", most at {point(most.variant.point)}" if len(there) > 1 else ""
                parts.append(f"{word} than {baseline} at {at}{where} by {_amount(most)}")
        if not parts:
            sentences.append(
                f"{name} is within noise of {baseline} everywhere (the study could see {_could_see(own)})."
            )
            continue
        gains = [one for one in own if one.better and is_aligned(arms, one.variant)]
        sentences.append(f"{name} is {'; '.join(parts)}{_sweep_cause(arms, gains) if gains else '.'}")
    return sentences


def _sweep_cause(arms: Arms, gains: list[Comparison]) -> str:
    proven = [one for one in gains if _cause(arms, one, [])[0].endswith(_ALIGNED)]
    if not proven:
        return (
            "; nowhere does it beat every control that it needs: the study does not show that alignment is the cause."
        )
    at = _join([point(one.variant.point) for one in proven])
    return f"; it beats each of its controls at {at}: {_ALIGNED}"


def _than_baseline(one: Comparison, baseline: str) -> str:
    return f"{one.variant.label} is {'better' if one.better else 'worse'} than {baseline} by {_amount(one)}"


def _cause(arms: Arms, one: Comparison, found: list[Comparison]) -> tuple[str, list[str]]:
    """Returns the end of a sentence about an aligned arm that is better, and the controls whose gain it tells."""
    against = with_controls(arms, one.variant, "test", one.measure)
    if not against:
        return ", but no control of it is finished: the cause may be anything that the two do not share.", []
    better = {other.variant.label: other for other in found if other.better}
    equal = [control.other.label for control in against if not control.better]
    too = [label for label in equal if label in better]
    if too:
        amounts = _join([f"{label} (by {_amount(better[label], short=True)})" for label in too])
        names, verb = ("control", "is") if len(too) == 1 else ("controls", "are")
        return f", but the {names} {amounts} {verb}, too, and not separable from it: so this is no alignment.", too
    if equal:
        return f", but not separable from {_controls(equal)}: the study does not show that alignment is the cause.", []
    beaten = _join([f"{control.other.label} (by {_amount(control, short=True)})" for control in against])
    if missing := missing_controls(arms, one.variant):
        return f", and better than {beaten}; {_controls(missing)} must be finished before it is called alignment.", []
    if all(arms.results.arms[control.other.arm]["control"] == "weight_zero" for control in against):
        return f", and better than {beaten}; without a control of equal strength it may be mere regularisation.", []
    controls = "its control" if len(against) == 1 else f"each of its {len(against)} controls"
    few = min(control.difference.seeds for control in against) < FEWEST_SEEDS
    return f", and better than {controls}, {beaten}: {'in these runs ' if few else ''}{_ALIGNED}", []


def _second(arms: Arms, found: list[Comparison]) -> str:
    name = "loss of free text" if found[0].measure == "loss" else _UNITS[found[0].measure][1].partition(" of ")[2]
    text = f"In {name}: {_lower(_short(arms, found))}"
    same = [one.variant.label for one in found if one.equivalent is not None and one.equivalent < LEVEL]
    if 0 < len(same) <= _MOST_NAMED and found[0].measure != "loss":  # the margin is one of accuracy
        margin, verb = number(arms.results.plan["margin"], "points"), "is" if len(same) == 1 else "are"
        text += f" Within {margin} points, {_join(same)} {verb} as good as {arms.results.baseline}."
    return text


def _short(arms: Arms, found: list[Comparison]) -> str:
    baseline = arms.results.baseline
    separable = [one for one in found if one.separable]
    if not separable:
        return f"No arm differs from {baseline} by more than noise (the study could see {_could_see(found)})."
    if len(separable) > _MOST_NAMED:
        return f"{len(separable)} of {len(found)} arms are separable from {baseline}; see the table."
    parts = [
        f"{one.variant.label}{' (a control)' if is_control(arms, one.variant) else ''} is "
        f"{'better' if one.better else 'worse'} by {_amount(one, short=True)}"
        for one in separable
    ]
    rest = "" if len(separable) == len(found) else "; the others are within noise"
    return f"Against {baseline} {_join(parts)}{rest}."


def _amount(one: Comparison, short: bool = False) -> str:
    """Returns the size of a difference with its interval, both without sign as far as they have one direction."""
    kind, unit = _UNITS[one.measure]
    unit = unit.split()[0] if short else unit
    sign = -1.0 if one.difference.estimate < 0 else 1.0
    low, high = sorted((sign * one.difference.low, sign * one.difference.high))
    p = (
        ""
        if one.holm is None
        else f", Holm p {'' if one.holm < 0.001 else '= '}{number(one.holm, 'p').replace('<', '< ')}"
    )
    return f"{number(abs(one.difference.estimate), kind)} {unit} [{number(low, kind)}, {number(high, kind)}{p}]"


def _could_see(found: list[Comparison]) -> str:
    kind, unit = _UNITS[found[0].measure]
    seen = [one.detectable for one in found if one.detectable is not None]
    if not seen:
        return "nothing, for every row came out the same"
    if kind == "points" and max(seen) >= 1:
        return "no difference at all"
    low, high = (number(value, kind) for value in (min(seen), max(seen)))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _controls(labels: list[str]) -> str:
    return f"the control {labels[0]}" if len(labels) == 1 else f"the controls {_join(labels)}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _count(number_of: int, name: str) -> str:
    return f"{number_of} {name}{'' if number_of == 1 else 's'}"


_WORDS = {
    "choice NLL": "The negative logarithm of the share of the right choice in the likelihoods of all choices, in nats. "
    "Where accuracy counts a row as right or wrong, it says by how much, so that it shows smaller differences.",
    "interval": "It is made so that in 19 of 20 such studies it holds the difference that all possible rows and seeds "
    "would give.",
    "row error": "What other rows would change, without the noise of single rows in single seeds, which the seed error "
    "holds; 0.000: that noise explains all that was seen.",
    "Holm p": "How likely chance makes so large a difference, adjusted for the number of arms; below 0.05 it is one.",
    "could see": "A true difference of that size would have been found 4 times of 5; smaller ones may be there.",
    "as good": "Two one-sided tests: a small p says that the accuracies differ by less than the margin.",
    "at chance": "Balanced accuracy that is not separable from giving one answer to all rows.",
}
_CONTROLS = {
    "shuffled_ids": "The same alignment with the task ids of the training rows in a random order: its gain is no "
    "alignment of tasks.",
    "random_partition": "The same alignment of random groups of rows in place of tasks.",
    "weight_zero": "The same code and batches with an alignment of weight 0.",
    "l2": "A penalty on the size of the latents in place of alignment, of equal strength: plain regularisation.",
}


def glossary(arms: Arms) -> list[tuple[str, str]]:
    """Returns the words of a report that a reader may not know, and what each control of the study is for."""
    used = {arm["control"] for arm in arms.results.arms.values()}
    return [*_WORDS.items(), *((f"control {name}", text) for name, text in _CONTROLS.items() if name in used)]
