"""How much a batch can hold."""

from dataclasses import dataclass

from coordinator.scheduler import Capacity

_WATERMARK_SHARE = 100  # one block in a hundred stays free on admission


@dataclass(frozen=True)
class BatchLimits:
    """Sizes that hold for an epoch; `num_blocks` counts the dummy."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    use_prefix_cache: bool = True

    def capacity(self, num_free_blocks: int, num_free_slots: int, num_steps: int) -> Capacity:
        """What a plan may give out, where so much is free and so many steps may be granted."""
        return Capacity(
            num_free_blocks=num_free_blocks,
            num_free_slots=num_free_slots,
            block_size=self.block_size,
            max_batch_tokens=self.max_batch_tokens,
            watermark_blocks=max(1, self.num_blocks // _WATERMARK_SHARE),
            num_steps=num_steps,
        )
