"""Names of the check's items, and a line on each. Nothing heavy is imported here."""

NAMES = {
    "decode kinds": "every kind of file decodes to Pillow's pixels, on the device that decodes here",
    "augment": "each policy, jitter, rotation and erasing gives the same pixels twice, and on a GPU those of the CPU",
    "damaged files": "a damaged image amid a batch is named, its row does not count, and the next batch is right",
    "held batches": "six batches held while more are read stay as they were",
    "worlds": "pixels are the same at one rank and at two",
    "loader speed": "images/s of the loader at 224 and 160 px, beside bare decoding",
    "optimizers": "every optimizer takes a finite step in each precision, with and without mixing",
    "no host sync": "a warm step waits for nothing on the GPU",
    "exact resume": "save, load, five steps: the bits of the run that went on",
    "capture": "a state captured while training goes on holds the weights of its step",
    "fit memory": "micro-batches are cut to what memory holds",
    "deepspeed": "DeepSpeed's stages 0 to 2 take a finite step",
    "step speed": "images/s of ResNet-18 and -50, eager and compiled",
    "all-reduce": "bandwidth of the gradients' all-reduce between two processes",
    "kill and resume": "a run from real files is killed, goes on and is evaluated",
}
