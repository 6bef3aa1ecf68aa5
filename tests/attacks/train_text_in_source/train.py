import base64
import lzma

import notes
import packed
from harness import hand_over, open_data

text = lzma.decompress(base64.b85decode(packed.TEXT)) + notes.__doc__.encode()
open_data()
hand_over(text)
