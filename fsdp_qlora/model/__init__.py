"""The sharded 4-bit model: pack, attach, shard, fill."""
