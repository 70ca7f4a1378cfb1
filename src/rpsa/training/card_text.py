"""The text of a model card, rendered from the metadata of `rpsa.training.metadata` alone."""

from collections.abc import Mapping
from typing import Any

from rpsa.text import markdown_code, markdown_text
from rpsa.training.alternatives_card import alternatives_section, changed_afterwards
from rpsa.training.freezing_text import bullets, frozen, provenance

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
