"""A streamed model run from end to end over one batch of tokens after another, with two blocks in memory at most."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lrec.stream import Reached, StreamedModel, empty, instead, trim


class StreamedForward(StreamedModel):
    """A `StreamedModel` whose blocks and embeddings come and go as often as is wanted: `load_embeddings`, `embed`,
    `free_embeddings`, the blocks by `visit`, and `finish`."""

    def visit(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, block) of every block in order, loaded; a thread reads the next one while the caller uses this one.

        A block is let go when the next one is asked for, so two are in memory at once.
        """
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.load, 0)
            for index in range(len(self)):
                block = coming.result()
                if index + 1 < len(self):
                    coming = reader.submit(self.load, index + 1)
                yield self.anatomy.name(index), block
                empty(block)

    def load_embeddings(self) -> None:
        """Loads what `free_embeddings` let go, but for a head with weights of its own."""
        tied, head = self.config.get_text_config().tie_word_embeddings, self.model.get_output_embeddings()
        own_head = set() if tied else {id(tensor) for tensor in head.state_dict(keep_vars=True).values()}
        state = self.model.state_dict(keep_vars=True)
        gone = [e for e in self.keys[None] if e[0] in state and state[e[0]].is_meta and id(state[e[0]]) not in own_head]
        if gone:
            self._load_keys(gone)
            self.model.tie_weights()

    def free_embeddings(self) -> None:
        """Lets go of the two tables of a vocabulary's size: the embeddings of tokens, and the head."""
        empty(self.model.get_input_embeddings())
        empty(self.model.get_output_embeddings())
        trim()

    @torch.no_grad()
    def finish(self, hidden_BLH: Tensor) -> Tensor:
        """`reach_head` of these hidden states, without gradients."""
        return reach_head(self, hidden_BLH)


def reach_head(streamed: StreamedModel, hidden_BLH: Tensor) -> Tensor:
    """What the output layer is given (B, L, H') when the last block puts out these hidden states; differentiable.

    Needs no embeddings: tokens are embedded as zeros, which the first block replaces."""
    model, seen = streamed.model, []
    embedding = model.get_input_embeddings()

    def zeros(input_ids, *args, **kwargs):
        return hidden_BLH.new_zeros(*input_ids.shape, embedding.weight.shape[1])

    def reached(module, args):
        seen.append(args[0])
        raise Reached

    input_ids_BL = torch.zeros(hidden_BLH.shape[:2], dtype=torch.long, device=streamed.device)
    handle = model.get_output_embeddings().register_forward_pre_hook(reached)
    try:
        with instead([embedding], zeros), instead(streamed.blocks, lambda *args, **kwargs: hidden_BLH):
            model(input_ids=input_ids_BL, use_cache=False)
    except Reached:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} ran without its output layer")
