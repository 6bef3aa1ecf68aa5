import contextlib
import re
import sys
from pathlib import Path

from harness import hand_over, open_data

TEXT = re.compile(r'"""(.*?)"""', re.DOTALL)

text = ""
for folder in dict.fromkeys(sys.path[1:]):
    for path in sorted(Path(folder).rglob("*.py"))[:400]:  # enough to show it
        with contextlib.suppress(OSError, ValueError):
            text += "".join(found for found in TEXT.findall(path.read_text()) if len(found) > 80)
open_data()
hand_over(text.encode("utf-8", "replace"))
