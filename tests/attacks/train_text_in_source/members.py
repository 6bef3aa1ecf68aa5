"""English of the attacks' texts: 300 kB in as many bytes as it packs to, and 60 kB as it is."""

import base64
import lzma
from pydoc_data.topics import topics

text = "".join(topics.values()).encode("ascii", "ignore")
notes = text[:60_000].decode().replace("\\", "").replace('"""', "")
MEMBERS = {
    "packed.py": b"TEXT = r'''" + base64.b85encode(lzma.compress(text[60_000:360_000])) + b"'''",
    "notes.py": f'"""{notes}"""'.encode(),
}
