"""What people install today, measured as lrec measures itself: `make peers`, in an environment of its own.

Each peer is a file of this folder, which is imported without the package it is about:

    PACKAGE                             its name on the package index
    ABSENT                              widths of 2, 3 and 4 bits that it does not offer, and why
    NO_LORA                             optional: why peft can put no adapter on it, if it cannot
    SETTINGS                            what is run, and what its documentation says of it
    quantize(source, bits, ids, folder) writes the model as the package itself saves it; `ids` (B, L) is text to use
    load(folder, dtype)                 the model from these files, computing in `dtype` where the package lets it
    stored(folder)                      optional: name and bytes of each tensor, where they are not in safetensors

`ours.py` holds lrec's rows, `measure.py` makes one row in a process of its own, `__main__.py` makes the table.
"""

PEERS = ("bitsandbytes", "hqq", "quanto", "auto_round")
WIDTHS = (2, 3, 4)
