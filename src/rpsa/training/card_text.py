"""The text of a model card, rendered from the metadata of `rpsa.training.metadata` alone.

What a model card says of freezing: what was frozen, and where the Fisher information comes from.

From the metadata of `rpsa.training.metadata`; the other sections are `rpsa.training.card_text`'s.

What a model card and its metadata say of an alternative to freezing.
"""

from collections.abc import Mapping
from typing import Any

from rpsa.text import markdown_code, markdown_text


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


def changed_afterwards(done: Mapping[str, Any]) -> bool:
    """Whether the weights are not those that training ended with."""
    return bool(done["interpolation"] < 1 or done["restored_ratio"])


def alternatives_section(metadata: Mapping[str, Any]) -> str:
    """The lines under "What was done instead of freezing"; empty where there was nothing."""
    done = metadata["alternatives"]
    if done is None:
        return ""
    weights = {
        "fisher": "by their Fisher information (elastic weight consolidation)",
        "uniform": "all alike (L2-SP)",
    }
    projections = {
        "agem": "its component against the reasoning gradient, where the two pointed apart (A-GEM)",
        "signs": "every element whose sign was not that of the reasoning gradient",
    }
    return bullets(
        done["penalty"]
        and f"Penalty on moving away from the starting weights, {weights[done['penalty']]}, strength "
        f"{done['penalty_strength']:g}.",
        done["projection"]
        and f"Taken out of the safety gradient at every step: {projections[done['projection']]}.",
        done["rehearsed"]
        and f"Rehearsal: {done['rehearsed']:,} of the {_count(metadata['safety_data']['examples'])}rows trained on are "
        "the model's own responses to reasoning problems.",
        done["restored_ratio"]
        and f"After training, {done['restored_ratio']:g} of the elements with non-zero Fisher information, those "
        "with the most, were put back to their starting values.",
        done["interpolation"] < 1
        and f"After training, the weights were interpolated: {done['interpolation']:g} of the way from the start.",
    )


def _count(rows: int | None) -> str:
    return "" if rows is None else f"{rows:,} "


METADATA = "rpsa_metadata.json"

_NOT_MEASURED = (
    "Nothing was measured when this card was written: not reasoning, not attack success, not over-refusal. "
    "Measure all three before using the model."
)


def render_card(metadata: Mapping[str, Any]) -> str:
    """The whole card, YAML front matter included, without results."""
    from huggingface_hub import ModelCardData

    name, base, adapter = metadata["model_name"], metadata["base_model"], metadata["adapter"]
    dataset = metadata["safety_data"]["hub_id"]
    derived = {
        "model_name": name,
        "base_model": base["hub_id"],
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [dataset] if dataset else None,
        **base["license"],
        "tags": _tags(metadata),
    }
    front_matter = ModelCardData(**(derived | metadata["front_matter"])).to_yaml(line_break="\n")
    sections = {
        "Use": _use(metadata),
        "What was frozen": frozen(metadata),
        f"What was done {'beside' if metadata['freezing'] else 'instead of'} freezing": alternatives_section(
            metadata
        ),
        f"Where the {'Fisher information' if metadata['fisher'] else 'reasoning data'} comes from": provenance(
            metadata
        ),
        "Training": _training(metadata),
        "Results": _NOT_MEASURED,
        "Limits": _limits(metadata),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text)
    return f"---\n{front_matter}\n---\n\n# {markdown_text(name)}\n\n{_summary(metadata)}\n\n{body}"


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    tags = [*metadata["tags"], "safety-alignment"]
    if metadata["freezing"]:
        tags.append("rpsa")
    if adapter := metadata["adapter"]:
        tags.append(adapter["type"].lower())
        if base := metadata["base_model"]["hub_id"]:
            tags.append(f"base_model:adapter:{base}")
    return sorted(set(tags))


def _summary(metadata: Mapping[str, Any]) -> str:
    base, adapter, freezing = metadata["base_model"], metadata["adapter"], metadata["freezing"]
    name = markdown_code(base["name"]) if base["name"] else "a model without a name"
    if base["hub_id"]:
        name = f"[{markdown_text(base['name'])}](https://huggingface.co/{base['hub_id']})"
    if base["revision"]:
        name += f" (revision `{base['revision'][:12]}`)"
    how = (
        f"This is a {adapter['type']} adapter for {name}, trained"
        if adapter
        else f"This is {name}, fine-tuned"
    )
    if freezing is None:
        return f"{how} on safety data. No parameter was frozen."
    if freezing["mask"] != "fisher":
        return f"{how} on safety data, with parameters frozen by a control mask: for comparison with RPSA, not RPSA."
    return (
        f"{how} on safety data while the elements of its parameters that reasoning depends on most, by their "
        "Fisher information, were frozen: Reasoning-Preserved Safety Alignment (RPSA)."
    )


def _use(metadata: Mapping[str, Any]) -> str:
    loader = "AutoModelForCausalLM"
    imports = f"from transformers import {loader}, AutoTokenizer\n"
    if metadata["adapter"]:
        loader = "AutoPeftModelForCausalLM"
        imports = f"from peft import {loader}\nfrom transformers import AutoTokenizer\n"
    return (
        f'```python\n{imports}\nmodel = {loader}.from_pretrained("path/or/id/of/this/model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/or/id/of/this/model")\n```\n\n'
        f"The facts below for machines: `{METADATA}`. Fingerprint of the weights: "
        f"`{metadata['weights_fingerprint'] or 'not taken (sharded)'}`."
    )


def _training(metadata: Mapping[str, Any]) -> str:
    training, data, adapter = metadata["training"], metadata["safety_data"], metadata["adapter"]
    name = markdown_code(data["name"]) if data["name"] else "not named"
    if data["hub_id"]:
        name = f"[{markdown_text(data['name'])}](https://huggingface.co/datasets/{data['hub_id']})"
    examples = f", {data['examples']:,} examples" if data["examples"] is not None else ""
    digest = f", SHA-256 of the rows as trained on `{data['sha256']}`" if data["sha256"] else ""
    unfinished = training["steps"] < training["planned_steps"]
    best = f"; the weights are those of step {training['best_step']}, with the best evaluation"
    done = metadata["alternatives"]
    later = ", before what was done after training" if done and changed_afterwards(done) else ""
    losses = [f"{what} {float(training[key]):.4f}" for what, key in (("training", "loss"), ("evaluation", "eval_loss"))
              if training[key] is not None]  # fmt: skip
    autocast = f" with {training['autocast']} autocast" if training["autocast"] else ""
    return bullets(
        f"Safety data: {name}{examples}{digest}.",
        f"{training['trainer']}, {training['steps']:,} optimizer steps"
        + (f" of {training['planned_steps']:,} planned: unfinished" if unfinished else "")
        + (best + later if training["best_step"] else "")
        + f". {training['trainable_parameters']:,} of {training['parameters']:,} parameters were trainable.",
        _adapter(adapter) if adapter else None,
        f"Batch size {training['batch_size']}, learning rate {training['learning_rate']:g} "
        f"({training['lr_scheduler']}, {training['warmup_steps']} warmup steps), {training['optimizer']}, weight decay "
        f"{training['weight_decay']:g}, gradients clipped at {training['max_grad_norm']:g}, maximal length "
        f"{training['max_length'] or 'not set'}, seed {training['seed']}, {', '.join(training['dtype'])} "
        f"weights{autocast}.",
        f"Last loss{later}: {', '.join(losses)}." if losses else None,
        "Versions: "
        + ", ".join(f"{package} {version}" for package, version in metadata["versions"].items())
        + ".",
    )


def _adapter(adapter: Mapping[str, Any]) -> str:
    settings = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    known = [f"{word} {adapter[name]}" for word, name in settings.items() if adapter[name] is not None]
    known += [f"on `{adapter['target_modules']}`"] if adapter["target_modules"] else []
    return f"Adapter: {', '.join([adapter['type'], *known])}."


def _limits(metadata: Mapping[str, Any]) -> str:
    freezing, trajectory, training = metadata["freezing"], metadata["trajectory"], metadata["training"]
    bad = training["nonfinite"]
    return bullets(
        "The training diverged: its last loss, or a weight, is not a finite number. The model is of no use."
        if training["diverged"]
        else None,
        bad
        and f"The loss was not finite in {bad['steps']:,} of {training['steps']:,} steps, the first of them "
        f"{bad['first']:,}.",
        "An attack success rate is not safety. It is the share of one set of requests that one judge took for "
        "complied with; other attacks, languages, longer conversations and other sampling settings may do better.",
        "A judge errs, and another judge gives other rates: compare only rates of the same one.",
        "A model that refuses everything has a perfect attack success rate. Read it beside over-refusal.",
        "One training run: another seed or another order of the data gives another model, with other rates.",
        "What reasoning the reasoning data does not contain was not protected." if freezing else None,
        "Freezing keeps elements, not abilities: those that trained may still have changed how the model reasons."
        if freezing
        else None,
        _lora(metadata),
        "Weight decay and momentum moved frozen elements, because only gradients were masked."
        if freezing and not freezing["exact"]
        else None,
        "The ratio was to be dynamic and never was: the run was too short for its window."
        if trajectory and not trajectory["left_half"]
        else None,
    )


def _lora(metadata: Mapping[str, Any]) -> str | None:
    if metadata["fisher"] is None or metadata["fisher"]["lora_a_nonzero"] is not False:
        return None
    freezing = metadata["freezing"]
    fate = "was frozen whole" if freezing and freezing["zero_fisher"] == "frozen" else "always trained"
    return (
        "LoRA: B was 0 when the Fisher information was measured, so that only elements of B have any and could be "
        f"{'frozen' if freezing else 'protected'} by it; A {fate}."
    )
