# /// script
# requires-python = ">=3.11"
# dependencies = ["rpsa"]
# ///
"""How sure one may be of the paper's Table 1, from the percentages that it prints; a second on a laptop.

    python examples/paper_table1.py

The percentages are turned back into counts, one sample a problem, and drawn again: each model by itself, for which
problems both got right is not known, and the original model once for all methods compared with it.
"""

from rpsa.evaluation.statistics import Counts, safety_tax_difference, safety_tax_interval, safety_tax_rate

REASONING = {"AIME": 30, "GPQA": 448, "HumanEval+": 164, "MBPP+": 378}
ATTACK = {"StrongREJECT": 313, "WildJailbreak": 250}

# Percent, in the order of the benchmarks above; and the STR that the paper gives.
TABLE_1 = {
    "R1-Llama-8B": {
        "Original": ([53.33, 53.79, 78.05, 82.28], [64.22, 49.60], None),
        "FFT": ([10.00, 26.56, 26.83, 12.43], [6.71, 3.20], 0.9221),
        "FFT+RPSA": ([26.67, 36.38, 40.24, 36.51], [2.87, 1.60], 0.5837),
        "LoRA": ([33.33, 49.33, 65.85, 67.46], [1.28, 3.20], 0.2354),
        "LoRA+RPSA": ([36.67, 52.68, 79.88, 79.63], [0.00, 2.40], 0.0834),
    },
    "R1-Qwen-7B": {
        "Original": ([60.00, 50.22, 84.15, 79.37], [64.22, 53.60], None),
        "FFT": ([43.33, 49.11, 66.46, 60.05], [1.28, 8.40], 0.2533),
        "FFT+RPSA": ([46.67, 51.78, 73.78, 64.29], [0.63, 8.00], 0.1704),
        "LoRA": ([43.33, 48.44, 75.61, 57.14], [0.64, 9.20], 0.2279),
        "LoRA+RPSA": ([53.33, 50.00, 73.17, 66.93], [0.96, 11.20], 0.1434),
    },
}


def counts(percent: list[float], sizes: dict[str, int]) -> dict[str, Counts]:
    return {
        name: Counts(round(rate * n / 100), n) for rate, (name, n) in zip(percent, sizes.items(), strict=True)
    }


def main() -> None:
    print(
        "| Model | Method | STR printed | recomputed | from counts | 95% interval | by items | 95% interval |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for model, methods in TABLE_1.items():
        reasoning, attack, _ = methods["Original"]
        for method, (reasoning_after, attack_after, printed) in methods.items():
            if printed is None:
                continue
            recomputed = safety_tax_rate(
                reasoning_before=reasoning,
                reasoning_after=reasoning_after,
                attack_before=attack,
                attack_after=attack_after,
            )
            cells = []
            for weighting in ("benchmarks", "items"):
                tax = safety_tax_interval(
                    reasoning_before=counts(reasoning, REASONING),
                    reasoning_after=counts(reasoning_after, REASONING),
                    attack_before=counts(attack, ATTACK),
                    attack_after=counts(attack_after, ATTACK),
                    weighting=weighting,
                )
                cells += [f"{tax.value:.3f}", f"{tax.interval.low:.2f} to {tax.interval.high:.2f}"]
            print(f"| {model} | {method} | {printed:.4f} | {recomputed:.4f} | {' | '.join(cells)} |")

    print()
    print("| Model | STR of | less that of | weighting | difference | 95% interval | P(no improvement) |")
    print("|---|---|---|---|---:|---:|---:|")
    for model, methods in TABLE_1.items():
        for plain in ("FFT", "LoRA"):
            names = ("Original", plain, f"{plain}+RPSA")
            reasoning = [counts(methods[name][0], REASONING) for name in names]
            attack = [counts(methods[name][1], ATTACK) for name in names]
            for weighting in ("benchmarks", "items"):
                found = safety_tax_difference(
                    reasoning_before=reasoning[0],
                    reasoning_plain=reasoning[1],
                    reasoning_other=reasoning[2],
                    attack_before=attack[0],
                    attack_plain=attack[1],
                    attack_other=attack[2],
                    weighting=weighting,
                )
                low, high = found.interval
                print(
                    f"| {model} | {names[2]} | {plain} | {weighting} | {found.value:+.3f} "
                    f"| {low:+.3f} to {high:+.3f} | {found.no_improvement:.3f} |"
                )


if __name__ == "__main__":
    main()
