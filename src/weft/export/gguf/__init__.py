"""GGUF, the file of llama.cpp and its kin, as an output.

    weft.save(checkpoint, "out.gguf")                       in the checkpoint's own precision
    weft.save(as_gguf(checkpoint, "q8_0"), "out.gguf")

`as_gguf` is a lazy node: tensors under GGUF's names, in its order of elements and types. The engine writes it
as it writes anything else, range by range, so that a merge goes straight into a GGUF file.
"""

from weft.export.gguf.file import Gguf, as_gguf

__all__ = ["Gguf", "as_gguf"]
