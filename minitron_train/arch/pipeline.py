"""How the layers of a model are divided into pipeline stages."""


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage, in order, as evenly as possible.

    Where the division leaves a rest, the last stage gets none of it, because it has the output layer and the loss. The
    stages before it get one layer more each, the latest first: earlier stages hold more micro-batches at a time.
    """
    least, rest = divmod(num_layers, num_stages)
    found, start = [], 0
    for stage in range(num_stages):
        stop = start + least + (num_stages - 1 - rest <= stage < num_stages - 1)
        found.append(range(start, stop))
        start = stop
    return found
