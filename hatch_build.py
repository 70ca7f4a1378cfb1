"""Where the project lives, known when a release is built: `RPSA_URL=https://... python -m build`.

The README's links are relative, so that they work in any checkout; a page of a package index has nothing that they
could be relative to. With the address they become absolute, and the project's links are set; without it both stay as
they are.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

URL = "RPSA_URL"


class Address(MetadataHookInterface):
    """Fills `readme` and `urls`, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        url = os.environ.get(URL, "").rstrip("/")
        if url:
            text = absolute(text, url, f"v{metadata['version']}")
            metadata["urls"] = {
                "Source": url,
                "Documentation": f"{url}/tree/v{metadata['version']}/docs",
                "Issues": f"{url}/issues",
                "Changelog": f"{url}/blob/v{metadata['version']}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, url: str, tag: str) -> str:
    """Links to files, and images, at a tag of the repository at `url`."""

    def target(path: str) -> str:
        kind = "raw" if path.endswith((".png", ".svg")) else "blob"
        return f"{url}/{kind}/{tag}/{path}"

    text = text.replace("<repository>", url)
    text = re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", lambda found: f"]({target(found[1])})", text)
    return re.sub(
        r"^(\[[^\]]+\]: )(?!https?:)(\S+)$", lambda found: found[1] + target(found[2]), text, flags=re.M
    )
