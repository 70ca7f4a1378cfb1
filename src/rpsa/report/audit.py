"""`rpsa audit`: the content of an rpsa_audit.json for reading."""

from collections.abc import Mapping
from typing import Any

from rpsa.text import printable


def render_audit(audit: Mapping[str, Any], console: Any = None) -> None:
    """Print the verdict, the drift of each module group and the course of k to a rich console (default: stdout)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    checked, moved = audit["frozen_element_steps_checked"], audit["frozen_elements_moved"]
    if moved is None:
        console.print("Nothing was frozen over any step, so nothing was checked.", style="bold")
    else:
        console.print(f"{moved:,} frozen elements moved in {checked:,} element-steps checked.", style="bold")
    if moved and audit["gradient_only"]:
        console.print("Only gradients were masked (gradient_only), so weight decay and momentum moved them.")
    elif moved:
        console.print("Freezing failed: no frozen element should ever move.")
    console.print(f"Intervals between changes of the mask: {len(audit['intervals'])}.")
    ks = [entry["k"] for entry in audit.get("trajectory", [])]
    if ks:
        console.print(f"k: {len(ks)} measurements, {min(ks):.3f} to {max(ks):.3f}, last {ks[-1]:.3f}.")
        if all(k == 0.5 for k in ks):
            console.print("k never left 0.5: the window of measurements was never full.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Module group")
    table.add_column("relative drift", justify="right")
    table.add_column("elements changed", justify="right")
    for group, drift in audit["drift"]["groups"].items():
        relative = drift["relative"]  # None where weights are no numbers
        shown = "–" if relative is None else f"{relative:.2e}"
        table.add_row(Text(printable(group)), shown, f"{drift['changed']:.1%}")
    console.print(table)
