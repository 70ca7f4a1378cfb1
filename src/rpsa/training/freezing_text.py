"""What a model card says of freezing: what was frozen, and where the Fisher information comes from.

From the metadata of `rpsa.training.freezing_metadata`; the other sections are `rpsa.training.card_text`'s.
"""

from collections.abc import Mapping
from typing import Any

from rpsa.text import markdown_code


def frozen(metadata: Mapping[str, Any]) -> str:
    freezing = metadata["freezing"]
    if freezing is None:
        return ""
    if freezing["mask"] == "fisher":
        mask = "Frozen first: the elements with the highest Fisher information."
    else:
        mask = f"Frozen first: `{freezing['mask']}`, a control that does not go by the Fisher information."
    if freezing["exact"]:
        how = "How: exactly. A frozen element is bit-identical after each optimizer step"
        how += ", as the optimizer held the trainable elements alone." if freezing["compact"] else "."
    else:
        how = "How: gradients only. Frozen elements had no gradient, but weight decay and momentum still moved them."
    return bullets(
        _ratio(freezing),
        _trajectory(metadata["trajectory"]) if isinstance(freezing["frozen_ratio"], str) else None,
        mask,
        _fraction(freezing, metadata["audit"]),
        how,
        f"Elements with F = 0: {freezing['zero_fisher']}. Adam's second moment of frozen elements: "
        f"`{freezing['frozen_moments']}`.",
        _audit(metadata["audit"]),
    )


def _ratio(freezing: Mapping[str, Any]) -> str:
    if not isinstance(freezing["frozen_ratio"], str):
        share = f"{freezing['frozen_ratio']:g}"
        return f"Frozen ratio k: constant, {share} of the elements with non-zero Fisher information."
    if freezing["frozen_ratio"] == "noise":
        return (
            "Frozen ratio k (of the elements with non-zero Fisher information): noise, a control. It is drawn anew "
            f"every {freezing['every']} optimizer steps by the law of the dynamic ratio, whatever the conflict."
        )
    return (
        "Frozen ratio k (of the elements with non-zero Fisher information): dynamic. It follows the conflict between "
        f"the reasoning and the safety gradient, measured every {freezing['every']} optimizer steps against the "
        f"previous {freezing['window']} measurements (sigma scale {freezing['sigma_scale']:g})."
    )


def _trajectory(trajectory: Mapping[str, Any] | None) -> str:
    if trajectory is None:
        return "k was not measured: the model was saved before any training."
    if not trajectory["left_half"]:
        return f"k never left 0.5 in {trajectory['measurements']} measurements: in effect a constant ratio of 0.5."
    k, c = trajectory["k"], trajectory["c"]
    conflict = (
        f"The conflict c was {c['min']:.3f} to {c['max']:.3f}, mean {c['mean']:.3f}."
        if c
        else "The conflict c was never measured: no gradient was finite."
    )
    return (
        f"Over {trajectory['measurements']} measurements k was {k['min']:.3f} to {k['max']:.3f}, median "
        f"{k['median']:.3f}; it was 0 in {trajectory['share_k_0']:.1%} and 1 in {trajectory['share_k_1']:.1%} of "
        f"them. {conflict}"
    )


def _fraction(freezing: Mapping[str, Any], audit: Mapping[str, Any] | None) -> str | None:
    if freezing["elements"] is None:
        return None
    text = (
        f"Frozen in the end: {freezing['frozen_fraction']:.2%} of all {freezing['elements']:,} trainable elements; "
        f"{freezing['nonzero']:,} have a score above 0"
    )
    if audit and audit["steps"]:
        mean = audit["frozen_element_steps_checked"] / (audit["steps"] * freezing["elements"])
        text += f"; {mean:.2%} on average over the steps"
    return text + "."


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "Audit: none was kept."
    if audit["frozen_elements_moved"] is None:
        return "Audit: nothing was frozen over any step, so nothing was checked."
    return (
        f"Audit: {audit['frozen_elements_moved']:,} frozen elements moved in "
        f"{audit['frozen_element_steps_checked']:,} element-steps checked (moves counted on "
        f"{audit['moved_counted_on']})."
    )


def provenance(metadata: Mapping[str, Any]) -> str:
    fisher, reference = metadata["fisher"], metadata["reference"]
    return bullets(
        *(_fisher(fisher) if fisher else []),
        *(_reference(reference) if reference else []),
        "The trainer was given no reasoning data of its own: the ratio does not depend on it."
        if metadata["freezing"] and not reference
        else None,
    )


def _fisher(fisher: Mapping[str, Any]) -> list[str | None]:
    if fisher["samples"] is None:
        return [f"Scores of unknown origin, with the fingerprint `{fisher['fingerprint']}`."]
    skipped = f" ({fisher['skipped']} more skipped)" if fisher["skipped"] else ""
    scope = f", scope {markdown_code(fisher['scope'])}" if fisher["scope"] else ""
    tokens = f" with {fisher['tokens']:,} response tokens" if fisher["tokens"] is not None else ""
    overlap = ", ".join(
        f"{share:.3f} for the top {float(k):.0%}"
        for k, share in (fisher["split_half"] or {}).items()
        if share is not None
    )
    prints = {
        "scores": "fingerprint",
        "samples": "data_fingerprint",
        "measured on the weights": "weights_fingerprint",
    }
    return [
        f"Estimated on {fisher['samples']:,} samples{skipped}{tokens}, by "
        f"`{fisher['estimator']}` (probes {fisher['probes']}, seed {fisher['seed']}{scope}), once, before training.",
        "Used on other weights than it was measured on, which was asked for."
        if fisher["any_weights"]
        else None,
        f"Agreement of its two halves (chance is the share itself): {overlap or 'not known'}.",
        f"Fingerprints: {', '.join(f'{of} `{fisher[name]}`' for of, name in prints.items() if fisher[name])}.",
    ]


def _reference(reference: Mapping[str, Any]) -> list[str | None]:
    sampled = (
        f", sampled from {markdown_code(reference['sampled_from'])}" if reference["sampled_from"] else ""
    )
    problems = f" to problems of {markdown_code(reference['problems'])}" if reference["problems"] else ""
    forms = {
        "temperature": "temperature {:g}",
        "top_p": "top-p {:g}",
        "max_new_tokens": "at most {:,} tokens",
    }
    known = [form.format(reference[name]) for name, form in forms.items() if reference[name] is not None]
    settings = f" {', '.join(known).capitalize()}." if known else ""
    return [
        f"Reasoning data: {reference['traces']:,} responses{problems}{sampled}; {reference['correct']:,} known to be "
        f"correct, {reference['truncated']:,} truncated, {reference['response_tokens']:,} tokens.{settings} SHA-256 "
        f"of the token ids: `{reference['sha256']}`."
    ]


def bullets(*lines: str | None) -> str:
    return "\n".join(f"- {line}" for line in lines if line)
